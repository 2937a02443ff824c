"""`benchmarks/LEADERBOARD.md`: the headline figures with card, commit and date, from the JSON under `results/`.

    python -m benchmarks.report            writes it, with RESULTS.md and README's tables
    make headline                          measures the first table's rows again, on a machine with a GPU

Every row is a ratio of two figures of one run. Older runs stay below newer ones, so that a lost gain is seen.
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.quality import commonsense, commonsense_methods
from benchmarks.report import commonsense_tables
from benchmarks.report.markdown import grid
from benchmarks.report.measurements import LABELS, MODES, Run, read, sweeps

HEAD = """# Leaderboard

Made by `python -m benchmarks.report` from the JSON under `results/`; not edited by hand. All figures: `RESULTS.md`.
`make headline` measures the first table anew. A commit with a + had changes that were committed after it.
"""
ENDINGS = ("_graphs_fp8", "_graphs_int8", "_fp8", "_int8", "")
OURS = tuple(f"{method}{ending}" for ending in ENDINGS for method in ("lsr", "kron_lora", "lora"))
PEERS = {"unsloth_lora": "Unsloth's LoRA", "peft_lora_liger": "PEFT + Liger's LoRA"}


def made_with(env: dict[str, Any]) -> list[str]:
    """Return a run's card, commit and date; the commit's "+" says that uncommitted changes were measured."""
    gpus = env.get("gpus") or [env["cpu"]]
    words = gpus[0].removeprefix("NVIDIA ").split(",")[0].removesuffix(" 80GB HBM3")
    card = f"{len(gpus)} {words}" if env.get("gpus") and len(gpus) > 1 else words
    commit, _, changed = (env.get("commit") or "unknown").partition("+")
    return [card, f"`{commit[:8]}`{'+' if changed else ''}", str(env.get("date", ""))[:10]]


def speed(runs: list[tuple[Path, Run]]) -> str:
    """Return each run's steps of our methods beside those of peers in the same run, the newest run first."""
    rows = []
    for _, run in reversed(runs):
        if sweeps(run) or run["config"].get("memory_gib"):
            continue
        done = {(row["provider"], row["checkpointing"]): row for row in run["rows"] if row["status"] == "ok"}
        for mode, word in MODES.items():
            peers = {name: done[name, mode] for name in PEERS if (name, mode) in done}
            for name in OURS:
                row = done.get((name, mode))
                if row is None or not peers:
                    continue
                ratios = [
                    f"{row['tokens_per_s'] / peers[peer]['tokens_per_s']:.2f}" if peer in peers else ""
                    for peer in PEERS
                ]
                label = LABELS[name].replace("*", "").partition(",")[0]
                what = f"{label}, {run['config']['model']}, {run['config']['base']}"
                figures = [f"{row['tokens_per_s']:,.0f}", f"{row['peak_memory_gib']:.1f}"]
                rows.append([what, word, *figures, *ratios, *made_with(run["env"])])
    head = ["training step", "activations", "tokens/s", "GiB", *(f"over {peer}" for peer in PEERS.values())]
    return grid([*head, "card", "commit", "date"], rows)


def scaling(runs: list[tuple[Path, Run]]) -> str:
    """Return what several GPUs make of one GPU's tokens/s, the newest run first."""
    rows = []
    for _, run in reversed(runs):
        for row in run["rows"]:
            if run["config"]["device"] == "cuda" and row["num_gpus"] > 1 and row["status"] == "ok":
                what = f"{run['config']['model']}, {run['config']['base']}, `zero{row['zero_stage']}`"
                rows.append([what, f"{row['scaling']:.2f}", *made_with(run["env"])])
    return grid(["the training command", "times one GPU", "cards", "commit", "date"], rows)


def accuracy(folder: Path) -> str:
    """Return the mean accuracies of the joint comparison, the best first."""
    results = commonsense_tables.load(folder)
    rows = []
    for name in commonsense_tables.HEADLINE:
        seeds = list(commonsense_tables.seeds_of(results, "joint", "bf16", name).values())
        if seeds:
            mean = statistics.fmean(commonsense.mean_accuracy(result) for result in seeds)
            label = commonsense_methods.LABELS[name].replace("*", "")
            env = max((result["env"] for result in seeds), key=lambda env: str(env.get("date", "")))
            rows.append(
                [label, f"{seeds[0]['trainable_parameters']:,}", f"{mean:.2f}", str(len(seeds)), *made_with(env)]
            )
    rows.sort(key=lambda row: -float(row[2]))
    head = ["SmolLM2-135M, five tasks", "parameters", "mean accuracy, %", "seeds", "card", "commit", "date"]
    return grid(head, rows)


def page(results: Path) -> str:
    """Return the page.

    Args:
        results: The folder of all results.
    """
    parts = [
        HEAD.strip(),
        "## Speed\n\nMore than 1 is faster than the peer.",
        speed(read(results / "throughput")),
        "## Several GPUs",
        scaling(read(results / "scaling")),
        "## Accuracy",
        accuracy(results / "commonsense"),
    ]
    return "\n\n".join(parts) + "\n"
