"""8 bits as a run watches them: which groups stay in bfloat16, by whose errors; shares of underflow, warnings."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from lsr_scale import distributed
from lsr_scale.kernels.hadamard import rotate_reference
from lsr_scale.kernels.quantize_rows import quantize_rows_reference
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.callbacks import eight_bit
from lsr_scale.training.callbacks.eight_bit import WARN_SHARES, EightBitCallback

MODEL = object()
STEP = SimpleNamespace(global_step=1)


class Fused:
    """Stands in for the fused model in 8 bits: what it measured, and what it was told."""

    def __init__(self, monkeypatch):
        self.errors, self.counts, self.kept, self.resets, self.measures = {}, {}, [], 0, True
        monkeypatch.setattr(eight_bit, "compute_errors", self.read)
        monkeypatch.setattr(eight_bit, "measure_compute_errors", lambda model: setattr(self, "measures", True))
        monkeypatch.setattr(
            eight_bit, "underflow_counts", lambda model: {k: torch.tensor(v) for k, v in self.counts.items()}
        )
        monkeypatch.setattr(eight_bit, "keep_in_bf16", lambda model, names: self.kept.append(names))
        monkeypatch.setattr(eight_bit, "reset_underflow_counts", self.reset)

    def read(self, model):
        was, self.measures = self.measures, False
        return dict(self.errors) if was else {}

    def reset(self, model):
        assert model is MODEL
        self.resets += 1


@pytest.fixture
def fused(monkeypatch):
    return Fused(monkeypatch)


@pytest.fixture
def said():
    return []


@pytest.fixture
def make(tmp_path, said):
    def made(decides=True, earlier=None, tolerance=0.1, compute="fp8"):
        return EightBitCallback(RunFolder(tmp_path), compute, tolerance, decides, earlier, said.append)

    return made


def end_step(callback):
    callback.on_step_end(None, STEP, None, model=MODEL)


def begin(callback):
    callback.on_train_begin(None, STEP, None, model=MODEL)


def test_groups_with_a_large_error_in_the_first_step_stay_in_bfloat16(fused, make, said, tmp_path):
    callback = make()
    begin(callback)
    assert (fused.kept, callback.measures) == ([], True)
    fused.errors = {"0.qkv.output": 0.04, "0.down.gradient": 0.25, "1.down.output": 0.11, "1.down.gradient": 0.12}
    end_step(callback)
    fused.errors = {"0.qkv.output": 0.9}
    end_step(callback)
    assert fused.kept == [["0.down", "1.down"]]
    assert said == [
        "fp8: 2 of 3 groups of linears stay in bfloat16; largest errors: 0.11 in 1.down's outputs, 0.25 in 0.down's "
        "input gradients (training.compute_tolerance: 0.1)"
    ]
    assert json.loads((tmp_path / "compute.json").read_text()) == {
        "compute": "fp8",
        "tolerance": 0.1,
        "errors": {**{"0.qkv.output": 0.04, "0.down.gradient": 0.25, "1.down.output": 0.11, "1.down.gradient": 0.12}},
        "kept": ["0.down", "1.down"],
    }


def test_the_largest_error_that_any_process_found_decides(fused, make, monkeypatch):
    other = {"0.qkv.output": 0.3, "0.down.output": 0.01, "1.down.output": math.nan}
    monkeypatch.setattr(distributed, "gather", lambda own: [*own, other])
    fused.errors = {"0.qkv.output": 0.04, "0.down.output": 0.05, "1.down.output": 0.06}
    callback = make()
    for _ in range(2):
        end_step(callback)
    assert fused.kept == [["0.qkv", "1.down"]]


def test_the_main_process_alone_writes(fused, make, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    fused.errors = {"0.qkv.output": 0.04}
    end_step(make())
    assert fused.kept == [[]]
    assert not (tmp_path / "compute.json").exists()


def test_a_first_step_that_is_not_finite_does_not_decide(fused, make, said):
    callback = make()
    fused.errors = {"0.qkv.output": math.nan, "0.down.output": 0.02}
    end_step(callback)
    assert (fused.kept, said) == ([], [])
    fused.errors = {"0.qkv.output": 0.03, "0.down.output": 0.02}
    end_step(callback)
    assert fused.kept == [[]]
    assert "0 of 2 groups" in said[0]


def test_what_is_not_finite_in_the_second_step_either_stays_in_bfloat16(fused, make, said):
    callback = make()
    fused.errors = {"0.qkv.output": math.inf, "0.down.output": math.nan, "0.o.output": 0.02}
    end_step(callback)
    end_step(callback)
    assert fused.kept == [["0.qkv", "0.down"]]
    assert callback.measures is False


def test_a_run_that_resumes_decides_by_what_it_measured(fused, make, said, tmp_path):
    callback = make(earlier={"0.qkv.output": 0.04, "0.down.output": 0.25})
    assert callback.measures is False
    begin(callback)
    fused.errors = {"0.qkv.output": 0.9}
    end_step(callback)
    assert fused.kept == [["0.down"]]
    assert said[0].endswith("(training.compute_tolerance: 0.1), as measured when the run began")
    assert json.loads((tmp_path / "compute.json").read_text())["kept"] == ["0.down"]


def test_a_tolerance_that_is_changed_as_a_run_resumes_counts(fused, make):
    begin(make(earlier={"0.qkv.output": 0.04, "0.down.output": 0.25}, tolerance=0.3))
    assert fused.kept == [[]]


def test_groups_that_the_run_names_are_not_decided_here(fused, make, said, tmp_path):
    callback = make(decides=False)
    begin(callback)
    fused.errors = {"0.qkv.output": 0.9}
    end_step(callback)
    assert (fused.kept, said, list(tmp_path.iterdir())) == ([], [], [])


def test_shares_of_underflow_are_logged_over_all_processes(fused, make, monkeypatch):
    fused.counts = {"0.qkv.input": [25, 100], "0.o.input": [75, 100], "0.o.gradient": [4, 100], "1.o.input": [0, 0]}
    logs = {"loss": 1.0}
    make().on_log(None, None, None, logs=logs, model=MODEL)
    assert logs == {
        "loss": 1.0,
        "underflow_input_median": 0.5,
        "underflow_input_max": 0.75,
        "underflow_gradient_median": 0.04,
        "underflow_gradient_max": 0.04,
    }
    other = {"0.qkv.input": [3, 300], "0.o.input": [0, 300], "0.o.gradient": [0, 300], "1.o.input": [0, 0]}
    monkeypatch.setattr(distributed, "gather", lambda own: [*own, other])
    logs = {"loss": 1.0}
    make().on_log(None, None, None, logs=logs, model=MODEL)
    assert logs["underflow_input_max"] == 75 / 400
    assert logs["underflow_gradient_max"] == 4 / 400
    assert fused.resets == 2


@pytest.mark.parametrize("logs", [None, {"eval_loss": 1.0}])
def test_other_logs_are_left_alone(fused, make, logs):
    fused.counts = {"0.o.input": [9, 100]}
    make().on_log(None, None, None, logs=logs, model=MODEL)
    assert logs in (None, {"eval_loss": 1.0})
    assert fused.resets == 0


def test_nothing_is_logged_where_all_stays_in_bfloat16(fused, make):
    logs = {"loss": 1.0}
    make().on_log(None, None, None, logs=logs, model=MODEL)
    assert logs == {"loss": 1.0}


def test_a_group_most_of_which_underflows_is_warned_of_once(fused, make, said):
    callback = make(decides=False)
    fused.counts = {"3.down.gradient": [60, 100], "4.down.gradient": [70, 100], "0.o.input": [50, 100]}
    for _ in range(2):
        callback.on_log(None, None, None, logs={"loss": 1.0}, model=MODEL)
    assert said == [
        "note: output gradients of 4.down and 1 more: 70 % of the values are too small for e4m3 beside the "
        "largest of their token; training.keep_in_bf16: [4.down] keeps it in bfloat16"
    ]
    fused.counts = {"0.o.input": [51, 100]}
    callback.on_log(None, None, None, logs={"loss": 1.0}, model=MODEL)
    assert "activations of 0.o: 51 % of the values are too small for e4m3 beside" in said[1]


def test_activations_that_are_zero_in_int8_are_warned_of_sooner(fused, make, said):
    fused.counts = {"3.down.input": [13, 100], "0.o.input": [12, 100], "3.down.gradient": [50, 100]}
    make(compute="int8").on_log(None, None, None, logs={"loss": 1.0}, model=MODEL)
    assert said == [
        "note: activations of 3.down: 13 % of the values are zero in int8, too small beside the largest of their "
        "token; training.keep_in_bf16: [3.down] keeps it in bfloat16"
    ]
    fused.counts = {"3.down.gradient": [51, 100]}
    callback = make(compute="int8")
    callback.on_log(None, None, None, logs={"loss": 1.0}, model=MODEL)
    assert "output gradients of 3.down: 51 % of the values are too small for e4m3 beside" in said[1]


def test_a_warning_says_what_error_the_group_had(fused, make, said):
    callback = make(compute="int8")
    fused.errors = {"3.down.output": 0.011, "3.down.gradient": 0.04}
    end_step(callback)
    for direction, error in (("input", "0.011"), ("gradient", "0.04")):
        fused.counts = {f"3.down.{direction}": [60, 100]}
        callback.on_log(None, None, None, logs={"loss": 1.0}, model=MODEL)
        assert f"of their token (its error in the first step: {error}); training" in said[-1]


def underflow_and_error(dtype, outlier):
    """Return the share that underflows of normally distributed rows beside an outlier each, and their error."""
    x = torch.randn(32, 2048, generator=torch.Generator().manual_seed(0))
    x[:, 0] = outlier
    codes, scales, counts = torch.empty(x.shape, dtype=dtype), torch.empty(len(x)), torch.zeros(2)
    quantize_rows_reference(x, codes, scales, counts=counts)
    rounded = codes.float() * scales[:, None]
    rounded = rotate_reference(rounded) if dtype == torch.int8 else rounded
    return float(counts[0] / counts[1]), float((rounded - x)[:, 1:].norm() / x[:, 1:].norm())


def test_a_share_is_warned_of_where_it_begins_to_cost():
    """In e4m3 where the error exceeds the format's own, in int8 where it comes near `compute_tolerance`'s default."""
    in_e4m3 = [underflow_and_error(torch.float8_e4m3fn, outlier) for outlier in (2, 8000, 16000)]
    shares, errors = zip(*in_e4m3, strict=True)
    assert shares[0] < 0.01 < 0.3 < shares[1] < WARN_SHARES[torch.float8_e4m3fn] < shares[2] < 0.8
    assert errors[1] < 1.1 * errors[0]
    assert errors[2] > 1.4 * errors[0]
    in_int8 = [underflow_and_error(torch.int8, outlier) for outlier in (2, 240, 350)]
    shares, errors = zip(*in_int8, strict=True)
    assert shares[0] < 0.02 < 0.09 < shares[1] < WARN_SHARES[torch.int8] < shares[2] < 0.16
    assert 0.07 < errors[1] < 0.1 < errors[2] < 0.12
