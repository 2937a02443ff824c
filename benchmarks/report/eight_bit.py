"""README's tables of products in 8 bits: their speed, how far they move a real model's losses, and its accuracy."""

from pathlib import Path
from typing import Any

from benchmarks.quality import fp8_accuracy, trials
from benchmarks.report import real_training
from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import LABELS, LENGTH, MODES, TOKENS, by_provider, has_headline, read
from benchmarks.speed.providers import EIGHT_BIT, bf16_of, compute_of

PEER = "unsloth_lora"


def speeds(run: dict[str, Any]) -> str:
    """Return the table of a throughput run, each provider over Unsloth's LoRA."""
    config, providers = run["config"], by_provider(run)
    body = []
    for name, modes in providers.items():
        cells = [LABELS[name]]
        for mode in MODES:
            row, peer = modes.get(mode), providers[PEER][mode]
            if row is None or row["status"] != "ok":
                cells += ["not run", "", "", ""]
                continue
            ratio = "" if name == PEER else number(row["tokens_per_s"] / peer["tokens_per_s"], ".2f")
            floor = number(row["floor_fraction"], ".2f") if row.get("floor_fraction") else ""
            cells += [number(row["tokens_per_s"]), number(row["peak_memory_gib"], ".1f"), ratio, floor]
        body.append(cells)
    heads = [f"{word}: tokens/s" if head == "tokens/s" else head for word in MODES.values() for head in _HEADS]
    gpu, date = run["env"]["gpus"][0].removeprefix("NVIDIA "), run["env"]["date"][:10]
    where = f"{config['model']}, {config['base'].upper()}, {TOKENS // LENGTH} x {LENGTH:,} tokens, one {gpu}, {date}"
    return f"{where}; activations saved or recomputed:\n\n{grid(['', *heads], body)}"


_HEADS = ("tokens/s", "GiB", "over Unsloth", "of its floor")


def differences(run: dict[str, Any]) -> str:
    """Return in a sentence how far losses lie from those of the same method in bfloat16."""
    parts = []
    for name, row in run["rows"].items():
        if row.get("loss_rms_from_bf16") is not None:
            method = "LoRA" if "lora" in bf16_of(name) else "LSR-Adapt"
            rms, mean, held_out = (
                row[key] for key in ("loss_rms_from_bf16", "loss_mean_from_bf16_last_50", "held_out_from_bf16")
            )
            parts.append(f"{method} in {compute_of(name)}: {rms:.4f}, {mean:+.4f}, {held_out:+.4f}")
    config = run["config"]
    what = f"{real_training.named(run)}, {config['steps']} steps"
    where = "the losses lie so far from bf16's, in nats (rms, mean of the last 50 steps, held-out after training)"
    return f"{what}: {where}: {'; '.join(parts)}."


def accuracies(done: dict[str, dict[str, Any]]) -> str:
    """Return the table of how far accuracies lie from those of the same adapters trained in bfloat16."""
    cells: dict[str, dict[str, str]] = {}
    for row in fp8_accuracy.summary(done):
        if row["seed"] is None:
            points = row["right"]
            sure = "" if points.low <= 0 <= points.high else ", separated"
            figures = f"{100 * points.difference:+.2f} ({100 * points.low:+.2f} to {100 * points.high:+.2f}{sure})"
            cells.setdefault(f"{row['model']}, {METHODS[row['method']]}", {})[row["compute"]] = figures
    seeds = len({result["seed"] for result in done.values() if "seed" in result})
    where = f"Points of accuracy on ARC-E, ARC-C and OpenBookQA less bf16's, {seeds} seeds (95 %):"
    body = [[name, *(row.get(compute, "") for compute in EIGHT_BIT)] for name, row in cells.items()]
    return f"{where}\n\n{grid(['', *EIGHT_BIT], body)}"


METHODS = {"lora": "LoRA", "lsr": "LSR-Adapt"}


def newest(results: Path) -> str:
    """Return the newest speeds of each model and base, losses and accuracies as Markdown; "" before there are some."""
    timed = [run for _, run in read(results / "throughput") if has_headline(run) and _in_8_bits(_names(run))]
    by_model = {(run["config"]["model"], run["config"]["base"]): run for run in timed}
    trained = [run for _, run in read(results / "real_training") if _in_8_bits(run["rows"])]
    done = trials.load(results / "fp8_accuracy")
    texts = [speeds(by_model[key]) for key in sorted(by_model, reverse=True)]
    texts += [differences(trained[-1])] if trained else []
    return "\n\n".join(texts + ([accuracies(done)] if any("method" in one for one in done.values()) else []))


def _names(run: dict[str, Any]) -> list[str]:
    return [row["provider"] for row in run["rows"] if row["status"] == "ok"]


def _in_8_bits(names: Any) -> bool:
    return any(compute_of(name) != "bf16" for name in names)
