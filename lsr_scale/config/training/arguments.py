"""What the trainer is given: its class of arguments, and its keyword arguments of a run's section."""

import dataclasses
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

from lsr_scale.config import declared
from lsr_scale.config.methods import METHODS
from lsr_scale.config.optimizers import OWN_OPTIMIZERS
from lsr_scale.config.training.compute import RENAMED, checkpoints_layers
from lsr_scale.config.training.fields import own_fields
from lsr_scale.config.training.subject import Task


def training_arguments_class(task: Task, method: str = "sft") -> type:
    """Return the dataclass that the trainer of a task, and of a method, is given; the import takes seconds."""
    if task == "seq_cls":
        from transformers import TrainingArguments

        return TrainingArguments
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental")  # what TRL calls so, it says of all of it
        module = importlib.import_module(f"trl.{METHODS[method].module}")
    return getattr(module, METHODS[method].class_name)


def declaration(task: Task, method: str) -> type:
    """Return a dataclass with the fields of `training_arguments_class`, without importing that where it can be told."""
    if not declared.already_imported():
        try:
            return declared.training_class(None if task == "seq_cls" else METHODS[method].arguments)
        except declared.UnreadableError:
            pass
    return training_arguments_class(task, method)


def training_kwargs(training: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return keyword arguments for TRL's class of the method, or `TrainingArguments`, of the installed version.

    `bf16` and `fp16` are explicitly off, for TRL turns bf16 on by itself: the factors are float32 in the forward, and
    the base computes in the dtype it was loaded in.
    """
    known = {field.name for field in dataclasses.fields(training_arguments_class(task, training["method"]))}
    kwargs = dict(training)
    kwargs["gradient_checkpointing"] = checkpoints_layers(kwargs)
    for name in own_fields(task, training["method"]):
        del kwargs[name]
    if kwargs["optim"] in OWN_OPTIMIZERS:  # made by training/optimizers/; LoRA+ of what this names
        kwargs["optim"], kwargs["optim_args"] = "adamw_torch_fused", None
    kwargs.pop("assistant_only_loss", None)  # labels come from lsr_scale/data/chat_tokens.py, for any chat template
    if task == "seq_cls":
        del kwargs["max_length"]  # ours: the tokenizer cuts, not the trainer
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):  # torch takes no integer beside a float
        if name in kwargs:
            kwargs[name] = float(kwargs[name])
    if kwargs["output_dir"] is None:
        del kwargs["output_dir"]
    for old, new in RENAMED.items():
        if old in kwargs and new in known:
            kwargs[new] = kwargs.pop(old)
    return {**kwargs, "bf16": False, "fp16": False}
