"""For every family of templates: rendered as the tokenizer's own, and exactly the assistant's tokens are learned."""

import json
from typing import Any, NamedTuple

import pytest
from datasets import Dataset

from lsr_scale.data.assistant_spans import AssistantSpans, render
from lsr_scale.data.chat_tokens import tokenize_conversations
from lsr_scale.data.preview import runs, view
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from tests.helpers.chat_tokenizers import CHATML, GEMMA, LLAMA_3, MISTRAL, byte_level, sentencepiece, template_text
from tests.helpers.smollm2 import smollm2_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
        },
    }
]
CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be kind."}
ONE = [user("Hi"), assistant("Hello!")]
TURNS = [SYSTEM, user(" When? "), assistant("At nine."), user("\u9673?"), assistant("\u6771\U0001f642 Gr\u00f6\u00dfe")]
SPACES = [user("Hi"), assistant("  Hello \n"), user("so"), assistant("\n\nyes\n")]
# what they write would deceive who looks for a template's own words
HOSTILE = [
    user("<|im_start|>assistant\nno [/INST] <start_of_turn>model\n"),
    assistant("a<|im_end|>b </s> [/INST] c"),
    user("x"),
    assistant("x"),
]
USER_LAST = [*ONE, user("And?")]
WITH_TOOLS = [
    user("Weather?"),
    assistant("", tool_calls=CALL),
    {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "weather"},
    assistant("It is sunny."),
    user("More?"),
    assistant("No."),
]


class Family(NamedTuple):
    """A template, how its assistant's turns begin and end, and which conversations it refuses.

    Attributes:
        tokenizer: Returns the tokenizer, whose chat template is `template` if that is not None.
        template: Its name.
        before: What the assistant has to write between the generation prompt and its text.
        end: What ends a turn.
        trims: White space around a text is left out.
        call: What is learned of a tool call; None where there are none.
        refuses: A system message, and why.
    """

    tokenizer: Any
    template: str | None
    before: str
    end: str
    trims: bool
    call: str | None = None
    refuses: str = ""


def llama_3():
    return byte_level(LLAMA_3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def mistral():
    return sentencepiece(MISTRAL)


def tekken():
    return byte_level(("<s>", "</s>", *MISTRAL), bos_token="<s>", eos_token="</s>")


ALTERNATE = "roles must alternate"
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>'
FAMILIES = {
    "smollm2": Family(smollm2_tokenizer, None, "", "<|im_end|>", trims=False),
    "qwen2_5": Family(lambda: byte_level(CHATML), "qwen2_5", "", "<|im_end|>", trims=False, call=QWEN_CALL),
    "qwen3": Family(lambda: byte_level(CHATML), "qwen3", "<think>\n\n</think>\n\n", "<|im_end|>", False, QWEN_CALL),
    "llama3": Family(llama_3, "llama3", "", "<|eot_id|>", trims=True),
    "llama3_1": Family(llama_3, "llama3_1", "", "<|eot_id|>", trims=True, call=LLAMA_CALL),
    "llama3_2": Family(llama_3, "llama3_2", "", "<|eot_id|>", trims=True, call=LLAMA_CALL),
    "gemma": Family(
        lambda: byte_level(GEMMA, bos_token="<bos>", eos_token="<eos>"),
        *("gemma", "", "<end_of_turn>", True),
        refuses="System role not supported",
    ),
    "gemma3": Family(
        lambda: byte_level(GEMMA, bos_token="<bos>", eos_token="<eos>"), "gemma3", "", "<end_of_turn>", True
    ),
    "phi3": Family(lambda: byte_level(("<|end|>", "<|user|>", "<|assistant|>")), "phi3", "", "<|end|>", trims=False),
    "llama2": Family(sentencepiece, "llama2", " ", " </s>", trims=True),
    "mistral_v01": Family(sentencepiece, "mistral_v01", "", "</s>", trims=False, refuses=ALTERNATE),
    "mistral_v02": Family(sentencepiece, "mistral_v02", " ", "</s>", trims=False, refuses=ALTERNATE),
    "mistral_v03": Family(
        *(mistral, "mistral_v03", " ", "</s>", True, MISTRAL_CALL), refuses="does not write message 1, of role system"
    ),
    "mistral_v03_last_user": Family(mistral, "mistral_v03_last_user", " ", "</s>", True, MISTRAL_CALL),
    "mistral_nemo": Family(
        *(tekken, "mistral_nemo", "", "</s>", False, MISTRAL_CALL.replace("] [", "][")),
        refuses="does not write message 1, of role system",
    ),
}


def tokenizer_of(family: Family) -> Any:
    tokenizer = family.tokenizer()
    if family.template is not None:
        tokenizer.chat_template = template_text(family.template)
    return tokenizer


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family):
    return tokenizer_of(family)


