"""Several processes on one sweep: by a launcher, by hand, and what each claims."""

import time

import pytest

from lsr_scale import UserError
from lsr_scale.cli import main
from lsr_scale.sweeping import workers
from lsr_scale.sweeping.driver import share_of
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState
from lsr_scale.sweeping.sweep import run_sweep
from tests.helpers.launch import ROOT, launch
from tests.helpers.ports import held_port
from tests.helpers.programs import start_program
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import factors, same
from tests.helpers.tiny_sweeps import sweep_place, tiny_sweep, write_sweep

SECTION = {"grid": {"training.learning_rate": [2e-3, 5e-3], "training.seed": [1, 2]}, "together": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return sweep_place(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def alone(place):
    """Return the folder of the sweep in one process."""
    return run_sweep(tiny_sweep(place, place / "alone", SECTION, max_steps=2), "run", quiet=True)


@two_processes  # torchrun holds the store where they meet; below the first process does, as under DeepSpeed's launcher
def test_a_launchers_processes_deal_the_trials_out_and_each_is_as_alone(place, alone, tmp_path):
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", SECTION, max_steps=2)
    status, out, err = launch("torchrun", ROOT / "launch" / "train.py", "--config", file)
    assert status == 0, err
    folder = SweepFolder(tmp_path / "sweep")
    assert {trial.status for trial in folder.read().trials.values()} == {"finished"}
    assert out.count("best: ") == out.count("sweep folder: ") == 1, "one speaks for all"
    assert sorted(line.partition("begins: ")[2] for line in out.splitlines() if "begins: " in line) == sorted(
        folder.read().trials
    )
    for name in folder.read().trials:
        assert same(factors(folder.trial(name)), factors(alone.trial(name)))
    assert folder.table.read_text() == alone.table.read_text().replace(str(alone.path), str(folder.path)).replace(
        "# alone", "# sweep"
    )
    assert not folder.workers.exists()


def test_a_mistake_ends_all_of_a_launchers_processes(place, tmp_path, monkeypatch, capsys):
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", SECTION, max_steps=2)
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    with held_port() as port:
        # as a launched process tells the one that it executes; the first of them holds the store where they meet
        first, second = (f"{rank} 2 127.0.0.1 {port} 0" for rank in range(2))
        program = (
            f"import os, sys\nos.environ['LSR_SCALE_SWEEP_RANK'] = {second!r}\nfrom lsr_scale.cli import main\n"
            f"sys.exit(main(['sweep', {str(file)!r}]))\n"
        )
        other = start_program(program, tmp_path, tmp_path / "out", tmp_path / "err")
        monkeypatch.setenv("LSR_SCALE_SWEEP_RANK", first)
        assert main(["sweep", str(file)]) == 2
        other.join()
    assert other.exitcode == 2
    for said in (capsys.readouterr().err, (tmp_path / "err").read_text()):
        assert "holds trials, which no sweep wrote" in said


def test_another_process_joins_by_resuming(place, alone, tmp_path):
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", SECTION, max_steps=2)
    # it waits in its first trial until this process has done the others
    program = (
        "import pathlib, sys, time\nfrom lsr_scale.cli import main\n"
        "from lsr_scale.training.callbacks.progress import Progress\n"
        "begin = Progress.on_train_begin\n"
        "def on_train_begin(self, *args, **more):\n"
        "    print('now', flush=True)\n"
        f"    while not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n        time.sleep(0.02)\n"
        "    begin(self, *args, **more)\n"
        "Progress.on_train_begin = on_train_begin\n"
        f"sys.exit(main(['sweep', {str(file)!r}]))\n"
    )
    other = start_program(program, tmp_path, out := tmp_path / "out", tmp_path / "err")
    while "now\n" not in out.read_text():
        assert other.is_alive(), (tmp_path / "err").read_text()
        time.sleep(0.02)
    assert main(["sweep", str(file), "--resume", "auto"]) == 0
    state = SweepFolder(tmp_path / "sweep").read()
    assert [trial.status for trial in state.trials.values()] == ["running", "finished", "finished", "finished"]
    (tmp_path / "go").touch()
    other.join()
    assert other.exitcode == 0
    folder = SweepFolder(tmp_path / "sweep")
    assert {trial.status for trial in folder.read().trials.values()} == {"finished"}
    assert all(same(factors(folder.trial(name)), factors(alone.trial(name))) for name in folder.read().trials)


def test_training_a_sweep_names_the_command(place, tmp_path, capsys):
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", SECTION)
    assert main(["train", str(file)]) == 2
    assert f"all of them: lsr-scale sweep {file}" in capsys.readouterr().err


def test_who_comes_second_takes_as_many_as_who_came_first():
    trials = {f"trial-{number}": TrialState(f"trial-{number}", {}) for number in range(16)}
    state = SweepState({}, {}, "final_loss", trials)
    assert share_of(state, 2) == [f"trial-{number}" for number in range(8)]
    for name in share_of(state, 2):
        trials[name].status = "running"
    assert share_of(state, 2) == [f"trial-{number}" for number in range(8, 16)]
    for trial in trials.values():
        trial.status = "finished"
    trials["trial-3"].status = "pending"
    assert share_of(state, 2) == ["trial-3"]


@pytest.mark.parametrize(("visible", "number", "found"), [("", 1, "1"), ("3,5", 1, "5"), ("GPU-a,GPU-b", 0, "GPU-a")])
def test_each_process_sees_one_gpu(monkeypatch, visible, number, found):
    monkeypatch.setattr(workers, "_num_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers._own_gpu(number) == {"CUDA_VISIBLE_DEVICES": found}


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(workers, "_num_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="process 3 of this host has no GPU for itself: there are 2"):
        workers._own_gpu(2)
    monkeypatch.setenv("LSR_SCALE_BACKEND", "gloo")
    assert workers._own_gpu(2) == {"CUDA_VISIBLE_DEVICES": "0"}


def test_gpus_are_needed_for_gpus(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_num_gpus", lambda: 0)
    file = write_sweep(tmp_path / "run.yaml", place, tmp_path / "sweep", SECTION)
    assert main(["sweep", str(file), "--gpus", "2"]) == 2
    assert "--gpus 2: this machine has no GPU that torch can use" in capsys.readouterr().err
