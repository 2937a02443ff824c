"""Why runs cannot train in one step (`joint.py`); then they train one after the other, on one base in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lsr_scale import adapters
from lsr_scale.config import RunConfig
from lsr_scale.config.reporters import reporter_names
from lsr_scale.config.training import checkpoints_layers, wants_fused

# settings of `training` that runs have in common, or a step has rows of different kinds
_ALIKE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "padding_free")
_ALIKE += ("fused", "compute", "memory")
# the values of `training` with which the loss is the mean cross-entropy of each run's own tokens
_PLAIN: dict[str, tuple[Any, ...]] = {
    "loss_type": (None, "nll"),
    "label_smoothing_factor": (None, 0),
    "neftune_noise_alpha": (None, 0),
    "compute": ("bf16",),
    "torch_compile": (None, False),
}
# options of the adapters that draw random numbers in training
_DROPOUTS = ("dropout", "lora_dropout", "rank_dropout", "module_dropout")
# reporters that several runs of a process may have at a time
_OF_A_RUN = {"tensorboard"}
_SHOWN = 3  # runs that are named
# layers whose rows depend on nothing but what attention lets them see
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def sharing_fallback_reason(runs: Sequence[RunConfig]) -> str | None:
    """Return why runs cannot share a step, naming the setting, or None.

    Any adapter methods, targets, ranks, scalings, data and optimizers may differ.
    """
    for run in runs:
        reason = own_fallback_reason(run)
        if reason is not None:
            return reason
    first = runs[0]
    for run in runs[1:]:
        for name in type(first.model).model_fields:
            values = getattr(first.model, name), getattr(run.model, name)
            if values[0] != values[1]:
                return f"model.{name} differs: {values[0]} and {values[1]}"
        for name in _ALIKE:
            values = first.training.get(name), run.training.get(name)
            if values[0] != values[1]:
                return f"training.{name} differs: {values[0]} and {values[1]}"
        if checkpoints_layers(first.training) != checkpoints_layers(run.training):
            return "training.gradient_checkpointing differs"
        seeds = first.training["seed"], run.training["seed"]
        if first.model.random_weights and seeds[0] != seeds[1]:
            return f"training.seed differs: {seeds[0]} and {seeds[1]}, by which model.random_weights draws the base"
    return None


def alone_reasons(runs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Return which of some runs, by their names, share no step, and why, where others can; nothing where none can."""
    reasons = {name: reason for name, run in runs.items() if (reason := own_fallback_reason(run)) is not None}
    return reasons if len(runs) - len(reasons) > 1 else {}


def alone_words(alone: Mapping[str, str]) -> str:
    """Return in words what `alone_reasons` does, "" for nothing."""
    named: dict[str, list[str]] = {}
    for name, reason in alone.items():
        named.setdefault(reason, []).append(name)
    if not named:
        return ""
    reasons = [f"{_some(names)} ({reason})" for reason, names in named.items()]
    return f"trained alone, as they share no step: {', '.join(reasons)}"


def _some(names: list[str]) -> str:
    left = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {left} more" if left > 0 else "")


def runs_fused(run: RunConfig, pays: bool) -> bool:
    """Tell whether a run's layers can be fused: `training.fused` lets them be, and its adapter has a low-rank pair.

    One run of another kind has all that share its step run unfused.

    Args:
        run: The run.
        pays: Whether fused layers pay where it is trained: on a GPU.
    """
    method = run.adapter.method
    has_pair = method == "lora" or (method in adapters.METHODS and adapters.METHODS[method].is_low_rank())
    return has_pair and wants_fused(run.training, pays)


def own_fallback_reason(run: RunConfig) -> str | None:
    """Return why a run shares no step, whatever the others are, naming the setting, or None."""
    if run.model.task != "causal_lm":
        return f"model.task: {run.model.task}, whose head is trained; only causal_lm shares a step"
    if run.training["method"] != "sft":
        return f"training.method: {run.training['method']}, whose loss is no mean over tokens; only sft shares a step"
    config: Any = adapters.peft_config(run.adapter.method, run.adapter.options, adapters.TASK_TYPES[run.model.task])
    if any(getattr(config, name, None) for name in _DROPOUTS):
        return "adapter.dropout is not 0: its random numbers would not be those of the run alone; 0 lets it share steps"
    if config.modules_to_save:
        return "adapter.modules_to_save: each run has modules of its own"
    if others := [name for name in reporter_names(run.training.get("report_to")) if name not in _OF_A_RUN]:
        return f"training.report_to: {others[0]} records one run of a process at a time"
    for name, plain in _PLAIN.items():
        if run.training.get(name) not in plain:
            return f"training.{name}: {run.training[name]} has no shared form"
    return None


def base_fallback_reason(base: Any) -> str | None:
    """Return why runs cannot share a step on a base, or None."""
    config = base.config.get_text_config()
    dropouts = [module.p for module in base.modules() if isinstance(module, nn.Dropout)]
    dropouts += [getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop", "dropout")]
    if any(dropouts):
        return f"{config.model_type} models drop out in training: random numbers would not be those of the run alone"
    if getattr(config, "output_router_logits", False):
        return "the router's loss is of all rows of a batch"
    others = sorted({*(getattr(config, "layer_types", None) or ())} - _ATTENTION)
    if others:
        return f"layers of the kind {', '.join(others)} do not tell packed rows apart by their positions"
    return None
