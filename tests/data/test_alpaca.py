"""Rows in Alpaca's columns, with what LLaMA-Factory's files have beside them: history, system, tools, judgements."""

import json

import pytest

from lsr_scale.data.formats import build_dataset
from lsr_scale.data.preview import preview, runs
from lsr_scale.data.tokenizer_setup import row_check
from lsr_scale.errors import UserError
from tests.data.test_assistant_spans import FAMILIES, TOOLS, tokenizer_of
from tests.helpers.tiny_runs import write_rows

ROW = {"instruction": "Add them.", "input": "1 and 2", "output": "3"}
BEFORE = [["Hi", "Hello!"], ["Can you add?", "I can."]]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": role, "content": text} for pair in BEFORE for role, text in zip(("user", "assistant"), pair, strict=True)
]
ASKED = {"role": "user", "content": "Add them.\n1 and 2"}
ANSWER = {"role": "assistant", "content": "3"}
WRONG = {"role": "assistant", "content": "4"}
PAIR = {"instruction": "Add them.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
TAGGED = {**ROW, "kto_tag": True}


@pytest.fixture
def read(tmp_path):
    """Write rows to files, one for each list, and build a dataset of them."""

    def build(*several, method="sft", data_format="auto", **options):
        paths = [write_rows(tmp_path / f"{index}.jsonl", rows) for index, rows in enumerate(several)]
        sources = [{"path": path, "format": data_format} for path in paths]
        dataset, kind = build_dataset(sources, model_task="causal_lm", method=method, **options)
        return list(dataset), kind

    return build


def test_history_and_system_make_a_source_conversations_whose_answers_are_all_learned(read):
    rows, kind = read([ROW, {**ROW, "history": BEFORE, "system": "Be brief."}, {**ROW, "history": [], "system": ""}])
    assert kind == "messages"
    plain = {"messages": [ASKED, ANSWER]}
    assert rows == [plain, {"messages": [SYSTEM, *TURNS, ASKED, ANSWER]}, plain]
    assert read([{**ROW, "history": json.dumps(BEFORE)}, {**ROW, "history": "[]"}])[0][0] == {
        "messages": [*TURNS, ASKED, ANSWER]
    }, "a CSV's cells are texts"


def test_empty_columns_leave_rows_in_stanfords_template(read):
    empty = {"history": [], "system": "", "tools": "[]"}
    assert read([{**ROW, **empty}]) == read([ROW])
    assert read([ROW])[1] == "prompt_completion"


def test_tools_beside_an_instruction_are_not_lost(read):
    for row, method, read_as in (
        (ROW, "sft", "messages"),
        (PAIR, "dpo", "chat_preference"),
        (TAGGED, "kto", "chat_unpaired"),
    ):
        rows, kind = read([{**row, "tools": json.dumps(TOOLS)}], method=method)
        assert (kind, json.loads(rows[0]["tools"])) == (read_as, TOOLS)


def test_each_reading_can_be_chosen_by_its_format(read):
    assert read([ROW], data_format="alpaca_chat") == ([{"messages": [ASKED, ANSWER]}], "messages")
    with pytest.raises(UserError, match=r"line 1: 'history', 'system': Stanford's template has no place .*alpaca_chat"):
        read([{**ROW, "history": BEFORE, "system": "Be brief."}], data_format="alpaca")


def test_sources_of_both_readings_are_told_how_to_agree_and_then_do(read):
    both = [ROW], [{**ROW, "history": BEFORE}]
    with pytest.raises(UserError, match=r"cannot be mixed: .* or set format: alpaca_chat, which makes conversations"):
        read(*both)
    assert read(*both, data_format="alpaca_chat")[1] == "messages"


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_preference_is_of_texts_in_the_template_or_of_conversations(read, method):
    rows, kind = read([PAIR], method=method)
    assert kind == "preference"
    assert rows == [{"prompt": read([ROW])[0][0]["prompt"], "chosen": "3", "rejected": "4"}]
    in_turns = {"prompt": [SYSTEM, *TURNS, ASKED], "chosen": [ANSWER], "rejected": [WRONG]}
    rows, kind = read([{**PAIR, "system": "Be brief.", "history": BEFORE}], method=method)
    assert (rows, kind) == ([in_turns], "chat_preference")
    rows, kind = read([PAIR], method=method, data_format="alpaca_chat")
    assert (rows, kind) == ([{**in_turns, "prompt": [ASKED]}], "chat_preference")


@pytest.mark.parametrize("column", ["kto_tag", "label"])
def test_a_tagged_row_is_desirable_or_not(read, column):
    rows, kind = read([{**ROW, column: True}, {**ROW, column: False}], method="kto")
    assert (kind, [row["label"] for row in rows]) == ("unpaired", [True, False])
    assert {key: rows[0][key] for key in ("prompt", "completion")} == read([ROW])[0][0]
    rows, kind = read([{**ROW, column: False, "history": BEFORE}], method="kto")
    assert kind == "chat_unpaired"
    assert rows == [{"prompt": [*TURNS, ASKED], "completion": [ANSWER], "label": False}]


def test_whole_conversations_beside_an_instruction_stay_what_is_read(read):
    whole = {"instruction": ASKED["content"], "chosen": [ASKED, ANSWER], "rejected": [ASKED, WRONG]}
    assert read([whole], method="dpo")[0] == [{"prompt": [ASKED], "chosen": [ANSWER], "rejected": [WRONG]}]


def test_a_csvs_empty_cells_are_nothing(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("instruction,input,output,history,system,tools,kto_tag\nAdd them.,1 and 2,3,,,,\n")
    dataset, kind = build_dataset([str(file)], model_task="causal_lm", method="sft")
    assert (kind, dataset[0]["completion"]) == ("prompt_completion", "3")
    file.write_text('instruction,input,output,history,kto_tag\nAdd them.,1 and 2,3,"[[""Hi"", ""Hello!""]]",False\n')
    dataset, kind = build_dataset([str(file)], model_task="causal_lm", method="kto")
    assert (kind, dataset[0]["prompt"], dataset[0]["label"]) == ("chat_unpaired", [*TURNS[:2], ASKED], False)


@pytest.mark.parametrize("method", ["sft", None])
def test_tagged_rows_are_no_answers_to_learn_unless_one_says_so(read, method):
    with pytest.raises(
        UserError, match=r"rows with 'kto_tag' are for training\.method: kto; set that, or format: alpaca"
    ):
        read([TAGGED], method=method)
    with pytest.raises(UserError, match=r"line 2: rows with 'kto_tag' are"):
        read([{**ROW, "kto_tag": None}, TAGGED], method=method)
    assert read([TAGGED], method=method, data_format="alpaca") == read([ROW])
    with pytest.raises(UserError, match=r"rows with 'kto_tag' are for training\.method: kto; set that$"):
        read([TAGGED], method="dpo")


@pytest.mark.parametrize(
    ("method", "row", "remedy"),
    [
        ("sft", PAIR, "set training.method: dpo or orpo"),
        ("kto", PAIR, "set training.method: dpo or orpo"),
        ("dpo", ROW, "set training.method: sft"),
        ("kto", ROW, "set training.method: sft"),
    ],
)
def test_rows_of_another_method_are_refused_with_it(read, method, row, remedy):
    with pytest.raises(UserError, match=f"training.method is {method}, which takes .*{remedy}"):
        read([row], method=method)


@pytest.mark.parametrize(
    ("method", "good", "change", "message"),
    [
        ("sft", ROW, {"history": "Hi"}, r"expected \[\[user, assistant\], \.\.\.\] under 'history', got 'Hi'"),
        ("sft", ROW, {"history": [["Hi"]]}, r"two texts, as history\[0\], got \['Hi'\]"),
        ("sft", ROW, {"history": [*BEFORE, ["Hi", None]]}, r"two texts, as history\[2\], got \['Hi', None\]"),
        ("sft", ROW, {"system": 3}, "expected a text under 'system', got 3"),
        ("sft", ROW, {"output": " "}, "expected a text under 'output', got an empty one"),
        ("sft", ROW, {"history": BEFORE, "instruction": "", "input": ""}, "text under 'instruction', got an empty one"),
        ("sft", ROW, {"tools": "no JSON"}, "expected a list of tools"),
        ("sft", ROW, {"images": ["a.png"]}, "something under 'images', and only texts are trained on; remove the row"),
        ("dpo", PAIR, {"rejected": None}, "expected a text under 'rejected', got nothing"),
        ("dpo", PAIR, {"rejected": "3"}, "'chosen' and 'rejected' are the same"),
        ("dpo", PAIR, {"instruction": None}, "expected a text under 'instruction', got nothing"),
        ("dpo", PAIR, {"tools": [1]}, "expected a list of tools, or its JSON, under 'tools'"),
        ("kto", TAGGED, {"kto_tag": "yes"}, r"expected true \(desirable\) or false under 'kto_tag', got 'yes'"),
        ("kto", TAGGED, {"kto_tag": None}, r"expected true \(desirable\) or false under 'kto_tag', got nothing"),
        ("kto", TAGGED, {"label": False}, "'label' and 'kto_tag' say different things"),
        ("kto", TAGGED, {"output": ""}, "expected a text under 'output', got an empty one"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(read, method, good, change, message):
    with pytest.raises(UserError, match=rf"0\.jsonl, line 2: .*{message}"):
        read([good, {**good, **change}], method=method)


def test_a_preference_with_history_is_shown_through_the_chat_template(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{**PAIR, "history": BEFORE, "system": "Be brief."}])
    tokenizer, training = tokenizer_of(FAMILIES["qwen2_5"]), {"method": "dpo", "max_length": 1024}
    check = row_check(tokenizer, True, training)
    dataset, kind = build_dataset([source], model_task="causal_lm", method="dpo", check=check)
    shown = preview(dataset, kind, tokenizer, training=training)
    assert shown.names == ["chosen", "rejected"]
    for sample, answer in zip(shown.samples, (ANSWER, WRONG), strict=True):
        whole = tokenizer.apply_chat_template([SYSTEM, *TURNS, ASKED, answer], tokenize=False)
        assert "".join(text for _, text in runs(sample)) == whole
        learned = "".join(text for is_learned, text in runs(sample) if is_learned)
        assert learned.startswith(f"{answer['content']}<|im_end|>")
