"""YAML text to plain data and back, by the rules of YAML 1.2, knowing on which line every value stands.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `010` is eight and `1:30` is ninety. Here a number
looks as it does in Python or JSON, and only true and false are booleans. ruamel.yaml knows YAML 1.2 but would spare
only the table of rules below: it makes dates of text and numbers of `1_000`, empties a value that contains itself, has
no places for merged keys, and names the first of several repeated keys.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lsr_scale.errors import UserError, shortened
from lsr_scale.paths import is_special_file

KeyPath = tuple[str | int, ...]
Places = dict[KeyPath, str]

_INT = re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")


# far above any run, far below what takes a second; aliases and merges can stand for more values than memory has bytes
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 2**20, 64, 20_000


class _Loader(yaml.SafeLoader):
    """Makes plain data only: text, numbers, true and false, null, lists and mappings."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - replaces PyYAML's own table of YAML 1.1 rules
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct as PyYAML does, but for what is no value of the tag that stands before it."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            words = f"expected a value of the kind {kind}, got {node.value!r}"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def _construct_int(loader: _Loader, node: yaml.Node) -> int:
    text = str(loader.construct_scalar(node))  # pyright: ignore[reportArgumentType] - it says what is no scalar
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Represent text; its line breaks other than a newline are escaped, which outside of double quotes are spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _ShortDumper(_Dumper):
    """Writes lists of plain values as [one, two]."""


def _represent_list(dumper: _Dumper, items: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


_ShortDumper.add_representer(list, _represent_list)
for _dumper in (_Dumper, _ShortDumper):
    _dumper.add_representer(str, _represent_text)
    _dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dotted(path: KeyPath) -> str:
    """Return a path as it is written on the command line: `data.train.0.limit`."""
    return ".".join(str(key) for key in path)


def place_of(path: KeyPath, places: Places, otherwise: str) -> str:
    """Return where a value stands, or what nearest contains it, or `otherwise`."""
    return next((places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in places), otherwise)


def dump(data: Any, short: bool = False) -> str:
    """Return YAML text that `parse` reads back as equal data.

    Args:
        data: Plain data.
        short: For a screen of 80 columns: a list of plain values stands on one line where it fits.
    """
    dumper, width = (_ShortDumper, 64) if short else (_Dumper, 120)
    return yaml.dump(data, Dumper=dumper, sort_keys=False, allow_unicode=True, width=width)


def parse(text: str, where: str) -> tuple[Any, Places]:
    """Return the data of one YAML document and, by path, where each value stands (`file:line`).

    Raises:
        UserError: for malformed YAML, a key that stands twice, a value that contains itself, or more values or levels
            than any run has.
    """
    try:
        _check_depth(text, where)
        loader = _Loader(text)
        node = loader.get_single_node()
        places: Places = {}
        duplicates: list[str] = []
        if node is not None:
            _walk(node, (), f"{where}:{node.start_mark.line + 1}", where, places, duplicates, ())
        if duplicates:
            raise UserError("\n".join(duplicates))
        return (None if node is None else loader.construct_document(node)), places
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_error(error, where)) from None
    except yaml.reader.ReaderError as error:
        # half of a surrogate pair is given as the text that it is
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise UserError(f"{where}: not text: character #x{code:04x} is not allowed in YAML") from None


def _check_depth(text: str, where: str) -> None:
    """Raise if values stand deeper in each other than any run's; a deeper one would overflow what composes it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{where}:{event.start_mark.line + 1}: more than {MAX_DEPTH} values stand in each other")


def read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: if it is missing, empty, no file, unreadable, too large, or no text.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file, got a folder")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if is_special_file(path):
        raise UserError(f"{path}: expected a file, got a pipe or a device; write the text to a file")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: expected a few lines of text, got more than a MiB; is it the right file?")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text, got other bytes at offset {error.start}; is it the right file?"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def override(data: dict[str, Any], places: Places, overrides: Iterable[str], shorthand: str) -> None:
    """Apply `a.b.0.c=value` assignments to parsed data, in order and in place; values are YAML.

    Args:
        data: What `parse` returned.
        places: Its places; those of what is assigned become the assignment itself.
        overrides: The assignments.
        shorthand: The key that a plain string in a list stands for where the path goes on below it.

    Raises:
        UserError: for an assignment without `=`, a malformed value, or a path through something that is no container.
    """
    for assignment in overrides:
        where = f"--set {assignment}"
        dotted_path, equals, text = assignment.partition("=")
        keys = keys_of(dotted_path.strip())
        if not equals or not all(keys) or len(keys) > MAX_DEPTH:
            raise UserError(f"{where}: expected section.name=value, such as training.learning_rate=1e-3")
        value, _ = parse(text, where)
        assign(data, places, keys, value, where, shorthand)


def keys_of(dotted_path: str) -> list[str]:
    """Return the keys of a path `a.b.c`; what a sweep's grid or an entry of its list changes is one key with dots."""
    keys = dotted_path.split(".")
    depth = {"sweep.grid": 2, "sweep.list": 3}.get(".".join(keys[:2]), len(keys))
    return [*keys[:depth], ".".join(keys[depth:])] if len(keys) > depth and all(keys) else keys


