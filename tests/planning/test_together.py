"""What trials that share a step take: the base once, and each its rows and its adapter."""

import json

import pytest
import yaml

from lsr_scale.cli import main
from lsr_scale.config.trials import sweep_from_dict
from lsr_scale.planning.together import plan_together

RUN = {
    "model": {"name": "builtin:smollm2-135m-instruct"},
    "adapter": {"method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train": ["builtin:commonsense"]},
    "training": {"max_length": 64, "per_device_train_batch_size": 2},
}
SECTION = {"grid": {"adapter.rank": [2, 16, 8]}}


@pytest.fixture(scope="module")
def planned():
    return plan_together(sweep_from_dict({**RUN, "sweep": SECTION}))


def test_the_largest_trial_is_planned(planned):
    assert planned.trial == "rank=16"
    assert planned.one.trainable_parameters == max(16 * (576 + out) for out in (576,)) * 30 + 16 * (576 + 192) * 30


def test_of_trials_that_share_no_step_the_one_with_the_most_tokens_is_planned():
    section = {"together": 1, "list": [{"training.max_length": 128, "adapter.rank": 2}, {"adapter.rank": 16}]}
    result = plan_together(sweep_from_dict({**RUN, "sweep": section}))
    assert (result.trial, result.one.tokens_per_gpu) == ("max_length=128,rank=2", 2 * 128)
    assert result.num_sharing == 1
    assert result.alone_because is not None


def test_each_further_one_adds_less_than_the_first(planned):
    totals = planned.totals()
    assert list(totals) == [1, 2, 3]
    assert totals[1] == pytest.approx(planned.one.memory_gib.total, abs=1e-3)
    assert 0 < totals[3] - totals[2] < totals[1]
    assert planned.further_gib > 16 * planned.one.trainable_parameters / 2**30


def test_how_many_fit_a_card(planned):
    assert planned.most(1000.0) == 3
    assert planned.most(0.1) == 0
    card = next(card for card in (0.7 + 0.001 * i for i in range(10_000)) if planned.most(card) == 2)
    assert planned.most(card + planned.further_gib * 1.1) == 3


def test_the_command_plans_a_sweep(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "sweep": SECTION}))
    assert main(["plan", str(file), "--card-gib", "24"]) == 0
    shown = capsys.readouterr().out
    assert "the largest of 3 trials: rank=16" in shown
    assert "trials that share a step: 1: " in shown
    assert "on a card of 24 GiB 3 share a step" in shown
    assert "zero2 " in shown
    assert "zero3" not in shown, "which a sweep refuses"
    assert main(["plan", str(file), "--json", "--card-gib", "24"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trial"], found["fit"], list(found["together_gib"])) == ("rank=16", 3, ["1", "2", "3"])
    assert main(["plan", str(file), "--gpus", "2"]) == 2


def test_trials_that_share_no_step_are_counted_out(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "sweep": {"grid": {"adapter.dropout": [0, 0.1], "adapter.rank": [2, 16]}}}))
    assert main(["plan", str(file), "--card-gib", "24"]) == 0
    shown = capsys.readouterr().out
    assert "trials that share a step: 1: " in shown
    assert "trained alone, as they share no step: dropout=0.1,rank=2, dropout=0.1,rank=16 (adapter.dropout" in shown
    assert "on a card of 24 GiB 2 share a step" in shown
    assert main(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["alone_because"] is None, "some share steps"
    assert list(found["alone"]) == ["dropout=0.1,rank=2", "dropout=0.1,rank=16"]
    assert all(reason.startswith("adapter.dropout is not 0") for reason in found["alone"].values())


def test_trials_that_cannot_share_a_step_are_planned_one_after_the_other(tmp_path, capsys):
    training = {**RUN["training"], "compute": "fp8"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "training": training, "sweep": {"grid": {"adapter.rank": [2, 16]}}}))
    assert main(["plan", str(file), "--card-gib", "24"]) == 0
    shown = capsys.readouterr().out
    assert "one after the other, as they cannot share steps: training.compute: fp8 has no shared form" in shown
    assert "trials that share a step" not in shown
    assert "on a card of 24 GiB it fits" in shown
    assert main(["plan", str(file), "--json", "--card-gib", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fit"], list(found["together_gib"])) == (0, ["1"])
    assert found["alone_because"].startswith("training.compute: fp8")
    assert found["alone"] == {}
