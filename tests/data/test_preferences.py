"""Rows that say which completion is preferred: what they become, and what is refused before anything is loaded."""

import json

import pytest

from lsr_scale.data import commonsense
from lsr_scale.data.answered_prompts import PromptForm
from lsr_scale.data.conversations import as_messages
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.tokenizer_setup import row_check
from lsr_scale.errors import UserError
from tests.data.test_assistant_spans import FAMILIES, tokenizer_of
from tests.helpers.run_text import MINIMAL, load, problem
from tests.helpers.tiny_runs import byte_tokenizer, write_rows

PAIR = {"prompt": "What cuts bread?", "chosen": " a knife", "rejected": " a spoon"}
ONE = {"prompt": "What cuts bread?", "completion": " a knife", "label": True}
TURN = {"role": "user", "content": "What cuts bread?"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("A knife.", "A spoon.")]
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = {"prompt": [TURN], "chosen": ANSWERS[:1], "rejected": ANSWERS[1:]}


def read(tmp_path, rows, method="dpo", **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_dataset([str(file)], model_task="causal_lm", method=method, **options)


def refused(tmp_path, row, method="dpo", **options):
    """Return what is said of a row behind a good one."""
    good = ONE if method == "kto" else PAIR
    with pytest.raises(UserError) as error:
        read(tmp_path, [good, row], method, **options)
    assert f"{tmp_path / 'rows.jsonl'}, line 2: " in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_pairs_are_taken_as_texts_and_as_messages(tmp_path, method):
    dataset, kind = read(tmp_path, [PAIR, PAIR], method)
    assert (kind, dataset[1]) == ("preference", PAIR)
    dataset, kind = read(tmp_path, [CHAT], method)
    assert (kind, dataset[0]) == ("chat_preference", CHAT)


def test_whole_conversations_are_split_where_they_differ(tmp_path):
    whole = {"prompt": "What cuts bread?", "chosen": [TURN, ANSWERS[0]], "rejected": [TURN, ANSWERS[1]]}
    dataset, kind = read(tmp_path, [whole])
    assert (kind, dataset[0]) == ("chat_preference", CHAT)


SAID = {"from": "human", "value": "What cuts bread?"}
NEXT = {
    "conversations": [SAID],
    "chosen": {"from": "gpt", "value": "A knife."},
    "rejected": {"from": "gpt", "value": "A spoon."},
}
TAGGED = {"conversations": [SAID, NEXT["chosen"]], "kto_tag": True}


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_a_conversation_with_two_next_turns_is_a_pair(tmp_path, method):
    openai = {"messages": [TURN], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    for row in (NEXT, openai, {**openai, "prompt": TURN["content"]}):
        dataset, kind = read(tmp_path, [row], method)
        assert (kind, dataset[0]) == ("chat_preference", CHAT)
    dataset, _ = read(tmp_path, [{**NEXT, "system": "Be brief.", "tools": "[]"}], method)
    assert dataset[0] == {**CHAT, "prompt": [SYSTEM, TURN]}


@pytest.mark.parametrize("column", ["kto_tag", "label"])
def test_a_conversation_with_a_tag_is_its_last_answer_desirable_or_not(tmp_path, column):
    (tag,) = (value for name, value in TAGGED.items() if name == "kto_tag")
    rows = [
        {"conversations": TAGGED["conversations"], column: tag},
        {"messages": [TURN, ANSWERS[1], TURN, ANSWERS[0]], column: False, "system": "Be brief."},
    ]
    dataset, kind = read(tmp_path, rows, "kto")
    assert kind == "chat_unpaired"
    assert dataset[0] == {"prompt": [TURN], "completion": ANSWERS[:1], "label": True}
    prompt = [SYSTEM, TURN, ANSWERS[1], TURN]
    assert dataset[1] == {"prompt": prompt, "completion": ANSWERS[:1], "label": False}


@pytest.mark.parametrize(
    ("method", "row", "change", "message"),
    [
        ("dpo", NEXT, {"chosen": SAID}, "expected an assistant turn as the answer under 'chosen', got user"),
        ("dpo", NEXT, {"rejected": {"from": "robot", "value": "x"}}, r"unknown speaker 'robot' in rejected\[0\]"),
        ("dpo", NEXT, {"rejected": NEXT["chosen"]}, "'chosen' and 'rejected' are the same"),
        ("dpo", NEXT, {"rejected": None}, "expected a list of messages under 'rejected', got None"),
        ("dpo", NEXT, {"chosen": "a", "rejected": "b"}, "expected a list of messages under 'chosen', got 'a'"),
        ("dpo", NEXT, {"conversations": None}, "nothing under 'messages' or 'conversations'"),
        ("dpo", NEXT, {"conversations": [SAID, NEXT["chosen"]]}, "answers under 'conversations', got its own turn"),
        ("dpo", NEXT, {"prompt": "Who?"}, "expected a turn of 'chosen' and 'rejected' under 'prompt', got 'Who"),
        ("dpo", NEXT, {"chosen": {"from": "function_call", "value": "f()"}}, r"as JSON alone under 'value' in chosen"),
        ("dpo", NEXT, {"chosen": {**NEXT["chosen"], "weight": 0}}, "under 'chosen' is not to be learned, but answers"),
        ("kto", TAGGED, {"conversations": [SAID]}, "an assistant turn as the answer under 'conversations', got user"),
        (
            "kto",
            TAGGED,
            {"conversations": [NEXT["chosen"]]},
            "expected turns before the assistant's answer under 'conv",
        ),
        ("kto", TAGGED, {"kto_tag": 1}, r"expected true \(desirable\) or false under 'kto_tag', got 1"),
        ("kto", TAGGED, {"tools": [1]}, "expected a list of tools, or its JSON, under 'tools'"),
        (
            "kto",
            TAGGED,
            {"conversations": [SAID, {**NEXT["chosen"], "train": False}]},
            "is not to be learned, but answ",
        ),
        ("kto", TAGGED, {"images": ["a.png"]}, "something under 'images', and only texts are trained on"),
    ],
)
def test_a_judged_conversation_that_cannot_be_read_is_refused_by_line(tmp_path, method, row, change, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read(tmp_path, [row, {**row, **change}], method)


@pytest.mark.parametrize(
    ("method", "row", "methods"), [("kto", NEXT, "dpo or orpo"), ("dpo", TAGGED, "kto"), ("orpo", TAGGED, "kto")]
)
def test_judged_conversations_of_another_method_are_refused_with_it(tmp_path, method, row, methods):
    with pytest.raises(UserError, match=rf"line 1: rows with .* are for training\.method: {methods}; set that$"):
        read(tmp_path, [row], method)


@pytest.mark.parametrize(("row", "methods"), [(NEXT, "dpo or orpo"), (TAGGED, "kto")])
def test_judged_conversations_are_none_to_learn_from_unless_one_says_so(tmp_path, row, methods):
    row = {**row, "conversations": TAGGED["conversations"]}
    with pytest.raises(UserError, match=f"are for training.method: {methods}; set that, or format: sharegpt to learn"):
        read(tmp_path, [row], "sft")
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "sharegpt"}
    dataset, kind = build_dataset([source], model_task="causal_lm", method="sft")
    assert (kind, dataset[0]) == ("messages", {"messages": [TURN, ANSWERS[0]]})


@pytest.mark.parametrize(
    ("row", "method"), [(NEXT | {"conversations": [SAID, ANSWERS[0], SAID]}, "dpo"), (TAGGED, "kto")]
)
def test_a_format_that_hides_what_the_method_needs_is_named(tmp_path, row, method):
    source = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=r"got messages .*; leave format: sharegpt out, by which they are read so"):
        build_dataset([{"path": source, "format": "sharegpt"}], model_task="causal_lm", method=method)
    assert build_dataset([source], model_task="causal_lm", method=method)[1].startswith("chat_")


CALLED = [{"type": "function", "function": {"name": "cut", "arguments": {"what": "bread"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLED}
RESULT = {"role": "tool", "content": "cut"}
CUT = {"type": "function", "function": {"name": "cut", "description": "Cuts.", "parameters": {}}}


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", {"prompt": [TURN], "chosen": [CALL], "rejected": [ANSWERS[0]]}),
        ("orpo", {"chosen": [TURN, CALL, RESULT, ANSWERS[0]], "rejected": [TURN, CALL, RESULT, ANSWERS[1]]}),
        (
            "dpo",
            {
                "conversations": [SAID],
                "chosen": {"from": "function_call", "value": '{"name": "cut", "arguments": {"what": "bread"}}'},
                "rejected": NEXT["rejected"],
            },
        ),
        ("kto", {"prompt": [TURN, CALL, RESULT], "completion": ANSWERS[:1], "label": True}),
        ("kto", {"messages": [TURN, CALL], "label": False}),
    ],
)
def test_tools_and_their_calls_are_kept(tmp_path, method, row):
    dataset, kind = read(tmp_path, [{**row, "tools": [CUT]}, {**row, "tools": None}], method)
    assert kind == ("chat_unpaired" if method == "kto" else "chat_preference")
    assert [json.loads(tools) if tools else tools for tools in dataset["tools"]] == [[CUT], None]
    columns = ("prompt", "completion") if method == "kto" else ("prompt", "chosen")
    turns = [turn for column in columns for turn in as_messages(dataset[0][column])]
    assert {**CALL, "content": ""} in turns


@pytest.mark.parametrize(("method", "row"), [("dpo", PAIR), ("kto", ONE), ("sft", ONE)])
def test_tools_beside_raw_texts_are_refused_with_their_line(tmp_path, method, row):
    with pytest.raises(UserError, match=r"line 2: raw texts have no place for what is under 'tools'"):
        read(tmp_path, [{**row, "tools": "[]"}, {**row, "tools": [CUT]}], method)


@pytest.mark.parametrize(("method", "row"), [("dpo", CHAT), ("kto", {**CHAT, "completion": ANSWERS[:1]})])
def test_turns_before_an_answer_may_be_ones_that_are_not_to_be_learned(tmp_path, method, row):
    spoken = {**ANSWERS[1], "weight": 0}
    dataset, _ = read(tmp_path, [{**row, "prompt": [TURN, spoken, TURN], "label": True}], method)
    assert dataset[0]["prompt"] == [TURN, ANSWERS[1], TURN]


def test_calls_that_a_template_does_not_write_are_refused_with_their_line(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["gemma3"])
    pair = {**CHAT, "chosen": [CALL], "tools": [CUT]}
    with pytest.raises(UserError, match="line 2: the chat template does not write the tool calls of message 2; take a"):
        read(tmp_path, [CHAT, pair], check=row_check(tokenizer))
    with pytest.raises(UserError, match="line 2: the chat template does not write 'tools'; take a"):
        read(tmp_path, [CHAT, {**pair, "chosen": ANSWERS[:1]}], check=row_check(tokenizer))
    for family in ("qwen2_5", "llama3_1"):
        read(tmp_path, [CHAT, pair], check=row_check(tokenizer_of(FAMILIES[family])))


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", CHAT),
        ("dpo", {"chosen": [TURN, ANSWERS[0]], "rejected": [TURN, ANSWERS[1]]}),
        ("kto", {"prompt": [TURN], "completion": ANSWERS[:1], "label": True}),
        ("kto", {"messages": [TURN, ANSWERS[0]], "label": True}),
        ("sft", {"prompt": [TURN], "completion": ANSWERS[:1]}),
        ("sft", {"messages": [TURN, ANSWERS[0]]}),
        ("sft", {"conversations": [SAID, NEXT["chosen"]]}),
        ("grpo", {"prompt": [TURN], "answer": "a knife"}),
        ("grpo", {"messages": [TURN, ANSWERS[0]], "answer": "a knife"}),
    ],
)
def test_messages_that_are_json_as_in_a_csv_are_messages(tmp_path, method, row):
    form = {"form": PromptForm(chat=True)} if method == "grpo" else {}
    written = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
    assert list(read(tmp_path, [written], method, **form)[0]) == list(read(tmp_path, [row], method, **form)[0])


