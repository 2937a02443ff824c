"""Two CPU processes: prompts are completed, and training stops early, on both alike and under every engine."""

import json

import pytest

from lsr_scale.run.folder import RunFolder
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import factors, metrics, results, same, save_llama, tiny_run, write_rows

pytestmark = [pytest.mark.slow, two_processes]
ENGINES = ["ddp", "zero0", "zero2", "zero3", "zero3-fused"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    place = tmp_path_factory.mktemp("watching")
    save_llama(place / "model", num_hidden_layers=2)
    tiny_run(place)
    write_rows(place / "held.jsonl", [{"prompt": "a", "completion": "@#{}[]|~^"}] * 3)
    status, out, err = run_ranks("tests.ranks.two_ranks_watching", place)
    assert status == 0, out + err
    return place, out, err


def samples(place, name):
    return [json.loads(line) for line in RunFolder(place / name).samples.read_text().splitlines()]


@pytest.mark.parametrize("name", ENGINES)
def test_prompts_are_completed_once_whatever_the_engine(ran, name):
    place, *_ = ran
    found, steps = samples(place, name), results(RunFolder(place / name))["steps"]
    assert 1 < steps < 6, "or nothing stopped early"
    best = results(RunFolder(place / name))["best_step"]
    expected = [(0, "before"), *((step, "evaluation") for step in range(1, steps + 1)), (best, "after")]
    assert [(row["step"], row["moment"]) for row in found[::3]] == expected
    assert len(found) == 3 * len(expected)
    before = [row["completion"] for row in found if row["moment"] == "before"]
    assert before == [row["completion"] for row in samples(place, "ddp") if row["moment"] == "before"]
    of_best = [row["completion"] for row in found if (row["step"], row["moment"]) == (best, "evaluation")]
    assert [row["completion"] for row in found if row["moment"] == "after"] == of_best


def test_a_sharded_base_trains_the_same_bit_for_bit_without_them(ran):
    place, *_ = ran
    two = [RunFolder(place / name) for name in ("zero3", "zero3-without")]
    losses = [[row[key] for row in metrics(one) for key in ("loss", "eval_loss") if key in row] for one in two]
    assert losses[0] == losses[1]
    assert same(factors(two[0]), factors(two[1]))
    assert not two[1].samples.exists()


def test_the_first_process_alone_shows_and_reports(ran):
    place, out, _ = ran
    assert out.count("samples before training:") == out.count("samples after training:") == len(ENGINES)
    assert out.count("stopped early after step") == len(ENGINES) + 1
    assert len(list((place / "zero2").rglob("events.out.tfevents.*"))) in (1, 2), "of training, and of what comes after"
