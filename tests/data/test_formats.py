"""Rows of every usual shape become what the trainer takes, and training sees what scoring scores."""

import copy
import json
import re
from pathlib import Path

import pytest

from lsr_scale.data.classification import tokenize_classification
from lsr_scale.data.formats import COLUMNS, FORMATS, build_dataset, fitting_formats, load_source
from lsr_scale.data.preview import preview
from lsr_scale.data.tasks import TASKS, to_example
from lsr_scale.data.tokenizer_setup import prepare_tokenizer
from lsr_scale.errors import UserError
from lsr_scale.scoring.scorer import encode_pairs
from tests.data.test_tasks import HUB_ROWS
from tests.helpers.smollm2 import beginning_marked, smollm2_tokenizer

CHOICE = {"question": "Which floats?", "choices": ["cork", "lead"], "answer": 0}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
SHARE = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
ALPACA = {"instruction": "Add {them}.", "input": "1 and 2", "output": "3"}


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture
def built(tmp_path):
    """Write rows to a file, a number each, and build a dataset from them."""

    def build(*several, data_format=None, **options):
        sources = []
        for index, rows in enumerate(several):
            file = tmp_path / f"{index}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sources.append({"path": str(file), **({"format": data_format} if data_format else {})})
        dataset, kind = build_dataset(sources, **options)
        return list(dataset), kind

    return build


def test_a_multiple_choice_row_is_the_scored_text_of_its_right_choice(built):
    rows, kind = built([CHOICE])
    assert kind == "prompt_completion"
    assert rows == [{"prompt": "Question: Which floats?\nAnswer:", "completion": " cork"}]


def test_prompt_and_completion_stay_as_written(built):
    assert built([PAIR]) == ([PAIR], "prompt_completion")
    asked = {"question": "How many?", "answer": "Three."}
    assert built([asked])[0] == [{"prompt": "Question: How many?\nAnswer:", "completion": " Three."}]


def test_alpaca_is_stanfords_template(built):
    start = "Below is an instruction that describes a task"
    rows, kind = built([ALPACA, {"instruction": "Say hi.", "input": "", "output": "hi"}])
    assert kind == "prompt_completion"
    assert rows[0] == {
        "prompt": f"{start}, paired with an input that provides further context. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n1 and 2\n\n### Response:",
        "completion": "3",
    }
    assert rows[1] == {
        "prompt": f"{start}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:",
        "completion": "hi",
    }
    dolly = {"instruction": "Add {them}.", "context": "1 and 2", "response": "3", "category": "math"}
    assert built([dolly])[0] == rows[:1]
    assert built([{"prompt": "Say hi.", "response": "hi"}])[0] == rows[1:]


def test_sharegpt_becomes_messages(built):
    rows, kind = built([{**SHARE, "system": "Be kind."}, SHARE])
    assert kind == "messages"
    assert rows[0]["messages"] == [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]
    assert rows[1] == built([CHAT])[0][0] == CHAT


def test_conversations_as_prompt_and_completion_stay_two_lists(built):
    row = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert built([row]) == ([row], "chat_prompt_completion")


def test_tools_travel_as_json(built):
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows, _ = built([CHAT], [{**CHAT, "tools": tools}])
    assert rows[0]["tools"] is None
    assert json.loads(rows[1]["tools"]) == tools


