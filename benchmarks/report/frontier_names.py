"""What models, texts, rows, starts and optimizers of the frontier are called in tables and sentences."""

from collections.abc import Iterable, Sequence

from benchmarks.quality.frontier_rows import MODEL_NAMES, AdapterRow
from benchmarks.quality.frontier_scores import Row, Suite
from lsr_scale.planning.evidence import OURS

NAMES = {
    "lora": "LoRA",
    "lora_xs": "LoRA-XS",
    "slora": "SLoRA",
    "inttune": "IntTune",
    "vera": "VeRA",
    "tinylora": "TinyLoRA",
    "krona": "KronA",
    "kron_lora": "Kron-LoRA",
    "lsr": "LSR-Adapt",
}
VARIANT_NAMES = {
    "gradient": "from the gradient",
    "rite": "by LoRA-RITE",
    "pro": "by LoRA-Pro",
    "plus": "by LoRA+",
    "gradient_rite": "from the gradient, by LoRA-RITE",
}
REGIME_NAMES = {"commonsense": "five commonsense tasks", "gsm8k": "GSM8K's solutions"}


def series(adapter: Row | AdapterRow) -> str:
    """Return the line of the figure that a row belongs to: its method, SLoRA's IntTune by itself."""
    return "inttune" if adapter.options.get("train") == "middle" else adapter.method


def variant(row: str) -> str:
    """Return what the start and optimizer of a row are called by its name; nothing for the plain ones."""
    return VARIANT_NAMES.get(row.partition("+")[2], "")


def name(adapter: Row | AdapterRow, row: str) -> str:
    """Return what a row is called without its size: its method, with the start and optimizer if they are others."""
    return f"{NAMES[series(adapter)]} {variant(row)}".rstrip()


def label(row: Row) -> str:
    """Return what a row is called: its method, size, where it is, its start and optimizer if they are others."""
    options = dict(row.options)
    words = [f"r={options['rank']}"] if "rank" in options else []
    if "separation_rank" in options:
        words.append(f"s={options['separation_rank']}")
    if "left_in" in options:
        words.append(f"({options['left_in']}, {options['left_out']})")
    if "target_modules" in options:
        words.append("on " + ", ".join(name.removesuffix("_proj") for name in options["target_modules"]))
    if "layers_to_transform" in options:
        words.append(f"in the last {len(options['layers_to_transform'])} layers")
    return " ".join([NAMES[series(row)], *words, variant(row.row)]).rstrip()


def heading(suite: Suite) -> str:
    """Return what a suite is called."""
    model, regime, base = suite
    return f"{MODEL_NAMES[model]}, {REGIME_NAMES[regime]}, base in {'bf16' if base == 'none' else base}"


def by_name(pairs: Iterable[tuple[str, str]], ours: bool = True) -> str:
    """Return at which sizes each name is, our methods first; with `ours` it is said where they are at none."""
    sizes: dict[str, list[str]] = {}
    for of_row, size in pairs:
        sizes.setdefault(of_row, []).append(size)
    first = [of_row for of_row in sizes if of_row.startswith(tuple(NAMES[method] for method in OURS))]
    parts = [f"{of_row} at {listed(sizes[of_row])}" for of_row in dict.fromkeys([*first, *sizes])]
    return "; ".join(parts if first or not ours else ["LSR-Adapt and Kron-LoRA at no size", *parts])


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence has them: a, b and c."""
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last
