"""Runs that a signal stops while they evaluate, keep the best, or end within an epoch: what they resume from."""

import os
import signal
import subprocess
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import yaml

from lsr_scale import UserError
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.lock import locked
from lsr_scale.run.train import train
from lsr_scale.training.callbacks.signals import Terminated
from tests.helpers.launch import PATHS, QUICK_START
from tests.helpers.ranks import COMMAND, Rank
from tests.helpers.tiny_runs import completions, do, factors, metrics, same, save_llama, tiny_run, write_rows
from tests.training.test_resume import arrange_stop


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    save_llama(folder / "model")
    write_rows(folder / "held-out.jsonl", completions(4))
    tiny_run(folder)
    return folder


def run_in(place, folder, **training):
    """Return a run of two epochs of six steps that is validated."""
    training = {"output_dir": str(folder), "num_train_epochs": 2, "eval_strategy": "epoch", **training}
    data = {"train": [str(place / "rows.jsonl")], "validation": [str(place / "held-out.jsonl")]}
    return tiny_run(place, training=training, data=data, eval={"tasks": []})


def stop(run, after, patch):
    """Have SIGTERM come in a step's log, which is heeded at the end of the next; return the run's folder."""
    arrange_stop(patch, after - 1, signal.SIGTERM)
    with pytest.raises(Terminated, match=f"after step {after}, a checkpoint is saved"):
        do(run)
    return RunFolder(Path(run.training["output_dir"]))


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


@pytest.mark.parametrize("limit", [1, 8])
def test_a_stop_within_an_epoch_changes_nothing_of_what_is_best(place, tmp_path, monkeypatch, limit):
    training = {"save_strategy": "epoch", "save_total_limit": limit, **BEST}
    whole = do(run_in(place, tmp_path / "whole", **training))
    run = run_in(place, tmp_path / "run", **training)
    folder = stop(run, 9, monkeypatch)
    assert [path.name for path in folder.checkpoints()][-1] == "checkpoint-9"
    assert [row["step"] for row in metrics(folder) if "eval_loss" in row] == [6], "none for the stop"
    done = do(run, resume="auto")
    assert same(factors(whole), factors(done))
    assert [row.get("eval_loss") for row in metrics(whole)] == [row.get("eval_loss") for row in metrics(done)]


def test_a_stop_keeps_its_checkpoint_beside_the_best_one_where_one_is_kept(place, tmp_path, monkeypatch):
    # the loss grows, so the first evaluation is the best
    grows = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    run = run_in(place, tmp_path / "run", save_steps=1, save_total_limit=1, **grows, **BEST)
    folder = stop(run, 5, monkeypatch)
    assert [path.name for path in folder.checkpoints()][-1] == "checkpoint-5"
    do(run, resume="auto")
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, 13))


def test_a_stop_saves_what_is_not_the_best_too(place, tmp_path, monkeypatch):
    grows = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    run = run_in(place, tmp_path / "run", save_strategy="best", **grows, **BEST)
    folder = stop(run, 5, monkeypatch)
    assert [path.name for path in folder.checkpoints()][-1] == "checkpoint-5"


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"num_train_epochs": 0.5}])
def test_a_run_that_ended_within_an_epoch_is_not_trained_on(place, tmp_path, length):
    run = run_in(place, tmp_path / "run", eval_strategy="no", **length)
    done = do(run)
    kept, rows, names = factors(done), metrics(done), [path.name for path in done.checkpoints()]
    for _ in range(2):
        do(run, resume="auto")
        assert same(kept, factors(done))
        assert metrics(done) == rows
        assert [path.name for path in done.checkpoints()] == names


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_a_signal_in_the_last_step_stops_nothing(place, tmp_path, monkeypatch, saves):
    run = run_in(place, tmp_path / "run", eval_strategy="no", max_steps=4, save_strategy=saves)
    arrange_stop(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Terminated, match="training is complete, the adapter is saved") as ended:
        do(run)
    assert "resumes it" not in str(ended.value)
    assert ("no training: the same command with --resume auto" in str(ended.value)) == (saves == "steps")
    if saves == "steps":
        kept = factors(RunFolder(tmp_path / "run"))
        done = do(run, resume="auto")
        assert done.results.is_file()
        assert same(kept, factors(done))
    assert RunFolder(tmp_path / "run").adapter.is_dir()


