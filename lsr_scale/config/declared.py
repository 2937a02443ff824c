"""Dataclasses as installed files declare them, read off the source: importing those files takes seconds.

What a run's file may say follows from `trl.SFTConfig`, `transformers.TrainingArguments` and the adapter methods' option
classes. Their modules import torch, transformers and peft, which no question about a file needs. So only the statements
that declare such a class are executed here: fields, and of this package's own files what checks them. The classes are
equal to the imported ones (tests/config/test_declared.py compares them, for every version that is supported). Where a
file is written in another way than is understood here, `UnreadableError` says so, and the caller imports it.
"""

import ast
import builtins
import dataclasses
import enum
import functools
import importlib.util
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = "lsr_scale"
# of this package: modules that import nothing heavy themselves, and so may be imported by what is executed here
_LIGHT = tuple(f"{PACKAGE}.{name}" for name in ("errors", "option_checks", "option_names", "paths", "safe_regex"))
# without a prefix of their own: what declarations of fields are written with
_TYPING: dict[str, Any] = {
    **{name: getattr(typing, name) for name in ("Any", "ClassVar", "Literal", "Optional", "Union")},
    **{"dataclass": dataclasses.dataclass, "field": dataclasses.field},
}


class UnreadableError(Exception):
    """A file declares its classes in a way that only importing it can tell."""


class _PlainEnum(enum.StrEnum):
    """In place of transformers' ExplicitEnum."""


@dataclasses.dataclass
class _PlainConfig:
    """In place of `peft.PeftConfig`: none of its fields is an option."""

    def __post_init__(self) -> None:
        pass


def already_imported() -> bool:
    """Tell whether this process has imported peft and the methods, and so need not read their source."""
    return f"{PACKAGE}.adapters" in sys.modules


@functools.cache
def training_class(name: str | None) -> type:
    """Return a class of training arguments, fields only, a field's type where none of it can be told Any.

    Args:
        name: One of TRL's by its name below `trl`, such as trainer.sft_config.SFTConfig; None: `TrainingArguments`.

    Raises:
        UnreadableError: if the installed version declares it in another way.
    """
    arguments = _fields_of("transformers", "training_args.py", "TrainingArguments", object)
    if name is None:
        return arguments
    base = _fields_of("trl", "trainer/base_config.py", "_BaseConfig", arguments)
    module, _, class_name = name.rpartition(".")
    return _fields_of("trl", module.replace(".", "/") + ".py", class_name, base)


@functools.cache
def method_options() -> dict[str, type]:
    """Return the option class of every file in `adapters/methods/`, by the method's name.

    They take options as keywords and check them; PEFT's own methods have `to_peft`, which gives PEFT's names.

    Raises:
        UnreadableError: if a file declares them in another way.
    """
    folder = Path(__file__).parent.parent / "adapters"
    shared = _execute(folder / "peft" / "config.py", {"PeftConfig": _PlainConfig, "PeftType": str})
    given = {name: shared[name] for name in ("AdapterConfig", "BaseWeightConfig", "option")}
    given |= {name: types.SimpleNamespace for name in ("LoraConfig", "LoKrConfig", "VeraConfig", "TinyLoraConfig")}
    found: dict[str, type] = {}
    of_peft: dict[str, type] = {}
    for path in sorted((folder / "methods").glob("*.py")):
        namespace = _execute(path, given)
        for node in _parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name in namespace:
                if "to_peft" in vars(namespace[node.name]):
                    of_peft[path.stem] = namespace[node.name]
            elif isinstance(node, ast.ClassDef) and _decorated(node, "register"):
                named = _assigned(node)
                method, config = named.get("name"), named.get("config_class")
                if not isinstance(method, ast.Constant) or not isinstance(config, ast.Name):
                    raise UnreadableError(f"{path}: {node.name} names no config_class")
                options = namespace[config.id]
                options.method = types.SimpleNamespace(name=method.value)
                found[str(method.value)] = options
    return found | {name: of_peft[name] for name in ("lora", "lokr", "vera", "tinylora")}


def is_low_rank(method: str) -> bool:
    """Tell whether a method's update is an exact pair, which LoRA can hold: whether its class has a `materialize`."""
    if already_imported():
        from lsr_scale.adapters import SAVED_METHODS

        return method not in SAVED_METHODS or SAVED_METHODS[method].is_low_rank()
    for path in (Path(__file__).parent.parent / "adapters" / "methods").glob("*.py"):
        for node in _parse(path).body:
            name = _assigned(node).get("name") if isinstance(node, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef) and isinstance(name, ast.Constant) and name.value == method:
                return any(isinstance(item, ast.FunctionDef) and item.name == "materialize" for item in node.body)
    return True  # PEFT's own: LoRA itself, VeRA, TinyLoRA


