"""What TensorBoard, Weights & Biases and the like are told: all that `metrics.jsonl` has, scores, samples.

Transformers' own callbacks report; here they are checked before a model is loaded, put after the callbacks whose
measurements go into the logs, and told what is known outside of training: scores and samples before and after it.
"""

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from lsr_scale import distributed
from lsr_scale.config.reporters import REPORTERS, reporter_names
from lsr_scale.errors import UserError
from lsr_scale.scoring.accuracy import TaskScore
from lsr_scale.training.callbacks.samples import Sample

_ACCURACIES = ("accuracy", "acc_norm")
_OFFLINE = ("offline", "dryrun", "disabled")


def check_reporters(report_to: str | list[str] | None) -> None:
    """See that what a run reports to is installed, and that W&B is logged in or offline, before anything is loaded.

    Args:
        report_to: `training.report_to`, of names that are known.

    Raises:
        UserError: on every process alike, with the command that helps.
    """
    problem = _problem(report_to) if distributed.is_main() else None
    if problem := distributed.broadcast(problem):
        raise UserError(str(problem))


def _problem(report_to: str | list[str] | None) -> str | None:
    names = reporter_names(report_to)
    if names == ["all"]:
        names = get_available_reporting_integrations()
    for name in names:
        module, package = REPORTERS.get(name, (name, name))
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises anything
            return (
                f"training.report_to: {name}: {module} cannot be imported ({str(error)[:120]}); "
                f"pip install '{package}', or set it to none"
            )
    if "wandb" in names and not _is_logged_in():
        return (
            "training.report_to: wandb: not logged in; run wandb login (or set WANDB_API_KEY), set WANDB_MODE=offline "
            "to log to this disk, or set it to none"
        )
    return None


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_MODE", "").lower() in _OFFLINE or os.environ.get("WANDB_API_KEY"):
        return True
    wandb = importlib.import_module("wandb")
    if "prompt" in inspect.signature(wandb.login).parameters:  # releases whose `wandb.api` is on its way out
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


class Reports:
    """The reporting callbacks of a trainer, and what they are told beside the logs; does nothing where it has none."""

    def __init__(self, trainer: Trainer, tensorboard: Path, step: int) -> None:
        """Put the trainer's reporting callbacks last.

        Args:
            trainer: It was made with them.
            tensorboard: The folder for TensorBoard's files, where TENSORBOARD_LOGGING_DIR names none.
            step: That the run resumes from: what TensorBoard has of later ones is hidden; 0 for none.
        """
        self.trainer = trainer
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(key=lambda one: isinstance(one, kinds))
        self.callbacks: list[Any] = [one for one in callbacks if isinstance(one, TensorBoardCallback | WandbCallback)]
        self.had_run = any(_wandb_run(one) is not None for one in self.callbacks)
        if not distributed.is_main():
            self.callbacks = []
        for one in self.callbacks:
            if isinstance(one, TensorBoardCallback):
                one.logging_dir = one.logging_dir or str(tensorboard)
                if step and one._SummaryWriter is not None:
                    one.tb_writer = one._SummaryWriter(log_dir=one.logging_dir, purge_step=step + 1)

    def scores(self, tasks: Mapping[str, TaskScore], of_classes: Mapping[str, float], step: int) -> None:
        """Report accuracies by task, and a classifier's scores, of one moment.

        Args:
            tasks: By the task's name.
            of_classes: A classifier's, by their names in an evaluation.
            step: 0 before training, after it that of the adapter.
        """
        values = {f"eval_{task}_{name}": getattr(of, name) for task, of in tasks.items() for name in _ACCURACIES}
        self._log(values | {f"eval_{n}": v for n, v in of_classes.items() if isinstance(v, int | float)}, step)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Report completions as text: to TensorBoard a text a prompt, to W&B a table a moment."""
        step = samples[0].step
        for one in self.callbacks:
            self._open(one)
            if isinstance(one, TensorBoardCallback):
                for number, sample in enumerate(samples, 1):
                    text = f"{_quoted(_text(sample))}\n\n{_quoted(sample.completion, '    ')}"
                    one.tb_writer.add_text(f"samples/{number}", text, step)  # pyright: ignore
                one.tb_writer.flush()  # pyright: ignore[reportOptionalMemberAccess]
            else:
                rows = [[sample.step, sample.moment, _text(sample), sample.completion] for sample in samples]
                table = one._wandb.Table(columns=["step", "moment", "prompt", "completion"], data=rows)
                one._wandb.log({"samples": table, "train/global_step": step})

    def close(self) -> None:
        """Write out what is not written yet, and end a W&B run that began here."""
        for one in self.callbacks:
            if isinstance(one, TensorBoardCallback):
                one.on_train_end(self.trainer.args, self.trainer.state, self.trainer.control)
            elif not self.had_run and _wandb_run(one) is not None:
                one._wandb.finish()

    def _open(self, callback: Any) -> None:
        """Have a callback begin, or begin again, what it writes to."""
        if isinstance(callback, TensorBoardCallback):
            if callback.tb_writer is None:
                callback._init_summary_writer(self.trainer.args)
        elif not callback._initialized:
            callback.setup(self.trainer.args, self.trainer.state, self.trainer.model)

    def _log(self, values: dict[str, Any], step: int) -> None:
        state = self.trainer.state
        reached, state.global_step = state.global_step, step
        try:
            for one in self.callbacks if values else ():
                self._open(one)
                one.on_log(self.trainer.args, state, self.trainer.control, logs=dict(values), model=self.trainer.model)
        finally:
            state.global_step = reached


def _wandb_run(callback: Any) -> Any:
    return getattr(getattr(callback, "_wandb", None), "run", None)


def _text(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return sample.prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in sample.prompt)


def _quoted(text: str, indent: str = "> ") -> str:
    """Return a text for Markdown, its lines quoted, or as they stand where they are indented by four."""
    return "\n".join(f"{indent}{line}" for line in text.split("\n"))
