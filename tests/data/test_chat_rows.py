"""Rows of conversations as people have them: each is taken, or refused by file and line."""

import json

import pytest
from datasets import Dataset

from lsr_scale.data.chat_tokens import tokenize_conversations
from lsr_scale.data.conversations import messages_of
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.preview import preview, runs
from lsr_scale.data.token_counts import count_tokens
from lsr_scale.data.tokenizer_setup import row_check, template_notes
from lsr_scale.errors import UserError
from tests.data.test_assistant_spans import CALL, FAMILIES, TOOLS, tokenizer_of
from tests.helpers.tiny_runs import write_rows

ASK = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"}


def read(folder, *rows, family="qwen2_5", assistant_only=True):
    """Return the messages that the chat template is given, row by row."""
    source = write_rows(folder / "rows.jsonl", list(rows))
    dataset, kind = build_dataset([source], check=row_check(tokenizer_of(FAMILIES[family]), assistant_only))
    assert kind in ("messages", "chat_prompt_completion")
    return [messages_of(row)[0] for row in dataset]


def test_tool_calls_keep_their_arguments_apart_whatever_form_they_have(tmp_path):
    openai = [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    ]
    bare = [{"name": "rain", "arguments": {"days": 3}}]
    first = {"role": "assistant", "content": None, "tool_calls": openai}
    second = {"role": "assistant", "tool_calls": bare}
    rows = [{"messages": [ASK, call, RESULT, ANSWER], "tools": TOOLS} for call in (first, second)]
    one, two = read(tmp_path, *rows)
    assert one == [ASK, {"role": "assistant", "content": "", "tool_calls": CALL}, RESULT, ANSWER]
    assert two[1]["tool_calls"] == [{"type": "function", "function": {"name": "rain", "arguments": {"days": 3}}}]


FLAT = TOOLS[0]["function"]
SHARED = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "Sunny."},
]


def test_sharegpts_function_calls_and_observations_are_tool_calls_and_their_results(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    several = json.dumps([{"name": "weather", "arguments": '{"city": "Paris"}'}, {"name": "rain"}])
    two = [SHARED[0], {**SHARED[1], "value": several}, *SHARED[2:]]
    rows = [{"conversations": turns, "tools": json.dumps([FLAT])} for turns in (SHARED, two)]
    first, second = read(tmp_path, *rows)
    result = {"role": "tool", "content": "sunny"}
    assert first == [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, result, ANSWER]
    assert second[1]["tool_calls"] == [call, {"type": "function", "function": {"name": "rain", "arguments": {}}}]


def test_a_function_call_is_shown_and_learned_as_the_template_writes_it_and_its_result_is_not(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"conversations": SHARED, "tools": json.dumps([FLAT])}])
    tokenizer = tokenizer_of(FAMILIES["qwen2_5"])
    dataset, kind = build_dataset([source], check=row_check(tokenizer))
    shown = runs(preview(dataset, kind, tokenizer).samples[0])
    turns = [ASK, {"role": "assistant", "content": "", "tool_calls": CALL}, RESULT, ANSWER]
    assert "".join(text for _, text in shown) == tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    learned = "".join(text for is_learned, text in shown if is_learned)
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in learned
    assert "Sunny." in learned
    assert "sunny" not in learned