def test_text_and_classification(built):
    assert built([{"text": "Once.", "meta": 1}]) == ([{"text": "Once."}], "text")
    rows, kind = built(
        [{"premise": "a", "hypothesis": "b", "label": 1}, {"premise": "c", "hypothesis": "", "label": 0}]
    )
    assert kind == "classification"
    assert rows[0] == {"sentence1": "a", "sentence2": "b", "label": 1}
    scores, _ = built(
        [{"sentence1": "a", "sentence2": "b", "label": 2}, {"sentence1": "a", "sentence2": "b", "label": 2.5}]
    )
    assert [row["label"] for row in scores] == [2.0, 2.5]
    assert built([{"sentence": "a", "label": 1}])[0] == [{"sentence1": "a", "sentence2": "", "label": 1}]
    assert built([{"sentence1": "a", "label": 1}])[0] == [{"sentence1": "a", "sentence2": "", "label": 1}]


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        (CHOICE, ["multiple_choice"]),
        (PAIR, ["prompt_completion"]),
        (CHAT, ["messages"]),
        ({"conversations": CHAT["messages"]}, ["messages"]),
        (SHARE, ["sharegpt"]),
        (ALPACA, ["alpaca"]),
        ({**ALPACA, "text": "Below is ..."}, ["alpaca"]),
        ({"prompt": "Hi", **CHAT}, ["messages"]),
        ({"text": "a"}, ["text"]),
        ({"question": "a", "sentence": "b", "label": 1}, ["classification"]),
        ({"text": "a", "label": 1}, ["classification", "text"]),
        ({**PAIR, **CHAT}, ["messages", "prompt_completion"]),
        ({"col": 1}, []),
    ],
)
def test_the_format_is_detected_by_the_columns(row, formats):
    assert fitting_formats(row) == formats


@pytest.mark.parametrize("task", TASKS)
def test_hub_columns_are_multiple_choice(task):
    assert fitting_formats(HUB_ROWS[task][0]) == ["multiple_choice"]


@pytest.mark.parametrize("columns", COLUMNS.split("; "))
def test_the_columns_that_are_proposed_are_detected(columns):
    names = columns.replace(" and ", ", ").split(", ")
    assert fitting_formats({name: CHAT["messages"] if name == "messages" else "a" for name in names})


