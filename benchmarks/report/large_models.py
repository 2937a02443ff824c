"""What GUIDE.md says of bases larger than a GPU that were trained for real (`robustness/large_model.py`)."""

from pathlib import Path

from benchmarks.models import MODELS
from benchmarks.report.markdown import grid
from benchmarks.report.measurements import Run, read

NOTHING = "None was run: `python -m benchmarks.robustness.large_model --gpus 2 --card-gib 24 --out NAME.json` does it."


def guide(results: Path) -> str:
    """Return a line a run, the oldest first; without any, how one is made."""
    rows = [_row(run) for _, run in read(results / "large_model")]
    if not rows:
        return NOTHING
    head = ["run, `zero3`", "tokens/s", "peak, GiB", "by `plan`", "start, s", "killed and resumed"]
    return "\n\n".join(["Random weights, activations recomputed, as many GPUs as processes:", grid(head, rows)])


def _row(run: Run) -> list[str]:
    config, whole, plan = run["config"], run["whole"], run["plan"]
    cards = (run["env"].get("gpus") or ["CPU"])[0].removeprefix("NVIDIA ")
    held = f" held to {config['card_gib']:g} GiB" if config["card_gib"] else ""
    layers = f", {config['layers']} layers" if config["layers"] else ""
    model = MODELS.get(config["model"], config["model"]).rpartition("/")[2]
    what = f"{model}{layers}, weights on disk in {config['stored']}, {config['gpus']} {cards}{held}, "
    return [
        f"{what}{config['seq_len']:,} tokens each",
        f"{whole['tokens_per_s']:,.0f}",
        f"{max(whole['peak_gib']):.2f}" if whole["peak_gib"] else "",
        f"{max(plan['total_gib'], plan['loading_gib']):.2f}",
        f"{whole['start_and_end_s']:.0f}",
        _resumed(run),
    ]


def _resumed(run: Run) -> str:
    if "same_adapter" not in run:
        return "not run"
    return f"after step {run['killed_at']}: {'the same adapter' if run['same_adapter'] else '**another adapter**'}"
