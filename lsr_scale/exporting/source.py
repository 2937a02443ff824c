"""A saved adapter without its base model: factors by module; sizes are computed on shapes before any tensor is made."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from lsr_scale.adapters import SAVED_METHODS, AdapterConfig
from lsr_scale.adapters.peft import Params
from lsr_scale.adapters.read import (
    CONFIG_NAME,
    MAX_SHOWN_NAME,
    WEIGHTS_NAME,
    portable_base,
    read_base,
    read_config,
    read_weights,
    scaling_of,
)
from lsr_scale.config import RunConfig, load_run
from lsr_scale.errors import UserError
from lsr_scale.files import read_json
from lsr_scale.model.tokenizer import has_tokenizer
from lsr_scale.paths import user_path
from lsr_scale.run.find import find_adapter, find_trained, is_checkpoint
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.load import trained_on_chat

WRAPPER = "base_model.model."
_MAX_PAIR_ELEMENTS = 2**28
_LORA_NAMES = {"lora_A.weight": "down", "lora_B.weight": "up"}
_LORA_VARIANTS = ("use_dora", "lora_bias", "megatron_config", "layer_replication", "alora_invocation_tokens")


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """A saved adapter: configuration, factors by module, and what is known of its base."""

    folder: Path
    config: Any
    modules: dict[str, Params]
    extra: dict[str, Tensor]  # fully trained modules, under their names in the file
    base: dict[str, Any] | None
    run: RunConfig | None = None
    results: dict[str, Any] | None = None
    tokenizer: Path | None = None  # where the run's lies
    chat: bool = False  # trained on conversations
    # factors that are made of the base's weights and not saved, by module, once `with_base_factors` has made them
    frozen: dict[str, Params] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method's name, as `adapter.method` takes it."""
        return str(self.config.peft_type.value).lower()

    @property
    def prefix(self) -> str:
        """What the names of the factors begin with, in the file."""
        return "" if self.method == "lora" else SAVED_METHODS[self.method].prefix

    def scaling(self, module: str) -> float:
        """Return the factor on a module's update."""
        return scaling_of(self.config_of(module))

    def config_of(self, module: str) -> Any:
        """Return the configuration with every `*_pattern` applied to a module."""
        if isinstance(self.config, AdapterConfig):
            return self.config.for_module(module)
        config = copy.copy(self.config)
        for pattern, name in (
            ("rank_pattern", "r"),
            ("alpha_pattern", "lora_alpha" if self.method == "lora" else "alpha"),
        ):
            values = getattr(config, pattern) or {}
            setattr(config, name, values.get(get_pattern_key(list(values), module), getattr(config, name)))
        return config

    @property
    def is_low_rank(self) -> bool:
        """Whether the updates are exact pairs; where not, they exist as dense matrices only."""
        return SAVED_METHODS[self.method].is_low_rank()

    @property
    def needs_base(self) -> bool:
        """Whether factors of it are made of the base's weights, which the file does not have."""
        return bool(SAVED_METHODS[self.method].frozen_shapes(1, 1, self.config))

    def factors(self, module: str) -> Params:
        """Return a module's factors, float32: those of the file, and those that are made of the base's weights."""
        if self.needs_base and module not in self.frozen:
            raise RuntimeError(f"{self.folder}: {module}: with_base_factors was not called")
        return {name: value.float() for name, value in (self.modules[module] | self.frozen.get(module, {})).items()}

    def delta(self, module: str) -> Tensor:
        """Return the dense update `[out, in]` of a module whose method has no pair, float32, scaled."""
        params = self.factors(module)
        return self._finite(module, SAVED_METHODS[self.method].delta_weight(params) * self.scaling(module))[0]

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Return the exact `(down [R, in], up [out, R])` of a module, float32, its scaling in `up`.

        Raises:
            UserError: if the method's updates are of full rank, or one is not finite.
        """
        if not self.is_low_rank:
            raise UserError(
                f"{self.folder}: {self.method}'s updates are of full rank, so no LoRA holds them; --to adapter keeps "
                "the factors, --to merged the whole model"
            )
        params = self.factors(module)
        down, up = SAVED_METHODS[self.method].materialize(params)
        down, up = self._finite(module, down, up * self.scaling(module))
        return down, up

    def _finite(self, module: str, *values: Tensor) -> tuple[Tensor, ...]:
        if not all(torch.isfinite(value).all() for value in values):
            raise UserError(f"{self.folder}: {module}: its update is beyond float32; the training diverged")
        return values

    def num_parameters(self) -> int:
        """Return the number of the factors' elements."""
        return sum(value.numel() for params in self.modules.values() for value in params.values())


