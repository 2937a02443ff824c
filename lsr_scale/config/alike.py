"""Which runs have the same rows, in the same form, and take the same memory: those that train on them differently."""

import json
from typing import Any

from lsr_scale.config.run import RunConfig

# Of training: what neither rows nor layers are made by. All else may be read by who makes them, and tells runs apart.
_READ_LATER = {
    *("output_dir", "run_name", "data_seed", "num_train_epochs", "max_steps", "on_nonfinite", "early_stopping"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "condition_guard"),
    *("condition_tolerance", "save_as_lora", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
    *("eval_strategy", "eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model"),
}


def rows_key(run: RunConfig) -> str:
    """Return a text that is the same for runs of the same rows, tokenizer and form of batches."""
    training = _training_key(run)
    if not training.get("shuffle_dataset"):  # it shuffles rows as they are made
        training.pop("seed", None)
    prompts = {"prompts": run.eval.prompts, "max_new_tokens": run.eval.max_new_tokens}
    return _text(
        {"model": run.model.model_dump(), "data": run.data.model_dump(), "eval": prompts, "training": training}
    )


def memory_key(run: RunConfig) -> str:
    """Return a text that is the same for runs of which `planning.plan` says the same."""
    training = _training_key(run)
    training.pop("seed", None)
    parts = {name: getattr(run, name).model_dump() for name in ("model", "adapter", "data", "deepspeed")}
    return _text({**parts, "training": training})


def _training_key(run: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in run.training.items() if name not in _READ_LATER}


def _text(parts: dict[str, Any]) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
