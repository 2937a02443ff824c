"""Tables and plots from the committed measurements; nothing here is typed by hand.

    python benchmarks/report.py            write README's table, RESULTS.md and the plots beside the JSON
    python benchmarks/report.py --check    fail if any of them is not what the JSON says

The newest file of a model and a base that has 4 x 2,048 tokens is shown. A table stands in README.md between the two
markers that name it; a plot carries a digest of its rows.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import commonsense_report
import results_page
from PIL import Image

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/throughput"
PAGE = ROOT / "benchmarks/RESULTS.md"
LABELS = {
    "lsr": "**LSR-Adapt** r=16 s=16, fused",
    "lsr_held": "the same, weights held in bfloat16",
    "kron_lora": "**Kron-LoRA** r=8, fused",
    "lora": "LoRA r=16, fused by us",
    "unsloth_lora": "LoRA r=16, Unsloth",
    "peft_lora_liger": "LoRA r=16, PEFT + Liger",
    "peft_kbit_liger": "the same after `prepare_model_for_kbit_training`",
    "peft_lora": "LoRA r=16, PEFT",
    "frozen": "no adapter, fused",
    "peft_frozen_liger": "no adapter, Liger",
}
COLORS = {name: f"C{index}" for index, name in enumerate(LABELS)}
MODES = {"none": "kept", "full": "recomputed"}
TOKENS, LENGTH = 8192, 2048


def newest(model: str, base: str) -> dict[str, Any]:
    """Return the newest measurement of a model and base, its rows those of 4 x 2,048 tokens alone."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"{model}-{base}-*.json"))]
    for run in found:
        run["rows"] = [row for row in run["rows"] if (row["tokens"], row["seq_len"]) == (TOKENS, LENGTH)]
    found = [run for run in found if run["rows"]]
    if not found:
        raise SystemExit(f"no {model}-{base}-*.json in {RESULTS.relative_to(ROOT)}; run benchmarks/throughput.py")
    return max(found, key=lambda run: run["env"]["date"])


def by_provider(run: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows by provider and way of checkpointing, in the order of `LABELS`."""
    rows = {name: {row["checkpointing"]: row for row in run["rows"] if row["provider"] == name} for name in LABELS}
    return {name: modes for name, modes in rows.items() if modes}


def table(run: dict[str, Any]) -> str:
    """Return the Markdown table of one measurement."""
    config = run["config"]
    lines = [
        "| | " + " | ".join(f"{word}: tokens/s | GiB | LSR over it" for word in MODES.values()) + " |",
        "|---|" + "---:|" * 3 * len(MODES),
    ]
    providers = by_provider(run)
    for name, modes in providers.items():
        cells = [LABELS[name]]
        for mode in MODES:
            row, ours = modes.get(mode), providers["lsr"].get(mode)
            if row is None or row["status"] != "ok":
                cells += ["" if row is None else row["status"], "", ""]
                continue
            ratio = ours["tokens_per_s"] / row["tokens_per_s"] if ours and name != "lsr" else None
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['peak_memory_gib']:.1f}", f"{ratio:.2f}" if ratio else ""]
        lines.append("| " + " | ".join(cells) + " |")
    gpu, date = run["env"]["gpus"][0].removeprefix("NVIDIA "), run["env"]["date"][:10]
    where = f"{config['model']}, {config['base'].upper()}, {TOKENS // LENGTH} x {LENGTH:,} tokens, one {gpu}, {date}"
    return "\n".join([f"{where}; activations kept, or recomputed in the backward pass:", "", *lines])


def markers(name: str) -> tuple[str, str]:
    """Return what a generated part of the README begins and ends with."""
    return f"<!-- {name}: made by benchmarks/report.py -->\n", f"\n<!-- end of {name} -->"


def with_table(text: str, name: str, content: str) -> str:
    """Return the README's text with a generated part replaced."""
    begin, end = markers(name)
    before, found, rest = text.partition(begin)
    old, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md has no place for {name}: put {begin.strip()} and {end.strip()} there")
    del old
    return before + begin + content + end + after


def digest(run: dict[str, Any]) -> str:
    """Return what a plot of these rows is recognized by."""
    shown = [
        [row["provider"], row["checkpointing"], row["tokens_per_s"], row["peak_memory_gib"]] for row in run["rows"]
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def plot(run: dict[str, Any], path: Path) -> None:
    """Draw tokens/s against memory: one color a provider, filled where everything is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    providers = by_provider(run)
    for depth, (name, modes) in enumerate(providers.items()):
        points = {mode: row for mode, row in modes.items() if row["status"] == "ok" and mode in MODES}
        for mode, row in points.items():
            face = COLORS[name] if mode == "none" else "none"
            label = LABELS[name].replace("*", "").replace("`", "") if mode == "none" else None
            style = {"marker": "o", "s": 70, "facecolors": face, "edgecolors": COLORS[name], "label": label}
            style["zorder"] = 3 + len(providers) - depth  # ours on top
            axis.scatter(row["peak_memory_gib"], row["tokens_per_s"], **style)
    axis.set_xlabel("peak memory, GiB")
    axis.set_ylabel("tokens/s")
    axis.set_xlim(0)
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="lower right", title="filled: activations kept; open: recomputed")
    config = run["config"]
    gpu = run["env"]["gpus"][0].removeprefix("NVIDIA ")
    axis.set_title(f"{config['model']}, {config['base'].upper()}, {TOKENS:,} tokens a step, one {gpu}")
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Source": digest(run)})


def drawn_from(picture: Path) -> str | None:
    """Return the digest of the results that a plot was drawn from, None where there is no plot."""
    return Image.open(picture).info.get("Source") if picture.exists() else None


def main(arguments: list[str] | None = None) -> int:
    """Write everything, or with --check compare it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args(arguments).check
    run, picture = newest("mistral-7b", "nf4"), RESULTS / "mistral-7b-nf4.png"
    text = README.read_text(encoding="utf-8")
    wanted = with_table(text, "throughput", table(run))
    page, stale = results_page.page(RESULTS.parent), []
    if wanted != text:
        stale.append("README.md")
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        stale.append("benchmarks/RESULTS.md")
    pictures = {picture: (digest(run), lambda: plot(run, picture))}
    pictures |= commonsense_report.pictures(RESULTS.parent / "commonsense")
    old = [path for path, (wanted_digest, _) in pictures.items() if drawn_from(path) != wanted_digest]
    stale += [str(path.relative_to(ROOT)) for path in old]
    if check:
        for name in stale:
            print(f"{name} is not what the measurements say; run python benchmarks/report.py", file=sys.stderr)
        return int(bool(stale))
    README.write_text(wanted, encoding="utf-8")
    PAGE.write_text(page, encoding="utf-8")
    for path in old:
        pictures[path][1]()
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
