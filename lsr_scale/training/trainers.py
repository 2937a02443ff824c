"""The trainers: TRL's, by the training method (`methods/`), and transformers' Trainer for classifiers, each with this
package's checkpoints, checks of its losses, and steps before it among its bases. The loop is theirs.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback

from lsr_scale.config import RunConfig
from lsr_scale.config.methods import METHODS
from lsr_scale.data.cache import cached
from lsr_scale.data.classification import tokenize_classification
from lsr_scale.rewards.checked import CheckedReward
from lsr_scale.scoring import classification
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import method_module
from lsr_scale.training.optimizers.create import OwnOptimizers, choose_optimizer
from lsr_scale.training.reference import REFERENCE, set_reference
from lsr_scale.training.run_data import MadeRows, RunData
from lsr_scale.training.settings import naming_settings
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.finite_check import FiniteCheck


def make_trainer(
    run: RunConfig,
    model: PeftModel,
    arguments: Any,
    data: RunData,
    callbacks: list[TrainerCallback] | None,
    rewards: list[CheckedReward] | None = None,
) -> Any:
    """Return the trainer of a run, its rows tokenized.

    The factors stay float32: on a quantized base TRL's trainers cast what trains to bfloat16 in place, which is undone.

    Raises:
        UserError: for a setting that the library refuses.
    """
    made = data.made
    if not made.given:
        parts = {"train": data.train, "eval": data.validation}
        made.given = {name: cached(rows) for name, rows in parts.items() if rows is not None}
    options: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "processing_class": data.tokenizer,
        "callbacks": callbacks,
        "train_dataset": made.given["train"],
        "eval_dataset": made.given.get("eval"),
    }
    if rewards:
        options["reward_funcs"] = rewards
    is_classifier = run.model.task == "seq_cls"
    make = _classifier_trainer if is_classifier else method_module(run.training["method"]).make_trainer
    if is_classifier or run.training["method"] == "sft":
        options["rows"] = made
    with _keeping_float32(model), ignore_library_warnings(), naming_settings(run):
        trainer: Any = make(run, options)
    if METHODS[run.training["method"]].has_reference and (arguments.beta or REFERENCE in model.peft_config):
        set_reference(model, starts_from_adapter=run.adapter.start_from is not None)
    choose_optimizer(trainer, run)
    trainer.on_nonfinite = run.training["on_nonfinite"]
    trainer.remove_callback(PrinterCallback)  # prints what Progress prints
    if not arguments.push_to_hub:
        trainer.create_model_card = lambda *_, **__: None  # a template for the hub, among files to be read
    return trainer


def _classifier_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    made: MadeRows = options.pop("rows")
    for part, rows in made.given.items():
        if part not in made.tokenized:
            tokenizer, limit = options["processing_class"], run.training["max_length"]
            made.tokenized[part] = tokenize_classification(rows, tokenizer, limit)
        options[f"{part}_dataset"] = made.tokenized[part]
    return ClassifierTrainer(**options, compute_metrics=classification.measure_prediction)


class ClassifierTrainer(Resumable, FiniteCheck, EngineSteps, OwnOptimizers, Trainer):
    """Transformers' trainer, of the mean loss of each batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers tells by forward's signature whether a model divides its loss by all of a step's labels;
        # classifiers would, and do not: theirs is their batch's mean
        self.model_accepts_loss_kwargs = False


@contextmanager
def _keeping_float32(model: torch.nn.Module) -> Iterator[None]:
    """Undo TRL's cast of trainable parameters to bfloat16, rounding included."""
    float32 = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype == torch.float32
    }
    yield
    for name, parameter in model.named_parameters():
        if name in float32 and parameter.dtype != torch.float32:
            parameter.data = float32[name].to(parameter.device)


@contextmanager
def ignore_library_warnings() -> Iterator[None]:
    """Leave out what transformers and TRL warn of in each other's names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b.*")
        # PEFT would compare the vocabulary with the hub's; no embedding is ever resized here
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield
