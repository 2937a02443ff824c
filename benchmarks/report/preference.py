"""What RESULTS.md and README.md say of `speed/preference.py`: steps of DPO and GRPO beside TRL's own."""

from pathlib import Path
from typing import Any

from benchmarks.quality.frontier_rows import MODEL_NAMES
from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import Run, read, where

LABELS = {
    "lsr": "**LSR-Adapt** r=16 s=16, a run's trainer",
    "lsr_fp8": "LSR-Adapt r=16 s=16, a run's trainer with `compute: fp8`",
    "lora": "LoRA r=16, a run's trainer",
    "trl_lora_liger": "LoRA r=16, TRL + PEFT + Liger",
    "trl_lora": "LoRA r=16, TRL + PEFT",
}
MODES = {"none": "saved, weights cached", "saved": "saved", "full": "recomputed"}
TITLES = {"dpo": "DPO", "grpo": "GRPO"}


def heading(run: Run) -> str:
    """Return what a file measures."""
    config = run["config"]
    of_case = {
        "dpo": "{pairs} pairs of 2 x {length:,} tokens a step",
        "grpo": "{prompts} prompts x {completions} completions of at most {new_tokens} tokens a step",
    }
    size = of_case[config["case"]].format(**config)
    model = MODEL_NAMES.get(config["model"], config["model"])
    return f"{TITLES[config['case']]}: {model}, {config['base'].upper()}, {size}"


def table(run: Run) -> str:
    """Return a file's rows, each trainer of ours with its ratio over each of TRL's."""
    dpo = run["config"]["case"] == "dpo"
    peers = list(dict.fromkeys(one["over"] for one in run["ratios"]))
    body = []
    for row in run["rows"]:
        name = f"{LABELS[row['trainer']]}; activations {_mode(row)}"
        ratios = {one["over"]: one for one in run["ratios"] if (one["trainer"], one["mode"]) == _of(row)}
        if row["status"] != "ok":
            body.append([name, row["status"], *[""] * ((2 if dpo else 5) + 2 * len(peers))])
            continue
        cells = [number(row["step_s"], ".3f")]
        if dpo:
            cells.append(number(row["tokens_per_s"]))
        else:
            cells += [number(row[part], ".2f") for part in ("generation_s", "scoring_s", "training_s")]
            cells.append(number(row["completion_tokens"]))
        cells.append(number(row["peak_memory_gib"], ".1f"))
        for peer in peers:
            cells += [number(ratios.get(peer, {}).get(name), ".2f") for name in ("speed", "memory")]
        body.append([name, *cells])
    parts = ["tokens/s"] if dpo else ["generation", "rewards", "training", "tokens of a completion"]
    over = [f"{what} over {peer}" for peer in peers for what in ("speed", "memory")]
    return grid(["", "s a step", *parts, "GiB", *over], body)


def _mode(row: dict[str, str]) -> str:
    return MODES["saved" if row["mode"] == "none" and row["trainer"].startswith("trl") else row["mode"]]


def _of(row: dict[str, str]) -> tuple[str, str]:
    return row["trainer"], row["mode"]


def section(path: Path, run: Run) -> str:
    """Return one measurement of the page: its heading, machine, table and command."""
    machine = f"{where(run, path)} TRL {run['env']['trl']}. Medians of {run['config']['rounds']} turns."
    return "\n\n".join([f"### {heading(run)}", machine, table(run), f"    {run['command']}"])


def newest(results: Path) -> str:
    """Return README's table: the newest measurement of each case and mode in which all turns were made."""
    found: dict[tuple[str, str], tuple[Run, list[dict[str, Any]]]] = {}
    for _, run in read(results / "preference"):
        for mode in dict.fromkeys(row["mode"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["mode"] == mode]
            whole = [row["status"] == "ok" and len(row["turns"]) == run["config"]["rounds"] for row in rows]
            if all(whole) and any(one["mode"] == mode for one in run["ratios"]):
                found[run["config"]["case"], mode] = run, rows  # the oldest come first
    body = []
    for run, rows in sorted(found.values(), key=lambda one: one[0]["config"]["case"]):
        of_trainer = {row["trainer"]: row for row in rows}
        for one in run["ratios"]:
            mine, peer = of_trainer.get(one["trainer"]), of_trainer.get(one["over"])
            if mine is None or peer is None or one["mode"] != mine["mode"]:
                continue
            label = LABELS[one["trainer"]].replace(", a run's trainer", "")
            name = f"{TITLES[run['config']['case']]}, activations {_mode(mine)}: {label}"
            cells = [name, number(mine["step_s"], ".2f"), number(mine["peak_memory_gib"], ".1f")]
            cells += [LABELS[one["over"]].removeprefix("LoRA r=16, "), number(peer["step_s"], ".2f")]
            body.append([*cells, number(one["speed"], ".2f"), number(one["memory"], ".2f")])
    cards = {run["env"]["gpus"][0].removeprefix("NVIDIA ") for run, _ in found.values()}
    what = "; ".join(sorted({heading(run) for run, _ in found.values()}))
    table = grid(["", "s a step", "GiB", "LoRA r=16 by", "s a step", "times as fast", "memory of it"], body)
    return f"{what}; one {' or '.join(sorted(cards))}:\n\n{table}"
