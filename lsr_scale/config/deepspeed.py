"""The DeepSpeed configurations that are shipped, and what DeepSpeed is told of one.

`configs/deepspeed/*.json` are copies of the dictionaries here, for reading and for starting one's own from. Here they
can be explained, and here they are also where the package is installed without the repository.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# "auto" is filled from the training section by transformers' DeepSpeed integration. No bf16 or fp16 section: the engine
# then casts nothing, so the base stays as it was loaded (packed bytes and model.dtype) and the factors stay float32.
COMMON: dict[str, Any] = {
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

SHIPPED: dict[str, dict[str, Any]] = {
    "zero0": {**COMMON, "zero_optimization": {"stage": 0}},
    "zero1": {**COMMON, "zero_optimization": {"stage": 1, **_BUCKETS}},
    "zero2": {**COMMON, "zero_optimization": {"stage": 2, **_BUCKETS}},
    # The frozen base is sharded by `lsr_scale.model.shard`; see `engine_config` for what DeepSpeed is told.
    "zero3": {**COMMON, "zero_optimization": {"stage": 3, **_BUCKETS}},
    # The optimizer's state is a few times the adapter: it stays on the GPU, and no CPU Adam has to be compiled.
    "zero3_offload": {
        **COMMON,
        "zero_optimization": {"stage": 3, **_BUCKETS, "offload_param": {"device": "cpu"}},
    },
}


# What the training section says; a number here must be the same.
OF_TRAINING = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}

# Where transformers fills in auto, in zero_optimization.
FILLED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")

# What steers how DeepSpeed's own stage 3 partitions parameters and gathers them, beside all that begins with stage3_.
_OF_STAGE_3 = (
    *("offload_param", "sub_group_size", "memory_efficient_linear", "module_granularity_threshold"),
    *("gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params", "log_trace_cache_warnings"),
    *("zero_hpz_partition_size", "mics_shard_size", "mics_hierarchical_params_gather", "zero_quantized_gradients"),
    *("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold"),
    *("model_persistence_threshold", "zeropp_loco_param", "override_module_apply"),
)

# What steers how DeepSpeed reduces gradients, beside reduce_bucket_size: `training.steps.engine` does it at once.
_OF_REDUCTION = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "ignore_unused_parameters"),
    *("use_multi_rank_bucket_allreduce", "communication_data_type", "prescale_gradients"),
    *("gradient_predivide_factor", "gradient_allreduce_op"),
)


def engine_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DeepSpeed's engine is told: stage 3 is a lower one for what trains, the frozen base is sharded here.

    DeepSpeed's own stage 3 would partition, gather and reduce every factor by itself, a thousand small tensors a step.
    Its timer, which would wait for the GPU in every step, is off if nobody asks for it.
    """
    content = {"timers": {"throughput": {"enabled": False}}, **content}
    zero = content.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return content
    stage_2 = {name: value for name, value in zero.items() if not _is_of_stage_3(name)}
    return {**content, "zero_optimization": {**stage_2, "stage": 2}}


def offloads_parameters(content: Mapping[str, Any]) -> bool:
    """Tell whether the shards of a frozen base are held on the CPU."""
    return _offloads(content, "offload_param")


def offloads_optimizer(content: Mapping[str, Any]) -> bool:
    """Tell whether DeepSpeed holds the optimizer on the CPU, and then sees to the gradients itself."""
    return _offloads(content, "offload_optimizer")


def _offloads(content: Mapping[str, Any], name: str) -> bool:
    return (content.get("zero_optimization", {}).get(name) or {}).get("device", "none") != "none"


def beyond_a_trial(content: Mapping[str, Any]) -> str | None:
    """Return what a configuration does that a sweep's trial, which one GPU trains, is refused for; None for nothing."""
    if content.get("zero_optimization", {}).get("stage", 0) == 3:
        return "ZeRO-3 shards the base over processes"
    return "it offloads" if offloads_parameters(content) or offloads_optimizer(content) else None


def without_effect(content: Mapping[str, Any]) -> list[str]:
    """Return the settings of a configuration that nothing here reads."""
    zero = content.get("zero_optimization", {})
    ignored = [name for name in zero if zero.get("stage") == 3 and _is_of_stage_3(name) and name != "offload_param"]
    if zero.get("stage", 0) > 0 and not offloads_optimizer(content):
        ignored += [name for name in (*zero, *content) if name in _OF_REDUCTION]
        ignored += ["reduce_bucket_size"] if zero.get("reduce_bucket_size", "auto") != "auto" else []
    return ignored


def _is_of_stage_3(name: str) -> bool:
    return name.startswith("stage3_") or name in _OF_STAGE_3


def write_shipped(folder: Path) -> None:
    """Write the shipped configurations as `<name>.json`."""
    for name, content in SHIPPED.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
