"""A classifier goes elsewhere with its head and its labels' names: transformers' own classes and pipeline read them."""

import json
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, pipeline

from lsr_scale import UserError
from lsr_scale.exporting import export
from lsr_scale.run.classifier import classify
from tests.helpers.tiny_runs import TOOLS, do, save_classifier, save_llama, tiny_run, write_rows

NAMES = ["garden", "kitchen", "workshop"]
PLACES = ["kitchen", "kitchen", "workshop", "workshop", "workshop", "kitchen", "garden", "kitchen", "kitchen", "garden"]
ROWS = [{"text": text, "label": place} for text, place in zip(TOOLS, PLACES, strict=True)]
LINEARS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"], "roberta": ["query", "value"]}


@pytest.fixture(scope="module", params=["llama-nf4", "llama-none", "bert-none", "roberta-int8"])
def trained(request, tmp_path_factory):
    """Return the kind of base, and the folder of a run that learned where tools are used."""
    kind, quantization = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    save_llama(folder / "model") if kind == "llama" else save_classifier(folder / "model", kind)
    write_rows(folder / "rows.jsonl", ROWS)
    run = tiny_run(
        folder,
        model={"task": "seq_cls", "quantization": quantization, "dtype": "float32"},
        adapter={"rank": 4, "separation_rank": 2, "target_modules": LINEARS[kind]},
        data={"train": [str(folder / "rows.jsonl")], "validation": [str(folder / "rows.jsonl")]},
        training={"num_train_epochs": 2, "learning_rate": 2e-2},
        eval={"tasks": []},
    )
    return kind, do(run).path


def silent(text):
    del text


def answers(folder, **options):
    """Return what transformers' own pipeline says of each text: its label, and every probability."""
    said: Any = pipeline("text-classification", str(folder), device="cpu", top_k=None, **options)(list(TOOLS))
    return [(row[0]["label"], {one["label"]: one["score"] for one in row}) for row in said]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_a_merged_classifier_answers_by_name_in_transformers_own_pipeline(trained, tmp_path, dtype, tolerance):
    _, run = trained
    result = export(run, "merged", tmp_path / "out", dtype=dtype, say=silent)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", NAMES, strict=True))
    assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    expected = classify(run, TOOLS)
    for row, (label, scores) in zip(expected, answers(tmp_path / "out", dtype=torch.float32), strict=True):
        assert scores == pytest.approx(row["probabilities"], abs=tolerance)
        if dtype == "float32":
            assert label == row["predicted"]
    assert "label the same for" in result["logits"]
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["merged", "lora"])
def test_an_export_does_not_say_that_the_head_starts_at_random(trained, tmp_path, to, caplog):
    _, run = trained
    export(run, to, tmp_path / "out", say=silent)
    assert "start at random" not in caplog.text


def test_a_classifier_quantized_again_is_smaller_and_keeps_its_head_and_names(trained, tmp_path):
    _, run = trained
    result = export(run, "merged", tmp_path / "out", dtype="nf4", say=silent)  # verified: it loads, and answers alike
    assert result["agreement"]["relative_error"] < 0.5
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    quantized = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantized
    assert all(model.get_submodule(name).weight.quant_state is not None for name in quantized)
    assert not any(name.startswith(("score", "classifier")) for name in quantized)
    assert model.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize(("to", "bits"), [("adapter", None), ("adapter", 4), ("lora", None)])
def test_an_adapter_brings_its_head_and_names(trained, tmp_path, to, bits):
    kind, run = trained
    out = tmp_path / "out"
    export(run, to, out, **({} if bits is None else {"bits": bits}), say=silent)
    names = json.loads((out / "base.json").read_text())["labels"]
    assert names == NAMES
    assert "`garden`, `kitchen`, `workshop`" in (out / "README.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(
        run.parent / "model", id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    model = PeftModel.from_pretrained(base, str(out))
    heads = {name.split(".")[2] for name, _ in model.named_parameters() if "modules_to_save.default" in name}
    assert heads == {"score" if kind == "llama" else "classifier"}
    assert model.config.id2label == dict(enumerate(NAMES))
    # the bare adapter's folder, without the run, is enough for the whole model
    if bits is None:
        export(out, "merged", tmp_path / "whole", base=str(run.parent / "model"), dtype="float32", say=silent)
        assert json.loads((tmp_path / "whole" / "config.json").read_text())["id2label"]["1"] == "kitchen"


def test_gguf_is_refused_and_the_advice_works(trained, tmp_path):
    _, run = trained
    for merged in (False, True):
        with pytest.raises(UserError, match=r"llama\.cpp runs no classifiers; use --to merged, lora or adapter"):
            export(run, "gguf", tmp_path / "out", say=silent, merged=merged)
    assert not (tmp_path / "out").exists()


def test_a_body_that_is_fully_trained_too_is_not_merged(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    run = tiny_run(
        tmp_path,
        model={"task": "seq_cls", "quantization": "none", "dtype": "float32"},
        adapter={"target_modules": ["query"], "modules_to_save": ["pooler"]},
        data={"train": [write_rows(tmp_path / "labelled.jsonl", ROWS)]},
        training={"max_steps": 1},
        eval={"tasks": []},
    )
    with pytest.raises(UserError, match=r"--to merged: bert\.pooler\.dense\.bias is fully trained .*export lora"):
        export(do(run).path, "merged", tmp_path / "out", say=silent)
    export(tmp_path / "run", "lora", tmp_path / "out", say=silent)
