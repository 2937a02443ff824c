"""The section of RESULTS.md on `speed/preference.py`: steps of DPO and GRPO beside TRL's own."""

from pathlib import Path

from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import Run, where

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
    return f"{TITLES[config['case']]}: {config['model']}, {config['base'].upper()}, {size}"


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
