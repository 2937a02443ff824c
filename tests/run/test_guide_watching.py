"""GUIDE's example of what a run watches itself with is run as it stands there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_runs import completions, do, results, save_llama, tiny_run, write_rows

GUIDE = (Path(__file__).parents[2] / "GUIDE.md").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_the_example_of_what_is_watched_runs(tmp_path):
    section = GUIDE.partition("**While it trains.**")[2]
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, re.DOTALL)[1])
    assert set(given) == {"data", "eval", "training"}
    save_llama(tmp_path / "model")
    rows = [{**row, "prompt": f"{n} {row['prompt']}"} for n, row in enumerate(completions(40))]
    given["data"]["train"] = [write_rows(tmp_path / "many.jsonl", rows)]
    given["eval"] |= {"tasks": []}
    given["training"] |= {"save_steps": 0.1}
    folder = do(tiny_run(tmp_path, **given))
    samples = [json.loads(line) for line in folder.samples.read_text().splitlines()]
    assert {row["prompt"] for row in samples} == {"What cuts bread?"}
    assert {row["moment"] for row in samples} == {"before", "evaluation", "after"}
    assert list(folder.tensorboard.iterdir())
    assert results(folder)["best_step"] >= 1
    assert results(folder)["train_rows"] < 40
