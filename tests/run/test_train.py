"""Whole runs on one process: what trains, in which dtype, on which data, and what the folder holds afterwards."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lsr_scale import UserError, files
from lsr_scale.adapters.methods.lsr import Lsr
from lsr_scale.adapters.save_and_load import load_adapter
from lsr_scale.cli import main
from lsr_scale.config import dump_yaml, load_run
from lsr_scale.config.training import checkpoints_layers
from lsr_scale.fused import attention_block
from lsr_scale.model import load_base, load_base_for
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.train import train
from lsr_scale.training import assembly
from lsr_scale.training.assembly import adapt, build_trainer
from lsr_scale.training.callbacks.memory import FitMemoryCallback
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import (
    CHAT_TEMPLATE,
    TOOLS,
    byte_tokenizer,
    completions,
    do,
    factors,
    labelled,
    metrics,
    results,
    same,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

KRON = {"method": "kron_lora", "rank": 4, "left_out": 4}
LORA = {"method": "lora", "rank": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model; runs in it name their own output folders."""
    folder = tmp_path_factory.mktemp("runs")
    save_llama(folder / "model", chat=True, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def plain(place, with_pages):
    """Return the folder of the plainest run, done once."""
    with with_pages():
        return do(tiny_run(place, training={"output_dir": str(place / "plain")}))


def run_in(place, tmp_path, **sections):
    return tiny_run(place, **{**sections, "training": {"output_dir": str(tmp_path), **sections.get("training", {})}})


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("method", [{}, KRON, LORA], ids=["lsr", "kron_lora", "lora"])
def test_factors_are_the_seeded_ones_in_float32_after_the_trainers_constructor(place, tmp_path, method, quantization):
    run = run_in(place, tmp_path, adapter=method, model={"quantization": quantization})
    expected = dict(adapt(run, load_base_for(run.model, run.training["seed"]))[0].named_parameters())
    trainer = build_trainer(run, RunFolder(tmp_path))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) >= 2 * 14
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())
    if method is not LORA:  # PEFT draws LoRA's in the dtype of the base; ours a cast to bfloat16 would have rounded
        assert any(not torch.equal(p, p.bfloat16().float()) for p in trained.values())


def test_factors_are_float32_in_the_forward_and_cast_once_after_materialization(place, tmp_path, monkeypatch):
    seen, cast = set(), set()
    materialize = Lsr.materialize

    def spy(params):
        seen.update(p.dtype for p in params.values())
        return materialize(params)

    monkeypatch.setattr(Lsr, "materialize", staticmethod(spy))
    run = run_in(place, tmp_path, training={"max_steps": 1}, eval={"tasks": []})
    trainer = build_trainer(run, RunFolder(tmp_path))
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(
        lambda module, inputs, out: cast.update(t.dtype for t in module.pair("default", out.dtype))
    )
    trainer.train()
    assert seen == {torch.float32}
    assert cast == {torch.bfloat16}


def test_same_configuration_and_seed_give_the_same_adapter_and_another_seed_another(place, plain, tmp_path):
    again = do(run_in(place, tmp_path / "again"))
    assert same(factors(plain), factors(again))
    other = do(run_in(place, tmp_path / "other", training={"seed": 7}))
    assert not same(factors(plain), factors(other))


