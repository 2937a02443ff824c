"""A process's place among others, as a launcher gives it by the environment: whole, empty, or something else."""

import os

import pytest
import torch

from lsr_scale import UserError, cli, distributed
from lsr_scale.config import dump_yaml
from lsr_scale.model import local_device
from lsr_scale.run import start
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import completions, save_llama, tiny_run, write_rows

WHOLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets a launcher's variables, all of them anew."""

    def launch(**variables):
        for name in (*distributed._VARIABLES, "LSR_SCALE_BACKEND"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", "zero"), ("RANK", "-1"), ("RANK", "1.0"), ("RANK", "9" * 5000), ("RANK", "\u0663")),
        *(("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "gpu0"), ("LOCAL_RANK", "-1")),
        *(("LOCAL_WORLD_SIZE", "x"), ("LOCAL_SIZE", "0"), ("MASTER_PORT", "http"), ("MASTER_PORT", "99999")),
        ("MASTER_PORT", "0"),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_named(launched, name, value):
    launched(**{**WHOLE, name: value})
    with pytest.raises(
        UserError, match=f"the environment's {name}: expected a whole number from .*; deepspeed and"
    ) as it:
        distributed.start(use_deepspeed=False)
    assert len(str(it.value)) < 300


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "has RANK, but not WORLD_SIZE: start with"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but not RANK: start with"),
        ({"LOCAL_RANK": "0"}, "has LOCAL_RANK, but not RANK and WORLD_SIZE: .* unset LOCAL_RANK$"),
        ({**WHOLE, "RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2: ranks go from 0 to 1"),
        ({**WHOLE, "MASTER_PORT": ""}, "has RANK and WORLD_SIZE, but not MASTER_PORT"),
        ({**WHOLE, "MASTER_ADDR": " "}, "has RANK and WORLD_SIZE, but not MASTER_ADDR"),
        ({**WHOLE, "LSR_SCALE_BACKEND": "carrier-pigeon"}, "LSR_SCALE_BACKEND: 'carrier-pigeon' is not in this torch"),
    ],
)
def test_a_launchers_variables_that_lack_others_are_refused(launched, variables, words):
    launched(**variables)
    with pytest.raises(UserError, match=words):
        distributed.start(use_deepspeed=False)


def test_empty_variables_are_none(launched, monkeypatch):
    launched(**dict.fromkeys(distributed._VARIABLES, ""))
    assert (distributed.rank(), distributed.world_size(), distributed.is_launched()) == (0, 1, False)
    distributed.start(use_deepspeed=False)
    assert not any(name in os.environ for name in distributed._VARIABLES), "accelerate would read them as numbers"
    monkeypatch.setenv("RANK", "")
    assert cli.main(["config", "nowhere.yaml"]) == 2


def test_threads_as_openmp_has_them_are_left_to_it(launched, monkeypatch):
    launched(**WHOLE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1,1")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    distributed.start(use_deepspeed=False)
    assert os.environ["OMP_NUM_THREADS"] == "1,1"


def test_the_advice_to_unset_a_launchers_variables_works(launched, tmp_path, monkeypatch, capsys):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", completions(2))
    (tmp_path / "run.yaml").write_text(dump_yaml(tiny_run(tmp_path, eval={"tasks": []})))
    launched(LOCAL_RANK="0")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    for name in said.rpartition("unset ")[2].split():
        monkeypatch.delenv(name)
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0


def test_processes_that_were_started_with_different_runs_are_refused_on_all(tmp_path, monkeypatch):
    one = tiny_run(tmp_path)
    other = tiny_run(tmp_path, training={"learning_rate": 1e-4}, model={"quantization": "int8"})
    monkeypatch.setattr(distributed, "gather", lambda mine: [*both])
    for runs in ((one, other), (one, one)):
        both = [{**run.model_dump(), "--resume": None, "--overwrite": False} for run in runs]
        if runs[1] is one:
            start._check_alike(one, None, False)
            continue
        with pytest.raises(UserError, match="rank 1 was started with another configuration than rank 0: ") as refused:
            start._check_alike(other, None, False)
        assert "training.learning_rate: 0.005 -> 0.0001" in str(refused.value)
        assert "model.quantization: 'nf4' -> 'int8'" in str(refused.value)
    both[1]["--overwrite"] = True
    with pytest.raises(UserError, match="--overwrite: False -> True; start all processes with one file"):
        start._check_alike(one, None, False)


def test_a_local_rank_that_is_no_number_is_refused_by_every_command_on_a_gpu(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched(LOCAL_RANK="gpu0")
    with pytest.raises(UserError, match=r"LOCAL_RANK: expected a whole number .*got 'gpu0'; .* unset RANK"):
        local_device()
    launched(LOCAL_RANK="3")
    assert local_device() == torch.device("cuda", 1)


@pytest.mark.slow
@two_processes
def test_what_the_main_process_does_first_may_take_longer_than_a_collective(tmp_path):
    status, out, err = run_ranks("tests.ranks.patient_ranks", tmp_path / "came", number=3)
    assert status == 0, out + err
    first, *others = (tmp_path / "came").read_text().splitlines()
    assert first.startswith("rank 0 had ")
    assert "Timed out waiting" in first
    assert sorted(others) == ["rank 1 came", "rank 2 came"]