def test_the_guides_table_has_each_format():
    guide = (Path(__file__).parents[2] / "GUIDE.md").read_text(encoding="utf-8")
    table = guide.partition("| columns of a row | read as (`format`) |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split(" | ")[1] for line in table.splitlines()[2:])))
    assert named >= set(FORMATS) - {"auto"}


def test_a_conversation_may_be_json_in_a_text_as_a_csv_has_it(built):
    messages = json.dumps(CHAT["messages"])
    assert built([{"messages": messages}]) == built([CHAT])
    assert fitting_formats({"conversations": json.dumps([{"from": "human", "value": "a"}])}) == ["sharegpt"]
    with pytest.raises(
        UserError, match=r"line 2: expected a list of messages, or its JSON, under 'messages', got '\[\{'"
    ):
        built([{"messages": messages}, {"messages": "[{"}])
    with pytest.raises(UserError, match="line 1: expected a list of messages, or its JSON, under 'conversations', got"):
        built([{"conversations": "[{"}])
    with pytest.raises(UserError, match="line 1: nothing under 'messages' or 'conversations'; the row has nothing"):
        built([{"messages": None}, {"messages": messages}])


def test_a_row_without_its_conversation_is_told_what_it_has(built):
    with pytest.raises(UserError, match=r"line 2: nothing under 'messages' or 'conversations'; the row has prompt, "):
        built([CHAT, PAIR])


def test_unknown_and_ambiguous_rows_ask_for_a_format(built):
    with pytest.raises(UserError, match=r"columns col fit no format .*; rename them: prompt and completion; messages;"):
        built([{"col": 1}])
    both = {"text": "a", "label": 1}
    with pytest.raises(UserError, match=r"more than one format; set format to one of: classification, text$"):
        built([both])
    assert built([both], data_format="text") == ([{"text": "a"}], "text")
    with pytest.raises(UserError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        built([ALPACA], data_format="alpacca")


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (CHOICE, {**CHOICE, "answer": 7}, "between 0 and 1, got 7"),
        (PAIR, {"prompt": "a"}, "text under 'completion', got nothing"),
        (PAIR, {"prompt": "a", "completion": " "}, "something to learn"),
        (PAIR, {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "keep one kind a source"),
        (CHAT, {"messages": []}, "list of messages"),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}, "no assistant turn"),
        (CHAT, {"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": " "}]}, "empty assistant turns"),
        (
            {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
            {"prompt": CHAT["messages"][:1], "completion": [{"role": "assistant", "content": ""}]},
            "something to learn under 'completion', got empty",
        ),
        (CHAT, {"messages": [{"role": "asistant", "content": "Hi"}]}, r"messages\[0\]; did you mean 'assistant'"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            r"messages\[0\]\.tool_calls\[0\]",
        ),
        (SHARE, {"conversations": [{"from": "robot", "value": "Hi"}]}, "unknown speaker 'robot'"),
        (CHAT, {**CHAT, "images": ["a.png"]}, "something under 'images', and only texts are trained on"),
        (ALPACA, {"instruction": "a", "output": 3}, "text under 'output', got 3"),
        ({"text": "a"}, {"text": ""}, "something to learn"),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": "good"}, "class number"),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": -1}, "unlabelled"),
        (
            {"sentence": "a", "label": 1},
            {"sentence": "a", "label": float("inf")},
            "finite and below 2.14748e.09, got inf",
        ),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": float("nan")}, "finite and below"),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": 2**70}, "finite and below"),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": None}, "expected a label .* got nothing"),
        ({"sentence": "a", "label": 1}, {"sentence": "a", "label": [1]}, "multi-label classification is not supported"),
        ({"sentence": "a", "label": 1}, {"sentence": " ", "label": 1}, "expected a text to classify under 'sentence'"),
        (CHAT, {**CHAT, "tools": "not JSON"}, "list of tools, or its JSON, under 'tools', got 'not JSON'"),
        (CHAT, {**CHAT, "tools": {"name": "f"}}, "list of tools"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(built, good, bad, message):
    with pytest.raises(UserError, match=r"0\.jsonl, line 2: .*" + message):
        built([good, bad])


def test_sources_stand_one_after_the_other_and_unify_where_nothing_is_lost(built):
    rows, kind = built([CHOICE], [ALPACA], [PAIR])
    assert kind == "prompt_completion"
    assert [row["completion"] for row in rows] == [" cork", "3", " 4"]
    assert built([SHARE], [CHAT])[1] == "messages"


@pytest.mark.parametrize("others", [[CHAT], [{"text": "a"}], [{"sentence": "a", "label": 1}]])
def test_kinds_that_are_trained_on_differently_are_not_mixed(built, others):
    with pytest.raises(
        UserError, match=r"0\.jsonl' is prompt_completion \(raw text, loss on the completion\); .*1\.jsonl"
    ):
        built([PAIR], others)


def test_data_of_the_wrong_sort_for_the_model_is_refused(built):
    with pytest.raises(
        UserError, match=r"model\.task is seq_cls, which takes classification rows, got prompt_completion"
    ):
        built([PAIR], model_task="seq_cls")
    with pytest.raises(UserError, match=r"model\.task is causal_lm"):
        built([{"sentence": "a", "label": 1}], model_task="causal_lm")
    assert built([PAIR], model_task="causal_lm")[1] == "prompt_completion"
    with pytest.raises(UserError, match="at least one source"):
        build_dataset([])


def test_sources_are_paths_mappings_or_objects_and_may_be_read_before(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR) + "\n", encoding="utf-8")

    class Source:
        path, name, split, task, format, limit = str(file), None, None, None, "auto", 1

    assert len(build_dataset([str(file), {"path": str(file), "limit": 1}, Source()])[0]) == 4
    rows = load_source(Source())
    assert rows.provenance.num_rows == 1
    assert len(build_dataset([Source()], loaded=[rows])[0]) == 1


@pytest.mark.parametrize("marks_beginning", [False, True])
def test_training_supervises_the_scored_tokens_of_the_right_choice_and_the_end(tmp_path, tokenizer, marks_beginning):
    tokenizer = beginning_marked(tokenizer) if marks_beginning else tokenizer
    sources, pairs = [], []
    for task, rows in HUB_ROWS.items():
        file = tmp_path / task / "train.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources.append(str(file.parent))
        examples = [to_example(row, task) for row in rows]
        pairs += [(example.contexts[example.answer], example.continuations[example.answer]) for example in examples]
    dataset, kind = build_dataset(sources)
    seen = preview(dataset, kind, tokenizer, num_samples=len(dataset))
    assert len(seen.samples) == len(pairs)
    for sample, (context_ids, continuation_ids) in zip(seen.samples, encode_pairs(tokenizer, pairs), strict=True):
        assert [token.id for token in sample] == [*context_ids, *continuation_ids, tokenizer.eos_token_id]
        assert [token.supervised for token in sample] == [False] * len(context_ids) + [True] * (
            len(continuation_ids) + 1
        )
    assert any("appends the end-of-sequence token" in note for note in seen.notes)


