"""Reading a saved adapter's three files, for every command and for `AdapterBank`: nothing in them is trusted.

Only JSON and safetensors are read, of regular files, and nothing in them is used as a path. A configuration is returned
as PEFT's class of its method, so that PEFT need not read the file again.
"""

import dataclasses
import functools
import json
import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pydantic
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lsr_scale.adapters import METHODS, PEFT_METHODS, AdapterConfig
from lsr_scale.adapters.packing import is_packed, unpack
from lsr_scale.errors import UserError, did_you_mean, quoted
from lsr_scale.files import read_json
from lsr_scale.model import builtin
from lsr_scale.option_checks import check_options

BASE_NAME = "base.json"  # the description of its base (`identity.py`)
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, BASE_NAME)
MAX_SHOWN_NAME = 300  # characters of a tensor's name in a message
_FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PACKED_DTYPES = (torch.float16, torch.uint8, torch.int8)
# they configure the initialization, and PEFT keeps changing their types
_IGNORED_FIELDS = {"auto_mapping", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# wider than PEFT's annotations: others write floats there, and PEFT a number of iterations
_WIDER_TYPES = {"lora_alpha": float, "alpha": float | None, "init_lora_weights": bool | str}


def read_config(folder: Path) -> Any:
    """Return an adapter's configuration, of PEFT's class of its method.

    Raises:
        UserError: if it is missing, unreadable, of an unknown method, or has values that the method cannot have.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{folder}: there is no adapter in this folder ({CONFIG_NAME} is missing)")
    content = _read_json(file, "adapter's configuration")
    peft_type = content.get("peft_type") if isinstance(content, dict) else None
    known = [name.upper() for name in (*METHODS, *PEFT_METHODS)]
    if peft_type not in known:
        hint = did_you_mean(peft_type, known) if isinstance(peft_type, str) else f"valid: {', '.join(known)}"
        raise UserError(f"{file}: peft_type {quoted(peft_type)} is no adapter method that is known here; {hint}")
    types = _field_types(peft_type)
    values = {name: value for name, value in content.items() if name in types}
    for name, value in values.items():
        try:
            types[name].validate_python(value)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{file}: {name}: {problem[:1].lower()}{problem[1:200]}, got {quoted(value)}") from None
    # of a trained adapter it is only a record, while PEFT would ask for packages and settings of some values
    init = values.pop("init_lora_weights", None)
    try:
        check_options(values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**values)
            scaling = scaling_of(config)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, re.error) as error:
        raise UserError(f"{file}: {str(error)[:300]}; restore the file, or save the adapter again") from error
    if not 0 < abs(scaling) < 1e30:
        raise UserError(f"{file}: rank and alpha give the scaling {scaling!r}; restore the file")
    if init is not None:
        config.init_lora_weights = init
    return config


def check_own_base(folder: Path, config: Any) -> None:
    """Raise for LoRA initialized from the base's weights, which PEFT then subtracts from the base as it loads.

    Its factors are an update of the residual weights, not of the base's own.

    Raises:
        UserError: naming the initialization, and how PEFT saves such an adapter for the base itself.
    """
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{folder}: init_lora_weights: {init} changes the base's weights, so that these factors are an update of "
            "other ones; save it again by PEFT as one of the base itself: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_ADAPTER_BEFORE_TRAINING)"
        )


def scaling_of(config: Any) -> float:
    """Return the factor on an update that a configuration gives where no pattern says otherwise."""
    if isinstance(config, AdapterConfig):
        return config.scaling
    # VeRA and TinyLoRA have no such factor
    alpha, rank = getattr(config, "lora_alpha", getattr(config, "alpha", config.r)), config.r
    return alpha / (rank**0.5 if getattr(config, "use_rslora", False) else rank)


@functools.cache
def _field_types(peft_type: str) -> dict[str, pydantic.TypeAdapter]:
    """Return what validates a value, by the name of each field that a saved configuration may set."""
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]  # pyright: ignore[reportArgumentType]
    hints: dict[str, Any] = typing.get_type_hints(config_class) | _WIDER_TYPES
    strict = pydantic.ConfigDict(strict=True)  # pydantic takes none for a dataclass
    return {
        field.name: pydantic.TypeAdapter(
            hints[field.name], config=None if dataclasses.is_dataclass(hints[field.name]) else strict
        )
        for field in dataclasses.fields(config_class)
        if field.init and field.name not in _IGNORED_FIELDS
    }


def portable_base(name: str | None, base: dict[str, Any] | None) -> str | None:
    """Return what `base_model_name_or_path` is to say: the hub's name of a built-in base, not its folder here.

    Args:
        name: What PEFT says.
        base: What `read_base` returns.
    """
    known = base["name"] if base is not None else builtin.name_of(name or "")
    return builtin.find(known).hub_name if known and known.startswith(builtin.PREFIX) else name


def read_weights(folder: Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Return an adapter's tensors, those packed into 8 or 4 bits unpacked: floating-point, finite, none empty.

    Args:
        folder: The adapter's.
        max_bytes: Refuse a larger file before anything of it is read into memory.

    Raises:
        UserError: if the file is missing, damaged, or holds other values.
    """
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; save the adapter again")
    if max_bytes is not None and file.stat().st_size > max_bytes:
        raise UserError(f"{file}: has {file.stat().st_size:,} bytes, too many for the adapter that is expected here")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file}: damaged or cut short ({str(error)[:200]}); restore it or train again") from error
    packed = is_packed(tensors)
    for name, value in tensors.items():
        where = f"{file}: {name[:MAX_SHOWN_NAME]}"
        if value.dtype not in (_PACKED_DTYPES if packed and name.startswith("packed.") else _FACTOR_DTYPES):
            raise UserError(f"{where}: an adapter has no values of {value.dtype}; save it again")
        if value.numel() == 0:
            raise UserError(f"{where}: is empty, {list(value.shape)}; save the adapter again")
        # in the dtype that it is computed in: a large float64 is infinite in float32
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise UserError(f"{where}: holds values that are not finite in float32; train or save it again")
    if packed:
        try:
            return unpack(tensors)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    return tensors


def read_base(folder: Path) -> dict[str, Any] | None:
    """Return the description of the base beside an adapter (`identity.base_description`), None if there is none.

    Raises:
        UserError: if it is no such description.
    """
    file = folder / BASE_NAME
    if not file.is_file():
        return None
    content = _read_json(file, "base model's description")
    content = content if isinstance(content, dict) else {}
    shapes = content.get("linear_shapes")
    fields = ("name", "architecture", "quantization", "config_sha256")
    missing = [field for field in fields if not isinstance(content.get(field), str)]
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
        for shape in shapes.values()
    ):
        missing.append("linear_shapes")
    if missing:
        raise UserError(f"{file}: not a description of a base model (no {', '.join(missing)}); restore or remove it")
    return content | {"name": builtin.name_of(content["name"]) or content["name"]}  # earlier releases wrote its folder


def _read_json(file: Path, what: str) -> Any:
    content = read_json(file, what)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError(f"{file}: has half of a surrogate pair, or is nested too deeply; restore it") from error
    return content
