"""README's tables of speed and what it says of small adapters, and GUIDE.md's table of several GPUs.

The newest file of a model and a base that has LSR-Adapt, Unsloth and PEFT + Liger at 4 x 2,048 tokens is shown. A table
stands in README.md between the two markers that name it.
"""

from pathlib import Path
from typing import Any

from benchmarks.report import eight_bit, frontier_words, grpo_words, preference, real_training
from benchmarks.report.markdown import grid, number, with_table
from benchmarks.report.measurements import LABELS, LENGTH, MODES, TOKENS, by_provider, newest_headline, read


def table(run: dict[str, Any]) -> str:
    """Return the Markdown table of one measurement."""
    config, providers = run["config"], by_provider(run)
    # whose tokens/s over each row's; in 8 bits only where that was measured
    eight_bit = {"lsr_fp8": "in FP8", "lsr_int8": "in int8"}
    ours = {"lsr": "LSR over it"} | {name: head for name, head in eight_bit.items() if name in providers}
    heads = " | ".join(["tokens/s | GiB", *ours.values()])
    lines = [
        "| | " + " | ".join(f"{word}: {heads}" for word in MODES.values()) + " |",
        "|---|" + "---:|" * (2 + len(ours)) * len(MODES),
    ]
    for name, modes in providers.items():
        cells = [LABELS[name]]
        for mode in MODES:
            row = modes.get(mode)
            if row is None or row["status"] != "ok":
                cells += ["" if row is None else row["status"], "", *[""] * len(ours)]
                continue
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['peak_memory_gib']:.1f}"]
            for own in ours:
                speed = providers[own].get(mode, {}).get("tokens_per_s")
                cells.append(f"{speed / row['tokens_per_s']:.2f}" if speed and name != own else "")
        lines.append("| " + " | ".join(cells) + " |")
    gpu, date = run["env"]["gpus"][0].removeprefix("NVIDIA "), run["env"]["date"][:10]
    where = f"{config['model']}, {config['base'].upper()}, {TOKENS // LENGTH} x {LENGTH:,} tokens, one {gpu}, {date}"
    return "\n".join([f"{where}; activations saved for the backward pass, or recomputed in it:", "", *lines])


def scaling_table(folder: Path, model: str = "mistral-7b", base: str = "nf4") -> str:
    """Return the Markdown table of the newest measurement of each number of GPUs above one; "" if there is none."""
    newest: dict[int, dict[str, Any]] = {}
    for _, run in read(folder):
        config, most = run["config"], max(row["num_gpus"] for row in run["rows"])
        if (config["model"], config["base"], config["device"]) == (model, base, "cuda") and most > 1:
            newest[most] = run  # the oldest come first
    if not newest:
        return ""
    stages = sorted({row["zero_stage"] for run in newest.values() for row in run["rows"]} - {None})
    rows = []
    for gpus, run in sorted(newest.items()):
        scaling_by_stage = {row["zero_stage"]: row["scaling"] for row in run["rows"] if row["num_gpus"] == gpus}
        card = run["env"]["gpus"][0].split()[1]
        rows.append([f"{gpus} {card}", *(number(scaling_by_stage.get(stage), ".2f") for stage in stages)])
    config = next(iter(newest.values()))["config"]
    what = f"{model}, {base.upper()}, {config['tokens']:,} tokens a GPU and step"
    table = grid(["times one GPU without DeepSpeed", *(f"`zero{stage}`" for stage in stages)], rows)
    return f"Tokens/s of the training command, {what}:\n\n{table}"


def filled(text: str, results: Path) -> str:
    """Return README's text with its tables made of the measurements in the folder of all results."""
    tables = {
        "throughput": table(newest_headline(results / "throughput")),
        "real training": real_training.newest_table(results),
        "8 bits": eight_bit.newest(results),
        "preferences": preference.newest(results),
        "reinforcement by size": grpo_words.readme(results / "grpo"),
        "by size": frontier_words.readme(results / "frontier"),
    }
    for name, content in tables.items():
        text = with_table(text, name, content)
    return text
