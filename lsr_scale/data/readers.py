"""Files of rows: JSON lines, JSON, CSV, TSV, parquet, Arrow -> (number, row), every text as it stands in the file.

Nothing is guessed and nothing is dropped: a line that does not fit is refused by its number.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lsr_scale.errors import UserError, first_line
from lsr_scale.paths import is_special_file

SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"),
    *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow"),
)
_JSON_SPACE = " \t\r\n"  # str.strip takes more off, such as separators
# csv's own limit of 131,072 characters a field is a book's chapter
_LONGEST_FIELD = min(sys.maxsize, 2**31 - 1)

# columns whose values are lists of objects in one row
_CONVERSATIONS = {"messages", "conversations", "prompt", "completion", "tools"}

NumberedRows = Iterator[tuple[int, dict[str, Any]]]


def suffix(path: Path) -> str | None:
    """Return the ending by which a file's format is known, in lower case, or None."""
    name = path.name.lower()
    return next((ending for ending in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(ending)), None)


def has_lines(path: Path) -> bool:
    """Tell whether the numbers of a file's rows are those of its lines, rather than of its rows."""
    ending = suffix(path) or ""
    return ending.startswith((".jsonl", ".csv", ".tsv"))


def check_regular(path: Path) -> None:
    """Raise a UserError for what exists and is no file that can be read twice: a pipe, a device, a socket."""
    if is_special_file(path):
        raise UserError(f"{path}: a pipe, device or socket, not a file; save what it gives to a file, and name that")


def read_file(path: Path, split: str | None = None) -> NumberedRows:
    """Yield (number from 1, row); the number is that of the row's first line where `has_lines`.

    Args:
        path: The file; its ending says what is in it.
        split: The key under which the rows stand in a JSON object of lists, besides "data".

    Raises:
        UserError: The file cannot be read, or a line or row is malformed; both are named.
    """
    check_regular(path)
    ending = suffix(path)
    if ending is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}; rename or convert it")
    try:
        if ending == ".parquet":
            yield from _parquet(path)
        elif ending == ".arrow":
            yield from _arrow(path)
        else:
            with gzip.open(path, "rb") if ending.endswith(".gz") else path.open("rb") as stream:
                if ending.startswith(".jsonl"):
                    yield from _json_lines(path, _lines(path, stream))
                elif ending.startswith(".json"):
                    yield from _json(path, stream, split)
                else:
                    yield from _separated(path, _lines(path, stream), ending.startswith(".tsv"))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); check that the file is whole") from error


def _lines(path: Path, stream: IO[bytes] | gzip.GzipFile) -> Iterator[tuple[int, str]]:
    """Yield (number, line with its end). Only CR, LF and CRLF end a line: U+2028 and the like are text."""
    number = 0
    for chunk in stream:
        for part in chunk.splitlines(keepends=True):
            number += 1
            yield number, _decode(path, part, number)


def _decode(path: Path, part: bytes, number: int | None) -> str:
    """Return the text of a line, or with None for its number of a whole file, in which the line at fault is counted."""

    def line_of(at: int) -> tuple[str, int]:
        lines = part[: at + 1].splitlines()
        return f"{path}, line {number or len(lines)}", len(lines[-1]) - 1

    if number in (None, 1):
        if part.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}: is UTF-16; save it as UTF-8")
        if part.startswith(b"\x1f\x8b"):
            raise UserError(f"{path}: is compressed by gzip; add .gz to its name")
        part = part.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put in front
    if b"\0" in part:
        where, _ = line_of(part.index(b"\0"))
        raise UserError(f"{where}: holds NUL bytes, so it is no text; save the file as UTF-8 text")
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        where, column = line_of(error.start)
        byte = part[error.start]
        raise UserError(f"{where}: not UTF-8 (the byte 0x{byte:02x} at {column}); save the file as UTF-8") from None


