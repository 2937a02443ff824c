"""`lsr-scale init`: what it writes is checked and trained as it stands, its commented options too; mistakes by line."""

import builtins
import json
import re
import shlex
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lsr_scale import cli, config
from lsr_scale.config.methods import METHODS
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.split import split_by_hash
from lsr_scale.errors import UserError
from lsr_scale.new_run.data_facts import look_at_data
from lsr_scale.new_run.model_facts import look_at_model
from lsr_scale.run.folder import RunFolder
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import (
    TOOLS,
    completions,
    metrics,
    questions,
    results,
    save_classifier,
    save_llama,
    write_rows,
)


def conversations(num=48):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {TOOLS[i % 10].split()[1]} number {i} for?"},
                {"role": "assistant", "content": TOOLS[i % 10]},
            ]
        }
        for i in range(num)
    ]


@pytest.fixture
def init(monkeypatch, capsys):
    """Return a function that calls the command in an empty folder; nobody is at the terminal."""
    monkeypatch.setattr("sys.stdin", None)

    def call(*words):
        capsys.readouterr()
        status = cli.main(["init", *map(str, words)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def written(kind):
    """Return the arguments of a call on invented data of a kind, with a tiny model."""
    if kind == "classify":
        save_classifier(Path("model"), "roberta")
        rows = "\n".join(f"{TOOLS[i % 10]} {i},{'sharp' if i % 2 else 'blunt'}" for i in range(48))
        Path("rows.csv").write_text(f"text,label\n{rows}\n")
        return ["--data", "rows.csv", "--model", "model"]
    save_llama(Path("model"), chat=True)
    if kind == "chat":
        write_rows(Path("rows.jsonl"), conversations())
        return ["--data", "rows.jsonl", "--model", "model"]
    for split, rows in {"train": questions(10), "test": questions(6)}.items():
        write_rows(Path("tools") / f"{split}.jsonl", rows)
    return ["--data", "tools", "--model", "model"]


def test_lsr_has_the_size_of_the_shipped_runs_on_a_large_model(init):
    write_rows(Path("rows.jsonl"), conversations())
    shipped = config.load_run("mistral_lsr")
    words = ["--data", "rows.jsonl", "--model", shipped.model.name, "--method", "lsr", "--out", "a.yaml"]
    status, *_ = init("chat", *words)
    assert status == 0
    run = config.load_run("a.yaml")
    assert run.adapter.options == shipped.adapter.options
    assert run.training["learning_rate"] == shipped.training["learning_rate"]


@pytest.mark.parametrize("kind", ["chat", "classify", "commonsense"])
def test_what_is_written_trains_as_it_is(init, kind):
    status, out, err = init(*written(kind), "--method", "lsr", "--out", "mine.yaml")
    assert (status, err) == (0, "")
    assert "48 rows" in out or "10 rows, multiple_choice; columns id, question, choices, answer" in out
    for command in ("preview", "plan", "train"):
        assert f"lsr-scale {command} mine.yaml" in out
    assert cli.main(["config", "mine.yaml"]) == 0
    assert cli.main(["train", "mine.yaml", "--quiet"]) == 0
    folder = RunFolder(Path("runs/mine"))
    assert folder.has_adapter()
    found = results(folder)
    if kind == "commonsense":
        assert set(found["accuracy"]["tools"]) >= {"before", "after"}
    else:
        assert any("eval_loss" in row for row in metrics(folder)), "some rows were held out"
        assert found["train_rows"] < 48
    if kind == "chat":
        samples = [json.loads(line) for line in folder.samples.read_text().splitlines()]
        rows = Dataset.from_list(conversations())
        held_out = split_by_hash(rows, config.load_run("mine.yaml").data.validation_split)[1]
        asked = [row["messages"][:1] for row in held_out]
        assert all(sample["prompt"] in asked for sample in samples)
        assert {sample["moment"] for sample in samples} == {"before", "evaluation", "after"}


@pytest.mark.parametrize(("options", "held"), [({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True}, "fp4")])
def test_weights_that_are_quantized_already_are_taken_as_they_are(init, capsys, options, held):
    words = written("chat")
    quantizer = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=quantizer, device_map={"": "cpu"})
    model.save_pretrained("model")
    assert init(*words, "--out", "mine.yaml")[0] == 0
    assert cli.main(["train", "mine.yaml", "--quiet", "--set", "training.max_steps=1"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "--budget", "1k", "--model", "model"]) == 0
    Path("proposed.yaml").write_text(capsys.readouterr().out)
    assert [config.load_run(file).model.quantization for file in ("mine.yaml", "proposed.yaml")] == [held, held]
    assert cli.main(["generate", "--model", "model", "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert cli.main(["plan", "proposed.yaml", "--set", "model.quantization=nf4", "--budget", "1k"]) == 2
    assert f"quantized already, in {held}; set it to {held}" in capsys.readouterr().err


def test_weights_that_none_can_train_on_are_refused_at_once(init):
    words = written("chat")
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    status, _, err = init(*words, "--out", "mine.yaml")
    assert (status, Path("mine.yaml").exists()) == (2, False)
    assert "its weights are quantized already, by gptq" in err


def test_a_prompt_of_a_row_that_is_trained_on_is_called_so_and_the_run_folder_is_that_of_the_file(init):
    words = written("chat")
    assert init(*words, "--out", "mine.yaml")[0] == 0
    assert "# of a row that is not trained on" in Path("mine.yaml").read_text()
    write_rows(Path("rows.jsonl"), conversations(4))
    assert init(*words, "--out", "few.yaml")[0] == 0
    text = Path("few.yaml").read_text()
    assert "What is knife number 0 for?" in text
    assert "# of a row that is also trained on" in text
    assert "# output_dir: runs/few " in text


@pytest.mark.parametrize("kind", ["chat", "classify", "commonsense"])
@pytest.mark.parametrize("method", ["lora", "kron_lora"])
def test_every_option_that_is_commented_out_can_be_taken(init, kind, method):
    assert init(kind, *written(kind), "--method", method, "--out", "mine.yaml")[0] == 0
    text = Path("mine.yaml").read_text()
    taken = set()
    for line in text.splitlines():
        option = re.fullmatch(r"(\s+)# (\w+): .*", line)
        if option is None:
            continue
        changed = text.replace(line, line.replace("# ", "", 1))
        if option[2] == "validation":
            changed = re.sub(r"\n  validation_split.*", "", changed)
        if option[2] == "early_stopping":
            changed = re.sub(r"\n  # validation_split", "\n  validation_split", changed)
        if option[2] == "num_labels":
            changed = re.sub(r"\n  # labels.*", "", changed)
        Path("other.yaml").write_text(changed)
        assert config.load_run("other.yaml") != config.load_run("mine.yaml"), option[2]
        taken.add(option[2])
    assert taken >= {"dropout", "validation", "early_stopping", "memory", "report_to", "output_dir"} - (
        {"dropout"} if method == "kron_lora" else set()
    )


def test_the_kind_is_found_in_the_rows(init):
    for kind in ("chat", "classify", "commonsense"):
        words = written(kind)
        assert init(*words, "--out", f"{kind}.yaml")[0] == 0
        run = config.load_run(f"{kind}.yaml")
        assert run.model.task == ("seq_cls" if kind == "classify" else "causal_lm")
        assert bool(run.eval.tasks) == (kind == "commonsense")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: unknown role 'usr' in messages[0]"),
        (["--data", "row.jsonl"], "no such file or folder; did you mean 'rows.jsonl'"),
        (["--data", "empty.jsonl"], "empty.jsonl: no rows in it"),
        ([], "--data: expected files of rows to train on, such as --data my.jsonl"),
        (
            ["classify", "--data", "rows.jsonl"],
            "rows.jsonl: classify takes a text (or sentence1 and sentence2) with a label",
        ),
        (["commonsense", "--data", "rows.jsonl"], "columns messages; write: lsr-scale init chat"),
        (["chat", "--data", "labels.csv"], "columns text, label; write: lsr-scale init classify"),
        (["--data", "rows.jsonl", "--method", "loar"], "--method 'loar': did you mean 'lora'"),
        (["--data", "rows.jsonl", "--model", "modle"], "modle"),
        (["--data", "rows.jsonl", "--model", "bert"], "is an encoder, it sees the words that it should predict"),
        (["--data", "rows.jsonl", "--out", "model"], "--out model: expected a file, got a folder"),
        (
            ["--data", "some/dataset"],
            "it takes you to say what it is for: lsr-scale init chat or classify or commonsense",
        ),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(init, words, expected):
    written("chat")
    save_classifier(Path("bert"), "bert")
    good, bad = conversations(2)
    write_rows(Path("bad.jsonl"), [good, {"messages": [{**bad["messages"][0], "role": "usr"}]}])
    Path("empty.jsonl").write_text("")
    Path("labels.csv").write_text("text,label\na knife,sharp\na mop,blunt\n")
    before = {path.name for path in Path().iterdir()}
    status, out, err = init(*words)
    if "modle" in words:  # as good a name as any on the hub
        assert status == 0
        assert "modle: not on this machine, so nobody looked at it" in out
        return
    assert status == 2
    assert expected in err
    assert {path.name for path in Path().iterdir()} == before


def test_a_file_is_written_over_with_force_only(init):
    words = written("chat")
    assert init(*words)[0] == 0
    Path("rows_lora.yaml").write_text("mine")
    status, out, err = init(*words)
    assert status == 2
    assert out == "", "before anything is looked at"
    assert "rows_lora.yaml: is there already; --force writes over it, --out names another" in err
    assert Path("rows_lora.yaml").read_text() == "mine"
    assert init(*words, "--force")[0] == 0
    assert config.load_run("rows_lora.yaml").adapter.method == "lora"


class Terminal:
    def isatty(self):
        return True


def test_somebody_at_the_terminal_is_asked_for_what_is_missing(init, monkeypatch):
    written("chat")
    asked, answers = [], iter(["rows.jsonl", "model", "lsr"])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: (asked.append(question), next(answers))[1])
    assert init("chat")[0] == 0
    assert [question.partition(":")[0] for question in asked] == [
        "Data",
        "Model",
        "Method (lora, lsr, kron_lora, ...) [lora]",
    ]
    run = config.load_run("rows_lsr.yaml")
    assert (run.model.name, run.adapter.method, run.data.train[0].path) == ("model", "lsr", "rows.jsonl")

    def leave(question):
        raise EOFError

    monkeypatch.setattr(builtins, "input", leave)
    status, _, err = init("chat")
    assert status == 2
    assert "nothing was written; give the answers as options" in err


def test_odd_names_are_quoted(init):
    save_llama(Path("model"), chat=True)
    name = "it's: a #1 [file].jsonl"
    write_rows(Path(name), conversations(2))
    assert init("--data", name, "--model", "model")[0] == 0
    (file,) = Path().glob("*.yaml")
    assert file.name == "it_s__a__1__file_lora.yaml", file
    assert config.load_run(file).data.train[0].path == name


def test_rows_that_are_no_conversations_are_taken_too(init):
    save_llama(Path("model"), chat=True)
    write_rows(Path("rows.jsonl"), completions(4))
    status, out, _ = init("--data", "rows.jsonl", "--model", "model")
    assert status == 0
    assert "4 rows, prompt_completion; columns prompt, completion" in out
    run = config.load_run("rows_lora.yaml")
    assert run.data.validation_split is None, "too few to hold some out"


@pytest.mark.parametrize(
    ("name", "task", "targets"),
    [
        ("mistralai/Mistral-7B-v0.1", "causal_lm", SEVEN_LINEARS),
        ("builtin:smollm2-135m-instruct", "seq_cls", SEVEN_LINEARS),
        ("FacebookAI/roberta-base", "seq_cls", ["query", "key", "value"]),  # dense is the classifier's, too
        ("nobody/knows-this", "causal_lm", "all-linear"),
    ],
)
def test_targets_follow_from_the_architecture_without_a_hub(name, task, targets, monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.socket.connect", reached)
    assert look_at_model(name, task).targets == targets


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"instruction": "Add.", "chosen": "3", "rejected": "4"}, []),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            [],
        ),
        ({"messages": conversations(1)[0]["messages"], "kto_tag": True}, ["training.method=kto"]),
        ({"instruction": "Add.", "output": "3", "kto_tag": False}, ["training.method=kto"]),
    ],
)
def test_judged_rows_are_told_with_what_they_begin(tmp_path, row, options):
    source = write_rows(tmp_path / "judged.jsonl", [row] * 2)
    with pytest.raises(UserError, match="begin with lsr-scale train mistral_dpo ") as error:
        look_at_data([source], None)
    words = shlex.split(str(error.value).partition("lsr-scale train mistral_dpo ")[2])
    settings = [word for word in words if word != "--set"]
    assert settings == [*options, f"data.train=[{source}]", "data.validation=[]"]
    run = config.load_run("mistral_dpo", settings)
    dataset, kind = build_dataset(run.data.train, model_task="causal_lm", method=run.training["method"])
    assert (len(dataset), kind in METHODS[run.training["method"]].rows) == (2, True)
