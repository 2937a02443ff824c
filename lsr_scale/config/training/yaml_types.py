"""How a dataclass's field is written in YAML: its type, and a value as it was written."""

import enum
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter


def _flag(value: Any) -> Any:
    """Take YAML 1.1's words for a boolean where, and only where, a boolean is expected."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool)]


def yaml_type(annotation: Any, choices: Any = None) -> Any:
    """Return the type that a dataclass field has in YAML: enumerations as their values, sets and tuples as lists.

    Args:
        annotation: The field's type.
        choices: The only values it takes, if the dataclass says so beside the type.
    """
    members = members_of(annotation)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    values = [*(choices or ()), *(item.value for member in enums for item in member)]
    if values:
        rest = [yaml_type(member) for member in members if member is types.NoneType or get_origin(member) is list]
        return Union[(Literal[tuple(values)], *rest)]
    if len(members) > 1:
        # Beside str, "no" is text; a boolean there has to be written true or false.
        kinds = [member if member is bool and str in members else yaml_type(member) for member in members]
        return Union[tuple(kinds)]  # noqa: UP007
    if annotation is bool:
        return Flag
    if get_origin(annotation) in (list, set, frozenset, tuple):
        return list[yaml_type(get_args(annotation)[0])]
    return annotation


def buildable(annotation: Any) -> Any:
    """Return `annotation` if pydantic can check it, else Any: a release may declare what no file can hold."""
    try:
        TypeAdapter(annotation).json_schema()
    except Exception:
        return Any
    return annotation


def narrowed(kind: Any, choices: tuple[str, ...] | None, filled: bool) -> Any:
    """Return the type of a field with the values alone that a method's trainer can do something with.

    Args:
        kind: The field's, as `yaml_type` says it.
        choices: Its only values, or those of its list, which then has one at least; None where it may be any.
        filled: Null is no value of it.
    """
    if filled:
        kind = Union[tuple(member for member in members_of(kind) if member is not types.NoneType)]  # noqa: UP007
    if choices is None:
        return kind
    if get_origin(kind) is list:
        return Annotated[list[Literal[choices]], Field(min_length=1)]  # pyright: ignore
    return Literal[choices]


def as_written(raw: Any, checked: Any) -> Any:
    """Keep `10` an integer where the field is a float, so that a resolved run reads as it was written."""
    if isinstance(checked, BaseModel):
        return {name: as_written(raw.get(name), value) for name, value in checked}
    if isinstance(checked, list) and checked and isinstance(checked[0], BaseModel):
        return [one.model_dump(exclude_none=True) for one in checked]
    return raw if isinstance(raw, int) and isinstance(checked, float) else checked


def members_of(annotation: Any) -> list[Any]:
    """Return the types of which a union is made; a type that is none, alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