def test_a_run_beside_an_interrupted_one_says_so_and_how_to_resume_that(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = run_in(place, None, eval_strategy="no", max_steps=4)
    run = run.model_copy(update={"training": {**run.training, "output_dir": None}})
    arrange_stop(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Terminated):
        train(run)
    (newest,) = (path for path in RunFolder(Path("runs/run")).checkpoints() if path.name == "checkpoint-3")
    capsys.readouterr()
    train(run)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "interrupted" in line)
    assert "runs/run holds an interrupted run (newest checkpoint: checkpoint-3)" in line
    assert "this one goes into runs/run-2" in line
    assert f"--resume {newest};" in line
    assert "--overwrite --set training.output_dir=runs/run" in line
    train(run, resume=str(newest))
    assert RunFolder(Path("runs/run")).has_adapter()
    train(run)
    assert "interrupted" not in capsys.readouterr().out, "the one before is complete"


def test_factors_that_are_not_finite_at_an_epochs_end_are_said_and_not_saved(place, tmp_path, monkeypatch):
    from trl import SFTTrainer

    step = SFTTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 5:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", poisoned)
    quiet = {"eval_strategy": "no", "max_grad_norm": 0.0, "logging_steps": 100}
    run = run_in(place, tmp_path / "run", save_strategy="epoch", **quiet)
    with pytest.raises(UserError, match=r"training diverged: .*after step 6, so it is not saved"):
        do(run)
    assert RunFolder(tmp_path / "run").checkpoints() == []


@pytest.mark.slow
def test_ctrl_c_on_a_run_whose_reader_is_gone_saves_and_says_so_by_its_status(place, tmp_path):
    run = run_in(place, tmp_path / "run", eval_strategy="no", num_train_epochs=500, save_steps=5000)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(exclude={"deepspeed"})))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # read and written: opening waits for nobody, and there is a reader until this one is closed
    reader = os.open(pipe, os.O_RDWR)
    rank = Rank([COMMAND, "--config", tmp_path / "run.yaml"], {"OMP_NUM_THREADS": 1}, stdout=pipe, stderr=pipe)
    try:
        said = b""
        while b"\nstep 3/" not in said:
            assert reader in wait([reader, rank.process.sentinel]), said
            said += os.read(reader, 4096)
        os.close(reader)
        rank.send_signal(signal.SIGINT)
        rank.wait()
    finally:
        rank.kill()
    assert rank.returncode == 130
    assert len(RunFolder(tmp_path / "run").checkpoints()) == 1


def test_a_lock_goes_with_its_process_and_not_with_the_loaders_workers(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; folder = Path(sys.argv[1]); sys.argv[0] = 'lsr-scale'\n"
        "from lsr_scale.run.lock import locked\n"  # without torch, as the command
        "with locked(folder):\n"
        "    if os.fork() == 0:\n"
        "        print('a worker', flush=True)\n"
        "        input()\n"
        "    os._exit(0)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **QUICK_START, "PYTHONPATH": PATHS}, **pipes) as process:
        assert process.stdout.readline() == "a worker\n"
        assert process.wait() == 0
        with locked(tmp_path):
            pass  # the worker still waits for a line


def test_steps_done_again_are_noted_once_among_what_was_not_finite(place, tmp_path, monkeypatch):
    run = run_in(place, tmp_path / "run", eval_strategy="no", save_steps=2)
    folder = stop(run, 5, monkeypatch)
    folder.nonfinite.write_text('{"step": 4, "loss": "nan"}\n{"step": 5, "loss": "nan"}\n{"step": 6, "loss": "nan"}\n')
    do(run, resume="auto")
    assert folder.nonfinite.read_text() == '{"step": 4, "loss": "nan"}\n{"step": 5, "loss": "nan"}\n'
    assert torch.isfinite(torch.cat([t.flatten() for t in factors(folder).values()])).all()
