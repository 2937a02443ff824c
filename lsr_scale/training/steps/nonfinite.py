"""What a run does when a loss, a gradient or a trained parameter is not finite; `finite_check` finds it."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from lsr_scale import distributed
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.metrics import read_metrics


def check_finite(model: torch.nn.Module, when: str) -> None:
    """Raise if a trained parameter is not finite; `when` is for the message, such as "after step 12"."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise diverged(f"{name} is not finite {when}, so it is not saved")


def diverged(what: str) -> UserError:
    """Return the error of a run whose numbers are no longer finite; `what` says which."""
    return UserError(
        f"training diverged: {what}; lower training.learning_rate or lengthen training.warmup_steps, and start again "
        "with --overwrite"
    )


WAIT_FOR_OTHERS_S = 5.0
# a checkpoint keeps its learning rate
_REMEDY = (
    "set training.on_nonfinite: skip and resume with --resume auto; or lower training.learning_rate, lengthen "
    "training.warmup_steps{more}, and start again with --overwrite"
)


def handle_nonfinite_loss(trainer: Any, loss: float, inputs: dict[str, Any], step: int, micro_step: int) -> None:
    """Record the batch in `nonfinite.jsonl` of the run's folder, and end the run unless it skips such batches.

    Args:
        trainer: The trainer.
        loss: The batch's.
        inputs: The batch.
        step: How many steps were done before its own.
        micro_step: How many batches of its step before it, on this process.

    Raises:
        UserError: where `training.on_nonfinite` is "stop".
    """
    # of GRPO's batches, which are made of several rows' completions, each says where its row stands
    rows = inputs["row"] if "row" in inputs else _rows_of(trainer, step, micro_step)
    line = {"step": step + 1, "process": distributed.rank(), "loss": str(loss), "rows": rows}
    # ORPO's batches have them for chosen and rejected, GRPO's for prompts and completions
    own = ("input_ids", "prompt_ids", "completion_ids")
    ids = {name: value.tolist() for name, value in inputs.items() if name.endswith(own)}
    file = _record(trainer, {**line, **ids})
    if trainer.on_nonfinite == "skip":
        return
    raise _diverged_loss(line, file)


def handle_nonfinite_gradient(trainer: Any, norm: float, step: int) -> None:
    """Record the step in `nonfinite.jsonl`, without rows: it may be any of its own; end the run unless it skips such.

    Args:
        trainer: The trainer.
        norm: Of the gradient of all processes, so that they do the same.
        step: How many steps were done before it.

    Raises:
        UserError: where `training.on_nonfinite` is "stop".
    """
    file = RunFolder(Path(str(trainer.args.output_dir))).nonfinite
    if distributed.is_main():
        _record(trainer, {"step": step + 1, "gradient_norm": str(norm)})
    if trainer.on_nonfinite == "skip":
        return
    if (row := _loss_of_another(file, step + 1)) is not None:
        raise _diverged_loss(row, file)
    raise UserError(
        f"training diverged: the gradient of step {step + 1} is not finite (its norm is {norm}), but its losses "
        "are; " + _REMEDY.format(more=" or set model.dtype to float32")
    )


def _loss_of_another(file: Path, step: int) -> dict[str, Any] | None:
    """Return the record of a loss of this step by another process, which on a GPU may come later than the gradient's.

    Whoever speaks first ends the others, by the launcher: so that what is said names the rows.
    """
    end = time.monotonic() + WAIT_FOR_OTHERS_S
    while distributed.world_size() > 1:
        rows = [row for row in read_metrics(file) if row["step"] == step and "loss" in row]
        if rows or time.monotonic() > end:
            return rows[0] if rows else None
        time.sleep(0.05)
    return None


def _diverged_loss(row: dict[str, Any], file: Path) -> UserError:
    return UserError(
        f"training diverged: the loss is {row['loss']} at step {row['step']}, on rows {row['rows']} of the training "
        f"data (process {row['process']}; the tokens are in {file}); {_REMEDY.format(more=' or fix these rows')}"
    )


def _record(trainer: Any, line: dict[str, Any]) -> Path:
    file = RunFolder(Path(str(trainer.args.output_dir))).nonfinite
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return file


def _rows_of(trainer: Any, step: int, micro_step: int) -> list[int] | None:
    """Return the numbers of a micro-batch's rows, by the sampler's order; None where it has none.

    Args:
        trainer: The trainer.
        step: How many steps were done before the batch's.
        micro_step: How many batches of its step before it.
    """
    loader: Any = trainer.callback_handler.train_dataloader
    sampler: Any = getattr(loader, "batch_sampler", None)
    order = sampler
    while order is not None and not hasattr(order, "set_epoch"):
        order = getattr(order, "batch_sampler", None) or getattr(order, "sampler", None)
    if sampler is None or order is None:
        return None
    accumulation = trainer.args.gradient_accumulation_steps
    epoch, done = divmod(step, max(1, math.ceil(len(loader) / accumulation)))
    order.set_epoch(epoch)
    micro = done * accumulation + micro_step
    return next(itertools.islice(iter(sampler), micro, None), None)
