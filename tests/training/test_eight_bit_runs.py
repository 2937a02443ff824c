"""Whole runs with `training.compute: fp8 | int8`, on this machine's CPU: what they measure, keep, say, resume with."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from lsr_scale.run.folder import RunFolder
from lsr_scale.training.callbacks import eight_bit
from tests.helpers.fp8 import pretend_fp8
from tests.helpers.tiny_runs import do, factors, labelled, metrics, results, same, save_llama, tiny_run, write_rows
from tests.training.test_resume import Killed, arrange_stop

TOLERANCE = 0.0374  # between the errors of this model's groups
ALL_GROUPS = {f"{layer}.{group}" for layer in range(2) for group in ("qkv", "o", "gate_up", "down")}
# nothing before the first layer is trained
ALL_ERRORS = {f"{name}.{product}" for name in ALL_GROUPS for product in ("output", "gradient")} - {"0.qkv.gradient"}
SHARES = {f"underflow_{kind}_{which}" for kind in ("input", "gradient") for which in ("median", "max")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight_bits")
    # wide enough that an error is an average
    save_llama(folder / "model", num_hidden_layers=2, hidden_size=128, intermediate_size=192)
    write_rows(folder / "pairs.jsonl", labelled())
    return folder


@pytest.fixture(scope="module", autouse=True)
def anywhere():
    with pytest.MonkeyPatch.context() as patch:
        pretend_fp8(patch)
        yield


def run_in(place, folder, compute="fp8", training=None, **sections):
    values = {"output_dir": str(folder), "compute": compute, "fused": "on", "compute_tolerance": TOLERANCE}
    return tiny_run(place, training={**values, **(training or {})}, **{"eval": {"tasks": []}, **sections})


@pytest.fixture(scope="module")
def undisturbed(place, with_pages):
    with with_pages():
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
    taken, read = [], eight_bit.compute_errors
    monkeypatch.setattr(eight_bit, "compute_errors", lambda model: taken.append(read(model)) or taken[-1])
    return taken


def record(folder):
    return json.loads(folder.compute_errors.read_text())


def test_a_run_measures_keeps_logs_and_says_so(undisturbed):
    found = record(undisturbed)
    assert set(found["errors"]) == ALL_ERRORS
    assert all(0.01 < error < 0.15 for error in found["errors"].values())
    exceeding = [name.rpartition(".")[0] for name, error in found["errors"].items() if error > TOLERANCE]
    assert found["kept"] == list(dict.fromkeys(exceeding))
    assert 0 < len(found["kept"]) < 8, "the tolerance is between the errors"
    rows = metrics(undisturbed)
    assert all(row.keys() >= SHARES for row in rows)
    assert all(0 <= row[name] < 0.2 for row in rows for name in SHARES)
    assert max(row["underflow_input_max"] for row in rows) > 0
    assert results(undisturbed)["compute"] == "fp8"
    assert "underflow_gradient_max" in results(undisturbed)
    assert "layers kept in bfloat16" in undisturbed.report.read_text()


def test_losses_are_those_of_bfloat16_but_for_rounding_which_is_less_in_int8(place, undisturbed):
    plain, int8 = (do(run_in(place, place / compute, compute)) for compute in ("bf16", "int8"))
    fp8, expected, found = ([row["loss"] for row in metrics(folder)] for folder in (undisturbed, plain, int8))
    assert fp8 == pytest.approx(expected, abs=0.03)
    by_fp8, by_int8 = (sum(abs(a - b) for a, b in zip(one, expected, strict=True)) for one in (fp8, found))
    assert 0 < by_int8 < by_fp8
    assert not plain.compute_errors.exists()
    assert not SHARES & metrics(plain)[0].keys()
    assert (record(undisturbed)["compute"], record(int8)["compute"]) == ("fp8", "int8")
    assert set(record(int8)["errors"]) == ALL_ERRORS
    for name, error in record(int8)["errors"].items():  # forward alone it is in int8
        assert (error < record(undisturbed)["errors"][name] / 2) == name.endswith(".output"), name
    assert metrics(int8)[0].keys() >= SHARES
    assert results(int8)["compute"] == "int8"


def test_a_killed_run_resumes_to_the_same_adapter_and_measures_nothing(place, undisturbed, stopped, measured):
    before = stopped.compute_errors.read_bytes()
    do(run_in(place, stopped.path), resume="auto")
    assert same(factors(undisturbed), factors(stopped))
    assert [row["loss"] for row in metrics(stopped)] == [row["loss"] for row in metrics(undisturbed)]
    assert measured == []
    assert stopped.compute_errors.read_bytes() == before == undisturbed.compute_errors.read_bytes()


def test_a_run_that_resumes_elsewhere_takes_the_record_along(place, undisturbed, stopped, tmp_path, measured):
    folder = do(run_in(place, tmp_path / "elsewhere"), resume=str(stopped.path / "checkpoint-2"))
    assert same(factors(undisturbed), factors(folder))
    assert (record(folder), measured) == (record(stopped), [])


def test_a_run_whose_record_is_lost_measures_again_and_says_so(place, stopped, measured):
    stopped.compute_errors.unlink()
    do(run_in(place, stopped.path), resume="auto")
    assert [set(errors) for errors in measured] == [ALL_ERRORS]
    assert any("compute.json says what fp8 changed" in note for note in results(stopped)["notes"])
    assert stopped.compute_errors.exists()


def test_a_run_that_begins_again_measures_again(place, stopped, measured):
    do(run_in(place, stopped.path, training={"max_steps": 1}), overwrite=True)
    assert len(measured) == 1
    assert set(record(stopped)["errors"]) == ALL_ERRORS


@pytest.mark.parametrize(("before", "compute"), [("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "int8")])
def test_a_run_that_computes_otherwise_as_it_resumes_is_told_so(place, tmp_path, before, compute):
    folder = do(run_in(place, tmp_path / "run", before, training={"max_steps": 2}))
    do(run_in(place, folder.path, compute, training={"max_steps": 3}), resume="auto")
    said = results(folder)["notes"]
    assert f"changed since the run began: training.compute: '{before}' -> '{compute}'" in said
    assert (metrics(folder)[-1].keys() >= SHARES) == (compute != "bf16")
    if compute != "bf16":  # its own errors, not those of the format before
        assert any(f"says what {compute} changed" in note for note in said)
        assert record(folder)["compute"] == compute
    assert results(folder)["compute"] == compute


def test_what_a_run_names_stays_in_bfloat16_and_nothing_is_measured(place, tmp_path, monkeypatch):
    monkeypatch.setattr(eight_bit, "compute_errors", lambda model: pytest.fail("measured"))
    kept, keep = [], eight_bit.underflow_counts
    monkeypatch.setattr(eight_bit, "underflow_counts", lambda model: kept.append(set(keep(model))) or keep(model))
    folder = do(run_in(place, tmp_path / "run", training={"keep_in_bf16": ["down", "0.qkv"], "max_steps": 1}))
    names = ALL_GROUPS - {"0.down", "1.down", "0.qkv"}
    assert kept == [{f"{name}.{kind}" for name in names for kind in ("input", "gradient")}]
    assert not folder.compute_errors.exists()


@pytest.fixture(scope="module")
def trained(place):
    """Return a function that gives the folder of a run of three steps, trained once with the same options."""

    @functools.cache
    def of(compute, **training):
        folder = place / "_".join(map(str, (compute, *training.items())))
        return do(run_in(place, folder, compute, training={"max_steps": 3, **training}))

    return of


@pytest.mark.parametrize(
    ("compute", "training"),
    [
        *((compute, {"memory": memory}) for compute in ("fp8", "int8") for memory in ("save", "speed")),
        *((compute, {"packing": True, "max_length": 64}) for compute in ("fp8", "int8")),
        # the trainer's, whatever the format
        ("fp8", {"gradient_accumulation_steps": 2, "on_nonfinite": "skip"}),
    ],
    ids=str,
)
def test_ways_to_train_take_it(trained, compute, training):
    folders = [trained(one, **training) for one in (compute, "bf16")]
    found, expected = ([row["loss"] for row in metrics(folder)] for folder in folders)
    assert found == pytest.approx(expected, abs=0.05)
    assert set(record(folders[0])["errors"]) == ALL_ERRORS


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_recomputation_changes_no_bit(trained, compute):
    losses = [[row["loss"] for row in metrics(trained(compute, memory=memory))] for memory in ("save", "speed")]
    assert losses[0] == losses[1]


def test_a_classifier_on_a_decoder_takes_it(place, tmp_path):
    sections = {
        "model": {"name": str(place / "model"), "task": "seq_cls", "num_labels": 2},
        "data": {"train": [str(place / "pairs.jsonl")]},
    }
    folder = do(run_in(place, tmp_path / "run", training={"max_steps": 2}, **sections))
    assert set(record(folder)["errors"]) == ALL_ERRORS
    assert metrics(folder)[0].keys() >= SHARES


def test_a_batch_that_is_not_finite_does_not_decide(place, tmp_path, monkeypatch):
    read, calls = eight_bit.compute_errors, []

    def broken_at_first(model):
        errors = read(model)
        calls.append(errors)
        return dict.fromkeys(errors, float("nan")) if len(calls) == 1 else errors

    monkeypatch.setattr(eight_bit, "compute_errors", broken_at_first)
    folder = do(run_in(place, tmp_path / "run", training={"max_steps": 3}))
    assert [set(errors) for errors in calls] == [ALL_ERRORS, ALL_ERRORS]
    assert all(record(folder)["errors"].values())
