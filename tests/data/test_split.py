"""Held-out rows by hash: a row's side is its own, whatever stands beside it."""

import re

import pytest

from lsr_scale import UserError
from lsr_scale.data.answered_prompts import PromptForm
from lsr_scale.data.cache import digest
from lsr_scale.data.formats import build_dataset, load_source, question_records
from lsr_scale.data.split import note_shared, split_by_hash
from lsr_scale.data.tasks import examples
from tests.helpers.run_text import MINIMAL, load, problem
from tests.helpers.tiny_runs import labelled, questions, write_rows

KINDS = {
    "text": [{"text": f"sentence {n}"} for n in range(200)],
    "prompt_completion": [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(200)],
    "messages": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(200)
    ],
    "classification": [{"sentence": f"sentence {n}", "label": n % 2} for n in range(200)],
    "multiple_choice": [
        {"id": str(n), "question": f"which is {n}?", "choices": [str(n), "none"], "answer": 0} for n in range(200)
    ],
}


def dataset(tmp_path, *sources):
    paths = [write_rows(tmp_path / f"rows-{n}.jsonl", rows) for n, rows in enumerate(sources)]
    return build_dataset(paths)[0]


def texts(rows):
    return [repr({name: value for name, value in row.items() if value is not None}) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_on_one_side_in_its_order_and_about_the_share_is_held_out(tmp_path, kind):
    whole = dataset(tmp_path, KINDS[kind])
    train, held = split_by_hash(whole, 0.2)
    assert 20 <= len(held) <= 60
    assert sorted(texts(train) + texts(held)) == sorted(texts(whole))
    order = texts(whole)
    for side in (train, held):
        assert texts(side) == [text for text in order if text in set(texts(side))]
        assert side.features == whole.features


def test_a_row_stays_on_its_side_whatever_rows_sources_or_order_there_are(tmp_path):
    rows = KINDS["messages"]
    tools = [{**row, "tools": [{"name": "clock"}], "system": "Be brief."} for row in KINDS["messages"][:5]]
    named = [{"messages": [{**turn, "name": "ann"} for turn in row["messages"]]} for row in rows[:3]]
    held = set(texts(split_by_hash(dataset(tmp_path / "a", rows), 0.2)[1]))
    reordered = split_by_hash(dataset(tmp_path / "b", rows[::-1]), 0.2)[1]
    assert set(texts(reordered)) == held
    for n, sources in enumerate(([rows[:70], rows[70:]], [rows[70:], rows[:70]], [tools, rows, named])):
        found = split_by_hash(dataset(tmp_path / f"c{n}", *sources), 0.2)[1]
        plain = [
            {"messages": [{k: v for k, v in turn.items() if v is not None} for turn in row["messages"]]}
            for row in found
        ]
        assert held <= set(texts(plain))
    grown = [*rows, *({"messages": [{"role": "assistant", "content": f"more {n}"}]} for n in range(100))]
    assert held == set(texts(split_by_hash(dataset(tmp_path / "d", grown), 0.2)[1])) & set(
        texts(dataset(tmp_path, rows))
    )


def test_equal_rows_are_on_one_side(tmp_path):
    whole = dataset(tmp_path, KINDS["text"] * 3)
    train, held = split_by_hash(whole, 0.3)
    assert not set(texts(train)) & set(texts(held))
    assert len(held) == 3 * len(set(texts(held)))
    # a sentence is not to be learned with one label and asked with another
    both = dataset(tmp_path, [{**row, "label": label} for row in KINDS["classification"] for label in (0, 1)])
    train, held = split_by_hash(both, 0.3)
    assert not set(train["sentence1"]) & set(held["sentence1"])


def test_a_prompt_is_on_its_side_wherever_it_stands(tmp_path):
    """The rows of GRPO say where they stand, for messages."""
    rows = [{"prompt": f"say {n}", "answer": str(n)} for n in range(60)]
    held = []
    for name, written in (("a", rows), ("moved/b", rows[::-1]), ("c", rows * 2)):
        path = write_rows(tmp_path / f"{name}.jsonl", written)
        whole = build_dataset([path], method="grpo", form=PromptForm())[0]
        train, validation = split_by_hash(whole, 0.3)
        assert not {*train["prompt"]} & {*validation["prompt"]}
        held.append({*validation["prompt"]})
    assert 6 <= len(held[0]) <= 30
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("number", [2, 3, 10])
def test_either_side_has_a_row_however_few_there_are(tmp_path, share, number):
    train, held = split_by_hash(dataset(tmp_path, KINDS["text"][:number]), share)
    assert len(train) >= 1
    assert len(held) >= 1
    assert len(train) + len(held) == number
    if share != 0.5:
        assert min(len(train), len(held)) == 1


def test_rows_that_are_all_equal_are_refused(tmp_path):
    for number, alike in ((1, "there is one row"), (4, "all 4 rows are equal")):
        with pytest.raises(UserError, match=rf"validation_split: {alike}, so none can be held out"):
            split_by_hash(dataset(tmp_path, KINDS["text"][:1] * number), 0.5)


def test_the_sides_are_tables_of_their_own(tmp_path):
    """The cache knows a dataset by its table; two views of one table would be one dataset to it."""
    train, held = split_by_hash(dataset(tmp_path, KINDS["text"]), 0.5)
    assert digest(train) != digest(held)
    assert len(train.data) == len(train)


def test_the_rows_that_are_held_out_are_the_same_from_release_to_release(tmp_path):
    held = split_by_hash(dataset(tmp_path, KINDS["text"][:30]), 0.1)[1]
    assert held["text"][:] == [f"sentence {n}" for n in (3, 7, 8, 10, 13, 19, 25, 26)]
    held = split_by_hash(dataset(tmp_path, questions()), 0.3)[1]
    assert held["prompt"][:] == ["Question: What sews cloth?\nAnswer:", "Question: What drives nails?\nAnswer:"]
    held = split_by_hash(dataset(tmp_path, labelled()[:10]), 0.3)[1]
    assert held["sentence1"][:] == ["a needle sews cloth", "a ladle serves soup", "a spade digs holes"]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_that_are_trained_on_are_counted(tmp_path, kind):
    rows = KINDS[kind]
    train, held, other = (
        dataset(tmp_path / f"{n}", part) for n, part in enumerate((rows[:150], rows[148:], rows[150:]))
    )
    parts = {"data.validation": held, "eval.tasks, one": [held[0], held[0], held[9]], "eval.tasks, two": other}
    assert note_shared(train, parts) == [
        f"{where}: shares {shared} rows with data.train: what is measured on them tells what was memorized; remove "
        "them from one of the two"
        for where, shared in (("data.validation", "2 of 52"), ("eval.tasks, one", "2 of 3"))
    ]
    assert note_shared(train, {"data.validation": other}) == []
    rest, split = split_by_hash(train, 0.2)
    assert note_shared(rest, {"data.validation": split}) == []


@pytest.mark.parametrize(("kind", "method"), [("prompt_completion", "sft"), ("preference", "dpo"), ("unpaired", "kto")])
def test_questions_that_are_trained_on_are_counted_whatever_they_become(tmp_path, kind, method):
    source = write_rows(tmp_path / "questions.jsonl", questions(6))
    train, read_as = build_dataset([{"path": source, "limit": 4}], model_task="causal_lm", method=method)
    assert read_as == kind
    asked = question_records(examples(load_source(source, None)), kind)
    (note,) = note_shared(train, {"eval.tasks, questions": asked})
    assert note.startswith("eval.tasks, questions: shares 4 of 6 rows with data.train")
    assert question_records(examples(load_source(source, None)), "messages") == []


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "1.5", "'5%'", "true", ".nan"])
def test_a_share_is_between_0_and_1(share):
    message = problem(MINIMAL, f"data.validation_split={share}")
    assert re.search("data.validation_split: expected (a finite number|a number [<>] [01]|float), got", message)


def test_it_stands_in_place_of_validation_sources():
    message = problem(MINIMAL, "data.validation_split=0.1", "data.validation=[piqa]")
    assert "data.validation_split: holds out training rows, and data.validation gives other rows for that" in message
    assert load(MINIMAL, "data.validation_split=0.05").training["eval_strategy"] == "epoch"
    assert "here it is data.validation_split" in problem(MINIMAL, "val_set_size=0.1")
