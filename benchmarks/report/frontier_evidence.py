"""What `lsr-scale plan --budget` reads of the frontier: `lsr_scale/planning/frontier.json`, made of the trials."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.quality.frontier import LONGEST, PACKS
from benchmarks.quality.frontier_rows import HIDDEN_SIZE, LORA_8, MODEL_NAMES, NUM_LAYERS, SIZES
from benchmarks.quality.frontier_scores import Row, Score, Suite
from benchmarks.quality.frontier_verdicts import Frontier, Verdict, compared, load, over_lower
from benchmarks.report.frontier_names import REGIME_NAMES, label

FILE = ROOT / "lsr_scale/planning/frontier.json"


def text(results: Path) -> str:
    """Return the file's text: a line a row, so that what changes is seen."""
    found = load(results)
    suites = ",\n".join(suite_text(found, suite) for suite in found.suites)
    made = "made by python -m benchmarks.report of benchmarks/results/frontier/trials.jsonl; not edited by hand"
    return f'{{"about": {json.dumps(made)},\n"suites": [{suites}]}}\n'


def suite_text(found: Frontier, suite: Suite) -> str:
    """Return a suite's part: what it is, and its sizes."""
    model, regime, base = suite
    about = {
        **{"model": MODEL_NAMES[model], "texts": REGIME_NAMES[regime], "base": base},
        **{"hidden_size": HIDDEN_SIZE[model], "num_layers": NUM_LAYERS[model], "lora_8": LORA_8[model]},
        "tokens_a_step": LONGEST * PACKS,
    }
    parts = []
    for size, group in itertools.groupby(compared(found.of(suite)), key=lambda s: s.size):
        of_size = sorted(group, key=lambda s: s.nats)
        over = over_lower(of_size)
        rows = ",\n   ".join(json.dumps(row(score, over[score.row])) for score in of_size)
        others = [one for one in found.rows_of(suite) if one.size == size and one.row not in over]
        tuned = ",\n   ".join(json.dumps(about_row(one)) for one in others if math.isfinite(one.tuned))
        head = json.dumps({"name": size, "share": SIZES[size] / LORA_8["smollm2"]})
        parts.append(f'  {head[:-1]}, "rows": [\n   {rows}], "not_compared": [{tuned}]}}')
    joined = ",\n".join(parts)
    return f'\n {json.dumps(about)[:-1]}, "sizes": [\n{joined}]}}'


def row(score: Score, over: list[Verdict]) -> dict[str, Any]:
    """Return what is told of a row: what it is, what it lost, and by how much more than each row with less."""
    numbers = {one.theirs.row: (one.difference, *one.estimate.interval, one.corrected_p) for one in over}
    return {
        **about_row(score),
        **{"nats": round(score.nats, 5), "error": round(score.error, 5), "worse_than_base": score.worse_than_base},
        "over": {name: [float(f"{number:.3g}") for number in of_one] for name, of_one in numbers.items()},
    }


def about_row(one: Row) -> dict[str, Any]:
    """Return what a row is, and what it lost where rates are chosen."""
    layers = one.options.get("layers_to_transform")
    return {
        **{"row": one.row, "label": label(one), "method": one.method},
        "options": {name: value for name, value in one.options.items() if name != "layers_to_transform"},
        "last_layers": None if layers is None else len(layers),
        **{"optimizer": one.optimizer, "parameters": one.parameters, "rate": one.rate},
        **{"tuned": round(one.tuned, 5), "seeds": one.seeds, "diverged": one.diverged},
    }