def open_adapter(path: str | Path) -> AdapterSource:
    """Return the adapter of a run folder, of a checkpoint in it, or of an adapter folder.

    Raises:
        UserError: if there is none, or its files are damaged, inconsistent, of an unknown method, or hold values that
            are not finite.
    """
    folder, run_folder, run, results, chat = find_adapter(path), None, None, None, False
    if folder != user_path(path):
        run_folder = RunFolder(user_path(path))
        if run_folder.results.is_file():
            results = _read_results(run_folder.results)
    elif is_checkpoint(path):
        run_folder = RunFolder(*find_trained(path))
    if run_folder is not None:
        run = load_run(run_folder.config)
        chat = bool(trained_on_chat(run_folder, run))
    config, base = read_config(folder), read_base(folder)
    config.base_model_name_or_path = portable_base(config.base_model_name_or_path, base)
    _check_exportable(folder, config)
    modules, extra = _sort(folder, config, read_weights(folder))
    places = (run_folder.tokenizer, folder) if run_folder else (folder,)
    tokenizer = next((place for place in places if has_tokenizer(place)), None)
    source = AdapterSource(folder, config, modules, extra, base, run, results, tokenizer, chat)
    for module in modules:
        _check_module(source, module)
    return source


def _read_results(file: Path) -> dict[str, Any]:
    content = read_json(file, "run's results")
    try:
        tasks = list((content.get("accuracy") or {}).values())
        scores = [moments[when]["accuracy"] for moments in tasks for when in ("before", "after") if when in moments]
        good = all(isinstance(score, int | float) for score in scores)
        good = good and all(isinstance(values, dict) for moments in tasks for values in moments.values())
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"{file}: not the results of a run; restore or remove it")
    return content


def _check_exportable(folder: Path, config: Any) -> None:
    kind = str(config.peft_type.value)
    known = [name.upper() for name in SAVED_METHODS]
    if kind not in known:
        raise UserError(
            f"{folder / CONFIG_NAME}: peft_type {kind!r} cannot be exported; valid: {', '.join(known)}"
            " (of others PEFT's merge_and_unload makes a whole model)"
        )
    variants = [name for name in _LORA_VARIANTS if getattr(config, name, None)]
    if isinstance(config, LoraConfig) and (variants or config.bias != "none"):
        raise UserError(
            f"{folder / CONFIG_NAME}: LoRA with {', '.join(variants) or 'bias'} is not a plain pair; it cannot be "
            "exported"
        )


def _sort(folder: Path, config: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Params], dict[str, Tensor]]:
    """Return factors by module, and the tensors of fully trained modules."""
    method = str(config.peft_type.value).lower()
    saved = tuple(config.modules_to_save or ())
    modules: dict[str, Params] = {}
    extra: dict[str, Tensor] = {}
    for name in sorted(tensors):
        where = f"{folder / WEIGHTS_NAME}: {name[:MAX_SHOWN_NAME]!r}"
        if len(name) > MAX_SHOWN_NAME or not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
            raise UserError(f"{where}: not a name of an adapter's tensor; save the adapter again")
        inner = name.removeprefix(WRAPPER)
        module, factor = _split(method, inner)
        if factor is not None and name.startswith(WRAPPER):
            modules.setdefault(module, {})[factor] = tensors[name]
        elif any(f".{part}." in f".{inner}" for part in saved):
            extra[name] = tensors[name]
        else:
            raise UserError(f"{where}: belongs to no factor of {method}; the file is not that of its configuration")
    if not modules:
        raise UserError(f"{folder / WEIGHTS_NAME}: there are no factors of {method} in this file")
    return modules, extra


