"""Which characters of a conversation are the assistant's: for any chat template, as the template itself writes it.

A template that marks them (`{% generation %}`) is taken at its word. For any other, the conversation is rendered twice,
once as it is and once with a mark in place of each of the assistant's texts. What stands between the marks is the
template's own; the assistant's is what it would have to write at inference: all from the end of the generation prompt
to the end token, that one included. For

    <|im_start|>user\\nWhen?<|im_end|>\\n<|im_start|>assistant\\nAt nine.<|im_end|>\\n

that is `At nine.<|im_end|>`. Both renderings must agree in every character; where they cannot be made to, the row is
refused. So no template is copied, and no token is guessed.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lsr_scale.data.conversations import has_no_weight, is_empty
from lsr_scale.data.rows import RowError
from lsr_scale.errors import UserError
from lsr_scale.model.tokenizer import render_chat

Message = dict[str, Any]
Span = tuple[int, int]

# around what a chat template has the assistant say
GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
# The date that templates of LLaMA 3 fall back to: with today's, a row would be another one tomorrow.
TRAINING_DATE = datetime(2024, 7, 26)
_ADVICE = (
    "put {% generation %} and {% endgeneration %} around the assistant's text and end token in a copy of the template "
    "and set model.chat_template to that, or set training.assistant_only_loss: false to learn every turn"
)
_NO_PROMPT = f"the chat template's generation prompt is not what begins the assistant's turns; {_ADVICE}"


def render(tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None = None, **options: Any) -> str:
    """Return a conversation as the chat template writes it for training, on `TRAINING_DATE`.

    Raises:
        UserError: if the template fails.
    """
    with _training_date(tokenizer, tools):
        return render_chat(tokenizer, list(messages), tools=tools, **options)


@contextmanager
def _training_date(tokenizer: Any, tools: list[Any] | None) -> Iterator[None]:
    """Give a tokenizer's chat template `TRAINING_DATE` for today's, which it asks with strftime_now."""
    try:
        template = tokenizer.get_chat_template(None, tools)
        names = _compile_jinja_template(template).environment.globals
    except (ValueError, jinja2.TemplateError):  # which rendering says in words
        yield
        return
    usual = names["strftime_now"]
    names["strftime_now"] = TRAINING_DATE.strftime
    try:
        yield
    finally:
        names["strftime_now"] = usual


@dataclass(frozen=True)
class _Form:
    """What a template writes around every turn of the assistant, told by a conversation of two turns.

    Attributes:
        header: Ends the generation prompt: `<|im_start|>assistant\\n`, or nothing where that only ends a user's turn.
        lead: What stands between the generation prompt and the text: Mistral's space, Qwen3's empty thoughts.
        end: What stands behind the text up to the end token, that one included.
    """

    header: str
    lead: str
    end: str


class AssistantSpans:
    """Finds the assistant's characters in conversations, for one tokenizer.

    Args:
        tokenizer: The run's; its chat template and special tokens are used.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        nonce = os.urandom(4).hex()  # nothing that a text holds
        self._mark = f"Zq{nonce}x{{}}qZ"
        self._forms: dict[bool, _Form] = {}
        self._written: set[Any] = set()
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        ordered = sorted((token for token in special if token), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def find(
        self, messages: Sequence[Message], tools: list[Any] | None = None, learned_from: int = 0
    ) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the assistant's spans in it, one a turn that is not empty.

        Args:
            messages: As chat templates take them.
            tools: Descriptions of the tools, where there are any.
            learned_from: The first message of which something is learned, where those before are a prompt. (A template
                that marks the assistant's text marks all of them.)

        Raises:
            RowError: The assistant's characters cannot be told.
            UserError: The template fails.
        """
        if marks_itself(self.tokenizer, tools):
            return self._tagged(messages, tools)
        text = self._render(messages, tools)
        turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and not is_empty(turn)]
        marked = [self._marked(turn, i) if i in turns else turn for i, turn in enumerate(messages)]
        skeleton = self._render(marked, tools)
        places = self._places(skeleton, marked, turns, tools)
        starts = [start for start, _, _ in places[1:]] + [len(skeleton)]
        spans: list[Span] = []
        position, done = 0, 0  # in the text, in the skeleton
        for turn, (start, stop, end), following in zip(turns, places, starts, strict=True):
            position += start - done
            after = skeleton[stop:following]
            body = self._body(text[position:], after, skeleton[start:stop], messages[turn], turn)
            if body is None:
                body = self._rendered_body(messages, marked, turn, tools, skeleton[:start], skeleton[stop:])
            spans.append((position, position + len(body) + len(end)))
            position, done = position + len(body), stop
        if text != _with_bodies(skeleton, places, text, spans):
            raise self._untold(turns[-1] if turns else 0)
        learned = [turn >= learned_from and not has_no_weight(messages[turn]) for turn in turns]
        return text, [span for span, is_learned in zip(spans, learned, strict=True) if is_learned]

    def learned_header(self) -> str:
        """Return what a template without a generation prompt writes in front of the assistant's text: it is learned."""
        if marks_itself(self.tokenizer):
            return ""
        form = self._form(None)
        return "" if form.header else form.lead.strip()

    def check_written(self, messages: Sequence[Message], tools: list[Any] | None = None) -> None:
        """Raise for a message, a tool call or tools that the chat template passes over: they would be lost silently.

        Raises:
            RowError: naming the message.
        """
        kinds = (tuple((turn["role"], is_empty(turn), "tool_calls" in turn) for turn in messages), bool(tools))
        if kinds in self._written:  # rows of one shape are written alike
            return
        marked = [self._marked(turn, i) for i, turn in enumerate(messages)]
        name = self._mark.format("tool")
        described = [
            {**tool, "function": {**tool["function"], "name": name}} for tool in tools or () if _function(tool)
        ]
        try:
            text = self._render(marked, [*described, *(tools or ())][: len(tools or ())] or None)
        except UserError:  # a template that looks into its texts
            return
        advice = "take a model whose template does, set model.chat_template to another Jinja file, or leave the row out"
        for i, turn in enumerate(marked):
            calls = "tool_calls" in turn
            if (calls and self._mark.format(f"{i}n0") not in text) or (
                not calls and turn["content"].strip() and self._mark.format(i) not in text
            ):
                what = f"the tool calls of message {i + 1}" if calls else f"message {i + 1}, of role {turn['role']}"
                if turn["role"] == "system":
                    advice = "put its text in front of the first user's, or set model.chat_template to a Jinja file"
                raise RowError(f"the chat template does not write {what}; {advice}")
        if described and name not in text:
            raise RowError(f"the chat template does not write 'tools'; {advice}")
        self._written.add(kinds)

    def _tagged(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """Return what `find` does, from a template that marks the assistant's text."""
        try:
            with _training_date(self.tokenizer, tools):
                texts, spans = render_jinja_template(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=self.tokenizer.get_chat_template(None, tools),
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
        except Exception as error:  # a template is a program, and may raise anything
            raise RowError(f"the chat template fails on this conversation ({str(error)[:200]})") from error
        marked: Any = spans[0]  # pairs of offsets, whatever its annotation says
        if not any(start < end for start, end in marked):
            raise RowError(
                "the chat template's {% generation %} marks nothing of this conversation; put it around the "
                "assistant's text and end token"
            )
        unlearned = [has_no_weight(turn) for turn in messages if turn["role"] == "assistant"]
        if any(unlearned):
            if len(marked) != len(unlearned):
                raise RowError(
                    "the chat template's {% generation %} does not mark each of the assistant's turns once, so that "
                    "one with weight 0 cannot be told; take the marks out of a copy of the template and set "
                    "model.chat_template to that"
                )
            marked = [span for span, is_left in zip(marked, unlearned, strict=True) if not is_left]
        return texts[0], list(marked)

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> str:
        return render(self.tokenizer, messages, tools, **options)

    def _marked(self, message: Message, index: int) -> Message:
        """Return a message with a mark for its text, and one for each function that it calls."""
        marked = dict(message)
        if message["content"].strip():
            marked["content"] = self._mark.format(index)
        if "tool_calls" in message:
            marked["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._mark.format(f"{index}n{number}")}}
                for number, call in enumerate(message["tool_calls"])
            ]
        return marked

    def _marks(self, text: str, message: Message, index: int) -> Span | None:
        """Return where the first of a message's marks begins and the last one ends."""
        marks = [self._mark.format(index)]
        marks += [self._mark.format(f"{index}n{number}") for number in range(len(message.get("tool_calls", ())))]
        found = [(text.find(mark), text.rfind(mark) + len(mark)) for mark in marks if mark in text]
        return (min(first for first, _ in found), max(last for _, last in found)) if found else None

    def _places(
        self, skeleton: str, marked: Sequence[Message], turns: list[int], tools: list[Any] | None
    ) -> list[tuple[int, int, str]]:
        """Return where each turn's text begins and ends in the skeleton, and what ends it."""
        places: list[tuple[int, int, str]] = []
        before = 0
        for turn in turns:
            message, form = marked[turn], self._form(tools)
            calls, found = "tool_calls" in message, self._marks(skeleton, marked[turn], turn)
            if found is None or (calls and self._mark.format(f"{turn}n0") not in skeleton):
                self.check_written(marked, tools)
                raise self._untold(turn)
            first, stop = found
            start = self._start(skeleton, before, first, form, calls, marked[:turn], tools)
            if start is None:
                raise self._untold(turn)
            if calls:
                stop, end = self._end_of_calls(skeleton, stop, marked[: turn + 1], turn, tools)
            else:
                end = form.end if skeleton.startswith(form.end, stop) else ""
            places.append((start, stop, end))
            before = stop + len(end)
        return places

    def _form(self, tools: list[Any] | None) -> _Form:
        """Return what the template writes around a turn, from a conversation of two; one with tools may be another."""
        with_tools = bool(tools)
        if with_tools not in self._forms:
            question: Message = {"role": "user", "content": self._mark.format("question")}
            answer: Message = {"role": "assistant", "content": self._mark.format("answer")}
            asked = self._render([question], tools)
            prompt = self._render([question], tools, add_generation_prompt=True)
            full = self._render([question, answer], tools)
            before, mark, behind = full.partition(answer["content"])
            if not mark:
                raise RowError(f"the chat template does not write the assistant's text; {_ADVICE}")
            if prompt.startswith(asked) and before.startswith(asked):
                # all of it, or what of it stands in conversations: DeepSeek's R1 prompts for thoughts, too
                opening = _common_start(prompt[len(asked) :], before[len(asked) :])
                if prompt != asked and not opening:
                    raise RowError(_NO_PROMPT)
                header, lead = opening, before[len(asked) + len(opening) :]
            else:  # the end of the user's turn, which differs where the turn is the last
                tail = prompt.rpartition(question["content"])[2]
                place = before.rfind(tail) if tail else -1
                if place < 0:
                    raise RowError(_NO_PROMPT)
                header, lead = tail, before[place + len(tail) :]
            special = self._special.search(behind)
            end = behind[: special.end()] if special else behind.rstrip()
            self._forms[with_tools] = _Form(header, lead, end)
        return self._forms[with_tools]

    def _start(
        self,
        skeleton: str,
        before: int,
        first: int,
        form: _Form,
        calls: bool,
        earlier: Sequence[Message],
        tools: list[Any] | None,
    ) -> int | None:
        """Return where a turn begins whose first mark is known: behind the generation prompt."""
        if form.header:
            place = skeleton.rfind(form.header, before, first)
            if place >= 0:
                return place + len(form.header)
        elif not calls and skeleton[before:first].endswith(form.lead):
            return first - len(form.lead)
        try:
            prompt = self._render(earlier, tools, add_generation_prompt=True)[::-1]
        except UserError:  # no conversation that could be continued
            return None
        agreeing = {
            place: len(_common_start(prompt, skeleton[before:place][::-1]))
            for place in range(before + 1, first + 1)
            if skeleton[place - 1] == prompt[:1]
        }
        return max(agreeing, key=lambda place: (agreeing[place], place), default=None)

    def _end_of_calls(
        self, skeleton: str, stop: int, so_far: Sequence[Message], turn: int, tools: list[Any] | None
    ) -> tuple[int, str]:
        """Return where a turn that calls tools ends, and its end token: both follow the arguments of the last call."""
        alone = self._render(so_far, tools)
        marks = self._marks(alone, so_far[-1], turn)
        rest = alone[marks[1] :] if marks else ""
        for match in reversed([*self._special.finditer(rest)]):
            if skeleton.startswith(rest[: match.end()], stop):
                return stop + match.start(), match.group()
        if rest.strip() and skeleton.startswith(rest.rstrip(), stop):
            return stop + len(rest.rstrip()), ""
        raise self._untold(turn)

    def _body(self, text: str, after: str, pattern: str, message: Message, turn: int) -> str | None:
        """Return a turn's text where it is its content, as it is or without white space around; None elsewhere.

        Args:
            text: The rendered conversation, from where the turn's text begins.
            after: What the template writes behind it.
            pattern: The turn in the skeleton.
            message: The turn's message.
            turn: Its number.
        """
        mark, content = self._mark.format(turn), message["content"]
        if "tool_calls" in message or pattern.count(mark) != 1:
            return None
        bodies = (pattern.replace(mark, words) for words in (content, content.strip()))
        return next((body for body in bodies if text.startswith(body + after)), None)

    def _rendered_body(
        self,
        messages: Sequence[Message],
        marked: Sequence[Message],
        turn: int,
        tools: list[Any] | None,
        before: str,
        behind: str,
    ) -> str:
        """Return a turn's text where the template changes it: all other turns are marks, which are known."""
        alone = self._render([messages[i] if i == turn else other for i, other in enumerate(marked)], tools)
        if not alone.startswith(before) or not alone[len(before) :].endswith(behind):
            raise self._untold(turn)
        return alone[len(before) : len(alone) - len(behind)]

    def _untold(self, turn: int) -> RowError:
        return RowError(
            f"which tokens of message {turn + 1} are the assistant's cannot be told from the chat template; {_ADVICE}"
        )


def _function(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _with_bodies(skeleton: str, places: Sequence[tuple[int, int, str]], text: str, spans: Sequence[Span]) -> str:
    """Return the skeleton with what was found in the text in place of its marked turns."""
    parts, done = [], 0
    for (start, stop, end), (first, last) in zip(places, spans, strict=True):
        parts += [skeleton[done:start], text[first : last - len(end)]]
        done = stop
    return "".join([*parts, skeleton[done:]])


def marks_itself(tokenizer: Any, tools: list[Any] | None = None) -> bool:
    """Tell whether a tokenizer's chat template says by itself what is the assistant's."""
    try:
        return GENERATION_TAG.search(tokenizer.get_chat_template(None, tools)) is not None
    except ValueError as error:  # several templates, of which none is the default
        raise UserError(f"model.chat_template: {error}; set it to a Jinja file") from error