def test_a_columnar_file_may_have_turns_of_both_shapes(tmp_path):
    shared = [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": ANSWER["content"]}]
    rows = [{"messages": [ASK, ANSWER]}, {"messages": shared}]  # as columns each turn has all four keys
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    dataset, _ = build_dataset([str(tmp_path / "rows.parquet")])
    assert [dataset[index]["messages"] for index in (0, 1)] == [[ASK, ANSWER]] * 2
    with pytest.raises(UserError, match=r"nothing under 'from' in conversations\[0\], .*; valid: assist"):
        build_dataset([write_rows(tmp_path / "rows.jsonl", [{"conversations": [{"value": "a"}, shared[1]]}])])


def test_a_call_and_its_result_may_have_the_number_that_a_template_asks_for(tmp_path):
    numbered = json.dumps({"id": "abcdefghi", "name": "weather", "arguments": {"city": "Paris"}})
    turns = [SHARED[0], {**SHARED[1], "value": numbered}, {**SHARED[2], "tool_call_id": "abcdefghi"}, SHARED[3]]
    assert read(tmp_path, {"conversations": turns}, family="mistral_v03")[0][1]["tool_calls"] == CALL


@pytest.mark.parametrize("tools", ["[]", [], "", None])
@pytest.mark.parametrize("family", ["qwen2_5", "mistral_v03", "gemma"])
def test_a_row_with_no_tools_is_one_without_that_column(tmp_path, tools, family):
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": [ASK, ANSWER], "tools": tools}])
    dataset, _ = build_dataset([source], check=row_check(tokenizer_of(FAMILIES[family])))
    assert dataset.column_names == ["messages"]


def test_tools_that_are_written_bare_get_the_form_that_templates_expect(tmp_path):
    for tools in ([FLAT], json.dumps([{"type": "function", **FLAT}]), TOOLS):
        source = write_rows(tmp_path / "rows.jsonl", [{"messages": [ASK, ANSWER], "tools": tools}])
        dataset, _ = build_dataset([source])
        assert json.loads(dataset[0]["tools"]) == TOOLS


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"value": '{"name": "weather", "arguments": {'},
            r"or a list of such calls, as JSON alone under 'value' in conv",
        ),
        ({"value": "I look. {}"}, r"conversations\[1\], whose speaker is function_call, got 'I look\. \{\}'"),
        ({"value": "[]"}, r"conversations\[1\], whose speaker is function_call, got '\[\]'"),
        ({"value": None}, r"conversations\[1\], whose speaker is function_call, got None"),
        ({"value": '{"arguments": {}}'}, r"as conversations\[1\]\.tool_calls\[0\], got \{'arguments'"),
        (
            {"value": '{"name": "f", "arguments": [1]}'},
            r"as arguments of conversations\[1\]\.tool_calls\[0\], got \[1\]",
        ),
        ({"value": '{"name": "f", "name": "g"}'}, r"conversations\[1\]: the key 'name' is there twice"),
        ({"value": '{"name": "f", "arguments": {"a": "\\ud83d"}}'}, r"conversations\[1\]: \\ud83d is half of a char"),
        (
            {"from": "function", "value": "{}"},
            r"unknown speaker 'function' in conversations\[1\]; did you mean 'function_",
        ),
    ],
)
def test_a_function_call_that_cannot_be_read_is_refused_by_line(tmp_path, turn, message):
    bad = {"conversations": [SHARED[0], {**SHARED[1], **turn}, *SHARED[2:]]}
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read(tmp_path, {"conversations": SHARED}, bad)


def test_messages_that_are_json_twice_or_one_by_one_are_read(tmp_path):
    turns = [ASK, ANSWER]
    for written in (json.dumps(json.dumps(turns)), [json.dumps(turn) for turn in turns]):
        assert read(tmp_path, {"messages": written}) == [turns]


def test_messages_in_pythons_notation_are_told_how_to_be_written(tmp_path):
    with pytest.raises(
        UserError, match=r"line 1: expected a list of messages, or its JSON, .*write the column with json"
    ):
        read(tmp_path, {"messages": str([ASK, ANSWER])})


def test_parts_of_text_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "Weath"}, {"type": "text", "text": "er?"}]
    assert read(tmp_path, {"messages": [{"role": "user", "content": parts}, ANSWER]}) == [[ASK, ANSWER]]


def test_a_last_turn_of_the_user_two_in_a_row_and_an_empty_answer_are_taken(tmp_path):
    for turns in ([ASK, ANSWER, ASK], [ASK, ASK, ANSWER], [ASK, {"role": "assistant", "content": ""}, ASK, ANSWER]):
        assert read(tmp_path, {"messages": turns}) == [turns]