def _split(method: str, name: str) -> tuple[str, str | None]:
    """Return the module and the method's name of a factor, None where it is not one."""
    if method == "lora":
        head, last = ".".join(name.split(".")[:-2]), ".".join(name.split(".")[-2:])
        return head, _LORA_NAMES.get(last) if head else None
    head, _, last = name.rpartition(".")
    saved = SAVED_METHODS[method]
    factor = last.removeprefix(saved.prefix)
    known = last.startswith(saved.prefix) and factor in saved.parameter_names
    return head, factor if known and head else None


def _check_module(source: AdapterSource, module: str) -> None:
    """Raise unless a module's factors make a pair of a sane size, of the shapes that configuration and base give."""
    params, saved = source.modules[module], SAVED_METHODS[source.method]
    where = f"{source.folder}: {module}"
    shapes = {name: list(value.shape) for name, value in params.items()}
    try:
        on_meta = {name: value.float().to("meta") for name, value in params.items()}
        on_meta |= _frozen_on_meta(source, module)
        if source.is_low_rank:
            down, up = saved.materialize(on_meta)
            (rank, in_features), (out_features, up_rank) = down.shape, up.shape
            if rank != up_rank:
                raise ValueError(f"the pair is {list(down.shape)} and {list(up.shape)}")
        else:
            (out_features, in_features), rank = saved.delta_weight(on_meta).shape, 1
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise UserError(
            f"{where}: its factors {shapes} make no update ({str(error)[:150]}); restore the file"
        ) from error
    if rank * (in_features + out_features) > _MAX_PAIR_ELEMENTS or max(in_features, out_features) > 2**22:
        raise UserError(f"{where}: its factors {shapes} would make a pair of {rank} x {in_features}, {out_features}")
    try:
        config = source.config_of(module)
        if source.method == "lora":
            wrong = rank != config.r
            expected: Any = f"a rank of {config.r}"
        else:
            expected = saved.parameter_shapes(in_features, out_features, config)
            wrong = {name: list(shape) for name, shape in expected.items()} != shapes
    except (UserError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{where}: its configuration does not fit its factors {shapes}: {str(error)[:200]}") from error
    if wrong:
        raise UserError(f"{where}: the configuration asks for {expected}, the file has {shapes}; restore the adapter")
    if source.base is not None:
        pattern = ".".join("*" if part.isdigit() else part for part in module.split("."))
        base_shape = source.base["linear_shapes"].get(pattern)
        if base_shape != [out_features, in_features]:
            raise UserError(
                f"{where}: the pair is for a layer [{out_features}, {in_features}], its base has {base_shape} there "
                "(base.json); restore the adapter"
            )


def _frozen_on_meta(source: AdapterSource, module: str) -> Params:
    """Return the factors that are not in the file, on the meta device, by the sizes of the base's layer."""
    if not source.needs_base:
        return {}
    saved = SAVED_METHODS[source.method]
    pattern = ".".join("*" if part.isdigit() else part for part in module.split("."))
    size = (source.base or {}).get("linear_shapes", {}).get(pattern)
    if size is None:
        raise ValueError("those that are made of the base's weights need base.json, which has its layers' sizes")
    shapes = saved.frozen_shapes(size[1], size[0], source.config_of(module))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def describe_file(file: Path) -> dict[str, int]:
    """Return the bytes of a safetensors file: all of it, its header, and its tensors (names' index left out)."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    index = header.get("packed.index", {"data_offsets": [0, 0]})["data_offsets"]
    return {"file": total, "header": 8 + header_size, "tensors": total - 8 - header_size - (index[1] - index[0])}