def test_preview_shows_conversations_through_the_chat_template(built, tokenizer, tmp_path):
    built([CHAT])
    dataset, kind = build_dataset([str(tmp_path / "0.jsonl")])
    whole = preview(dataset, kind, tokenizer)
    expected = tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    assert [token.id for token in whole.samples[0]] == expected
    assert "".join(token.text for token in whole.samples[0] if token.supervised) == "Hello!<|im_end|>"
    every = preview(dataset, kind, tokenizer, training={"assistant_only_loss": False})
    assert [token.id for token in every.samples[0]] == expected
    assert all(token.supervised for token in every.samples[0])
    assert any("Every turn is supervised" in note for note in every.notes)


def test_preview_heeds_max_length_and_says_what_is_dropped(built, tokenizer, tmp_path):
    built([PAIR, {"prompt": "far " * 40, "completion": " off"}])
    dataset, kind = build_dataset([str(tmp_path / "0.jsonl")])
    seen = preview(dataset, kind, tokenizer, training={"max_length": 20, "learning_rate": 1.0})
    assert len(seen.samples) == 1
    assert any("1 of 2 rows dropped: max_length (20)" in note for note in seen.notes)
    assert len(preview(dataset, kind, tokenizer, training={"max_length": None}).samples) == 2
    with pytest.raises(UserError, match="no supervised token"):
        preview(dataset, kind, tokenizer, training={"max_length": 1})
    everything = preview(dataset, kind, tokenizer, num_samples=1, training={"completion_only_loss": False})
    assert all(token.supervised for token in everything.samples[0])


def test_a_missing_padding_token_is_replaced_and_noted(tokenizer):
    bare = beginning_marked(tokenizer)
    assert bare.pad_token is None
    (note,) = prepare_tokenizer(bare, "text")
    assert "<|im_end|>" in note
    assert bare.pad_token == "<|im_end|>"
    assert prepare_tokenizer(bare, "text") == []
    assert prepare_tokenizer(bare, "text", pad_token="<|im_start|>") == []
    assert bare.pad_token == "<|im_start|>"
    with pytest.raises(UserError, match="'<none>' is not in its vocabulary"):
        prepare_tokenizer(bare, "text", pad_token="<none>")


def test_a_tokenizer_that_cannot_serve_the_data_says_what_to_set(tokenizer):
    bare = beginning_marked(tokenizer)
    with pytest.raises(UserError, match="no chat template; set model"):
        prepare_tokenizer(bare, "messages")
    endless = copy.deepcopy(bare)
    endless.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*training.eos_token"):
        prepare_tokenizer(endless, "text")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare_tokenizer(endless, "classification")  # it would be the padding token
    # BERT's tokenizers have none, and a classifier needs none
    assert prepare_tokenizer(endless, "classification", pad_token="<|im_start|>") == []


def test_sentence_pairs_are_tokenized_alike_in_every_row(built, tokenizer, tmp_path):
    built(
        [{"sentence1": "one two", "sentence2": "three", "label": 1}, {"sentence1": "four", "sentence2": "", "label": 0}]
    )
    dataset, kind = build_dataset([str(tmp_path / "0.jsonl")])
    encoded = tokenize_classification(dataset, tokenizer, max_length=3)
    assert list(encoded["labels"]) == [1, 0]
    assert encoded[0]["input_ids"] == tokenizer("one two", "three", truncation=True, max_length=3).input_ids
    assert encoded[1]["input_ids"] == tokenizer("four", "").input_ids
    seen = preview(dataset, kind, tokenizer)
    assert seen.labels == [1, 0]
    assert not any(token.supervised for sample in seen.samples for token in sample)
