"""model.dtype: auto: what it is on which machine, and that a run keeps what it began with wherever it goes on."""

import contextlib

import bitsandbytes as bnb
import pytest
import torch

from lsr_scale.config.trials import sweep_from_dict
from lsr_scale.doctor.hardware import check_hardware
from lsr_scale.exporting.source import open_adapter
from lsr_scale.exporting.verify import base_section
from lsr_scale.model import chosen_dtype, dtype
from lsr_scale.model.dtype import cpu_has_bfloat16  # as it is, before it is replaced for the tests
from lsr_scale.planning import plan
from lsr_scale.run.load import load_run_model
from lsr_scale.run.train import train
from lsr_scale.sweeping.board import Board
from lsr_scale.sweeping.driver import Driver
from lsr_scale.sweeping.start import begin
from tests.helpers.tiny_runs import factors, same, save_llama, tiny_run
from tests.helpers.tiny_sweeps import sections


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtype")
    save_llama(folder / "model")
    return folder


@pytest.fixture
def cpu(monkeypatch):
    """Return a function after which this CPU has instructions for bfloat16, or has not."""
    return lambda has: monkeypatch.setattr(dtype, "cpu_has_bfloat16", lambda: has)


def auto_run(place, name, dtype="auto"):
    training = {"output_dir": str(place / name), "max_steps": 2, "save_steps": 1}
    return tiny_run(place, model={"dtype": dtype}, training=training, eval={"tasks": []})


def do(run, **options):
    """Train; return the folder, and the dtypes that the base computes in."""
    found = set()

    def take(trainer):
        found.update(one.compute_dtype for one in trainer.model.modules() if isinstance(one, bnb.nn.Linear4bit))
        found.add(trainer.model.get_input_embeddings().weight.dtype)

    return train(run, take=take, **options), found


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "onednn", "expected"),
    [
        ("x86_64", False, False, True, False),
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("aarch64", True, True, False, False),
        ("aarch64", False, False, True, True),
    ],
)
def test_which_cpus_have_bfloat16(monkeypatch, machine, avx512, amx, onednn, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert cpu_has_bfloat16() is expected


def test_a_gpu_without_bfloat16_takes_float32_and_none_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert chosen_dtype("auto", torch.device("cuda", 0)) == expected
        assert chosen_dtype("float16", torch.device("cuda", 0)) == "float16"


@pytest.mark.parametrize(("begins_with", "expected"), [(False, "float32"), (True, "bfloat16")])
def test_a_run_goes_on_in_the_dtype_that_it_began_with(place, cpu, capsys, begins_with, expected):
    cpu(begins_with)
    whole, computed_in = do(auto_run(place, f"whole {expected}"))
    assert computed_in == {getattr(torch, expected)}
    assert f"model.dtype: auto is {expected} here" in (printed := capsys.readouterr().out)
    assert ("as this CPU has no instructions for bfloat16" in printed) is not begins_with
    name = f"resumed {expected}"
    do(auto_run(place, name), stop_after_step=1)
    cpu(not begins_with)  # another machine
    capsys.readouterr()
    folder, computed_in = do(auto_run(place, name), resume="auto")
    assert computed_in == {getattr(torch, expected)}
    assert f"model.dtype: auto is {expected} here, as when the run began" in capsys.readouterr().out
    assert f"dtype: {expected}\n" in folder.config.read_text()
    assert same(factors(folder), factors(whole))
    # what reads the run later, there
    model, _, run = load_run_model(folder.path)
    assert run.model.dtype == expected
    assert model.get_input_embeddings().weight.dtype == getattr(torch, expected)
    assert base_section(open_adapter(folder.path), None)["dtype"] == expected


def test_a_dtype_that_is_named_stays_and_a_slow_one_is_told(place, cpu, capsys):
    cpu(False)
    folder, computed_in = do(auto_run(place, "named", "bfloat16"))
    assert computed_in == {torch.bfloat16}
    assert "dtype: bfloat16\n" in folder.config.read_text()
    note = "note: this CPU has no instructions for bfloat16, so float32 is faster: --set model.dtype=auto"
    assert note in capsys.readouterr().out


def test_a_plan_is_of_a_gpu_and_doctor_tells_of_this_machine(place, cpu):
    cpu(False)
    assert plan(auto_run(place, "planned"), trace=False).dtype == "bfloat16"
    if not torch.cuda.is_available():
        found = {finding.name: finding.found for finding in check_hardware()}
        assert found["dtype"] == "model.dtype: auto is float32, as this CPU has no instructions for bfloat16"


def test_a_sweep_has_one_dtype_on_all_machines(place, cpu, tmp_path):
    (place / "held-out.jsonl").write_text((place / "rows.jsonl").read_text())
    values = sections(place, tmp_path / "sweep", {"grid": {"training.learning_rate": [1e-3, 2e-3]}})
    sweep = sweep_from_dict({**values, "model": {**values["model"], "dtype": "auto"}})
    cpu(False)
    folder, _ = begin(sweep, "run", None, False)
    cpu(True)
    folder, _ = begin(sweep, "run", "auto", False)
    driver = Driver(sweep, folder, Board(quiet=True))
    assert [one.run.model.dtype for one in driver.plans.values()] == ["float32", "float32"]
    assert [driver.run_of(one).model.dtype for one in driver.sweep.trials] == ["float32", "float32"]
