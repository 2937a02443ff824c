"""Training that begins with the factors of an earlier adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lsr_scale.cli import main as command
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder
from tests.helpers.tiny_runs import (
    do,
    factors,
    labelled,
    metrics,
    same,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

# no step changes anything, so that what is saved is what was loaded
STILL = {"learning_rate": 0.0, "save_strategy": "no", "max_steps": 1}
PLAIN = {"eval": {"tasks": []}}


def trained(place, name="first", **sections):
    training = {"output_dir": str(place / name), "save_strategy": "no", **sections.pop("training", {})}
    return do(tiny_run(place, training=training, **PLAIN, **sections))


def started(place, path, name="second", **sections):
    adapter = {"start_from": str(path), **sections.pop("adapter", {})}
    return trained(place, name, training={**STILL, **sections.pop("training", {})}, adapter=adapter, **sections)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the folder of a model, its data, and `first`, a run on it."""
    folder = tmp_path_factory.mktemp("start-from")
    save_llama(folder / "model")
    trained(folder)
    return folder


@pytest.fixture
def place(shared, tmp_path):
    """Return a copy of it, a test's own."""
    return shutil.copytree(shared, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def first(place):
    return RunFolder(place / "first")


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lsr", "rank": 4, "separation_rank": 2},
        {"method": "kron_lora", "rank": 2, "left_out": 2, "dropout": 0.0},
        {"method": "lora", "rank": 2},
        {"method": "lokr", "rank": 2},
    ],
)
def test_a_run_begins_where_another_ended(place, adapter):
    sections = {"adapter": adapter, "model": {"quantization": "none"}}
    first = trained(place, "other", **sections)
    for number, path in enumerate((first.path, first.adapter)):
        assert same(factors(first), factors(started(place, path, f"second{number}", **sections)))
    moved = started(place, first.path, "third", training={"learning_rate": 1e-2, "max_steps": 2}, **sections)
    assert not same(factors(first), factors(moved))
    assert str(first.path) in moved.config.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["lm_head"]}, {}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}),
    ],
)
def test_what_the_start_has_and_the_run_leaves_open_is_kept(place, first, second):
    start = trained(place, "start", adapter=first)
    training = {"output_dir": str(place / "second"), "save_steps": 2}
    run = tiny_run(place, training=training, adapter={"start_from": str(start.path), **second}, **PLAIN)
    whole = factors(do(run))
    shutil.rmtree(place / "second" / "checkpoint-6")
    shutil.rmtree(start.path)
    assert same(whole, factors(do(run, resume="auto")))


def test_the_optimizer_and_the_schedule_begin_anew(place, first):
    training = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": -1}
    rows = metrics(started(place, first.path, training=training))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))


def test_rounded_factors_are_a_start_too(place, first):
    assert command(["export", str(first.path), "--to", "adapter", "--bits", "8", "--out", str(place / "small")]) == 0
    second = factors(started(place, place / "small"))
    for name, factor in factors(first).items():
        assert float((second[name] - factor).norm()) <= 0.02 * float(factor.norm())
        assert second[name].dtype == torch.float32


def test_a_resumed_run_takes_its_checkpoint_and_not_the_start(place, first):
    training = {"output_dir": str(place / "second"), "save_steps": 2}
    run = tiny_run(place, training=training, adapter={"start_from": str(first.path)}, **PLAIN)
    whole = factors(do(run))
    folder = RunFolder(place / "second")
    for step in (4, 6):
        for file in (folder.path / f"checkpoint-{step}").iterdir():
            file.unlink()
        (folder.path / f"checkpoint-{step}").rmdir()
    for file in first.adapter.iterdir():
        file.unlink()  # nobody needs it any more
    assert same(whole, factors(do(run, resume="auto")))
    assert str(first.path) in folder.config.read_text(encoding="utf-8")


def test_a_classifier_takes_its_head_along(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    write_rows(tmp_path / "rows.jsonl", labelled())
    write_rows(tmp_path / "questions.jsonl", [])
    sections = {"model": {"task": "seq_cls", "num_labels": 2, "quantization": "none"}}
    adapter = {"target_modules": ["query", "value"]}
    first = trained(tmp_path, adapter=adapter, **sections)
    second = started(tmp_path, first.path, adapter=adapter, **sections)
    found = [load_file(folder.adapter / "adapter_model.safetensors") for folder in (first, second)]
    assert any("classifier" in name for name in found[0])
    assert same(*found)
    turned = {"model": {"task": "seq_cls", "labels": ["1", "0"], "quantization": "none"}}
    with pytest.raises(UserError, match=r"was trained on the labels 0, 1 in this order, and these are 1, 0; set model"):
        started(tmp_path, first.path, "turned", adapter=adapter, **turned)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 2}, "adapter.rank: 2 in the run, 4 in the adapter"),
        ({"alpha": 3.0}, "adapter.alpha: 3.0 in the run, 8.0 in the adapter"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules: .'q_proj'. in the run"),
        ({"method": "lora", "rank": 4}, "holds an adapter of lsr, but adapter.method is lora"),
        ({"start_from": "nowhere"}, "adapter.start_from: nowhere: no such folder"),
        ({"start_from": "model"}, "there is no adapter in this folder"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(place, first, monkeypatch, adapter, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr("lsr_scale.training.assembly.load_base_for", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=message):
        started(place, adapter.get("start_from", first.path), adapter=adapter)


def test_an_adapter_of_another_base_is_refused(place, first):
    described = json.loads((first.adapter / "base.json").read_text(encoding="utf-8"))
    described["linear_shapes"] = {name: [7, 7] for name in described["linear_shapes"]}
    (first.adapter / "base.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match="base"):
        started(place, first.path)