@pytest.mark.parametrize("prompt", ["[1, 2", '[{"a": 1, "a": 2}]', "[" * 2000, "[" + "1" * 5000 + "]", "[{'a': 1}]"])
def test_texts_that_hold_a_list_of_anything_else_stay_texts(tmp_path, prompt):
    row = {"prompt": prompt, "completion": '[{"a": 1}]'}
    assert read(tmp_path, [row, {"prompt": json.dumps([TURN]), "completion": "A knife."}], "sft")[0][0] == row


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("sft", {"prompt": [TURN], "completion": ANSWERS[:1]}),
        ("kto", {"prompt": [TURN], "completion": ANSWERS[:1], "label": True}),
        ("dpo", {"chosen": [TURN, ANSWERS[0]], "rejected": [TURN, ANSWERS[1]]}),
        ("grpo", {"prompt": [TURN], "answer": "a knife"}),
    ],
)
def test_messages_in_pythons_notation_are_told_how_to_be_written_and_are_no_texts(tmp_path, method, row):
    form = {"form": PromptForm(chat=True)} if method == "grpo" else {}
    written = {name: str(value) if isinstance(value, list) else value for name, value in row.items()}
    with pytest.raises(
        UserError, match=r"line 1: expected a text, or messages as JSON, .*: write the column with json"
    ):
        read(tmp_path, [written], method, **form)


