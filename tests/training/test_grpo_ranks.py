"""GRPO on two CPU processes: under every stage of ZeRO the adapter that they train without DeepSpeed."""

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import save_llama, tiny_run, write_rows
from tests.ranks.two_ranks_completions import LOGGED, RUNS
from tests.training.test_grpo import prompts

pytestmark = [pytest.mark.slow, two_processes]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Run two_ranks_completions.py once for all tests."""
    folder = tmp_path_factory.mktemp("grpo-ranks")
    save_llama(folder / "model", num_hidden_layers=2)
    tiny_run(folder)
    write_rows(folder / "rows.jsonl", prompts(4))
    status, out, err = run_ranks("tests.ranks.two_ranks_completions", folder)
    assert status == 0, out + err
    return [torch.load(folder / f"completions-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_trains_the_adapter_of_two_processes_without_deepspeed(seen, name):
    plain, found = seen[0]["plain"], seen[0][name]
    assert len(found["logged"]) == 3
    for row, expected in zip(found["logged"], plain["logged"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["sharded"] == name.startswith("zero3")
    assert found["generated"].startswith("by TRL" if name == "zero3-trl" else "by the decoder")
    for key, expected in plain["factors"].items():
        assert (found["factors"][key] - expected).norm() <= 1e-3 * expected.norm(), key
        assert torch.equal(seen[1][name]["factors"][key], found["factors"][key]), key


def test_the_processes_complete_different_prompts(seen):
    assert len(seen[0]["plain"]["prompts"]) == 2, "those of both processes are gathered"
    steps = [dict(zip(LOGGED, row, strict=True)) for row in seen[0]["plain"]["logged"]]
    assert all(step["grad_norm"] > 0 for step in steps)
    assert abs(steps[0]["kl"]) < 1e-5 < 1e-3 < steps[2]["kl"], "the adapter leaves the reference"
