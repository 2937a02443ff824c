"""Table and plot of `speed/real_training.py`: a real model beside Unsloth and PEFT, its losses beside float32's."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import Run, read
from benchmarks.report.plots import Plot, rows_digest
from benchmarks.speed.providers import bf16_of, compute_of

LABELS = {
    "lora_graphs": "LoRA r=16 with us, as `lsr-scale train` runs it",
    "lora": "the same without CUDA graphs",
    "unsloth_lora": "LoRA r=16, Unsloth",
    "peft_lora_liger": "LoRA r=16, PEFT + Liger",
    "peft_lora": "LoRA r=16, PEFT",
    "peft_lora_float32": "LoRA r=16 computed in float32: the reference",
    "lsr_graphs": "LSR-Adapt r=16 s=16 with us",
    "lora_graphs_fp8": "LoRA r=16 with us in FP8",
    "lora_graphs_int8": "LoRA r=16 with us in int8",
    "lora_fp8": "LoRA r=16 with us in FP8, without CUDA graphs",
    "lora_int8": "LoRA r=16 with us in int8, without CUDA graphs",
    "lsr_graphs_fp8": "LSR-Adapt r=16 s=16 with us in FP8",
    "lsr_graphs_int8": "LSR-Adapt r=16 s=16 with us in int8",
    "kron_lora_graphs_fp8": "Kron-LoRA r=8 with us in FP8",
    "kron_lora_graphs_int8": "Kron-LoRA r=8 with us in int8",
    "lsr": "LSR-Adapt r=16 s=16 with us, without CUDA graphs",
    "lsr_fp8": "LSR-Adapt r=16 s=16 with us in FP8, without CUDA graphs",
    "lsr_int8": "LSR-Adapt r=16 s=16 with us in int8, without CUDA graphs",
    "kron_lora": "Kron-LoRA r=8 with us, without CUDA graphs",
    "kron_lora_fp8": "Kron-LoRA r=8 with us in FP8, without CUDA graphs",
    "kron_lora_int8": "Kron-LoRA r=8 with us in int8, without CUDA graphs",
    "kron_lora_graphs": "Kron-LoRA r=8 with us",
}
REFERENCE = "peft_lora_float32"
SMOOTHED = 8  # steps


def named(run: Run) -> str:
    """Return the model, its base and the data."""
    config = run["config"]
    return f"{config['model']}, {config['base'].upper()}, {config['data'].upper()}"


def table(run: Run) -> str:
    """Return a run's Markdown table."""
    rows, config = run["rows"], run["config"]
    ours = rows.get("lora_graphs", {}).get("tokens_per_s")
    in_8_bits = any("loss_rms_from_bf16" in row for row in rows.values())
    body = []
    for name, row in rows.items():
        if row["status"] != "ok":
            body.append([LABELS[name], row["status"], *[""] * (6 if in_8_bits else 4)])
            continue
        ratio = "" if name == "lora_graphs" or not ours else number(ours / row["tokens_per_s"], ".2f")
        rms = row.get("loss_rms_from_float32")
        shown = "" if rms is None or name == REFERENCE else number(rms, ".4f")
        speed, memory = number(row["tokens_per_s"]), number(row["peak_memory_gib"], ".1f")
        body.append([LABELS[name], speed, ratio, memory, number(row["held_out_loss_after"], ".4f"), shown])
        if in_8_bits:
            body[-1] += [
                number(row.get("loss_rms_from_bf16"), ".4f"),
                number(row.get("loss_mean_from_bf16_last_50"), "+.4f"),
            ]
    gpu = run["env"]["gpus"][0].removeprefix("NVIDIA ")
    tokens = config["rows"] * config["length"]
    what = (
        f"{named(run)}: the real weights, {config['steps']} steps of {tokens:,} tokens, answers supervised, the same "
        f"batches and first factors for all, one {gpu}:"
    )
    head = ["", "tokens/s", "ours over it", "GiB", "held-out loss", "rms from float32's curve"]
    if in_8_bits:
        head += ["rms from bf16's", "mean from bf16's, last 50"]
    return f"{what}\n\n{grid(head, body)}"


def draw(run: Run, path: Path) -> None:
    """Draw the losses over the time that they took, one curve a provider."""
    pairs = bf16_pairs(run)
    if pairs:
        figure, (axis, below) = pyplot.subplots(2, 1, figsize=(8, 7), height_ratios=(3, 2))
        draw_differences(below, pairs)
    else:
        figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for name, row in run["rows"].items():
        replayed = f"{bf16_of(name)}_graphs{name.removeprefix(bf16_of(name))}"
        if row["status"] != "ok" or replayed in run["rows"]:  # the same curve
            continue
        usual = statistics.median(row["step_ms"]) / 1e3  # without compilation and a first turn's captures
        seconds = list(itertools.accumulate(usual for _ in row["losses"]))
        losses = row["losses"]
        style: dict[str, Any] = {"color": "black", "linestyle": ":"} if name == REFERENCE else {"linewidth": 1.6}
        axis.plot(seconds, smoothed(losses), label=LABELS[name].replace("`", ""), **style)
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


def smoothed(losses: list[float]) -> list[float]:
    """Return the mean of each step and those before it, `SMOOTHED` in all."""
    return [statistics.fmean(losses[max(0, end - SMOOTHED) : end]) for end in range(1, len(losses) + 1)]


def bf16_pairs(run: Run) -> dict[str, list[float]]:
    """Return the losses of each provider in FP8 or int8 minus those of the same in bfloat16, step by step."""
    rows = {name: row["losses"] for name, row in run["rows"].items() if row["status"] == "ok"}
    eight_bit = [name for name in rows if compute_of(name) != "bf16" and bf16_of(name) in rows]
    return {name: [a - b for a, b in zip(rows[name], rows[bf16_of(name)], strict=True)] for name in eight_bit}


def draw_differences(axis: Any, pairs: dict[str, list[float]]) -> None:
    """Draw each difference, step by step and smoothed."""
    for index, (name, differences) in enumerate(pairs.items()):
        steps = range(1, len(differences) + 1)
        axis.plot(steps, differences, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(differences), color=f"C{index}", label=LABELS[name].replace("`", ""))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("minus bf16, nats")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


def digest(run: Run) -> str:
    """Return what a plot of this run is recognized by."""
    shown = ("losses", "step_ms")
    return rows_digest([[name, *(row.get(key) for key in shown)] for name, row in run["rows"].items()])


def plots(results: Path) -> dict[Path, Plot]:
    """Return the plot of every run."""
    runs: dict[Path, Any] = {path.with_suffix(".png"): run for path, run in read(results / "real_training")}
    return {path: Plot(digest(run), lambda target, run=run: draw(run, target)) for path, run in runs.items()}


def newest_table(results: Path) -> str:
    """Return the table of the newest run that has the reference."""
    return table([run for _, run in read(results / "real_training") if REFERENCE in run["rows"]][-1])


def sections(results: Path) -> list[str]:
    """Return a section of RESULTS.md for every run."""
    found = read(results / "real_training")
    texts = [
        f"{table(run)}\n\n    {run['command']}\n\n![losses](results/real_training/{path.stem}.png)"
        for path, run in found
    ]
    return ["## A real model beside its peers", *texts] if texts else []