@pytest.mark.parametrize(
    ("turns", "more", "message"),
    [
        ([{"role": "user"}, ANSWER], {}, r"no content in messages\[0\]; write its text, an empty one"),
        ([ASK, {"role": "assistant", "content": None}], {}, r"no content in messages\[1\]"),
        ([{"role": "asistant", "content": "x"}], {}, r"unknown role 'asistant' in messages\[0\]; did you mean 'assis"),
        ([{"role": "function", "content": "x"}, ANSWER], {}, r"unknown role 'function' in messages\[0\]"),
        (
            [{"content": "x"}, ANSWER],
            {},
            r"nothing under 'role' in messages\[0\], which is whose turn it is; valid: assistant, dev",
        ),
        ([ASK, {"role": "assistant", "content": ""}], {}, "empty assistant turns"),
        ([ASK, {"role": "assistant", "content": "", "id": 7, "name": "Bob"}], {}, "empty assistant turns"),
        ([ASK], {}, "no assistant turn under 'messages'"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ANSWER], {}, "got 'image': only texts"),
        ([{"role": "user", "content": 3}, ANSWER], {}, r"expected a text as content of messages\[0\], got 3"),
        ([{**ASK, "tool_calls": CALL}, ANSWER], {}, r"tool_calls in messages\[0\], whose role is user"),
        ([ASK, {**ANSWER, "tool_calls": [{"function": {"name": ""}}]}], {}, r"messages\[1\]\.tool_calls\[0\]"),
        (
            [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            {},
            "an object, or its JSON, as arguments",
        ),
        (
            [ASK, {**ANSWER, "weight": 0.5}],
            {},
            r"expected 0 \(not learned\) or 1 under 'weight' in messages\[1\], got 0\.5",
        ),
        ([{**ASK, "weight": 1}, ANSWER], {}, r"weight 1 in messages\[0\], whose role is user"),
        ([ASK, {**ANSWER, "weight": 0}], {}, "each assistant turn under 'messages' has weight 0"),
        ([ASK, {**ANSWER, "train": False}], {}, "each assistant turn under 'messages' has weight 0"),
        ([ASK, {**ANSWER, "train": "no"}], {}, r"expected 0 \(not learned\) or 1 under 'train' in messages\[1\], got"),
        ([ASK, {**ANSWER, "loss": True, "weight": 0}], {}, r"weight and loss in messages\[1\] disagree"),
        ([{**ASK, "loss": True}, ANSWER], {}, r"loss 1 in messages\[0\], whose role is user"),
        ([ASK, ANSWER], {"tools": "no JSON"}, "expected a list of tools"),
        ([ASK, ANSWER], {"tools": ["weather"]}, "expected a list of tools"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_line(tmp_path, turns, more, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read(tmp_path, {"messages": [ASK, ANSWER]}, {"messages": turns, **more})


@pytest.mark.parametrize(
    ("family", "turns", "message"),
    [
        ("gemma", [{"role": "system", "content": "s"}, ASK, ANSWER], "System role not supported"),
        ("gemma", [ASK, ASK, ANSWER], "roles must alternate"),
        ("mistral_v02", [ASK, ANSWER, RESULT, ANSWER], "roles must alternate"),
        (
            "mistral_v03",
            [{"role": "system", "content": "s"}, ASK, ANSWER],
            "does not write message 1, of role system; put its",
        ),
        ("mistral_v03", [ASK, {**ANSWER, "tool_calls": [{"name": "f"}]}], "Tool call IDs should be"),
        ("llama3", [ASK, {**ANSWER, "tool_calls": CALL}, RESULT, ANSWER], "does not write the tool calls of message 2"),
        ("phi3", [ASK, ANSWER, RESULT, ANSWER], "does not write message 3, of role tool"),
    ],
)
@pytest.mark.parametrize("assistant_only", [True, False])
def test_what_a_template_does_not_write_is_refused_by_line(tmp_path, family, turns, message, assistant_only):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read(tmp_path, {"messages": [ASK, ANSWER]}, {"messages": turns}, family=family, assistant_only=assistant_only)
    if "of role system" in message:  # as it says: in front of the first user's
        read(tmp_path, {"messages": [{"role": "user", "content": "s\n\nWeather?"}, ANSWER]}, family=family)


def test_tools_that_a_template_does_not_write_are_refused(tmp_path):
    row = {"messages": [ASK, ANSWER], "tools": json.dumps(TOOLS)}
    assert read(tmp_path, row) == [[ASK, ANSWER]]
    with pytest.raises(UserError, match=r"line 1: the chat template does not write 'tools'; take a model"):
        read(tmp_path, row, family="llama3")


@pytest.mark.parametrize("sharegpt", [False, True])
@pytest.mark.parametrize(
    ("key", "weights"),
    [("weight", [0, 0, None, 1.0]), ("train", [False, False, None, True]), ("loss", [0, False, 0, 1])],
)
def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path, sharegpt, key, weights):
    turns = [ASK, {**ANSWER, "content": "Wrong."}, ASK, ANSWER]
    row: dict[str, object] = {"messages": [{**turn, key: w} for turn, w in zip(turns, weights, strict=True)]}
    if sharegpt:
        pairs = zip(turns, weights, strict=True)
        row = {"conversations": [{"from": turn["role"], "value": turn["content"], key: w} for turn, w in pairs]}
    source = write_rows(tmp_path / "rows.jsonl", [row])
    for family in ("qwen2_5", "llama3", "mistral_v03"):
        tokenizer = tokenizer_of(FAMILIES[family])
        dataset, _ = build_dataset([source], check=row_check(tokenizer))
        made = tokenize_conversations(dataset, tokenizer)
        plain = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert made[0]["input_ids"] == plain
        learned = tokenizer.decode([token for token in made[0]["labels"] if token != -100])
        assert "Sunny." in learned
        assert "Wrong" not in learned
        counts = count_tokens(made, tokenizer, {})
        assert (counts.assistant_turns, counts.turns) == (1, 4)
    with pytest.raises(UserError, match=r"line 1: a turn has weight 0, but training\.assistant_only_loss: false"):
        build_dataset([source], check=row_check(tokenizer, assistant_only=False))


def test_what_turns_have_beside_texts_is_kept_as_json(tmp_path):
    turns = [{**ASK, "id": 1, "name": "Ann"}, {**ANSWER, "score": 0.5, "tags": ["a"], "by": None, "at": float("nan")}]
    (messages,) = read(tmp_path, {"messages": turns})
    assert [{name: text for name, text in turn.items() if text} for turn in messages] == [
        {**ASK, "id": "1", "name": "Ann"},
        {**ANSWER, "score": "0.5", "tags": '["a"]'},
    ]


def test_a_template_with_marks_of_its_own_leaves_turns_of_weight_0_out(tmp_path):
    row = {"messages": [ASK, {**ANSWER, "content": "Wrong.", "weight": 0}, ASK, ANSWER]}
    source = write_rows(tmp_path / "rows.jsonl", [row])
    tokenizer = tokenizer_of(FAMILIES["qwen2_5"])
    marked = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    tokenizer.chat_template = f"{marked}{{% endgeneration %}}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    dataset, _ = build_dataset([source], check=row_check(tokenizer))
    (labels,) = tokenize_conversations(dataset, tokenizer)["labels"]
    assert tokenizer.decode([token for token in labels if token != -100]) == "Sunny."
    tokenizer.chat_template = (
        "{% generation %}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(UserError, match=r"line 1: .* does not mark each of the assistant's turns once"):
        build_dataset([source], check=row_check(tokenizer))


def test_what_a_template_writes_nothing_of_is_said_and_what_it_writes_is_not(tmp_path):
    thoughtful = {**ANSWER, "reasoning_content": "hm", "name": "bob"}
    source = write_rows(tmp_path / "rows.jsonl", [{"messages": [ASK, ANSWER]}, {"messages": [ASK, thoughtful]}])
    dataset, _ = build_dataset([source])
    (note,) = template_notes(dataset, tokenizer_of(FAMILIES["qwen2_5"]))
    assert "writes nothing of what messages have under 'reasoning_content'; " in note
    assert template_notes(dataset, tokenizer_of(FAMILIES["qwen3"])) == []
