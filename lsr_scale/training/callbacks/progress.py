"""What a run says while it trains: a live line on the screen, `metrics.jsonl` on disk, the loss curve at the end."""

import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import files
from lsr_scale.config.training import EVALUATED
from lsr_scale.errors import UserError, printable, shortened
from lsr_scale.screen import terminal_width


def show_live(text: str) -> None:
    """Put text on the live line in place of what stands there, "" clearing it; nothing where there is no terminal."""
    if sys.stdout.isatty():
        _write(f"\r\x1b[2K{printable(text)[: terminal_width() - 1]}")


def print_line(text: str) -> None:
    """Print a line that stays, where the live line may stand."""
    show_live("")
    _write(f"{printable(text)}\n")


def _write(text: str) -> None:
    """Write to the screen; where its reader is gone, as after Ctrl-C on `... | tee`, to nobody from then on."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress(TrainerCallback):
    """A callback that shows and records each logging step: loss, tokens/s, memory, time left. Main process only.

    Tokens/s are those of training: what saves and evaluations take is in `wall_s` and in the time left only. On every
    process it ends a run whose numbers are no longer finite, before such factors are saved.
    """

    def __init__(self, metrics: Path, quiet: bool = False) -> None:
        self.metrics = metrics
        self.quiet = quiet
        self.started = self.last_time = time.monotonic()
        self.last_tokens = 0.0
        self.aside = 0.0  # seconds since last_time in which nothing was trained
        self.worked_until = self.started  # the last moment that belongs to a step
        self.first_step = 0
        # what the metrics file counts already where a run goes on: the clock and TRL's token count start again
        self.wall_s_before = self.tokens_before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks; drop recorded steps that a resumed run does again."""
        self.first_step = state.global_step
        state.compute_steps(args, state.max_steps)  # a checkpoint's intervals would stand in place of the run's
        if state.is_world_process_zero:
            kept = cut_back(self.metrics, state.global_step or -1)
            self.wall_s_before = max(numbers_of(kept, "wall_s"), default=0.0)
            self.tokens_before = max(numbers_of(kept, "num_tokens"), default=0.0)
        # transformers' own count goes on by itself
        self.last_tokens = float(state.num_input_tokens_seen)
        self.started = self.last_time = self.worked_until = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the step's time; record the last one too; refuse to save a checkpoint that nothing can go on from."""
        self._end_work(control)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if control.should_save:
            check_finite(kwargs["model"], f"after step {state.global_step}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the time of the step that a save or an evaluation at the epoch's end waits for; refuse as after it."""
        self._end_work(control)
        if control.should_save:
            check_finite(kwargs["model"], f"after step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evaluation out of the next step's time."""
        self._set_aside()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the save out of the next step's time."""
        self._set_aside()

    def _end_work(self, control: TrainerControl) -> None:
        if torch.cuda.is_available() and (control.should_save or control.should_evaluate):
            torch.cuda.synchronize()  # what the GPU still has to do is the step's, and either waits for it anyway
        self.worked_until = time.monotonic()

    def _set_aside(self) -> None:
        now = time.monotonic()
        self.aside += now - self.worked_until
        self.worked_until = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record one logging step."""
        if not logs or "train_loss" in logs:  # the summary at the end
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise _diverged(f"{name} is {logs[name]} at step {state.global_step}")
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row["wall_s"] = round(self.wall_s_before + now - self.started, 3)
        tokens = logs.get("num_tokens", logs.get("num_input_tokens_seen", 0.0))
        if "loss" in logs and tokens > self.last_tokens:
            seconds = now - self.last_time - self.aside
            row["tokens_per_s"] = round((tokens - self.last_tokens) / max(1e-9, seconds), 1)
            self.last_time, self.last_tokens, self.aside = now, tokens, 0.0
            self.worked_until = now
        row["memory_gib"] = round(memory_gib(), 3)
        row |= {name: value for name, value in logs.items() if name != "epoch" and not name.startswith("train_")}
        if "num_tokens" in row:
            row["num_tokens"] += self.tokens_before
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if not self.quiet:
            self._show(row, state, now)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the live line standing."""
        if sys.stdout.isatty() and not self.quiet and state.is_world_process_zero:
            _write("\n")

    def _show(self, row: dict[str, Any], state: TrainerState, now: float) -> None:
        if "loss" not in row:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k in EVALUATED)
            if shown:
                print_line(f"step {row['step']}: {shown}")
            return
        done = row["step"] - self.first_step
        left = (now - self.started) / max(1, done) * (state.max_steps - row["step"])
        speed = f"  {row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else ""
        memory = f"{row['memory_gib']:.1f} GiB"
        line = f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}{speed}  {memory}  {clock(left)} left"
        if sys.stdout.isatty():
            show_live(line)
        else:
            _write(f"{line}\n")


