"""Table and plot of `speed/real_training.py`: a real model beside Unsloth and PEFT, its losses beside float32's."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import Run, read
from benchmarks.report.plots import Plot, rows_digest

LABELS = {
    "lora_graphs": "LoRA r=16 with us, as `lsr-scale train` runs it",
    "lora": "the same without CUDA graphs",
    "unsloth_lora": "LoRA r=16, Unsloth",
    "peft_lora_liger": "LoRA r=16, PEFT + Liger",
    "peft_lora": "LoRA r=16, PEFT",
    "peft_lora_float32": "LoRA r=16 computed in float32: the reference",
    "lsr_graphs": "LSR-Adapt r=16 s=16 with us",
    "kron_lora_graphs": "Kron-LoRA r=8 with us",
}
SMOOTHED = 8  # steps


def named(run: Run) -> str:
    """Return the model, its base and the data."""
    config = run["config"]
    return f"{config['model']}, {config['base'].upper()}, {config['data'].upper()}"


def table(run: Run) -> str:
    """Return a run's Markdown table."""
    rows, config = run["rows"], run["config"]
    ours = rows["lora_graphs"]["tokens_per_s"]
    body = []
    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([LABELS[name], row["status"], *[""] * 4])
            continue
        ratio = "" if name == "lora_graphs" else number(ours / row["tokens_per_s"], ".2f")
        rms = row.get("loss_rms_from_float32")
        shown = "" if rms is None or name == "peft_lora_float32" else number(rms, ".4f")
        speed, memory = number(row["tokens_per_s"]), number(row["peak_memory_gib"], ".1f")
        body.append([LABELS[name], speed, ratio, memory, number(row["held_out_loss_after"], ".4f"), shown])
    gpu = run["env"]["gpus"][0].removeprefix("NVIDIA ")
    tokens = config["rows"] * config["length"]
    what = (
        f"{named(run)}: the real weights, {config['steps']} steps of {tokens:,} tokens, answers supervised, the same "
        f"batches and first factors for all, one {gpu}:"
    )
    head = ["", "tokens/s", "ours over it", "GiB", "held-out loss", "rms from float32's curve"]
    return f"{what}\n\n{grid(head, body)}"


def draw(run: Run, path: Path) -> None:
    """Draw the losses over the time that they took, one curve a provider."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for name, row in run["rows"].items():
        if row["status"] != "ok" or name == "lora":
            continue
        usual = statistics.median(row["step_ms"]) / 1e3  # without compilation and a first turn's captures
        seconds = list(itertools.accumulate(usual for _ in row["losses"]))
        losses = row["losses"]
        smooth = [statistics.fmean(losses[max(0, end - SMOOTHED) : end]) for end in range(1, len(losses) + 1)]
        style = {"color": "black", "linestyle": ":"} if name == "peft_lora_float32" else {"linewidth": 1.6}
        axis.plot(seconds, smooth, label=LABELS[name].replace("`", ""), **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("seconds of training at the median step's time")
    axis.set_ylabel(f"loss, nats per token ({SMOOTHED} steps' mean)")
    gpu = run["env"]["gpus"][0].removeprefix("NVIDIA ")
    axis.set_title(
        f"{run['config']['model']}, {run['config']['base'].upper()}, {run['config']['data'].upper()}, one {gpu}"
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Source": digest(run)})
    pyplot.close(figure)


def digest(run: Run) -> str:
    """Return what a plot of this run is recognized by."""
    shown = ("losses", "step_ms")
    return rows_digest([[name, *(row.get(key) for key in shown)] for name, row in run["rows"].items()])


def plots(results: Path) -> dict[Path, Plot]:
    """Return the plot of every run."""
    runs: dict[Path, Any] = {path.with_suffix(".png"): run for path, run in read(results / "real_training")}
    return {path: Plot(digest(run), lambda target, run=run: draw(run, target)) for path, run in runs.items()}


def newest_table(results: Path) -> str:
    """Return the table of the newest run."""
    return table(read(results / "real_training")[-1][1])


def sections(results: Path) -> list[str]:
    """Return a section of RESULTS.md for every run."""
    found = read(results / "real_training")
    texts = [
        f"{table(run)}\n\n    {run['command']}\n\n![losses](results/real_training/{path.stem}.png)"
        for path, run in found
    ]
    return ["## A real model beside its peers", *texts] if texts else []
