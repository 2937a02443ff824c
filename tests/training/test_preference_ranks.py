"""DPO on two CPU processes, under every stage of ZeRO: the steps of one process."""

import json

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import save_llama, tiny_run, write_rows
from tests.ranks.run_after_run import EXACT, logged
from tests.ranks.two_ranks_preferences import PAIRS, RUNS
from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer
from tests.training.test_preferences import preferences

pytestmark = [pytest.mark.slow, two_processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference-ranks")
    save_llama(folder / "model")
    tiny_run(folder)
    write_rows(folder / "rows.jsonl", preferences(4))
    return folder


@pytest.fixture(scope="module")
def alone(place):
    """Return the losses and norms of one process without DeepSpeed, which sees the same rows in each step."""
    training = {**PAIRS, "gradient_accumulation_steps": 2, "fused": "off"}
    return logged(first_trainer(place, "nf4", "lsr", DEFAULT, training=training, model=EXACT))


@pytest.fixture(scope="module")
def seen(place):
    """Run two_ranks_preferences.py once for all tests."""
    status, out, err = run_ranks("tests.ranks.two_ranks_preferences", place)
    assert status == 0, out + err
    return [json.loads((place / f"preferences-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_steps_of_one(seen, alone, name):
    assert len(alone) == 3
    assert alone[2][0] != pytest.approx(alone[0][0], rel=1e-4), "steps count"
    for row, expected in zip(seen[0][name]["logged"], alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert seen[1][name]["logged"] == seen[0][name]["logged"]
    assert seen[0][name]["rewards"][0] == pytest.approx(0, abs=1e-6), "the reference is what it began as"
    assert seen[0][name]["rewards"][2] != pytest.approx(0, abs=1e-4)
    assert seen[0][name]["sharded"] == name.startswith("zero3")
