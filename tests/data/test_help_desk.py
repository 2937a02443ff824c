"""The embedded conversations are true: what they name exists, and no question is in both splits."""

import re

import pytest

from lsr_scale import cli
from lsr_scale.config import run_from_dict
from lsr_scale.data import help_desk
from lsr_scale.data.embedded import SPLITS
from lsr_scale.data.formats import build_dataset
from lsr_scale.errors import UserError

MINIMAL = {"model": {"name": "a/b"}, "adapter": {"method": "lsr"}, "data": {"train": ["rows.jsonl"]}}


def texts(split, role):
    return [turn["content"] for row in help_desk.rows(split) for turn in row["messages"] if turn["role"] == role]


def quoted():
    """Return what answers have in backticks."""
    answers = [*texts("train", "assistant"), *texts("heldout", "assistant")]
    return sorted({words for answer in answers for words in re.findall(r"`([^`]+)`", answer)})


def test_no_question_is_in_both_splits_and_every_answer_that_is_held_out_can_be_known():
    assert not set(texts("train", "user")) & set(texts("heldout", "user"))
    commands = re.compile(r"`([^`]+)`")
    known = set(commands.findall(" ".join(texts("train", "assistant"))))
    assert set(commands.findall(" ".join(texts("heldout", "assistant")))) <= known
    for split in SPLITS:
        rows, kind = build_dataset([{"path": "builtin:chat", "split": split}])
        assert kind == "messages"
        assert list(rows["messages"]) == [row["messages"] for row in help_desk.rows(split)]
    assert any(len(row["messages"]) > 3 for row in help_desk.rows("train")), "some have several turns"
    assert any(row["messages"][0]["role"] == "system" for row in help_desk.rows("train"))


@pytest.mark.parametrize("command", [words for words in quoted() if words.startswith("lsr-scale ")])
def test_every_command_that_is_named_is_taken(command, capsys):
    words = command.replace('"..."', "hello").split()[1:]
    parser = cli.parser()
    assert parser.parse_args(words).command == words[0]


@pytest.mark.parametrize("key", [words for words in quoted() if re.fullmatch(r"[a-z]+\.[a-z_]+", words)])
def test_every_setting_that_is_named_exists(key):
    section, name = key.split(".")
    values = {
        "quantization": "nf4", "assistant_only_loss": False, "memory": "save", "max_length": 512, "packing": True,
        "chat_template": "own.jinja", "on_nonfinite": "skip", "start_from": "runs/first", "config": "zero3",
    }  # fmt: skip
    if key == "nonfinite.jsonl":
        return
    run = run_from_dict({**MINIMAL, section: {**MINIMAL.get(section, {}), name: values[name]}})
    assert getattr(run, section) is not None


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match=r"builtin:chat.*'train' or 'heldout', got 'test'"):
        build_dataset([{"path": "builtin:chat", "split": "test"}])
    with pytest.raises(UserError, match=r"'builtin:caht': did you mean 'builtin:chat'"):
        build_dataset(["builtin:caht"])