def assign(data: dict[str, Any], places: Places, keys: Sequence[str], value: Any, where: str, shorthand: str) -> None:
    """Set one value of parsed data, in place; see `override`.

    Args:
        data: What `parse` returned.
        places: Its places; that of the value becomes `where`.
        keys: The value's path.
        value: Plain data.
        where: What asks for it.
        shorthand: As in `override`.

    Raises:
        UserError: for a path through something that is no container.
    """
    path = _assign(data, keys, value, where, shorthand)
    for place in [place for place in places if place[: len(path)] == path]:
        del places[place]
    for end in range(1, len(path) + 1):
        places.setdefault(path[:end], where)


def _assign(data: dict[str, Any], keys: Sequence[str], value: Any, where: str, shorthand: str) -> KeyPath:
    container: Any = data
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(container, list):
            if not re.fullmatch(r"-?[0-9]{1,9}", key) or not -len(container) <= int(key) < len(container):
                valid = f"an index from 0 to {len(container) - 1}" if container else "a list as the value: it is empty"
                raise UserError(f"{where}: {dotted(path)} is a list; expected {valid}, got {key!r}")
            place = int(key) % len(container)
        elif not isinstance(container, dict):
            raise UserError(f"{where}: {dotted(path)} is {container!r}, which has nothing named {key!r} in it")
        path = (*path, place)
        if depth == len(keys) - 1:
            container[place] = value
        else:
            if isinstance(container, list) and isinstance(container[place], str):
                container[place] = {shorthand: container[place]}
            elif isinstance(container, dict) and container.get(place) is None:
                container[place] = {}
            container = container[place]
    return path


def _walk(
    node: yaml.Node,
    path: KeyPath,
    place: str,
    where: str,
    places: Places,
    duplicates: list[str],
    ancestors: tuple[yaml.Node, ...],
) -> None:
    """Record the place of `node` and all below it, and every key that stands twice in one mapping."""
    if node in ancestors:
        raise UserError(
            f"{place}: {dotted(path)} contains itself; an alias (*name) may not stand inside its own anchor"
        )
    places[path] = place
    if len(places) > MAX_VALUES:
        raise UserError(f"{place}: more than {MAX_VALUES:,} values, aliases (*name) and merges (<<) counted each time")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            line = f"{where}:{item.start_mark.line + 1}"
            _walk(item, (*path, index), line, where, places, duplicates, (*ancestors, node))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.start_mark)
            child = (*path, key)
            if key in lines and not key_node.tag.endswith(":merge"):
                duplicates.append(
                    f"{where}:{line}: {dotted(child)}: already set on line {lines[key]}; keep one of them"
                )
            lines[key] = line
            _walk(value_node, child, f"{where}:{line}", where, places, duplicates, (*ancestors, node))


def _syntax_error(error: yaml.MarkedYAMLError, where: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
    problem = f"{error.context}: {error.problem}" if error.context else str(error.problem)
    remedy = ""
    if "'\\t'" in problem:
        remedy = "; indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        remedy = "; check the indentation, and put a value that contains ': ' in quotes"
    elif "could not determine a constructor" in problem:
        remedy = "; tags (!name) have no meaning here, but for !!str, !!int, !!float and !!bool"
    elif "expected a single document" in problem:
        remedy = "; remove the line '---' between the documents"
    elif "alias" in problem or "cannot start any token" in problem or "anchor" in problem:
        remedy = "; put a value that begins with one of * & ! % @ ` in quotes"
    shown = mark.get_snippet(indent=2) if mark else None
    return f"{place}: not valid YAML: {shortened(problem, 300)}{remedy}" + (f"\n{shown}" if shown else "")
