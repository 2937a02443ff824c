"""A run's progress: a bar on the screen, or a line a logging step where that is no terminal, and `metrics.jsonl`."""

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
from lsr_scale.screen import leave_live, print_line, show_live, terminal_width, write
from lsr_scale.training.flops import utilization
from lsr_scale.training.steps.nonfinite import check_finite, diverged
from lsr_scale.units import byte_size, clock

_SHOWN_EVERY_S = 0.1  # on a terminal
_SHORTEST_BAR = 4


class Progress(TrainerCallback):
    """A callback that shows and records each logging step: loss, tokens/s, MFU, memory, time left. Main process only.

    What it measures goes into the logs too, for the callbacks after it, which report them. Tokens/s are those of
    training: what saves and evaluations take is in `wall_s` and in the time left only. On every
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
        self.wall_s_before = 0.0  # what the metrics file has already where a run resumes: the clock starts again
        self.utilization: float | None = None  # MFU of one token a second, where it is known
        self.last_row: dict[str, Any] = {}
        self.last_shown = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks; drop recorded steps that a resumed run repeats."""
        self.first_step = state.global_step
        state.compute_steps(args, state.max_steps)  # a checkpoint's intervals would stand in place of the run's
        if state.is_world_process_zero:
            rows = truncate(self.metrics, state.global_step or -1)
            self.wall_s_before = max(finite_values(rows, "wall_s"), default=0.0)
            if "model" in kwargs:
                rows = getattr(kwargs.get("train_dataloader"), "dataset", None)
                self.utilization = utilization(kwargs["model"], rows)
        self.last_tokens = float(state.num_input_tokens_seen)
        self.started = self.last_time = self.step_ended = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the step's time; record the last one too; refuse to save a checkpoint that no run can resume from."""
        self._end_step_time(control)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if control.should_save:
            check_finite(kwargs["model"], f"after step {state.global_step}")
        if state.is_world_process_zero and not self.quiet and self.step_ended - self.last_shown > _SHOWN_EVERY_S:
            self._show_live(state, self.step_ended)

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
        logs.pop("eval_num_tokens", None)  # TRL's count of those trained on, which lacks what the fused head counts
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row["wall_s"] = round(self.wall_s_before + now - self.started, 3)
        tokens = logs.get("num_tokens", logs.get("num_input_tokens_seen", 0.0))
        if "loss" in logs and tokens > self.last_tokens:
            seconds = now - self.last_time - self.untrained_s
            speed = (tokens - self.last_tokens) / max(1e-9, seconds)
            row["tokens_per_s"] = round(speed, 1)
            if self.utilization is not None:
                row["mfu"] = round(speed * self.utilization, 4)
            self.last_time, self.last_tokens, self.untrained_s = now, tokens, 0.0
            self.step_ended = now
        row["memory_gib"] = round(memory_gib(), 3)
        row |= {name: value for name, value in logs.items() if name != "epoch" and not name.startswith("train_")}
        if "loss" in row:
            logs |= {name: value for name, value in row.items() if name not in ("step", "epoch")}
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if not self.quiet:
            self._show(row, state, now)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the live line standing."""
        if not self.quiet and state.is_world_process_zero:
            leave_live()

    def _show(self, row: dict[str, Any], state: TrainerState, now: float) -> None:
        if "loss" not in row:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k in EVALUATED)
            if shown:
                print_line(f"step {row['step']}: {shown}")
            return
        self.last_row = row
        if sys.stdout.isatty():
            self._show_live(state, now)
        else:
            write(f"step {'  '.join(self._parts(state, now))}\n")

    def _show_live(self, state: TrainerState, now: float) -> None:
        """Show how far it is, with what the last logging step measured; a bar fills what the line leaves free."""
        self.last_shown = now
        line = "  ".join(self._parts(state, now)).replace(" tokens/s", " tok/s").replace(" %", "%")
        growth = len(str(state.max_steps)) - len(str(state.global_step))  # or the bar would jump
        size = min(30, terminal_width() - 1 - len(line) - growth - len("[] "))
        if size < _SHORTEST_BAR:
            show_live(f"step {line}")
            return
        done = round(size * state.global_step / max(1, state.max_steps))
        show_live(f"[{'#' * done}{'.' * (size - done)}] {line}")

    def _parts(self, state: TrainerState, now: float) -> list[str]:
        row, done = self.last_row, state.global_step - self.first_step
        parts = [f"{state.global_step}/{state.max_steps}"]
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "reward" in row:  # of GRPO, whose loss begins at 0 in every step
            parts.append(f"reward {row['reward']:.3g}")
        if "tokens_per_s" in row:
            parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in row:
            percent = 100 * row["mfu"]
            parts.append(f"MFU {percent:.0f} %" if percent >= 1 else "MFU <1 %")
        if "memory_gib" in row:
            parts.append(byte_size(row["memory_gib"] * 2**30))
        left = (now - self.started) / max(1, done) * max(0, state.max_steps - state.global_step)
        return [*parts, f"{clock(left)} left"]


def memory_gib() -> float:
    """Return this process's peak GPU memory in GiB, or its resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30
