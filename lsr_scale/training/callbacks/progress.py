"""A run's progress: a live line on the screen, and `metrics.jsonl` on disk."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale.config.training import EVALUATED
from lsr_scale.run.metrics import finite_values, truncate
from lsr_scale.screen import print_line, show_live, write
from lsr_scale.training.steps.nonfinite import check_finite, diverged
from lsr_scale.units import byte_size, clock


class Progress(TrainerCallback):
    """A callback that shows and records each logging step: loss, tokens/s, memory, time left. Main process only.

    Tokens/s are those of training: what saves and evaluations take is in `wall_s` and in the time left only. On every
    process it ends a run whose loss, gradient or factors are no longer finite, before such factors are saved.
    """

    def __init__(self, metrics: Path, quiet: bool = False) -> None:
        self.metrics = metrics
        self.quiet = quiet
        self.started = self.last_time = time.monotonic()
        self.last_tokens = 0.0
        self.untrained_s = 0.0  # since last_time, in saves and evaluations
        self.step_ended = self.started  # the last moment that belongs to a step
        self.first_step = 0
        # what the metrics file counts already where a run resumes: the clock and TRL's token count start again
        self.wall_s_before = self.tokens_before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks; drop recorded steps that a resumed run repeats."""
        self.first_step = state.global_step
        state.compute_steps(args, state.max_steps)  # a checkpoint's intervals would stand in place of the run's
        if state.is_world_process_zero:
            rows = truncate(self.metrics, state.global_step or -1)
            self.wall_s_before = max(finite_values(rows, "wall_s"), default=0.0)
            self.tokens_before = max(finite_values(rows, "num_tokens"), default=0.0)
        # transformers' own count is in the checkpoint
        self.last_tokens = float(state.num_input_tokens_seen)
        self.started = self.last_time = self.step_ended = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the step's time; record the last one too; refuse to save a checkpoint that no run can resume from."""
        self._end_step_time(control)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if control.should_save:
            check_finite(kwargs["model"], f"after step {state.global_step}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the time of the step that a save or an evaluation at the epoch's end waits for; refuse as after it."""
        self._end_step_time(control)
        if control.should_save:
            check_finite(kwargs["model"], f"after step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the evaluation out of the next step's time."""
        self._exclude()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the save out of the next step's time."""
        self._exclude()

    def _end_step_time(self, control: TrainerControl) -> None:
        if torch.cuda.is_available() and (control.should_save or control.should_evaluate):
            torch.cuda.synchronize()  # what the GPU still has to do is the step's, and either waits for it anyway
        self.step_ended = time.monotonic()

    def _exclude(self) -> None:
        """Take the time since the last step's end out of the next step's."""
        now = time.monotonic()
        self.untrained_s += now - self.step_ended
        self.step_ended = now

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
                raise diverged(f"{name} is {logs[name]} at step {state.global_step}")
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row["wall_s"] = round(self.wall_s_before + now - self.started, 3)
        tokens = logs.get("num_tokens", logs.get("num_input_tokens_seen", 0.0))
        if "loss" in logs and tokens > self.last_tokens:
            seconds = now - self.last_time - self.untrained_s
            row["tokens_per_s"] = round((tokens - self.last_tokens) / max(1e-9, seconds), 1)
            self.last_time, self.last_tokens, self.untrained_s = now, tokens, 0.0
            self.step_ended = now
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
            write("\n")

    def _show(self, row: dict[str, Any], state: TrainerState, now: float) -> None:
        if "loss" not in row:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k in EVALUATED)
            if shown:
                print_line(f"step {row['step']}: {shown}")
            return
        done = row["step"] - self.first_step
        left = (now - self.started) / max(1, done) * (state.max_steps - row["step"])
        speed = f"  {row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else ""
        memory = byte_size(row["memory_gib"] * 2**30)
        line = f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}{speed}  {memory}  {clock(left)} left"
        if sys.stdout.isatty():
            show_live(line)
        else:
            write(f"{line}\n")


def memory_gib() -> float:
    """Return this process's peak GPU memory in GiB, or its resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
