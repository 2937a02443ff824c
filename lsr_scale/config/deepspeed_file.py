"""Reading a DeepSpeed configuration and refusing what DeepSpeed would misread, fail on, or do harm with.

What a user leaves out is as in those that are shipped.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo

from lsr_scale.config.deepspeed import COMMON, FILLED, SHIPPED
from lsr_scale.config.messages import Problem, raise_problems
from lsr_scale.config.yaml_text import read
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import user_path

# DeepSpeed passes over a name that it does not know.
_KNOWN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
    *("gradient_clipping", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
    *("communication_data_type", "seq_parallel_communication_data_type", "gradient_allreduce_op", "disable_allgather"),
    *("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "tensor_parallel"),
    *(
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "flops_profiler",
        "timers",
        "comms_logger",
        "log_level",
    ),
    *("tensorboard", "wandb", "csv_monitor", "comet", "activation_checkpointing", "checkpoint", "nebula"),
    *("autotuning", "elasticity", "compression_training", "data_efficiency", "curriculum_learning", "eigenvalue"),
    *("progressive_layer_drop", "sparse_attention", "pipeline", "hybrid_engine", "compile", "graph_harvesting"),
    *("use_data_before_expert_parallelism", "dataloader_drop_last", "disable_python_gc", "weight_quantization"),
    *("managed_gradient_accumulation", "expert_parallel", "vocabulary_size"),
)


def resolve_deepspeed(value: Any, info: ValidationInfo) -> Any:
    """Return the content of a DeepSpeed configuration given by name, path or content, once it is known to be safe.

    A relative path is looked for from the working directory, then beside the run's YAML file (`context["folder"]`).
    """
    if isinstance(value, str):
        folder = (info.context or {}).get("folder", Path())
        value = copy.deepcopy(SHIPPED[value]) if value in SHIPPED else _read_json(value, folder)
    if isinstance(value, dict):
        value = _without_nulls(value)
        raise_problems(list(_unsafe(value)))
        if value not in SHIPPED.values():
            raise_problems(list(_misread(value)))
            value = {**COMMON, **value, "zero_optimization": {"stage": 0, **value.get("zero_optimization", {})}}
    return value


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what it says nothing of: not all that read it take null for that."""
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in content.items() if v is not None}


def _read_json(name: str, folder: Path) -> dict[str, Any]:
    candidates = [user_path(name, "deepspeed.config"), folder / name]
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or values that deep in each other
        raise UserError(f"{path}: not a DeepSpeed configuration: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected one JSON object, got {type(content).__name__}")
    return content


def _misread(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield names that DeepSpeed does not know and values that it cannot read."""
    for name in content:
        if name not in _KNOWN:
            yield Problem((name,), f"DeepSpeed knows no such setting; {did_you_mean(name, _KNOWN)}")
    if content.get("train_batch_size", "auto") != "auto":
        yield Problem(
            ("train_batch_size",),
            f"expected auto, got {content['train_batch_size']!r}: it depends on the number of processes; set "
            "training.per_device_train_batch_size and training.gradient_accumulation_steps",
        )
    if not content.get("zero_optimization"):
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # seconds, so only where there is something to judge

    try:
        DeepSpeedZeroConfig(**content["zero_optimization"])
        for name, value in content["zero_optimization"].items():
            if value == "auto" and name not in FILLED:
                yield Problem(("zero_optimization", name), "nobody fills in auto here; write a value, or leave it out")
    except ValidationError as error:
        for problem in error.errors():
            place = tuple(str(part) for part in problem["loc"])
            words = f"{problem['msg']}, got {problem['input']!r}"
            if problem["type"] == "extra_forbidden":
                names = DeepSpeedZeroConfig.model_fields if len(place) == 1 else ()
                words = f"DeepSpeed knows no such setting; {did_you_mean(place[-1], names)}"
            yield Problem(("zero_optimization", *place), words)


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
    for name in ("cpu_offload", "cpu_offload_params"):
        if zero.get(name):
            new = "offload_param" if name.endswith("params") else "offload_optimizer"
            yield Problem(("zero_optimization", name), f"DeepSpeed's name of old; write {new}: {{device: cpu}}")
    if content.get("managed_gradient_accumulation") is False:
        yield Problem(("managed_gradient_accumulation",), "the trainer leaves accumulation to DeepSpeed; leave it out")
    if zero.get("stage", 0) == 3:
        yield from _unsafe_in_stage_3(zero)
    tensor_parallel = content.get("tensor_parallel", {})
    if isinstance(tensor_parallel, dict) and tensor_parallel.get("autotp_size", 0) > 1:
        yield Problem(
            ("tensor_parallel", "autotp_size"), "tensor parallelism cannot split a quantized layer; use ZeRO stage 3"
        )


def _unsafe_in_stage_3(zero: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield places for parameters or states that stage 3 has in DeepSpeed and not here."""
    for name, where in (("offload_param", "shards of a frozen base are"), ("offload_optimizer", "the optimizer is")):
        offload = zero.get(name) or {}
        if not isinstance(offload, dict):
            yield Problem(
                ("zero_optimization", name), f"expected an object, got {offload!r}; such as {{'device': 'cpu'}}"
            )
        elif offload.get("device") == "nvme":
            yield Problem(("zero_optimization", name, "device"), f"{where} never held on nvme; set it to cpu")
