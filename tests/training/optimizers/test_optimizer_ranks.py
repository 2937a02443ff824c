"""A start from the gradient, LoRA-RITE and LoRA-Pro on two CPU processes: the steps of one process."""

import json

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import save_llama, tiny_run
from tests.ranks.run_after_run import EXACT
from tests.ranks.two_ranks_optimizers import RUNS, summary
from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer

pytestmark = [pytest.mark.slow, two_processes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer-ranks")
    save_llama(folder / "model")
    tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def seen(place):
    """Run two_ranks_optimizers.py once for all tests."""
    status, out, err = run_ranks("tests.ranks.two_ranks_optimizers", place)
    assert status == 0, out + err
    return [json.loads((place / f"optimizers-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_start_and_step_as_one(place, seen, name):
    training = {**RUNS[name]["training"], "per_device_train_batch_size": 2}
    adapter = RUNS[name]["adapter"]
    alone = summary(first_trainer(place, "nf4", "lsr", DEFAULT, training=training, model=EXACT, adapter=adapter))
    assert seen[0][name] == seen[1][name]  # to the bit
    for row, expected in zip(seen[0][name]["logged"], alone["logged"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    assert seen[0][name]["squares"] == pytest.approx(alone["squares"], rel=1e-3)


def test_a_run_without_deepspeed_is_the_same_after_one_under_it(seen):
    for of_process in seen:
        assert of_process["lora_pro-after-deepspeed"] == of_process["lora_pro"]  # to the bit