def check_finite(model: torch.nn.Module, when: str) -> None:
    """Raise if a trained parameter is not finite; `when` is for the message, such as "after step 12"."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise _diverged(f"{name} is not finite {when}, so it is not saved")


def _diverged(what: str) -> UserError:
    return UserError(
        f"training diverged: {what}; lower training.learning_rate or lengthen training.warmup_steps, and start again "
        "with --overwrite"
    )


def clock(seconds: float) -> str:
    """Return a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def memory_gib() -> float:
    """Return this process's peak GPU memory in GiB, or its resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; a line that is no step's, such as one that a kill cut short, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Leave in a file of rows those up to a step, since the later steps are done again; return them."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def numbers_of(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return the values of a column where they are finite numbers."""
    values = [row.get(name) for row in rows]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def summarize_metrics(path: Path, best: int | None = None) -> dict[str, Any]:
    """Return what the results say of a metrics file.

    The loss at the end (mean of the last tenth), tokens, memory, and the largest condition number of each side.

    Args:
        path: The file.
        best: The step whose adapter was taken; None is the last one's.
    """
    rows = read_metrics(path)
    steps = [row for row in rows if numbers_of([row], "loss")]
    if not steps:
        return {}
    last = numbers_of(steps[-max(1, len(steps) // 10) :], "loss")
    speeds = sorted(numbers_of(steps, "tokens_per_s"))
    evaluations = [row for row in rows if "eval_loss" in row and best in (None, row["step"])]
    tokens = numbers_of(steps[-1:], "num_tokens") or numbers_of(steps[-1:], "num_input_tokens_seen")
    found: dict[str, Any] = {
        "final_loss": round(sum(last) / len(last), 4),
        "tokens": round(tokens[-1]) if tokens else 0,
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "peak_memory_gib": max(numbers_of(steps, "memory_gib"), default=None),
    }
    for name in dict.fromkeys(name for row in steps for name in row if re.fullmatch("condition_.*_max", name)):
        if values := numbers_of(steps, name):
            found[name] = round(max(values), 4)
    if best is not None:
        found["best_step"] = best
    return found | {name: round(values[0], 6) for name in EVALUATED if (values := numbers_of(evaluations[-1:], name))}


def draw_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training (and evaluation) loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, style, color in (("loss", "training", "-", "C0"), ("eval_loss", "validation", "o-", "C1")):
        points = [(row["step"], row[key]) for row in rows if numbers_of([row], key)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        style = style if len(values) > 2 else "o-"
        axes.plot(steps, values, style, label=label, alpha=0.35 if len(values) > 20 else 1.0, color=color)
        if len(values) > 20:
            width = max(2, len(values) // 10)
            means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
            axes.plot(steps, means, color=color, label=f"{label}, mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(picture_text(title))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    save_figure(figure, picture)


def picture_text(text: str) -> str:
    """Return text for a picture as it stands: pyplot would read formulas between dollars."""
    return shortened(printable(text), 100).replace("$", r"\$")


def save_figure(figure: Any, picture: Path) -> None:
    """Write a pyplot figure as a PNG and close it; without date or version, so that the same run draws the same bytes.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, metadata=files.PICTURE_METADATA)
    pyplot.close(figure)
    files.write_bytes(picture, drawn.getvalue())
