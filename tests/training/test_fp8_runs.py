"""Whole runs with `training.compute: fp8`, on this machine's CPU: what they measure, keep, say, and resume with."""

import json
import shutil
from pathlib import Path

import pytest

from lsr_scale.run.folder import RunFolder
from lsr_scale.training.callbacks import fp8
from tests.helpers.fp8 import pretend_fp8
from tests.helpers.tiny_runs import do, factors, labelled, metrics, results, same, save_llama, tiny_run, write_rows
from tests.training.test_resume import Killed, arrange_stop

TOLERANCE = 0.0374  # between the errors of this model's groups
ALL_GROUPS = {f"{layer}.{group}" for layer in range(2) for group in ("qkv", "o", "gate_up", "down")}
SHARES = {f"fp8_underflow_{kind}_{which}" for kind in ("input", "gradient") for which in ("median", "max")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    # wide enough that an error is an average
    save_llama(folder / "model", hidden_size=128, intermediate_size=192)
    write_rows(folder / "pairs.jsonl", labelled())
    return folder


@pytest.fixture(scope="module", autouse=True)
def anywhere():
    with pytest.MonkeyPatch.context() as patch:
        pretend_fp8(patch)
        yield


def run_in(place, folder, compute="fp8", training=None, **sections):
    values = {"output_dir": str(folder), "compute": compute, "fused": "on", "fp8_tolerance": TOLERANCE}
    return tiny_run(place, training={**values, **(training or {})}, **{"eval": {"tasks": []}, **sections})


@pytest.fixture(scope="module")
def undisturbed(place):
    return do(run_in(place, place / "undisturbed"))


@pytest.fixture(scope="module")
def killed(place):
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 5)
        with pytest.raises(Killed):
            do(run_in(place, place / "killed"))
    return place / "killed"


@pytest.fixture
def stopped(killed, tmp_path):
    return RunFolder(Path(shutil.copytree(killed, tmp_path / "run")))


@pytest.fixture
def measured(monkeypatch):
    """Return a list that gets each measurement of errors that a run takes."""
    taken, read = [], fp8.compute_errors
    monkeypatch.setattr(fp8, "compute_errors", lambda model: taken.append(read(model)) or taken[-1])
    return taken


def record(folder):
    return json.loads(folder.fp8.read_text())


def test_a_run_measures_keeps_logs_and_says_so(undisturbed):
    found = record(undisturbed)
    assert set(found["errors"]) == ALL_GROUPS
    assert all(0.01 < error < 0.15 for error in found["errors"].values())
    assert found["kept"] == [name for name, error in found["errors"].items() if error > TOLERANCE]
    assert 0 < len(found["kept"]) < 8, "the tolerance is between the errors"
    rows = metrics(undisturbed)
    assert all(row.keys() >= SHARES for row in rows)
    assert all(0 <= row[name] < 0.2 for row in rows for name in SHARES)
    assert max(row["fp8_underflow_input_max"] for row in rows) > 0
    assert results(undisturbed)["compute"] == "fp8"
    assert "fp8_underflow_gradient_max" in results(undisturbed)
    assert "layers kept in bfloat16" in undisturbed.report.read_text()


def test_its_losses_are_those_of_bfloat16_but_for_rounding(place, undisturbed):
    plain = do(run_in(place, place / "plain", "bf16"))
    found, expected = ([row["loss"] for row in metrics(folder)] for folder in (undisturbed, plain))
    assert found != expected
    assert found == pytest.approx(expected, abs=0.03)
    assert not plain.fp8.exists()
    assert not SHARES & metrics(plain)[0].keys()


def test_a_killed_run_resumes_to_the_same_adapter_and_measures_nothing(place, undisturbed, stopped, measured):
    before = stopped.fp8.read_bytes()
    do(run_in(place, stopped.path), resume="auto")
    assert same(factors(undisturbed), factors(stopped))
    assert [row["loss"] for row in metrics(stopped)] == [row["loss"] for row in metrics(undisturbed)]
    assert measured == []
    assert stopped.fp8.read_bytes() == before == undisturbed.fp8.read_bytes()


def test_a_run_that_resumes_elsewhere_takes_the_record_along(place, undisturbed, stopped, tmp_path, measured):
    folder = do(run_in(place, tmp_path / "elsewhere"), resume=str(stopped.path / "checkpoint-2"))
    assert same(factors(undisturbed), factors(folder))
    assert (record(folder), measured) == (record(stopped), [])