def test_unpaired_rows_are_taken_by_kto_and_are_prompts_and_completions_to_sft(tmp_path):
    dataset, kind = read(tmp_path, [ONE, {**ONE, "label": False}], "kto")
    assert (kind, dataset["label"][:]) == ("unpaired", [True, False])
    chat = {"prompt": [TURN], "completion": ANSWERS[:1], "label": False}
    dataset, kind = read(tmp_path, [chat], "kto")
    assert (kind, dataset[0]) == ("chat_unpaired", chat)
    assert read(tmp_path, [ONE], "sft")[1] == "prompt_completion"


def test_labels_of_a_csv_which_are_texts_are_read(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion,label\na,b,true\nc,d,False\n")
    dataset, kind = build_dataset([str(file)], model_task="causal_lm", method="kto")
    assert (kind, dataset["label"][:]) == ("unpaired", [True, False])


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", CHAT),
        ("dpo", {"chosen": [TURN, ANSWERS[0]], "rejected": [TURN, ANSWERS[1]]}),
        ("kto", {"prompt": [TURN], "completion": ANSWERS[:1], "label": True}),
        ("sft", {"prompt": [TURN], "completion": ANSWERS[:1]}),
        ("grpo", {"prompt": [TURN], "answer": "a knife"}),
        ("grpo", {"question": TURN["content"], "answer": "a knife"}),
    ],
)
def test_a_column_system_goes_before_the_prompts_messages(tmp_path, method, row):
    form = {"form": PromptForm(chat=True)} if method == "grpo" else {}
    dataset, _ = read(tmp_path, [{**row, "system": SYSTEM["content"]}, {**row, "system": None}], method, **form)
    assert [turns[0] for turns in dataset["prompt"]] == [SYSTEM, TURN]
    assert [len(turns) for turns in dataset["prompt"]] == [2, 1]


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("dpo", PAIR),
        ("kto", ONE),
        ("sft", ONE),
        ("grpo", {"prompt": "What cuts bread?", "answer": "a knife"}),
        ("grpo", {"question": "What cuts bread?", "answer": "a knife"}),
    ],
)
def test_a_column_system_beside_raw_texts_is_refused_with_its_line(tmp_path, method, row):
    form = {"form": PromptForm()} if method == "grpo" else {}
    with pytest.raises(UserError, match=r"line 2: raw texts have no place for what is under 'system', 'Be brief\.'"):
        read(tmp_path, [{**row, "system": ""}, {**row, "system": "Be brief."}], method, **form)


