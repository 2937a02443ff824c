"""What happens to a run from outside: SIGTERM, a batch whose loss is not finite, kills, and a rank that dies."""

import json
import math
import os
import signal

import pytest
from test_resume import arrange_stop, config_file
from tiny_runs import do, factors, metrics, same, save_llama, tiny_run
from trl import SFTTrainer

from lsr_scale import cli
from lsr_scale.run_folder import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    save_llama(folder / "model")
    tiny_run(folder)
    return folder


def test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on(place, tmp_path, monkeypatch, capfd):
    file = config_file(place, tmp_path)
    # a step's log comes after its end, so the signal is heeded at the end of the fourth
    arrange_stop(monkeypatch, 3, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["train", file]) == 143
    assert "lsr-scale: ended by SIGTERM after step 4" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert not folder.adapter.exists()
    assert cli.main(["train", file, "--resume", "auto"]) == 0
    whole = do(tiny_run(place, **UNDISTURBED, training={"output_dir": str(tmp_path / "whole")}))
    assert same(factors(whole), factors(folder))


UNDISTURBED = {"adapter": {"method": "kron_lora", "rank": 4, "left_out": 4, "dropout": 0.2}}


def poison(monkeypatch, steps, process=0):
    """Make the loss of these steps infinite, once, on one process."""
    compute = SFTTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        result = compute(self, model, inputs, *args, **kwargs)
        if model.training and self.state.global_step + 1 in steps and int(os.environ.get("RANK", 0)) == process:
            return (result[0] * math.inf, *result[1:]) if isinstance(result, tuple) else result * math.inf
        return result

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_is_skipped_counts_for_nothing(place, tmp_path, monkeypatch, accumulation):
    poison(monkeypatch, {2})
    training = {
        "output_dir": str(tmp_path),
        "on_nonfinite": "skip",
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "sgd",
        "save_steps": 1,
    }
    done = do(tiny_run(place, training=training, eval={"tasks": []}))
    rows = metrics(done)
    assert len(rows) == 6 // accumulation
    assert rows[1]["loss"] == 0
    assert rows[1]["grad_norm"] == 0
    assert same(factors(done, "checkpoint-1"), factors(done, "checkpoint-2")), "no gradient, no step"
    assert not same(factors(done, "checkpoint-2"), factors(done, "checkpoint-3"))
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * accumulation
    noted = [row for line in lines for row in line["rows"]]
    assert len(set(noted)) == 2 * accumulation, "every micro-batch has rows of its own"
