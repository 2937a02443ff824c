"""Runs on conversations: labels in the trainer, packed, cut, cached, resumed; test_two_ranks has two processes."""

import json
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset

from lsr_scale.data.chat_tokens import tokenize_conversations
from lsr_scale.data.formats import build_dataset
from lsr_scale.model.tokenizer import read_tokenizer
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import assembly
from tests.helpers.chat_tokenizers import LLAMA_3, byte_level, template_text
from tests.helpers.tiny_runs import (
    CHAT_TEMPLATE,
    TOOLS,
    do,
    factors,
    results,
    same,
    save_llama,
    tiny_run,
    write_rows,
)


def chats(num):
    """Return conversations of two, three and four turns; some end with the user's."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": TOOLS[i % len(TOOLS)] if i % 2 else "what is it?"}
        for i in range(5)
    ]
    return [{"messages": turns[: 2 + i % 3]} for i in range(num)]


def chat_run(folder, rows=None, **sections):
    save_llama(folder / "model", chat=True)
    write_rows(folder / "chat.jsonl", rows or chats(12))
    model = {"name": str(folder / "model"), "quantization": "none"}
    data = {"train": [str(folder / "chat.jsonl")], "validation": [str(folder / "chat.jsonl")]}
    return tiny_run(folder, **{"model": model, "data": data, "eval": {"tasks": []}, **sections})


def built(run):
    """Return a run's trainer and what was said of it."""
    said = []
    return assembly.build_trainer(run, RunFolder(Path(run.training["output_dir"])), say=said.append), said


def learned(trainer):
    """Return the supervised texts of each row."""
    tokenizer, texts = trainer.processing_class, []
    for row in trainer.train_dataset:
        marked = [
            token if label != -100 else None for token, label in zip(row["input_ids"], row["labels"], strict=True)
        ]
        runs = " ".join("|" if token is None else str(token) for token in marked).split("|")
        texts.append([tokenizer.decode([int(token) for token in part.split()]) for part in runs if part.strip()])
    return texts


def test_the_trainer_learns_the_assistants_turns_and_says_how_many(tmp_path):
    trainer, said = built(chat_run(tmp_path))
    for row, texts in zip(chats(12), learned(trainer), strict=True):
        assert texts == [turn["content"] + "</s>" for turn in row["messages"] if turn["role"] == "assistant"]
    supervised = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    total = sum(len(row["labels"]) for row in trainer.train_dataset)
    share = f"{supervised} of {total} tokens ({100 * supervised / total:.3g} %)"
    assert said.count(f"chat: 16 assistant turns supervised of 36 turns, {share}") == 1
    assert trainer.processing_class.chat_template == CHAT_TEMPLATE


def test_every_turn_is_learned_where_that_is_asked_for(tmp_path):
    trainer, said = built(chat_run(tmp_path, training={"assistant_only_loss": False}))
    assert all(list(row["labels"]) == list(row["input_ids"]) for row in trainer.train_dataset)
    assert any(line.startswith("chat: every turn is supervised: ") for line in said)


def test_a_prompt_of_messages_is_context_and_its_completions_turns_are_learned(tmp_path):
    turns = chats(3)[2]["messages"]
    rows = [{"prompt": turns[:3], "completion": turns[3:]}] * 4
    assert learned(built(chat_run(tmp_path, rows))[0]) == [[turns[3]["content"] + "</s>"]] * 4


def test_packing_keeps_what_is_learned(tmp_path):
    trainer, _ = built(chat_run(tmp_path))
    packed, _ = built(chat_run(tmp_path, training={"packing": True, "max_length": 128}))
    assert len(packed.train_dataset) < 12
    assert sorted([*chain(*learned(packed))]) == sorted([*chain(*learned(trainer))])


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_of_which_nothing_that_is_learned_is_left_is_left_out_and_said(tmp_path, packing):
    long = [{"role": "user", "content": "what is it? " * 20}, {"role": "assistant", "content": "a saw"}]
    training = {"packing": packing, "max_length": 64}
    trainer, said = built(chat_run(tmp_path, [*chats(6), {"messages": long}], training=training))
    assert len([*chain(*learned(trainer))]) == len([*chain(*learned(built(chat_run(tmp_path, chats(6)))[0]))])
    assert trainer.token_counts["train"].unsupervised == 1
    assert any("left out: training.max_length (64) cuts off all" in line for line in said)


def test_cached_tokens_are_found_by_every_option_and_on_every_day(tmp_path):
    dataset, _ = build_dataset([write_rows(tmp_path / "rows.jsonl", chats(3))])
    tokenizer = byte_level(LLAMA_3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.chat_template = template_text("llama3_2")
    dataset.save_to_disk(str(tmp_path / "saved"))

    def fingerprint(**options):
        saved = Dataset.load_from_disk(str(tmp_path / "saved"))
        return tokenize_conversations(saved, tokenizer, **options)._fingerprint

    assert fingerprint() == fingerprint(assistant_only=True)
    assert len({fingerprint(), fingerprint(assistant_only=False), fingerprint(completion_only=False)}) == 3
    before = fingerprint()
    tokenizer.chat_template = template_text("llama3_1")
    assert fingerprint() != before


def test_a_run_on_conversations_resumes_bit_for_bit_and_keeps_its_template(tmp_path):
    whole = do(chat_run(tmp_path, training={"output_dir": str(tmp_path / "whole")}))
    halved = chat_run(tmp_path, training={"output_dir": str(tmp_path / "halves"), "max_steps": 6})
    half = do(chat_run(tmp_path, training={"output_dir": str(tmp_path / "halves"), "max_steps": 6}))
    assert same(factors(half), factors(whole))
    for step in (6, 4):
        folder = half.path / f"checkpoint-{step}"
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
    (half.path / "results.json").unlink()
    resumed = do(halved, resume="auto")
    assert same(factors(resumed), factors(whole))
    assert read_tokenizer(resumed.tokenizer).chat_template == CHAT_TEMPLATE
    assert json.loads(resumed.data.read_text())["kind"] == "messages"
    assert results(resumed)["eval_loss"] == results(whole)["eval_loss"]
