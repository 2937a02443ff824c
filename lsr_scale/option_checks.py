"""Validates the options of a method, ours or PEFT's, alike in a run's YAML and in a saved adapter's configuration:
what trains can be loaded, exported and inspected.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lsr_scale.errors import UserError, quoted
from lsr_scale.safe_regex import check_regex

MAX_RANK = 65536  # no linear layer is as wide
_RANKS = ("rank", "r", "separation_rank", "u")
_ALPHAS = ("alpha", "lora_alpha")
_SEEDS = ("projection_prng_key", "projection_seed")
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
LAYERS_BESIDE_EXPRESSION = (
    "has no effect where target_modules is an expression; put the layers there, such as "
    r".*\.[01]\..*q_proj, or name the modules in a list"
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse ranks and alphas that give no finite scaling, other numbers that are not finite, seeds that torch does not
    take, names that are no strings, and catastrophic regexes.

    Args:
        options: Values by the option's name; other options than those checked here are ignored.

    Raises:
        UserError: beginning with the name of the option.
    """
    for name, value in options.items():
        pattern = name.removesuffix("_pattern") if name not in _NAMES else name
        if pattern != name:
            if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
                raise UserError(f"{name}: expected a value by module, such as {{q_proj: 4}}, got {quoted(value)}")
            for key, number in (value or {}).items():
                check_regex(key, name)
                _check_number(pattern, number, f"{name}[{quoted(key)}]")
        elif name in _NAMES:
            for text in _texts(name, value):
                # a name in a list is compared as it is, but for those that PEFT builds a regular expression from
                if isinstance(value, str) or name in ("modules_to_save", "layers_pattern"):
                    check_regex(text, name)
        else:
            _check_number(name, value, name)


def check_types(options: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a value that is not of its option's type, without any conversion.

    Args:
        options: Type and value by the option's name; what `check_options` looks at is left to it.

    Raises:
        UserError: beginning with the name of the option.
    """
    for name, (annotation, value) in options.items():
        if name == "modules_to_save" and isinstance(value, str):
            raise UserError(f"{name}: expected a list of names, got {quoted(value)}; write [{quoted(value)}]")
        if isinstance(value, tuple | range | set):
            value = list(value)
        if name in _NAMES or name in _RANKS or name in _ALPHAS or name.endswith("_pattern"):
            continue
        try:
            _type_adapter(annotation).validate_python(value)
        except ValidationError:
            words = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
            raise UserError(f"{name}: expected {words}, got {quoted(value)}") from None


def check_start(init: Any, known: tuple[str, ...], rows: Any) -> None:
    """Refuse a start that a method does not have, and a number of rows for one of a gradient that is none.

    Raises:
        UserError: beginning with the name of the option.
    """
    if init not in known:
        names = [repr(name) for name in known]
        raise UserError(f"init: expected {', '.join(names[:-1])} or {names[-1]}, got {init!r:.60}")
    if type(rows) is not int or not 1 <= rows <= 10**9:
        raise UserError(f"init_rows: expected a number of training rows, an integer >= 1, got {quoted(rows)}")


@functools.cache
def _type_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def _texts(name: str, value: Any) -> Iterator[str]:
    if value is None:
        return
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple | set) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: expected names, got {quoted(value)}")
    yield from texts


def _check_number(option: str, value: Any, where: str) -> None:
    if option in _RANKS and (type(value) is not int or value < 1):
        raise UserError(f"{where}: expected an integer >= 1, got {quoted(value)}")
    if option in _RANKS and value > MAX_RANK:
        raise UserError(f"{where}: expected at most {MAX_RANK}, got {quoted(value)}")
    if option in _ALPHAS and not (value is None and where == option) and not _is_scale(value):
        raise UserError(f"{where}: expected a finite number other than 0, below 1e30, got {quoted(value)}")
    if option in _SEEDS and not (type(value) is int and 0 <= value < 2**63):
        raise UserError(f"{where}: expected an integer from 0 to 2^63 - 1, got {quoted(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {quoted(value)}")


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < abs(value) < 1e30