def check_characters(text: str, where: str) -> None:
    """Raise a UserError, which begins with `where`, for half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where}: {half} is half of a character (a lone surrogate), which no tokenizer takes; write the whole "
            "character, or remove it"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text in which nothing is lost: no key twice, no half of a character.

    Raises:
        json.JSONDecodeError: It is not JSON.
        UserError: It is, and cannot be taken.
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, where))
        if "\\u" in text:  # only an escape can write one
            check_characters(json.dumps(value, ensure_ascii=False), where)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise UserError(f"{where}: nested too deeply for a row; flatten it") from None
    except UserError:
        raise
    except ValueError:  # Python converts no integer of more than 4,300 digits
        raise UserError(f"{where}: holds a number of thousands of digits; write it as a text, in quotes") from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{where}: the key {twice[:60]!r} is there twice; keep one")
    return row


def _object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object {{...}}, got {type(row).__name__}")
    return row


def _json_lines(path: Path, lines: Iterable[tuple[int, str]]) -> NumberedRows:
    for number, line in lines:
        if not line.strip(_JSON_SPACE):
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(
                line.rstrip(_JSON_SPACE), where
            )  # with its end, a cut line's mistake would be in the next one
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
            ) from None
        if isinstance(row, list) and number == 1:
            raise UserError(
                f"{where}: expected an object {{...}}, got list; a file that is one list of rows ends in .json: "
                "rename it"
            )
        yield number, _object(row, where)


def _json(path: Path, stream: IO[bytes] | gzip.GzipFile, split: str | None) -> NumberedRows:
    """Read a list of objects, an object that holds the list, or JSON lines, one or many, under this ending."""
    content = stream.read()
    text = _decode(path, content, None)
    if not text.strip(_JSON_SPACE):
        return
    try:
        value = parse_json(text.rstrip(_JSON_SPACE), str(path))
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            numbered = enumerate((part.decode() for part in text.encode().splitlines()), 1)
            yield from _json_lines(path, numbered)
            return
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct the line") from None
    if isinstance(value, dict):
        value = _rows_of(value, path, split)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, got {type(value).__name__}; or write one object a line")
    for number, row in enumerate(value, 1):
        yield number, _object(row, f"{path}, row {number}")


def _rows_of(value: dict[str, Any], path: Path, split: str | None) -> list[Any]:
    """Return the rows of a JSON object: a list in it, or the object itself, which then is the only row."""
    for key in (split, "data"):
        if isinstance(value.get(key or ""), list):
            return value[key or ""]
    tables = [isinstance(item, list) and all(isinstance(row, dict) for row in item) for item in value.values()]
    if split is None and (not all(tables) or value.keys() & _CONVERSATIONS):
        return [value]
    raise UserError(f"{path}: expected rows under {split or 'data'!r}; set split to one of: {', '.join(value)[:200]}")


def _separated(path: Path, lines: Iterable[tuple[int, str]], tabs: bool) -> NumberedRows:
    """Read a table with a header line. Every field stays the text that it is: 00712 is no number."""
    iterator = iter(lines)
    first = next(((number, line) for number, line in iterator if line.strip()), None)
    if first is None:
        return
    number, header_line = first
    separator = "\t" if tabs else next((mark for mark in ",\t;" if mark in header_line), ",")
    last = number

    def texts() -> Iterator[str]:
        nonlocal last
        yield header_line
        for last, line in iterator:  # noqa: B007
            yield line

    limit = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(texts(), delimiter=separator, strict=True)
    header: list[str] | None = None
    begins = number
    try:
        for fields in reader:
            where = f"{path}, line {begins}"
            if header is None:
                header = _header(fields, where)
            elif fields and (len(fields) == len(header) or any(field.strip() for field in fields)):
                if len(fields) != len(header):
                    raise UserError(
                        f"{where}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)[:200]}); "
                        'put a field that holds the separator in quotes: "..."'
                    )
                yield begins, dict(zip(header, fields, strict=True))
            begins = last + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {begins}: not a row of a {'TSV' if separator == chr(9) else 'CSV'} file ({error}); a field "
            'with quotes in it is written "..." and each quote in it twice'
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(fields: list[str], where: str) -> list[str]:
    names = [field.strip() for field in fields]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{where}: the column {name[:60]!r} is there twice; rename one")
    # pandas writes its index as a first column without a name
    return [name or f"column {index}" for index, name in enumerate(names, 1)]


def label_names(path: Path) -> tuple[str, ...] | None:
    """Return the names of a file's ClassLabel feature named label, which `datasets` writes into parquet and Arrow."""
    if suffix(path) not in (".parquet", ".arrow"):
        return None
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        schema = pq.read_schema(path) if suffix(path) == ".parquet" else _arrow_table(path).schema
        return names_of_feature(Features.from_arrow_schema(schema))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):  # metadata of something else
        return None


def names_of_feature(features: Any) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel feature named label among a dataset's features."""
    names = getattr((features or {}).get("label"), "names", None)
    return tuple(names) if names else None


def _parquet(path: Path) -> NumberedRows:
    import pyarrow.parquet as pq

    yield from _table(path, "parquet", lambda: pq.ParquetFile(path).read())


def _arrow(path: Path) -> NumberedRows:
    yield from _table(path, "Arrow", lambda: _arrow_table(path))


def _arrow_table(path: Path) -> Any:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        with pa.OSFile(str(path)) as source:
            return pa.ipc.open_file(source).read_all()


def _table(path: Path, kind: str, read: Callable[[], Any]) -> NumberedRows:
    import pyarrow as pa

    try:
        table = read()
        names = table.column_names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the column {twice[:60]!r} is there twice; rename one")
        table.validate(full=True)  # what is damaged inside would end the process
        rows = table.to_pylist()
    except pa.ArrowException as error:
        words = first_line(error)[:200]
        raise UserError(f"{path}: cannot be read as {kind} ({words}); check that the file is whole") from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{path}: a value cannot be read ({str(error)[:200]}); write the file again") from error
    yield from enumerate(rows, 1)