def test_a_prompt_that_is_no_turn_of_the_conversations_beside_it_is_refused(tmp_path):
    whole = {"prompt": "Who cuts bread?", "chosen": [TURN, ANSWERS[0]], "rejected": [TURN, ANSWERS[1]]}
    assert "expected a turn of 'chosen' and 'rejected' under 'prompt', got 'Who" in refused(tmp_path, whole)
    whole["prompt"] = f" {TURN['content']}\n"
    assert read(tmp_path, [whole])[0][0] == CHAT


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [TURN, ANSWERS[0]]}, "expected messages that the assistant answers under 'prompt', got its own"),
        ({"messages": ANSWERS[:1]}, "expected messages that the assistant answers under 'messages', got its own"),
        (
            {"prompt": [TURN], "tools": [{"type": "function"}]},
            "tools under 'prompt': prompts for training.method: grpo",
        ),
    ],
)
def test_what_a_prompt_for_grpo_has_beside_its_turns_is_refused_and_not_left_out(tmp_path, row, message):
    with pytest.raises(UserError, match=f"line 1: {message}"):
        read(tmp_path, [{**row, "answer": "a knife"}], "grpo", form=PromptForm())
    answered, _ = read(tmp_path, [{"messages": [TURN, ANSWERS[0]], "answer": "a knife"}], "grpo", form=PromptForm())
    assert answered["prompt"][0] == [TURN], "the answer of a row for supervised training is no part of the prompt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "expected a text under 'rejected', got nothing"),
        ({"rejected": PAIR["chosen"]}, "'chosen' and 'rejected' are the same"),
        ({"chosen": "  "}, "expected a text under 'chosen', got an empty one"),
        ({"rejected": ""}, "expected a text under 'rejected', got an empty one"),
        ({"prompt": ""}, "expected a text under 'prompt', got an empty one"),
        ({"chosen": 3}, "expected a text under 'chosen', got 3"),
        ({**CHAT, "rejected": ANSWERS[:1]}, "'chosen' and 'rejected' are the same"),
        ({**CHAT, "rejected": None}, "expected a list of messages under 'rejected'"),
        ({**CHAT, "chosen": [TURN]}, "expected an assistant turn as the answer under 'chosen', got user"),
        ({**CHAT, "chosen": [{"role": "assistant", "content": " "}]}, "expected an answer under 'chosen'"),
        ({**CHAT, "prompt": None, "chosen": ANSWERS[:1]}, "that begin with the same turns"),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused_with_its_line(tmp_path, change, message):
    assert message in refused(tmp_path, PAIR | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1}, "expected true (desirable) or false under 'label', got 1"),
        ({"label": "yes"}, "under 'label', got 'yes'"),
        ({"label": None}, "under 'label', got nothing"),
        ({"completion": ""}, "expected a text under 'completion', got an empty one"),
    ],
)
def test_an_unpaired_row_without_a_label_or_completion_is_refused_with_its_line(tmp_path, change, message):
    assert message in refused(tmp_path, ONE | change, "kto")


