"""Advice in an error is followed to the letter, and the command that failed works."""

import gzip
import json
import re
import shutil

import pytest

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.config.training import OWNED
from tests.helpers.tiny_runs import (
    CHAT_TEMPLATE,
    completions,
    labelled,
    questions,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

CLASSIFIER = ["model.name={place}/bert", "model.task=seq_cls", "data.train=[{place}/pairs.jsonl]"]
CLASSIFIER += ["adapter.target_modules=[query, value]"]
TWO_CLASSES = [*CLASSIFIER, "model.num_labels=2"]
KRON = ["adapter.method=kron_lora", "adapter.rank=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a language model, a classifier, their data, and the file of a run of one step."""
    folder = tmp_path_factory.mktemp("advice")
    save_llama(folder / "model", num_hidden_layers=2)
    save_classifier(folder / "bert", "bert")
    write_rows(folder / "pairs.jsonl", labelled())
    write_rows(folder / "three.jsonl", [{**row, "label": i % 3} for i, row in enumerate(labelled())])
    write_rows(folder / "parts" / "train.jsonl", completions(4))
    write_rows(folder / "parts" / "validation.jsonl", completions(4))
    (folder / "rows.json").write_text(json.dumps({"train": completions(4), "held": completions(4)}))
    (folder / "compressed.jsonl").write_bytes(gzip.compress(json.dumps(completions(1)[0]).encode()))
    (folder / "compressed.jsonl.gz").write_bytes((folder / "compressed.jsonl").read_bytes())
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    run = tiny_run(folder, training={"max_steps": 1, "save_steps": 1}, eval={"tasks": []})
    (folder / "whole.yaml").write_text(dump_yaml(run))
    sections = {
        "model": {"name": str(folder / "model")},
        "adapter": {"method": "lsr", "target_modules": ["q_proj", "down_proj"]},
        "data": {"train": [str(folder / "rows.jsonl")]},
        "training": {"max_steps": 1, "save_steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(sections))
    return folder


@pytest.fixture
def call(place, tmp_path, capfd, monkeypatch):
    """Return a function that runs a command on run.yaml with these settings; it returns the status and what is said."""
    monkeypatch.setenv("COLUMNS", "80")
    number = iter(range(100))

    def run(command, settings=(), *words):
        where = {"place": place, "out": tmp_path / f"run-{next(number)}"}
        changes = [word for each in settings for word in ("--set", str(each).replace("{place}", str(place)))]
        if command == "train":
            changes += ["--set", f"training.output_dir={where['out']}"]
        status = cli.main([command, "--config", str(place / "run.yaml"), *changes, *words])
        said = capfd.readouterr()
        return status, " ".join((said.err + said.out).split())

    return run


def followed(call, command, mistake, advice, *ways):
    """Make a mistake, see the advice and follow each way that it names; return what was said of the mistake."""
    status, said = call(command, mistake)
    assert status == 2, said
    assert advice in said
    for way in ways:
        status, found = call(command, way)
        assert status == 0, f"{advice}, followed by {way}: {found[-600:]}"
    return said


@pytest.mark.parametrize(
    ("mistake", "advice", "ways"),
    [
        (
            ["model.num_labels=2"],
            "set model.task: seq_cls, or remove it",
            [["model.num_labels=2", "model.task=seq_cls"], []],
        ),
        (
            [*TWO_CLASSES, "eval.tasks=[{place}/questions.jsonl]"],
            "for seq_cls put the held-out rows under data.validation, or set data.validation_split",
            [
                [*TWO_CLASSES, "data.validation=[{place}/pairs.jsonl]"],
                [*TWO_CLASSES, "data.validation_split=0.2"],
            ],
        ),
        (
            ["adapter.method=lokr"],
            "set method: kron_lora, or model.quantization: none",
            [["adapter.method=kron_lora"], ["adapter.method=lokr", "model.quantization=none"]],
        ),
        (
            ["adapter.target_modules=q_proj"],
            "write a list of names, such as [q_proj, v_proj], or all-linear",
            [["adapter.target_modules=[q_proj, v_proj]"], ["adapter.target_modules=all-linear"]],
        ),
        (
            ["adapter.target_modules=[q_proj, lm_head]"],
            "remove it, or train the whole matrix with adapter.modules_to_save: [lm_head]",
            [
                ["adapter.target_modules=[q_proj]"],
                ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[lm_head]"],
            ],
        ),
        (
            ["deepspeed.config={gradient_accumulation_steps: 7}"],
            "set that one, and this to auto",
            [["training.gradient_accumulation_steps=7", "deepspeed.config={gradient_accumulation_steps: auto}"]],
        ),
        (
            ["training.condition_guard=rescale", "deepspeed.config=zero2"],
            "set it to warn, or deepspeed.config: zero0",
            [
                ["training.condition_guard=warn", "deepspeed.config=zero2"],
                ["training.condition_guard=rescale", "deepspeed.config=zero0"],
            ],
        ),
        (
            ["model.attention=flash_attention_2", "model.dtype=float32"],
            "set model.dtype: bfloat16, or attention: sdpa",
            [
                ["model.attention=flash_attention_2", "model.dtype=bfloat16"],
                ["model.attention=sdpa", "model.dtype=float32"],
            ],
        ),
        *(
            (
                [f"training.compute={compute}", mistake],
                f"{remedy.replace('=', ': ')}, or training.compute: bf16",
                [[f"training.compute={compute}", mistake, remedy], [mistake]],
            )
            for compute, mistake, remedy in (
                ("fp8", "training.fused=off", "training.fused=auto"),
                ("int8", "model.dtype=float32", "model.dtype=bfloat16"),
                ("fp8", "model.attention=eager", "model.attention=sdpa"),
                ("int8", "adapter.dropout=0.1", "adapter.dropout=0"),
            )
        ),
        (["training.keep_in_bf16=[1.dwon]"], "did you mean 'down'?", [["training.keep_in_bf16=[1.down]"]]),
        (["training.keep_in_bf16=[x.down]"], "such as 12.down", [["training.keep_in_bf16=[12.down]"]]),
        (
            ["training.eval_strategy=epoch"],
            "add data.validation or data.validation_split, or set it to no",
            [
                ["training.eval_strategy=epoch", "data.validation=[{place}/rows.jsonl]"],
                ["training.eval_strategy=epoch", "data.validation_split=0.2"],
                ["training.eval_strategy=no"],
            ],
        ),
        (
            ["training.packing=true", "training.max_length=null"],
            "set it, such as 1024",
            [["training.packing=true", "training.max_length=1024"]],
        ),
        (
            ["training.memory=save", "training.gradient_checkpointing=false"],
            "keep one",
            [["training.memory=save"], ["training.gradient_checkpointing=false"]],
        ),
        (
            ["training.gradient_checkpointing=true", "training.activation_checkpointing=false"],
            "keep one",
            [["training.gradient_checkpointing=true"], ["training.activation_checkpointing=false"]],
        ),
        (
            ["deepspeed.config={train_batch_size: 16}"],
            "set training.per_device_train_batch_size and training.gradient_accumulation_steps",
            [["training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=2"]],
        ),
        (
            ["deepspeed.config={bf16: {enabled: true}}"],
            "remove the section, or set enabled to false",
            [["deepspeed.config={}"], ["deepspeed.config={bf16: {enabled: false}}"]],
        ),
        (
            ["deepspeed.config={optimizer: {type: Adam}}"],
            "remove the section and set training.optim",
            [["deepspeed.config={}", "training.optim=adamw_torch"]],
        ),
        (
            ["deepspeed.config={scheduler: {type: WarmupLR}}"],
            "remove the section and set training.lr_scheduler_type",
            [["deepspeed.config={}", "training.lr_scheduler_type=linear"]],
        ),
        (
            ["deepspeed.config={zero_optimization: {stage: 2, cpu_offload: true}}"],
            "write offload_optimizer: {device: cpu}",
            [["deepspeed.config={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"]],
        ),
        (
            ["deepspeed.config={zero_optimization: {stage: 3, offload_param: {device: nvme}}}"],
            "set it to cpu",
            [["deepspeed.config={zero_optimization: {stage: 3, offload_param: {device: cpu}}}"]],
        ),
        (
            ["deepspeed.config={zero_optimization: {stage: 3, zero_quantized_weights: true}}"],
            "set model.quantization instead",
            [["deepspeed.config={zero_optimization: {stage: 3}}", "model.quantization=nf4"]],
        ),
        (
            ["deepspeed.config={tensor_parallel: {autotp_size: 2}}"],
            "use ZeRO stage 3",
            [["deepspeed.config=zero3"]],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_what_does_not_go_together(call, mistake, advice, ways):
    followed(call, "config", mistake, advice, *ways)


@pytest.mark.parametrize(
    ("run", "key", "value", "example"),
    [
        ([], "training.seed", "3", "[3, ...]"),
        ([], "training.packing", "true", "[true, ...]"),
        ([], "training.fused", "'off'", "['off', ...]"),
        ([], "training.keep_in_bf16", "auto", "[auto, ...]"),
        ([], "training.keep_in_bf16", "1.down", "[[1.down], ...]"),
        ([], "adapter.target_modules", "all-linear", "[all-linear, ...]"),
        ([], "adapter.modules_to_save", "norm", "[[norm], ...]"),
        ([], "data.train", "{place}/rows.jsonl", "[[{place}/rows.jsonl], ...]"),
        ([], "eval.prompts", "'A: b'", "[['A: b'], ...]"),
        (["training.method=grpo"], "training.reward", "exact_answer", "[[exact_answer], ...]"),
    ],
)
def test_a_value_in_a_grid_is_shown_as_a_list_of_such(call, place, run, key, value, example):
    example = example.replace("{place}", str(place))
    changes = [*run, f"sweep.grid={{{key}: {value}}}"]
    way = [*run, f"sweep.grid={{{key}: {example.replace(', ...', '')}}}"]
    followed(call, "config", changes, f"write a list of values, such as {example}; one for all trials", way)


def test_null_in_a_grid_is_no_value_to_list(call):
    _, said = call("config", ["sweep.grid={training.seed: null}"])
    assert "got None; write a list of values; one for all trials goes into the run itself" in said


BETAS = ["data.train=[{place}/pairs.jsonl]", "training.method=dpo", "sweep.grid={training.beta: [0.1, 0.5]}"]
HELD_OUT = "data.validation_split=0.2"
BY_PAIRS = "compared by the share of pairs in the right order"


@pytest.mark.parametrize(
    ("mistake", "advice", "way"),
    [
        (
            [*BETAS, HELD_OUT, "sweep.stop={metric: eval_loss}"],
            "set sweep.stop.metric: eval_rewards/accuracies",
            [*BETAS, HELD_OUT, "sweep.stop={metric: eval_rewards/accuracies}"],
        ),
        (
            [*BETAS, HELD_OUT, "sweep.stop={metric: eval_loss}"],
            "or remove it (training.early_stopping: {patience: 3}",
            [*BETAS, HELD_OUT, "training.early_stopping={patience: 3}"],
        ),
        (
            [*BETAS[:1], HELD_OUT, "training.method=kto", BETAS[2], "sweep.stop={}"],
            "make a sweep of its own for each value",
            [*BETAS[:1], HELD_OUT, "training.method=kto", "sweep.grid={training.beta: [0.1]}", "sweep.stop={}"],
        ),
    ],
)
def test_trials_that_stop_cannot_compare(call, mistake, advice, way):
    followed(call, "config", mistake, advice, way)


@pytest.mark.parametrize(
    ("mistake", "advice", "ways"),
    [
        (
            ["training.eval_strategy=no"],
            "data.validation_split: 0.05 with training.eval_strategy: steps has them",
            ["data.validation_split=0.05", "training.eval_strategy=steps"],
        ),
        (
            ["training.eval_strategy=no", HELD_OUT],
            "little; training.eval_strategy: steps has them",
            [HELD_OUT, "training.eval_strategy=steps"],
        ),
    ],
)
def test_what_has_trials_compared_by_pairs_does(call, mistake, advice, ways):
    status, said = call("config", [*BETAS, *mistake])
    assert status == 0
    assert f"{advice} {BY_PAIRS}" in said
    status, said = call("config", [*BETAS, *ways])
    assert status == 0
    assert "compared by eval_rewards/accuracies" in said


WAYS = {
    "set deepspeed.config": ["deepspeed.config=zero2"],
    "set model.dtype": ["model.dtype=bfloat16"],
    "set model.dtype, model.attention, model.quantization": [
        *("model.dtype=float32", "model.attention=eager", "model.quantization=none"),
    ],
    "set model.chat_template": ["model.chat_template={place}/chat.jinja"],
    "set deepspeed.config to zero3": ["deepspeed.config=zero3"],
}


@pytest.mark.parametrize("name", [name for name, advice in OWNED.items() if "set " in advice and name != "hub_token"])
def test_a_field_that_the_rest_of_the_run_decides_names_what_to_set(call, name):
    (way,) = {advice for advice in WAYS if OWNED[name].endswith(advice)}
    followed(call, "config", [f"training.{name}=x"], OWNED[name], WAYS[way])


@pytest.mark.parametrize(
    ("setting", "typo", "meant"),
    [
        ("adapter.{}=4", "rnak", "rank"),
        ("adaptor.rank=4", "adaptor", "adapter"),
        ("adapter.method={}", "kronlora", "kron_lora"),
        ("training.{}=1.0e-4", "learning_rat", "learning_rate"),
        ("training.optim={}", "adamw_torchh", "adamw_torch"),
        ("training.metric_for_best_model={}", "eval_los", "eval_loss"),
        ("deepspeed.config={}", "zero22", "zero2"),
        ("deepspeed.config={{zero_optimization: {{{}: true}}}}", "overlap_com", "overlap_comm"),
        ("model.quantization={}", "nf", "nf4"),
    ],
)
def test_a_name_that_was_meant_is_one_that_works(call, setting, typo, meant):
    setting = setting if "{}" in setting else setting.replace(typo, "{}")
    _, said = call("config", [setting.format(typo)])
    assert meant in said
    named = re.search(r"did you mean '([^']+)'", said) or re.search(r"expected one of ([\w-]+)", said)
    followed(call, "config", [setting.format(typo)], named[0], [setting.format(meant)])
    if named[0].startswith("did"):
        followed(call, "config", [setting.format(typo)], named[0], [setting.format(named[1].rpartition(".")[2])])


@pytest.mark.parametrize(
    ("mistake", "advice", "ways"),
    [
        (["training.max_length=1"], "raise it", [["training.max_length=64"]]),
        (["adapter.rank=1000"], "lower rank, or set rank_pattern for this module", [["adapter.rank=8"]]),
        (
            [*CLASSIFIER, "model.num_labels=2", "data.train=[{place}/three.jsonl]"],
            "set num_labels, or 1 for scores (regression)",
            [
                [*CLASSIFIER, "model.num_labels=3", "data.train=[{place}/three.jsonl]"],
                [*CLASSIFIER, "model.num_labels=1", "data.train=[{place}/three.jsonl]"],
            ],
        ),
        (
            ["adapter.modules_to_save=[v_proj]"],
            "name modules that are not, such as lm_head, embed_tokens or norm, or adapt it with adapter.target_modules",
            [["adapter.modules_to_save=[norm]"], ["adapter.target_modules=[q_proj, v_proj]"]],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and isinstance(value[0], str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_found_on_loading(call, mistake, advice, ways):
    followed(call, "train", mistake, advice, *ways)


@pytest.mark.parametrize(
    ("mistake", "pattern"),
    [
        (["adapter.left_in=7"], r"one of \[([\d, ]+)\] does"),
        ([*KRON, "adapter.left_out=7"], r"left_out_pattern: \{<module>: n\} with n one of \[([\d, ]+)\]"),
    ],
)
def test_every_divisor_that_is_named_divides(call, mistake, pattern):
    status, said = call("train", mistake)
    assert status == 2
    number = re.search(pattern, said)[1].split(", ")[1]
    *rest, option = mistake
    name = option.partition("=")[0]
    both = [*rest, f"{name}_pattern={{q_proj: {number}, down_proj: {number}}}"] if rest else [f"{name}={number}"]
    status, said = call("train", both)
    assert status == 0, said


@pytest.mark.parametrize(
    ("source", "advice", "instead"),
    [
        ("{{path: {place}/parts/train.jsonl, split: train}}", "remove split ('train')", "{place}/parts/train.jsonl"),
        (
            "{{path: {place}/parts/train.jsonl, split: train}}",
            "or set path to the folder",
            "{{path: {place}/parts, split: train}}",
        ),
        ("{{path: {place}/parts, split: tran}}", "set split to one of:", "{{path: {place}/parts, split: train}}"),
        ("{{path: {place}/rows.json, split: tran}}", "set split to one of:", None),
        ("{place}/compressed.jsonl", "add .gz to its name", "{place}/compressed.jsonl.gz"),
        ("{place}/row.jsonl", "did you mean", None),
    ],
)
def test_a_source_that_is_read(call, place, source, advice, instead):
    status, said = call("preview", [f"data.train=[{source.format(place=place)}]"])
    assert status == 2
    assert advice in said
    if instead is not None:
        status, said = call("preview", [f"data.train=[{instead.format(place=place)}]"])
        assert status == 0, said


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """Return the folder of a finished run of whole.yaml."""
    folder = tmp_path_factory.mktemp("done") / "run"
    assert cli.main(["train", str(place / "whole.yaml"), "--quiet", "--set", f"training.output_dir={folder}"]) == 0
    return folder


def say(capfd, *words):
    capfd.readouterr()
    status = cli.main([str(word) for word in words])
    said = capfd.readouterr()
    return status, " ".join((said.err + said.out).split())


def test_a_folder_that_holds_a_run(place, done, tmp_path, capfd):
    for index, way in enumerate(
        (["--resume", "auto"], ["--overwrite"], ["--set", f"training.output_dir={tmp_path}/b"])
    ):
        folder = shutil.copytree(done, tmp_path / f"run-{index}")
        words = ["train", place / "whole.yaml", "--set", f"training.output_dir={folder}"]
        status, said = say(capfd, *words)
        assert status == 2
        ways = "--resume auto continues it, --overwrite starts it again, --set training.output_dir=... goes elsewhere"
        assert ways in said
        status, said = say(capfd, *words, *way)
        assert status == 0, said


@pytest.mark.parametrize(
    ("words", "advice", "instead"),
    [
        (
            ["eval", "{run}"],
            "give some: lsr-scale eval {run} --tasks",
            ["eval", "{run}", "--tasks", "{place}/questions.jsonl"],
        ),
        (
            ["export", "{run}", "--to", "adapter", "--out", "{run}"],
            "export into a new folder",
            ["export", "{run}", "--to", "adapter", "--out", "{out}"],
        ),
        (
            ["generate", "{run}", "--prompt", "a knife", "--chat"],
            "leave it out, or set model.chat_template",
            ["generate", "{run}", "--prompt", "a knife"],
        ),
        (
            ["generate", "{run}", "--prompt", "a knife", "--temperature", "0", "--seed", "1"],
            "leave one of them out",
            ["generate", "{run}", "--prompt", "a knife", "--max-new-tokens", "3", "--seed", "1"],
        ),
        (
            ["generate", "{run}", "--prompt", "a knife", "--chat", "--raw"],
            "contradict each other; keep one",
            ["generate", "{run}", "--prompt", "a knife", "--max-new-tokens", "3", "--raw"],
        ),
        (["generate", "{run}", "--prompt", ""], "expected some text", ["generate", "{run}", "--prompt", "a knife"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_finished_run(place, done, tmp_path, capfd, words, advice, instead):
    where = {"run": done, "place": place, "out": tmp_path / "out"}
    status, said = say(capfd, *(word.format(**where) for word in words))
    assert status == 2
    assert advice.format(**where) in said
    status, said = say(capfd, *(word.format(**where) for word in instead))
    assert status == 0, said


def test_what_those_that_train_a_base_are_asked_that_no_gpu_holds(done, tmp_path, capfd):
    folder = shutil.copytree(done, tmp_path / "run")
    asked = write_rows(tmp_path / "other.jsonl", questions(3))
    words = ["train", "--config", str(folder / "config.yaml"), "--resume", "auto"]
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    status, said = say(capfd, *words, "--set", f"eval.tasks=[{asked}]", "--set", 'eval.prompts=["a broom"]')
    assert status == 0, said
    assert "nothing was left to train" in said
    assert json.loads((folder / "results.json").read_text())["accuracy"]["other"]["after"]["num_examples"] == 3
    assert json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])["prompt"] == "a broom"
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("variables", [{"RANK": "one"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": ""}])
def test_variables_that_are_to_be_unset(call, monkeypatch, variables):
    monkeypatch.setattr(cli.os, "_exit", lambda status: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # for rank 0 to speak first
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, said = call("train")
    assert status == 2, said
    for name in re.search(r"unset ([A-Z_ ]+)", said)[1].split():
        monkeypatch.delenv(name, raising=False)
    status, said = call("train")
    assert status == 0, said