def _fields_of(package: str, file: str, name: str, base: type) -> type:
    """Return a dataclass with the fields that a class declares, on the given base."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnreadableError(f"{package} is not installed as a folder")
    path = Path(spec.submodule_search_locations[0]) / file
    tree = _parse(path)
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if node is None:
        raise UnreadableError(f"{path}: there is no class {name}")
    body: list[ast.stmt] = [item for item in node.body if isinstance(item, ast.AnnAssign) or _is_constant(item)]
    known = {**_TYPING, **{n: v for n, v in vars(builtins).items() if not n.startswith("_")}}
    unknown = {used for item in body for used in _names(item)} - set(known)
    unknown -= {n for item in body if isinstance(item, ast.Assign) for n in _targets(item)}
    unknown -= {
        item.target.id for item in body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    enums = _enums(tree, path, unknown)
    known |= enums
    if "trainer_log_levels" in unknown:
        known["trainer_log_levels"] = dict.fromkeys([*_log_levels(path.parent / "utils" / "logging.py"), "passive"])
    for item in body:
        if isinstance(item, ast.AnnAssign) and set(_names(item.annotation)) & (unknown - set(enums)):
            item.annotation = ast.Name("Any", ast.Load())
    made = ast.ClassDef(
        name=name,
        bases=[ast.Name("_base", ast.Load())],
        keywords=[],
        body=body or [ast.Pass()],
        decorator_list=[ast.Name("dataclass", ast.Load())],
        **({"type_params": []} if sys.version_info >= (3, 12) else {}),
    )
    return _run([made], path, {**known, "_base": base})[name]


def _enums(tree: ast.Module, path: Path, names: Iterable[str]) -> dict[str, type]:
    """Return those names that are enumerations of text, declared in this file or in one beside it that it imports."""
    found: dict[str, type] = {}
    files = {path: set(names)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            beside = path.parent / (node.module.replace(".", "/") + ".py")
            if wanted := {alias.name for alias in node.names} & set(names):
                files[beside] = wanted
    for file, wanted in files.items():
        if not file.is_file():
            continue
        for node in (tree if file == path else _parse(file)).body:
            is_enum = isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]
            if isinstance(node, ast.ClassDef) and is_enum and node.name in wanted:
                node.body = [item for item in node.body if _is_constant(item)] or [ast.Pass()]
                found |= {node.name: _run([node], file, {"ExplicitEnum": _PlainEnum})[node.name]}
    return found


def _log_levels(path: Path) -> list[str]:
    """Return the names of transformers' log levels, the choices of two fields."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and _targets(node) == ["log_levels"] and isinstance(node.value, ast.Dict):
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise UnreadableError(f"{path}: there is no table log_levels")


def _execute(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of this package defines but for other classes than dataclasses, without its heavy imports.

    Args:
        path: The file.
        given: In place of what it imports from heavy modules.
    """
    body: list[ast.stmt] = []
    for node in _parse(path).body:
        if isinstance(node, ast.Import):
            node.names = [alias for alias in node.names if alias.name.partition(".")[0] in sys.stdlib_module_names]
            if node.names:
                body.append(node)
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").partition(".")[0]
            if top in sys.stdlib_module_names or node.module in _LIGHT:
                body.append(node)
        elif isinstance(node, ast.FunctionDef | ast.Assign | ast.AnnAssign) or _is_dataclass(node):
            body.append(node)
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.FunctionDef):  # annotations may name what is not imported; the fields' stay
            node.returns = None
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
    return _run(body, path, dict(given))


def _run(body: list[ast.stmt], path: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    # dataclasses look up their module; registered for as long as the classes are made
    module = types.ModuleType(f"{__name__}.{path.stem}")
    vars(module).update(namespace)
    sys.modules[module.__name__] = module
    try:
        tree = ast.fix_missing_locations(ast.Module(body, []))
        exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    except Exception as error:
        raise UnreadableError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module.__name__]
    return vars(module)


@functools.cache
def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UnreadableError(str(error)) from error


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(_source(path))
    except SyntaxError as error:
        raise UnreadableError(f"{path}: {error}") from error


def _names(node: ast.AST) -> list[str]:
    return [item.id for item in ast.walk(node) if isinstance(item, ast.Name)]


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _assigned(node: ast.ClassDef) -> dict[str, ast.expr]:
    return {name: item.value for item in node.body if isinstance(item, ast.Assign) for name in _targets(item)}


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)


def _is_dataclass(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and _decorated(node, "dataclass")


def _decorated(node: ast.ClassDef, name: str) -> bool:
    return any(ast.unparse(item).partition("(")[0].rpartition(".")[2] == name for item in node.decorator_list)
