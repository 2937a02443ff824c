"""`training.compute: fp8 | int8` before and around training: refusals, groups kept in bfloat16, the record of them."""

import json
import math

import pytest

from lsr_scale import UserError, config
from lsr_scale.config.training import LINEAR_GROUPS
from lsr_scale.fused.layer_state import GROUPS
from lsr_scale.run import train as train_module
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import compute as module
from lsr_scale.training.compute import above, check_compute, read_errors, write_errors
from tests.helpers.fp8 import pretend_fp8
from tests.helpers.tiny_runs import do, labelled, save_classifier, save_llama, tiny_run, write_rows

ERRORS = {"1.o.gradient": 0.2, "1.o.output": 0.3, "0.qkv.output": 0.04, "10.down.gradient": math.nan}
ERRORS |= {"1.down.output": 0.1, "0.gate_up.gradient": 0.11, "0.gate_up.output": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compute")
    save_llama(folder / "model", num_hidden_layers=2)
    save_classifier(folder / "bert", "bert")
    write_rows(folder / "pairs.jsonl", labelled())
    return folder


def run_in(place, compute="fp8", training=None, **sections):
    return tiny_run(place, training={"compute": compute, **(training or {})}, **sections)


def test_the_groups_that_a_run_may_name_are_those_of_a_layer():
    assert set(LINEAR_GROUPS) == set(GROUPS)


@pytest.mark.parametrize(("compute", "why"), [("fp8", ""), ("int8", ", as input gradients are in e4m3 with int8 too")])
def test_a_machine_without_fp8_is_told_so_before_anything_is_read(place, monkeypatch, compute, why):
    monkeypatch.setattr(module, "fp8_fallback_reason", lambda device: "the GPU has compute capability 8.0")
    monkeypatch.setattr(train_module, "read_data", lambda *args: pytest.fail("data was read"))
    monkeypatch.setattr(train_module.evaluate, "load_tasks", lambda *args: pytest.fail("questions were read"))
    with pytest.raises(
        UserError, match=rf"{compute} cannot be here: the GPU .* 8\.0{why}; set training\.compute: bf16"
    ):
        do(run_in(place, compute))
    assert not (place / "run").exists()
    check_compute(tiny_run(place))


@pytest.mark.parametrize("compute", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"adapter": {"method": "krona"}}, "krona has no low-rank pair"),
        (
            {
                "model": {"name": "{place}/bert", "task": "seq_cls", "num_labels": 2},
                "adapter": {"target_modules": ["query", "value"]},
                "data": {"train": ["{place}/pairs.jsonl"]},
                "eval": {"tasks": []},
            },
            "BertForSequenceClassification has no layers that fuse",
        ),
    ],
)
def test_what_has_no_fused_layers_is_refused_before_weights_are_read(place, monkeypatch, compute, sections, reason):
    pretend_fp8(monkeypatch)
    filled = json.loads(json.dumps(sections).replace("{place}", str(place)))
    with pytest.raises(UserError, match=rf"{compute} is for fused layers, .*{reason}; set training\.compute: bf16"):
        check_compute(run_in(place, compute, **filled))


def test_a_layer_that_the_model_does_not_have_is_refused(place, monkeypatch):
    pretend_fp8(monkeypatch)
    check_compute(run_in(place, "fp8", {"keep_in_bf16": ["1.down", "o"]}))
    with pytest.raises(UserError, match=r"keep_in_bf16: 2\.down: .*model has layers 0 to 1; .* or down for all"):
        check_compute(run_in(place, "fp8", {"keep_in_bf16": ["2.down"]}))


@pytest.mark.parametrize(("compute", "hidden_size", "unit"), [("fp8", 40, 16), ("int8", 48, 64)])
def test_linears_of_other_sizes_are_refused(place, tmp_path, monkeypatch, compute, hidden_size, unit):
    pretend_fp8(monkeypatch)
    save_llama(tmp_path / "narrow", num_hidden_layers=2, hidden_size=hidden_size, intermediate_size=72)
    name = {"name": str(tmp_path / "narrow")}
    reason = f"{compute} is for no linear of .*narrow: {hidden_size} inputs, no multiple of {unit}"
    with pytest.raises(UserError, match=rf"{reason}.*; set training"):
        check_compute(run_in(place, compute, model=name))
    if compute == "int8":
        check_compute(run_in(place, "fp8", {"keep_in_bf16": ["down"]}, model=name))


def test_groups_above_the_tolerance_and_without_an_error_are_kept():
    assert above(ERRORS, 0.1) == ["0.gate_up", "1.o", "10.down"]


def test_errors_are_read_as_they_were_written(tmp_path):
    folder = RunFolder(tmp_path)
    assert read_errors(folder.compute_errors, "int8") is None
    write_errors(folder, "int8", ERRORS, 0.1)
    found = read_errors(folder.compute_errors, "int8")
    ordered = ["0.qkv.output", "0.gate_up.output", "0.gate_up.gradient", "1.o.output", "1.o.gradient"]
    assert list(found) == [*ordered, "1.down.output", "10.down.gradient"]
    assert {name: str(error) for name, error in found.items()} == {name: str(error) for name, error in ERRORS.items()}
    assert json.loads(folder.compute_errors.read_text())["kept"] == above(ERRORS, 0.1)
    assert read_errors(folder.compute_errors, "fp8") is None, "int8's errors are not fp8's"


@pytest.mark.parametrize(
    "errors", ["", "{}", "[]", "3", '{"1.down": 1}', '{"1.x.output": 1}', "[1]", '{"1.down.output": "x"}']
)
def test_a_record_that_is_none_is_not_read(tmp_path, errors):
    file = tmp_path / "compute.json"
    file.write_text(f'{{"compute": "fp8", "errors": {errors}}}' if errors else "")
    assert read_errors(file, "fp8") == ({} if errors == "{}" else None)
    file.write_text(errors)
    assert read_errors(file, "fp8") is None


def test_a_run_that_says_nothing_computes_in_bfloat16(place):
    training = tiny_run(place).training
    assert (training["compute"], training["keep_in_bf16"], training["compute_tolerance"]) == ("bf16", "auto", 0.1)
    arguments = config.training_arguments(tiny_run(place))
    assert not {"compute", "keep_in_bf16", "compute_tolerance"} & arguments.keys()
