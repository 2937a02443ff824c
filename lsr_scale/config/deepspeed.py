"""The DeepSpeed configurations that are shipped, and what any other one must not contain.

`configs/deepspeed/*.json` are copies of the dictionaries here, for reading and for starting one's own from. Here they
can be explained, and here they are also where the package is installed without the repository.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo

from lsr_scale.config.messages import Problem, raise_problems
from lsr_scale.config.yaml_text import read
from lsr_scale.errors import UserError, did_you_mean

# "auto" is filled from the training section by transformers' DeepSpeed integration. No bf16 or fp16 section: the engine
# then casts nothing, so the base stays as it was loaded (packed bytes and model.dtype) and the factors stay float32.
_COMMON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # The optimizer is the trainer's own: torch's AdamW with its parameter groups.
    "zero_allow_untested_optimizer": True,
}

# An adapter has few gradients. DeepSpeed's default bucket of 5e8 elements would reserve 2 GB for them; auto is the
# square of the hidden size, 67 MB at 4096.
_BUCKETS: dict[str, Any] = {"reduce_bucket_size": "auto"}

_STAGE_3: dict[str, Any] = {
    **_BUCKETS,
    # In elements, and a 4-bit weight holds two weights an element: a Mistral-7B layer is 1.1e8, one of a 70B 4.3e8.
    # Each module that is called gathers so many more ahead, whatever was gathered before, until max_live_parameters
    # are there (1e9 by default). So the latter is what limits memory: half a GB of a quantized base.
    "stage3_prefetch_bucket_size": 250_000_000,
    "stage3_max_live_parameters": 500_000_000,
    # What is used again within as many is not let go of: the last layer of the forward pass, which begins the backward
    # pass, and a layer that is computed again there. By default 1e9, two layers of a 70B model.
    "stage3_max_reuse_distance": 250_000_000,
    # Factors stay whole on every rank (16 x 14336, LoRA's largest on a 7B model, is 2.3e5), so that no step gathers
    # hundreds of small tensors; the base's linears are 2e6 and more.
    "stage3_param_persistence_threshold": 300_000,
}

SHIPPED: dict[str, dict[str, Any]] = {
    "zero0": {**_COMMON, "zero_optimization": {"stage": 0}},
    "zero1": {**_COMMON, "zero_optimization": {"stage": 1, **_BUCKETS}},
    "zero2": {**_COMMON, "zero_optimization": {"stage": 2, **_BUCKETS}},
    "zero3": {**_COMMON, "zero_optimization": {"stage": 3, **_STAGE_3}},
    # The optimizer's state is a few times the adapter: it stays on the GPU, and no CPU Adam has to be compiled.
    "zero3_offload": {
        **_COMMON,
        "zero_optimization": {"stage": 3, **_STAGE_3, "offload_param": {"device": "cpu", "pin_memory": True}},
    },
}


def write_shipped(folder: Path) -> None:
    """Write the shipped configurations as `<name>.json`."""
    for name, content in SHIPPED.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def resolve_deepspeed(value: Any, info: ValidationInfo) -> Any:
    """Return the content of a DeepSpeed configuration given by name, path or content, once it is known to be safe.

    A relative path is looked for from the working directory, then beside the run's YAML file (`context["folder"]`).
    """
    if isinstance(value, str):
        folder = (info.context or {}).get("folder", Path())
        value = copy.deepcopy(SHIPPED[value]) if value in SHIPPED else _read_json(value, folder)
    if isinstance(value, dict):
        raise_problems(list(_unsafe(value)))
    return value


def _read_json(name: str, folder: Path) -> dict[str, Any]:
    candidates = [Path(name).expanduser(), folder / name]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise UserError(
            f"no such file: {name}; give the path of a DeepSpeed JSON file, or a shipped one by its name: "
            f"{did_you_mean(Path(name).stem, SHIPPED)}"
        )
    try:
        content = json.loads(read(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected one JSON object, got {type(content).__name__}")
    return content


def _unsafe(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what would corrupt a quantized base or an adapter without an error."""
    for name in ("bf16", "fp16", "amp", "bfloat16", "torch_autocast"):
        section = content.get(name)
        if isinstance(section, dict) and section.get("enabled") is True:
            yield Problem(
                (name, "enabled"),
                "would cast the adapter's float32 factors; remove the section, or set enabled to false "
                "(model.dtype is what the base computes in)",
            )
    for name, key in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if name in content:
            yield Problem((name,), f"the trainer makes it; remove the section and set training.{key}")
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield Problem(("zero_optimization",), f"expected an object, got {zero!r}; such as {{'stage': 2}}")
        return
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        yield Problem(("zero_optimization", "stage"), f"expected 0, 1, 2 or 3, got {zero['stage']!r}")
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            yield Problem(
                ("zero_optimization", name), "works with float16 weights only; set model.quantization instead"
            )
    if zero.get("stage", 0) == 3:
        yield from _unsafe_in_stage_3(zero)
    tensor_parallel = content.get("tensor_parallel", {})
    if isinstance(tensor_parallel, dict) and tensor_parallel.get("autotp_size", 0) > 1:
        yield Problem(
            ("tensor_parallel", "autotp_size"), "tensor parallelism cannot split a quantized layer; use ZeRO stage 3"
        )


def _unsafe_in_stage_3(zero: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield ways of sharding that take all parameters to be of one floating dtype, or hold more than a share."""
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        yield Problem(
            ("zero_optimization", "offload_param", "device"),
            "nvme swaps parameters through buffers of one floating dtype, which packed weights are not; set it to cpu",
        )
    for name, off, words in (
        ("use_all_reduce_for_fetch_params", False, "gathers parameters of one dtype only; remove it"),
        ("zero_hpz_partition_size", 1, "was never tried on a quantized base; remove it, or use zero2"),
    ):
        if zero.get(name, off) != off:
            yield Problem(("zero_optimization", name), words)