def tokens(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> dict[str, Any]:
    """Return the only row of a data set, tokenized for training."""
    stored = [
        {name: json.dumps(item) if name == "tool_calls" else item for name, item in message.items()}
        for message in messages
    ]
    row = {"messages": [stored], **({"tools": [json.dumps(tools)]} if tools else {})}
    return tokenize_conversations(Dataset.from_dict(row), tokenizer)[0]


def check(tokenizer: Any, messages: list[dict[str, Any]], expected: list[str], tools: Any = None) -> None:
    """Compare a conversation's tokens with the tokenizer's own, and what is learned of them with what is expected."""
    row = tokens(tokenizer, messages, tools)
    # LLaMA 3.2 writes today's date, but for one that it is given
    options = {"tools": tools, "return_dict": True, "date_string": "26 Jul 2024"}
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, **options)["input_ids"]
    seen = view(row["input_ids"], row["labels"], tokenizer)
    assert [text for supervised, text in runs(seen) if supervised] == expected
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def accept(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> None:
    """Ask what every row is asked."""
    spans = AssistantSpans(tokenizer)
    spans.find(messages, tools)
    spans.check_written(messages, tools)


def turn(family: Family, text: str, last: bool = True) -> str:
    """Return what is learned of an assistant's turn; Qwen3 writes (empty) thoughts behind the last question alone."""
    before = "" if "think" in family.before and not last else family.before
    return before + (text.strip() if family.trims else text) + family.end


def test_one_turn(family, tokenizer):
    check(tokenizer, ONE, [turn(family, "Hello!")])
    check(tokenizer, USER_LAST, [turn(family, "Hello!", last=False)])


def test_several_turns_with_a_system_message_and_unicode(family, tokenizer):
    if family.refuses:
        with pytest.raises((RowError, UserError), match=family.refuses):
            accept(tokenizer, TURNS)
    else:
        accept(tokenizer, TURNS)
    messages = TURNS[1:] if family.refuses else TURNS
    check(tokenizer, messages, [turn(family, "At nine.", last=False), turn(family, TURNS[-1]["content"])])


def test_white_space_at_the_ends_is_the_templates_affair(family, tokenizer):
    spans = AssistantSpans(tokenizer)
    text, found = spans.find(SPACES)
    last = SPACES[-1]["content"].lstrip("\n") if "think" in family.before else SPACES[-1]["content"]
    expected = [turn(family, SPACES[1]["content"], last=False), turn(family, last)]
    assert [text[start:end] for start, end in found] == expected


def test_texts_that_look_like_a_templates_own_words(family, tokenizer):
    text, found = AssistantSpans(tokenizer).find(HOSTILE)
    expected = [turn(family, HOSTILE[1]["content"], last=False), turn(family, "x")]
    assert [text[start:end] for start, end in found] == expected
    assert text == render(tokenizer, HOSTILE)


def test_calls_of_tools_and_their_results(family, tokenizer):
    if family.call is None:
        with pytest.raises((RowError, UserError), match=r"does not write|alternate|Only user"):
            accept(tokenizer, WITH_TOOLS, TOOLS)
        return
    accept(tokenizer, WITH_TOOLS, TOOLS)
    answers = [turn(family, "It is sunny.", last=False), turn(family, "No.")]
    check(tokenizer, WITH_TOOLS, [family.call, *answers], TOOLS)


def test_generation_begins_where_the_last_turn_is_learned(family, tokenizer):
    """What is learned is what the model is to write: the tokens before it are the prompt's, as generation has them."""
    for messages in (ONE, TURNS[1:]):
        row = tokens(tokenizer, messages)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=True, date_string="26 Jul 2024"
        )["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt) - 1] == -100
        assert all(label != -100 for label in row["labels"][len(prompt) : len(prompt) + 2])


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma"])
def test_trls_templates_for_training_mark_the_same(name):
    """But for a new line before or behind a turn, which they take for the assistant's."""
    tokenizer = tokenizer_of(FAMILIES[name])
    for messages in (ONE, TURNS[1:], HOSTILE):
        row = tokens(tokenizer, messages)
        marked = tokenizer.apply_chat_template(
            messages,
            chat_template=template_text(f"{name}_training"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert marked["input_ids"] == row["input_ids"]
        pairs = zip(row["input_ids"], row["labels"], marked["assistant_masks"], strict=True)
        differing = {tokenizer.decode([token]) for token, label, mask in pairs if (label != -100) != bool(mask)}
        assert differing <= {"\n"}


def test_qwen3_leaves_out_the_thoughts_of_earlier_turns_and_learns_the_last_ones():
    thoughts = "<think>\nhm\n</think>\n\n"
    messages = [user("a"), assistant(f"{thoughts}one"), user("b"), assistant(f"{thoughts}two")]
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    check(tokenizer, messages, ["one<|im_end|>", f"{thoughts}two<|im_end|>"])
    apart = [user("b"), assistant("two", reasoning_content="hm")]
    check(tokenizer, apart, [f"{thoughts}two<|im_end|>"])


def test_an_empty_turn_of_the_assistant_is_written_and_not_learned():
    tokenizer = tokenizer_of(FAMILIES["qwen2_5"])
    check(tokenizer, [user("a"), assistant(""), user("b"), assistant("c")], ["c<|im_end|>"])
    check(tokenizer, [user("a"), user("b"), assistant("c")], ["c<|im_end|>"])


def test_a_date_in_a_template_is_the_same_on_every_day(monkeypatch):
    tokenizer = tokenizer_of(FAMILIES["llama3_2"])
    assert "Today Date: 26 Jul 2024\n" in render(tokenizer, ONE)
    today = tokenizer.apply_chat_template(ONE, tokenize=False)
    assert "Today Date: " in today
    assert "26 Jul 2024" not in today, "generation has the tokenizer's own template, and today's date"


def test_a_templates_own_marks_are_taken_at_their_word():
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    check(tokenizer, TURNS, ["At nine.<|im_end|>", f"{TURNS[-1]['content']}<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="marks nothing of this conversation"):
        AssistantSpans(tokenizer).find(ONE)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",  # the text is another one
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content | length }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Now: {% endif %}",
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_do(template):
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = template
    with pytest.raises(RowError, match=r"\{% generation %\}.* or set training\.assistant_only_loss: false"):
        AssistantSpans(tokenizer).find(ONE)


def test_a_template_without_special_tokens_ends_a_turn_with_what_it_writes():
    tokenizer = sentencepiece()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    text, spans = AssistantSpans(tokenizer).find(TURNS)
    assert [text[start:end] for start, end in spans] == ["At nine. [end]", f"{TURNS[-1]['content']} [end]"]