def test_a_run_whose_record_is_lost_measures_again_and_says_so(place, stopped, measured):
    stopped.fp8.unlink()
    do(run_in(place, stopped.path), resume="auto")
    assert [set(errors) for errors in measured] == [ALL_GROUPS]
    assert any("there is no" in note and "fp8.json" in note for note in results(stopped)["notes"])
    assert stopped.fp8.exists()


def test_a_run_that_begins_again_measures_again(place, stopped, measured):
    do(run_in(place, stopped.path, training={"max_steps": 1}), overwrite=True)
    assert len(measured) == 1
    assert set(record(stopped)["errors"]) == ALL_GROUPS


@pytest.mark.parametrize("compute", ["fp8", "bf16"])
def test_a_run_that_computes_otherwise_as_it_resumes_is_told_so(place, tmp_path, compute):
    before = {"fp8": "bf16", "bf16": "fp8"}[compute]
    folder = do(run_in(place, tmp_path / "run", before, training={"max_steps": 2}))
    do(run_in(place, folder.path, compute, training={"max_steps": 3}), resume="auto")
    said = results(folder)["notes"]
    assert f"changed since the run began: training.compute: '{before}' -> '{compute}'" in said
    assert (metrics(folder)[-1].keys() >= SHARES) == (compute == "fp8")
    assert results(folder)["compute"] == compute


def test_what_a_run_names_stays_in_bfloat16_and_nothing_is_measured(place, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, "compute_errors", lambda model: pytest.fail("measured"))
    kept, keep = [], fp8.underflow_counts
    monkeypatch.setattr(fp8, "underflow_counts", lambda model: kept.append(set(keep(model))) or keep(model))
    folder = do(run_in(place, tmp_path / "run", training={"fp8_keep": ["down", "0.qkv"], "max_steps": 1}))
    names = ALL_GROUPS - {"0.down", "1.down", "0.qkv"}
    assert kept == [{f"{name}.{kind}" for name in names for kind in ("input", "gradient")}]
    assert not folder.fp8.exists()


@pytest.mark.parametrize(
    "training",
    [
        {"memory": "save"},
        {"memory": "speed"},
        {"packing": True, "max_length": 64},
        {"gradient_accumulation_steps": 2},
        {"on_nonfinite": "skip"},
    ],
    ids=str,
)
def test_ways_to_train_take_it(place, tmp_path, training):
    folders = [
        do(run_in(place, tmp_path / compute, compute, training={"max_steps": 3, **training}))
        for compute in ("fp8", "bf16")
    ]
    found, expected = ([row["loss"] for row in metrics(folder)] for folder in folders)
    assert found == pytest.approx(expected, abs=0.05)
    assert set(record(folders[0])["errors"]) == ALL_GROUPS


def test_recomputation_changes_no_bit(place, tmp_path):
    save, speed = (
        do(run_in(place, tmp_path / memory, training={"memory": memory, "max_steps": 3}))
        for memory in ("save", "speed")
    )
    assert [row["loss"] for row in metrics(save)] == [row["loss"] for row in metrics(speed)]


def test_a_classifier_on_a_decoder_takes_it(place, tmp_path):
    sections = {
        "model": {"name": str(place / "model"), "task": "seq_cls", "num_labels": 2},
        "data": {"train": [str(place / "pairs.jsonl")]},
    }
    folder = do(run_in(place, tmp_path / "run", training={"max_steps": 2}, **sections))
    assert set(record(folder)["errors"]) == ALL_GROUPS
    assert metrics(folder)[0].keys() >= SHARES


def test_a_batch_that_is_not_finite_does_not_decide(place, tmp_path, monkeypatch):
    read, calls = fp8.compute_errors, []

    def broken_at_first(model):
        errors = read(model)
        calls.append(errors)
        return dict.fromkeys(errors, float("nan")) if len(calls) == 1 else errors

    monkeypatch.setattr(fp8, "compute_errors", broken_at_first)
    folder = do(run_in(place, tmp_path / "run", training={"max_steps": 3}))
    assert [set(errors) for errors in calls] == [ALL_GROUPS, ALL_GROUPS]
    assert all(record(folder)["errors"].values())