def test_the_run_folder_holds_what_it_promises(place, plain):
    names = {path.name for path in plain.path.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "loss.png", "adapter", "results.json", "eval"} <= names
    assert "report.html" in names
    assert not [name for name in names if name.startswith(".") or name == "README.md"]
    run = tiny_run(place, training={"output_dir": str(plain.path)})
    assert load_run(plain.config) == run
    assert dump_yaml(run) == plain.config.read_text()
    environment = json.loads(plain.environment.read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__
    assert plain.curve.read_bytes().startswith(b"\x89PNG")
    found = results(plain)
    assert found["steps"] == 6
    assert found["train_rows"] == 12
    assert found["trainable_parameters"] == sum(t.numel() for t in factors(plain).values())
    assert set(found["accuracy"]["questions"]) == {"before", "after", "mcnemar"}
    assert found["accuracy"]["questions"]["before"]["num_examples"] == 6
    for when in ("before", "after"):
        assert len(plain.predictions("questions", when).read_text().splitlines()) == 6
    assert {file.name for file in plain.adapter.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "base.json",
    }


@pytest.mark.parametrize("logging_steps", [4, 100])
def test_the_last_step_is_recorded_whatever_the_others_are(place, tmp_path, logging_steps):
    done = do(tiny_run(place, training={"output_dir": str(tmp_path / "run"), "logging_steps": logging_steps}))
    assert [row["step"] for row in metrics(done) if "loss" in row] == ([4, 6] if logging_steps == 4 else [6])


def test_metrics_have_one_line_a_step_with_loss_speed_and_time(plain):
    rows = metrics(plain)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss"] > 0 and row["tokens_per_s"] > 0 and row["memory_gib"] > 0 for row in rows)
    times = [row["wall_s"] for row in rows]
    assert times == sorted(times)


def test_counted_tokens_are_the_real_ones_without_padding(place, plain):
    tokenizer = byte_tokenizer()
    texts = [row["prompt"] + row["completion"] for row in completions()]
    lengths = [
        len(tokenizer.encode(row["prompt"]).ids) + len(tokenizer.encode(row["completion"]).ids) + 1
        for row in completions()
    ]
    assert len(set(lengths)) > 2, "padding must be needed for this test to see it"
    assert metrics(plain)[-1]["num_tokens"] == sum(lengths), texts


def test_training_learns(place, tmp_path):
    training = {"num_train_epochs": 20, "per_device_train_batch_size": 12, "learning_rate": 2e-2, "save_strategy": "no"}
    done = do(run_in(place, tmp_path, training=training, eval={"tasks": []}))
    losses = [row["loss"] for row in metrics(done)]
    # a frozen random head of this width cannot bring it down by more than 1
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("method", [KRON, LORA], ids=["kron_lora", "lora"])
def test_other_methods_go_the_same_way(place, tmp_path, method):
    done = do(run_in(place, tmp_path, adapter=method))
    assert results(done)["method"] == method["method"]
    assert {t.dtype for t in factors(done).values()} == {torch.float32}
    assert done.predictions("questions", "after").is_file()


@pytest.mark.parametrize("quantization", ["int8", "none", "fp4"])
def test_other_bases_go_the_same_way(place, plain, tmp_path, quantization):
    done = do(run_in(place, tmp_path, model={"quantization": quantization}))
    assert json.loads((done.adapter / "base.json").read_text())["quantization"] == quantization
    assert factors(done).keys() == factors(plain).keys()
    assert metrics(done)[0]["loss"] == pytest.approx(metrics(plain)[0]["loss"], rel=2e-2)


def test_checkpointing_changes_memory_and_not_the_adapter(place, plain, tmp_path):
    assert checkpoints_layers(load_run(plain.config).training)
    done = do(run_in(place, tmp_path, training={"gradient_checkpointing": False}))
    assert same(factors(plain), factors(done))


@pytest.mark.parametrize("training", [{}, {"gradient_checkpointing": False}, {"packing": True, "max_length": 64}])
@pytest.mark.parametrize("method", [{}, LORA], ids=["lsr", "lora"])
def test_fused_layers_train_the_same(place, tmp_path, method, training, monkeypatch):
    def trained(fused, **changes):
        model = {"quantization": "nf4", "dtype": "float32"}
        values = {"save_strategy": "no", **training, "fused": fused, **changes}
        return do(run_in(place, tmp_path / fused, model=model, adapter=method, training=values, eval={"tasks": []}))

    calls = []
    original = attention_block.forward
    monkeypatch.setattr(attention_block, "forward", lambda *args: (calls.append(1), original(*args))[1])
    unfused = trained("off")
    assert not calls
    fused = trained("on")
    # two layers a step, and once more in the backward pass where nothing is kept
    again = 1 if training.get("gradient_checkpointing") is False else 2
    assert len(calls) == 2 * again * len(metrics(fused))
    losses = [[row["loss"] for row in metrics(done) if "loss" in row] for done in (fused, unfused)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in factors(unfused).items():
        assert torch.allclose(factors(fused)[name], value, atol=2e-4), name


def test_packed_sequences_do_not_see_each_other(place, tmp_path):
    def loss(**training):
        model = {"quantization": "none", "dtype": "float32"}
        training = {"save_strategy": "no", "learning_rate": 0.0, "num_train_epochs": 1, "max_length": 64, **training}
        done = do(run_in(place, tmp_path / str(len(training)), model=model, training=training, eval={"tasks": []}))
        return done, metrics(done)

    # all rows in one step either way, so that both losses are the mean over the same tokens
    _, one_by_one = loss(per_device_train_batch_size=12)
    packed_run, packed = loss(per_device_train_batch_size=12, packing=True)
    assert results(packed_run)["train_rows"] < 12
    assert packed[0]["loss"] == pytest.approx(one_by_one[0]["loss"], rel=1e-5)


def test_validation_loss_is_recorded_and_kept_in_the_results(place, tmp_path):
    rows = write_rows(tmp_path / "held.jsonl", completions(5))
    training = {"eval_strategy": "steps", "eval_steps": 3}
    done = do(run_in(place, tmp_path / "run", data={"validation": [rows]}, training=training))
    losses = [(row["step"], row["eval_loss"]) for row in metrics(done) if "eval_loss" in row]
    assert [step for step, _ in losses] == [3, 6]
    assert results(done)["eval_loss"] == pytest.approx(losses[-1][1], abs=1e-6)


def test_rows_held_out_by_hash_are_evaluated_and_not_trained_on(place, tmp_path):
    done = do(run_in(place, tmp_path / "run", data={"validation_split": 0.3}, training={"eval_strategy": "epoch"}))
    found = results(done)
    assert 0 < found["train_rows"] < 12
    assert found["eval_loss"] > 0
    with pytest.raises(UserError, match=r"another data.validation_split: 0.3 -> 0.5"):
        do(run_in(place, tmp_path / "run", data={"validation_split": 0.5}), resume="auto")


def test_the_best_checkpoint_can_be_the_one_that_is_kept(place, tmp_path):
    rows = write_rows(tmp_path / "held.jsonl", [{"prompt": "a", "completion": "@#{}[]|~^"}])
    training = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.2}
    done = do(run_in(place, tmp_path / "run", data={"validation": [rows]}, training=training))
    losses = {row["step"]: row["eval_loss"] for row in metrics(done) if "eval_loss" in row}
    best = min(losses, key=losses.get)
    kept = factors(RunFolder(done.path), f"checkpoint-{best}")
    assert best != 6, "what is learned must not help here, or this test sees nothing"
    assert same(factors(done), kept)
    found = results(done)
    assert (found["best_step"], found["eval_loss"]) == (best, pytest.approx(losses[best], abs=1e-6))


def test_a_misspelt_metric_of_the_best_is_refused_at_once(place, tmp_path):
    with pytest.raises(UserError, match=r"metric_for_best_model: .*'eval_los'.*did you mean 'eval_loss'"):
        run_in(place, tmp_path / "run", training={"metric_for_best_model": "eval_los"})


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(place, tmp_path):
    done = do(run_in(place, tmp_path / "run", eval={"tasks": []}))
    saved = [file for file in done.path.rglob("*.safetensors")]
    assert len(saved) >= 3
    assert {file.stat().st_mode & 0o777 for file in saved} == {0o666 & ~files._UMASK}


def test_conversations_take_the_chat_template(place, tmp_path):
    turns = [[{"role": "user", "content": s}, {"role": "assistant", "content": s}] for s in TOOLS]
    rows = write_rows(tmp_path / "messages.jsonl", [{"messages": each} for each in turns])
    done = do(run_in(place, tmp_path / "run", data={"train": [rows]}))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    expected = sum(
        len(tokenizer.apply_chat_template(each, tokenize=True, return_dict=True)["input_ids"]) for each in turns
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert metrics(done)[-1]["num_tokens"] == expected


def test_one_row_is_enough(place, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", completions(1))
    done = do(run_in(place, tmp_path / "run", data={"train": [rows]}))
    assert results(done)["steps"] == 1


def test_random_weights_need_no_checkpoint(place, tmp_path):
    assert results(do(run_in(place, tmp_path, model={"random_weights": True})))["steps"] == 6


@pytest.mark.parametrize(
    ("kind", "method", "model"),
    [
        ("bert", {"rank": 4}, {"quantization": "none", "dtype": "float32"}),
        ("roberta", {"rank": 4}, {"quantization": "nf4"}),
        ("bert", {**KRON}, {"quantization": "none", "dtype": "bfloat16"}),
        ("bert", {**LORA}, {"quantization": "int8"}),
    ],
    ids=["bert-lsr-float32", "roberta-lsr-nf4", "bert-kron_lora-bfloat16", "bert-lora-int8"],
)
def test_classifiers_train_with_their_head_and_load_again(tmp_path, kind, method, model):
    save_classifier(tmp_path / "model", kind)
    rows = write_rows(tmp_path / "pairs.jsonl", labelled())
    done = do(
        tiny_run(
            tmp_path,
            model={"task": "seq_cls", "num_labels": 2, **model},
            adapter={**method, "target_modules": ["query", "value"]},
            data={"train": [rows], "validation": [rows]},
            eval={"tasks": []},
        )
    )
    losses = [row for row in metrics(done) if "loss" in row]
    assert len(losses) == 8
    assert all(row["tokens_per_s"] > 0 for row in losses)
    scored = [row for row in metrics(done) if "eval_accuracy" in row][-1]
    assert results(done)["eval_accuracy"] == pytest.approx(scored["eval_accuracy"], abs=1e-6)
    saved = factors(done)
    head = [name for name in saved if "classifier" in name]
    assert head
    assert {t.dtype for t in saved.values()} == {torch.float32}
    if model["quantization"] == "none" and model["dtype"] == "float32":
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
        loaded = PeftModel.from_pretrained(base, done.adapter).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        pairs = labelled()
        inputs = tokenizer(
            [r["sentence1"] for r in pairs], [r["sentence2"] for r in pairs], padding=True, return_tensors="pt"
        )
        predicted = loaded(**inputs).logits.argmax(-1).tolist()
        accuracy = sum(p == r["label"] for p, r in zip(predicted, pairs, strict=True)) / len(pairs)
        assert accuracy == pytest.approx(scored["eval_accuracy"])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifiers_loss_is_its_rows_mean_however_they_are_dealt_out(tmp_path, kind):
    save_classifier(tmp_path / "model", kind)
    rows, first = write_rows(tmp_path / "pairs.jsonl", labelled()), {}
    for batch in (4, 2, 1):
        training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1}
        run = tiny_run(
            tmp_path,
            model={"task": "seq_cls", "num_labels": 2, "quantization": "none", "dtype": "float32"},
            adapter={"rank": 4, "target_modules": ["query", "value"], "dropout": 0.0},
            data={"train": [rows]},
            training={**training, "output_dir": str(tmp_path / f"run-{batch}")},
            eval={"tasks": []},
        )
        first[batch] = metrics(do(run))[0]
    for batch in (2, 1):
        assert first[batch]["loss"] == pytest.approx(first[4]["loss"], rel=0.2), "the base has dropout of its own"
        assert first[batch]["grad_norm"] == pytest.approx(first[4]["grad_norm"], rel=0.5)


def test_scores_in_place_of_classes_are_a_regression(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "pairs.jsonl", [{**row, "label": 2.5 * row["label"]} for row in labelled()])
    model = {"task": "seq_cls", "quantization": "none", "dtype": "float32"}
    sections = {"adapter": {"target_modules": ["query"]}, "data": {"train": [rows]}, "eval": {"tasks": []}}
    done = do(tiny_run(tmp_path, model={**model, "num_labels": 1}, **sections))
    assert metrics(done)[0]["loss"] > 0
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 1: has the label 2\.5, but model\.num_labels is 2"):
        do(
            tiny_run(
                tmp_path, model={**model, "num_labels": 2}, training={"output_dir": str(tmp_path / "b")}, **sections
            )
        )
    assert not (tmp_path / "b").exists()


def test_a_label_without_an_output_is_refused_with_its_row(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "pairs.jsonl", [{**row, "label": index % 3} for index, row in enumerate(labelled())])
    model = {"task": "seq_cls", "num_labels": 2, "quantization": "none", "dtype": "float32"}
    adapter, data = {"target_modules": ["query"]}, {"train": [rows]}
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 3: has the label 2, but model\.num_labels is 2"):
        do(tiny_run(tmp_path, model=model, adapter=adapter, data=data, eval={"tasks": []}))


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_rows_noted(place, tmp_path, logging_steps):
    run = run_in(place, tmp_path, training={"max_grad_norm": 0.0, "logging_steps": logging_steps}, eval={"tasks": []})
    run.training["learning_rate"] = 1e30  # beyond what a file may say: with less the gradient overflows before the loss
    words = r"diverged: the loss is nan at step 3, on rows \[\d+, \d+\] of the training data .* lower training\.learn"
    with pytest.raises(UserError, match=words):
        do(run)
    (line,) = (json.loads(text) for text in (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], line["process"], line["loss"]) == (3, 0, "nan")
    tokenizer = byte_tokenizer()
    rows = completions()
    for row, ids in zip(line["rows"], line["input_ids"], strict=True):
        assert rows[row]["prompt"] + rows[row]["completion"] in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("training", "words"),
    [({"save_steps": 1}, "is not finite after step 1, so it is not sav"), ({}, "not finite after training")],
    ids=["at a checkpoint", "at the end"],
)
def test_factors_that_are_not_finite_are_not_saved(place, tmp_path, monkeypatch, training, words):
    def poison(self, args, state, control, model, **kwargs):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(math.inf)

    monkeypatch.setattr("lsr_scale.training.callbacks.signals.StopOnSignal.on_step_end", poison)
    training = {"max_steps": 1, "save_strategy": "steps" if training else "no", **training}
    with pytest.raises(UserError, match=words):
        do(run_in(place, tmp_path, training=training, eval={"tasks": []}))
    done = RunFolder(tmp_path)
    assert not done.adapter.exists()
    for checkpoint in done.checkpoints():
        assert all(torch.isfinite(t).all() for t in factors(done, checkpoint.name).values())


def test_rows_that_lose_all_supervision_are_told(place, tmp_path, capsys):
    train(run_in(place, tmp_path / "run", training={"max_length": 4}, eval={"tasks": []}))
    said = capsys.readouterr().out
    found = re.search(r"note: (\d+) of (\d+) training rows left out: training\.max_length \(4\)", said)
    assert found
    lost, rows = map(int, found.groups())
    assert 0 < lost < rows
    assert f"training rows: {rows - lost}\n" in said


def test_rows_that_lose_all_supervision_are_an_error_where_none_is_left(place, tmp_path):
    with pytest.raises(UserError, match=r"data\.train: training\.max_length \(2\) cuts off everything"):
        do(run_in(place, tmp_path / "run", training={"max_length": 2}))
    assert not (tmp_path / "run").exists()


def test_one_of_a_thing_is_none_of_several(place, tmp_path, capsys):
    """All is one here: row, question, step, trial."""
    source = {"path": str(place / "questions.jsonl"), "limit": 1}
    eval_section = {"tasks": [source], "prompts": ["What sews cloth?"], "max_new_tokens": 1}
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    data = {"train": [source], "validation": [source]}
    run = run_in(place, tmp_path / "run", data=data, training=training, eval=eval_section)
    train(run)
    sections = {**run.model_dump(), "sweep": {"list": [{"name": "only"}]}}
    sections["training"]["output_dir"] = str(tmp_path / "sweep")
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sections))
    for command in ("preview", "plan", "sweep"):
        assert main([command, str(file)]) == 0
    said = capsys.readouterr().out
    assert "1 row with data.train" in said
    assert re.findall(r"(?<![\d.,-])1 (?!process\b|begins\b)[a-z]+s\b.*", said) == []


