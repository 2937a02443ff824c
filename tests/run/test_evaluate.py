"""Evaluating a saved run again: as it was scored after training, fused where its training was."""

import json

import pytest

from lsr_scale.run import evaluate
from lsr_scale.run.evaluate import evaluate_run
from tests.helpers.tiny_runs import do, save_llama, tiny_run


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_run_is_scored_again_as_its_training_computed(fused, tmp_path, monkeypatch):
    reports, fuse = [], evaluate.fuse
    monkeypatch.setattr(evaluate, "fuse", lambda model: reports.append(fuse(model)))
    save_llama(tmp_path / "model", num_hidden_layers=2)
    folder = do(tiny_run(tmp_path, training={"fused": fused, "max_steps": 2}))
    again = evaluate_run(str(folder.path))["accuracy"]["questions"]["adapter"]
    after = json.loads(folder.results.read_text())["accuracy"]["questions"]["after"]
    assert again["accuracy"] == after["accuracy"]
    assert [len(report.fused) for report in reports] == ([2] if fused == "on" else [])
    scored = [
        [json.loads(line)["log_likelihoods"] for line in folder.predictions("questions", when).read_text().splitlines()]
        for when in ("after", "eval-adapter")
    ]
    assert scored[0] == scored[1]
