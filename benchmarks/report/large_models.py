"""What GUIDE.md says of bases larger than a GPU that were trained for real (`robustness/large_model.py`)."""

from pathlib import Path

from benchmarks.models import MODELS
from benchmarks.report.markdown import grid
from benchmarks.report.measurements import Run, read
from lsr_scale.units import amount

NOTHING = "None was run: `python -m benchmarks.robustness.large_model --gpus 2 --card-gib 24 --out NAME.json` does it."

ABOUT = "Random weights, activations recomputed. Where processes share a GPU, tokens/s are not those of as many cards:"


def guide(results: Path) -> str:
    """Return a line a run, the oldest first; without any, how one is made."""
    rows = [_row(run) for _, run in read(results / "large_model")]
    if not rows:
        return NOTHING
    head = ["run, `zero3`", "tokens/s", "peak, GiB", "by `plan`", "start, s", "killed and resumed"]
    return "\n\n".join([ABOUT, grid(head, rows)])


def _row(run: Run) -> list[str]:
    config, whole, plan = run["config"], run["whole"], run["plan"]
    held = f" held to {config['card_gib']:g} GiB" if config["card_gib"] else ""
    layers = f", {config['layers']} layers" if config["layers"] else ""
    model = str(MODELS.get(config["model"]) or config["model"]).rpartition("/")[2]
    what = f"{model}{layers}, weights on disk in {config['stored']}, {_cards(run)}{held}, "
    return [
        f"{what}{config['seq_len']:,} tokens each",
        f"{whole['tokens_per_s']:,.0f}",
        f"{max(whole['peak_gib']):.2f}" if whole["peak_gib"] else "",
        f"{max(plan['total_gib'], plan['loading_gib']):.2f}",
        f"{whole['start_and_end_s']:.0f}",
        _resumed(run),
    ]


def _cards(run: Run) -> str:
    """Return how many processes had which GPUs; several may share one, which is then no measure of their speed."""
    names, number = run["env"].get("gpus") or [], run["config"]["gpus"]
    if not names:
        return amount(number, "CPU process")
    card = names[0].removeprefix("NVIDIA ")
    return f"{number} {card}" if len(names) >= number else f"{number} processes that share {len(names)} {card}"


def _resumed(run: Run) -> str:
    if "same_adapter" not in run:
        return "not run"
    return f"after step {run['killed_at']}: {'the same adapter' if run['same_adapter'] else '**another adapter**'}"