def test_held_out_rows_and_questions_that_are_trained_on_are_said(place, tmp_path, capsys):
    source = str(place / "questions.jsonl")
    train(run_in(place, tmp_path / "run", data={"train": [source], "validation": [{"path": source, "limit": 2}]}))
    notes = [line for line in capsys.readouterr().out.splitlines() if "rows with data.train" in line]
    assert [note.partition(" rows")[0] for note in notes] == [
        "note: data.validation: shares 2 of 2",
        "note: eval.tasks, questions: shares 6 of 6",
    ]


def test_two_sources_of_one_name_are_scored_apart(place, tmp_path):
    names = [str(place / "questions.jsonl")] * 2
    done = do(run_in(place, tmp_path, eval={"tasks": names, "limit": 2, "before": False}))
    assert set(results(done)["accuracy"]) == {"questions", "questions-2"}
    assert set(results(done)["accuracy"]["questions"]) == {"after"}


def test_tensorboard_gets_the_losses(place, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    written = {}

    class Writer:
        def __init__(self, log_dir=None):
            written["folder"] = log_dir

        def add_scalar(self, name, value, step):
            written.setdefault(name, []).append(step)

        def __getattr__(self, name):
            return lambda *_, **__: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    do(run_in(place, tmp_path, training={"report_to": "tensorboard"}, eval={"tasks": []}))
    assert written["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert str(written["folder"]).startswith(str(tmp_path))


def test_a_missing_reporter_or_hub_is_said(place, tmp_path, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.report_to 'tensorboard': .*installed.*set report_to to none"):
        do(run_in(place, tmp_path / "a", training={"report_to": "tensorboard"}))

    def refuse(_):
        raise OfflineModeIsEnabled("the hub is out of reach")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", refuse)
    with pytest.raises(UserError, match=r"training\.push_to_hub: the hub is out of reach; log in"):
        do(run_in(place, tmp_path / "b", training={"push_to_hub": True}))


def test_a_trl_that_cannot_train_on_this_machine_is_said(place, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.15.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"TRL 1\.15\.0 computes its loss with Triton, on a GPU only"):
        do(run_in(place, tmp_path / "run"))


def test_a_run_never_talks_to_the_hub(place, tmp_path, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a run on a local folder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    do(run_in(place, tmp_path))


def test_the_resolved_run_in_the_folder_trains_the_same_adapter_again(plain, tmp_path):
    values = yaml.safe_load(plain.config.read_text())
    assert values["adapter"]["target_modules"] == SEVEN_LINEARS
    again = do(load_run(plain.config, [f"training.output_dir={tmp_path}"]))
    assert same(factors(plain), factors(again))


def test_memory_auto_keeps_more_after_the_first_step(place, tmp_path, monkeypatch):
    """On a CPU there is nothing to fit into: a GPU's memory is told by hand, the rest is the run's own."""
    from tests.fused.test_memory import Gpu

    policies = []

    def policy(largest, say):
        policies.append(FitMemoryCallback(largest, say, Gpu(1000, 10**6, 10**9)))
        return policies[-1]

    monkeypatch.setattr(assembly, "FitMemoryCallback", policy)
    monkeypatch.setattr(assembly, "_fits_memory", lambda run: run.training["memory"] == "auto")
    training = {"save_strategy": "no", "fused": "on", "logging_steps": 1}
    model = {"quantization": "nf4", "dtype": "float32"}
    runs = {
        memory: do(
            run_in(place, tmp_path / memory, model=model, training={**training, "memory": memory}, eval={"tasks": []})
        )
        for memory in ("auto", "save", "speed")
    }
    (only,) = policies  # save and speed have none
    assert only.decided
    # rows of a few tokens, two at once, not training.max_length
    assert 2 <= only.max_tokens < 2 * load_run(runs["auto"].config).training["max_length"]
    for done in runs.values():
        for name, value in factors(runs["save"]).items():
            assert torch.allclose(factors(done)[name], value, atol=2e-4), name


@pytest.mark.parametrize(("name", "fused"), [("lm_head", "off"), ("lm_head", "on"), ("embed_tokens", "off")])
def test_modules_to_save_are_float32_so_that_small_updates_count(place, tmp_path, name, fused):
    whole = {"modules_to_save": [name]}
    training = {"learning_rate": 1e-6, "warmup_steps": 0, "fused": fused}
    done = do(tiny_run(place, adapter=whole, training={**training, "output_dir": str(tmp_path / "run")}))
    trained = next(tensor for key, tensor in factors(done).items() if name in key)
    before = next(tensor for key, tensor in load_file(place / "model" / "model.safetensors").items() if name in key)
    moved = (trained - before.to(torch.bfloat16).float()).abs()
    assert trained.dtype == torch.float32
    assert 1e-8 < moved.max() < 1e-5, "far below what bfloat16 would show of entries of this size"
    # a fresh base with it computes what the trained one did
    model, _ = load_adapter(load_base(str(place / "model"), quantization="none"), done.adapter)
    assert torch.equal(next(p for key, p in model.named_parameters() if f"{name}.modules_to_save" in key), trained)
    ids = torch.arange(5, 25)[None]
    output = model.eval()(input_ids=ids, labels=ids)
    assert math.isfinite(output.loss)
    with_start = tiny_run(
        place,
        adapter={**whole, "start_from": str(done.path)},
        training={**training, "output_dir": str(tmp_path / "on")},
    )
    again = next(tensor for key, tensor in factors(do(with_start)).items() if name in key)
    assert 0 < (again - trained).abs().max() < 1e-5


def test_modules_to_save_that_the_base_lacks_are_refused(place):
    with pytest.raises(UserError, match=r"modules_to_save: 'mlp' is quantized \(nf4\), which cannot be fully trained"):
        do(tiny_run(place, adapter={"modules_to_save": ["mlp"]}, training={"output_dir": str(place / "whole")}))
    adapter = {"modules_to_save": ["lm_headd"]}
    with pytest.raises(UserError, match=r"modules_to_save: 'lm_headd' is no module of .*did you mean 'lm_head'"):
        do(tiny_run(place, adapter=adapter, training={"output_dir": str(place / "misspelt")}))
