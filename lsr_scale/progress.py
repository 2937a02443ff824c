"""What a run says while it trains: a live line on the screen, `metrics.jsonl` on disk, the loss curve at the end."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):
    """A callback that prints and records each logging step: loss, tokens/s, memory, time left. Main process only."""

    def __init__(self, metrics: Path, quiet: bool = False) -> None:
        self.metrics = metrics
        self.quiet = quiet
        self.started = self.last_time = time.monotonic()
        self.last_tokens = 0.0
        self.first_step = 0
        self.live = sys.stdout.isatty()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks; drop recorded steps that a resumed run does again."""
        self.started = self.last_time = time.monotonic()
        self.first_step = state.global_step
        if state.is_world_process_zero:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_metrics(self.metrics) if row["step"] <= state.global_step]
            self.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept if state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record one logging step."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        now = time.monotonic()
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row["wall_s"] = round(now - self.started, 3)
        tokens = logs.get("num_tokens", logs.get("num_input_tokens_seen", 0.0))
        if "loss" in logs and tokens > self.last_tokens:
            row["tokens_per_s"] = round((tokens - self.last_tokens) / max(1e-9, now - self.last_time), 1)
            self.last_time, self.last_tokens = now, tokens
        row["memory_gib"] = round(memory_gib(), 3)
        row |= {name: value for name, value in logs.items() if name != "epoch"}
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if not self.quiet:
            self._show(row, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the live line standing."""
        if self.live and not self.quiet and state.is_world_process_zero:
            print(flush=True)

    def _show(self, row: dict[str, Any], state: TrainerState) -> None:
        if "loss" not in row:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k == "eval_loss")
            if shown:
                print(f"{'' if not self.live else chr(10)}step {row['step']}: {shown}", flush=True)
            return
        done = row["step"] - self.first_step
        left = row["wall_s"] / max(1, done) * (state.max_steps - row["step"])
        speed = f"{row.get('tokens_per_s', 0):,.0f} tokens/s"
        memory = f"{row['memory_gib']:.1f} GiB"
        line = f"step {row['step']}/{state.max_steps}  loss {row['loss']:.4f}  {speed}  {memory}  {clock(left)} left"
        print(f"\r\x1b[2K{line}" if self.live else line, end="" if self.live else "\n", flush=True)


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
    """Return the rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training (and evaluation) loss over the steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, label=label, alpha=0.35 if len(values) > 20 else 1.0, color="C0")
        if len(values) > 20:
            width = max(2, len(values) // 10)
            means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
            axes.plot(steps, means, color="C0", label=f"{label}, mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    # no date or version in the file: the same run draws the same bytes
    figure.savefig(picture, metadata={"Software": None})
    pyplot.close(figure)