def test_a_prompt_that_leaves_no_room_is_refused_with_its_line(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>")
    check = row_check(tokenizer, True, {"max_length": 16})
    message = refused(tmp_path, PAIR | {"prompt": "x" * 40}, check=check)
    assert "the prompt has 40 tokens, and training.max_length is 16" in message
    read(tmp_path, [PAIR | {"prompt": "x" * 40}], check=row_check(tokenizer, True, {"max_length": None}))
    keeps_end = {"max_length": 16, "truncation_mode": "keep_end"}
    read(tmp_path, [PAIR | {"prompt": "x" * 40}], check=row_check(tokenizer, True, keeps_end))


def test_a_pair_that_is_the_same_to_the_trainer_is_refused_with_its_line(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    check = row_check(tokenizer, True, {"max_length": 64})
    spaced = [{"role": "assistant", "content": "A knife. "}]
    for row in (PAIR | {"rejected": " a knife</s>"}, CHAT | {"rejected": spaced}):
        assert "are the same once the chat template, or the end token" in refused(tmp_path, row, check=check)


@pytest.mark.parametrize(
    ("method", "row", "remedy"),
    [
        ("sft", PAIR, "set training.method: dpo or orpo"),
        ("dpo", {"text": "abc"}, "set training.method: sft"),
        ("kto", PAIR, "set training.method: dpo or orpo"),
        ("dpo", {"prompt": "a", "completion": "b", "label": True}, "set training.method: sft or kto, or rewrite"),
        ("dpo", {"prompt": "a", "completion": "b", "label": 3}, "set training.method: sft, or rewrite"),
    ],
)
def test_rows_of_another_method_are_refused_with_it(tmp_path, method, row, remedy):
    with pytest.raises(UserError, match=f"training.method is {method}, which takes") as error:
        read(tmp_path, [row], method)
    assert remedy in str(error.value)


def test_a_first_row_that_lacks_a_part_says_so(tmp_path):
    for row, missing in (
        ({"prompt": "a", "chosen": "b"}, "'rejected'"),
        ({"prompt": "a", "rejected": "b"}, "'chosen'"),
    ):
        with pytest.raises(UserError, match=f"line 1: expected a text under {missing}"):
            read(tmp_path, [row])
    with pytest.raises(UserError, match="line 1: expected true"):
        read(tmp_path, [{"prompt": "a", "completion": "b"}], "kto")


def test_embedded_questions_prefer_the_right_choice_to_a_wrong_one():
    pairs, kind = build_dataset(["builtin:commonsense"], model_task="causal_lm", method="dpo")
    rows = commonsense.rows("train")
    assert kind == "preference"
    assert len(pairs) == len(rows)
    for pair, row in zip(pairs, rows, strict=True):
        choices = [f" {choice}" for choice in row["choices"]]
        assert pair["chosen"] == choices[row["answer"]]
        assert pair["rejected"] in choices
        assert pair["rejected"] != pair["chosen"]
    single, kind = build_dataset(["builtin:commonsense"], model_task="causal_lm", method="kto")
    assert kind == "unpaired"
    for pair, one in zip(pairs, single, strict=True):
        assert one["completion"] == pair["chosen" if one["label"] else "rejected"]
    assert 0.4 < sum(single["label"]) / len(single) < 0.6


def test_a_question_with_a_blank_is_the_prompt_up_to_it(tmp_path):
    row = {"sentence": "The cup broke as the _ was hard.", "option1": "floor", "option2": "bed", "answer": "1"}
    dataset, _ = read(tmp_path, [row])
    expected = {"prompt": "The cup broke as the", "chosen": " floor was hard.", "rejected": " bed was hard."}
    assert dataset[0] == expected


def test_what_a_method_does_not_have_is_named():
    assert "unknown key for training.method: dpo; it is one of sft" in problem(
        MINIMAL, "training.method=dpo", "training.packing=true"
    )
    assert "unknown key for training.method: sft; it is one of dpo, kto, orpo" in problem(MINIMAL, "training.beta=0.2")
    assert "the reference is the base" in problem(MINIMAL, "training.method=dpo", "training.sync_ref_model=true")
    assert "cuda_graphs: auto" in problem(MINIMAL, "training.method=dpo", "training.cuda_graphs=on")
    assert "set 2 or more" in problem(MINIMAL, "training.method=kto", "training.per_device_train_batch_size=1")
    load(
        MINIMAL, "training.method=kto", "training.per_device_train_batch_size=1", "training.loss_type=apo_zero_unpaired"
    )
    assert "at 0 dpo has no gradient" in problem(MINIMAL, "training.method=dpo", "training.beta=0")
    load(MINIMAL, "training.method=dpo", "training.beta=0", "training.loss_type=[sft]")
    sampled = "training.train_sampling_strategy=random"
    assert "rows keep their order" in problem(MINIMAL, "training.method=kto", sampled)
    weights = ("training.desirable_weight=0", "training.undesirable_weight=0")
    assert "nothing is learned" in problem(MINIMAL, "training.method=kto", *weights)
    assert "number >= 0" in problem(MINIMAL, "training.method=kto", "training.desirable_weight=-1")
    assert "number < 0.5" in problem(MINIMAL, "training.method=dpo", "training.label_smoothing=0.5")
    assert "label_smoothing above 0" in problem(MINIMAL, "training.method=dpo", "training.loss_type=[exo_pair]")
    classifier = MINIMAL.replace("name: some/model", "name: x\n  task: seq_cls\n  num_labels: 2")
    assert "dpo trains a language model" in problem(classifier, "training.method=dpo")
    assert load(MINIMAL, "training.method=orpo").training["learning_rate"] == 1e-4
