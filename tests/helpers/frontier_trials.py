"""Made-up trials of the frontier, as `benchmarks.quality.frontier` writes them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import trials
from benchmarks.quality.frontier_rows import ROWS, target
from benchmarks.quality.rate_trials import packed
from benchmarks.quality.trials import TUNING_SEED

TOKENS = np.array([2, 3, 4] * 100)
SUITE = ("smollm2", "commonsense", "nf4")


def made_up(
    size: str, row: str, shift: float, seeds: int = 3, rate: float = 4e-3, suite: tuple[str, str, str] = SUITE
) -> Iterator[dict[str, Any]]:
    """Yield a row's trials: what a question loses is common to all rows, and so much more a token."""
    adapter = ROWS[suite[0]][size][row]
    about: dict[str, Any] = dict(zip(("model", "regime", "base"), suite, strict=True))
    about |= {"size": size, "row": row, "rate": rate, "trainable_parameters": round(target(suite[0], size))}
    about |= {"method": adapter.method, "options": dict(adapter.options), "optimizer": adapter.optimizer}
    common = TOKENS * np.random.default_rng(7).gamma(4.0, 0.5, len(TOKENS))
    yield {**about, "seed": TUNING_SEED, "part": "dev", "nll": 2.0 + shift}
    for seed in range(seeds):
        noise = np.random.default_rng([seed, *map(ord, row)]).normal(0, 0.05, len(TOKENS))
        losses = common + TOKENS * (shift + noise)
        nll = losses.sum() / TOKENS.sum()
        yield {**about, "seed": seed, "part": "test", "nll": nll, "accuracy": 0.5, "losses": packed(losses)}


def write(folder: Path, *rows: Iterable[dict[str, Any]]) -> Path:
    """Write the trials of rows, and the bases that they are compared on, to a folder of results; return it."""
    results = [result for row in rows for result in row]
    for suite in dict.fromkeys((r["model"], r["regime"], r["base"]) for r in results):
        about = dict(zip(("model", "regime", "base"), suite, strict=True)) | {"row": "base", "part": "test"}
        content = {"answer_tokens": packed(TOKENS), "nll": 3.0, "accuracy": 0.3}
        trials.add(folder, f"{'-'.join(suite)}-base-test", {**about, **content})
    for result in results:
        end = "tune" if result["seed"] == TUNING_SEED else f"seed{result['seed']}"
        start = "-".join(result[name] for name in ("model", "regime", "base", "size", "row"))
        trials.add(folder, f"{start}-{end}-{result['rate']:g}", result)
    return folder
