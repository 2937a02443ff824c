"""Rows of conversations -> one shape: messages of texts, with the tools that an assistant calls.

A converted row is what an Arrow table holds without loss: each message a mapping of texts, `tools` and each message's
`tool_calls` as JSON (as structs, two calls with different arguments would get each other's names). `as_messages` and
`listed_tools` return them as chat templates take them. A turn of the assistant that is not to be learned has `weight:
"0"`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lsr_scale.data.readers import parse_json
from lsr_scale.data.rows import Row, RowError
from lsr_scale.errors import UserError, did_you_mean

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "assistant",  # its value is JSON: the call, or a list of calls
    "observation": "tool",
}
COLUMNS = ("messages", "conversations")
# what says of an assistant's turn whether it is learned: OpenAI's name, axolotl's and XTuner's
_LEARNED = ("weight", "train", "loss")
# what a message has beside its texts: who says it, which one it is, which call it answers
BESIDE_TEXTS = {"role", "name", "id", "tool_call_id", "weight"}
ROLES = ("system", "developer", "user", "assistant", "tool")


def conversation(row: Row) -> dict[str, Any]:
    """Return a row of messages, or of ShareGPT's conversations, as `{"messages"}`, and `tools` where it has them."""
    key, turns = turns_of(row)
    messages = with_system(row, checked_messages(turns, key))
    check_learnable([message for message in messages if message["role"] == "assistant"], key)
    return {"messages": messages, **tools_of(row)}


def has_turns(row: Row) -> bool:
    """Tell whether a row has something in a column of conversations."""
    return any(row.get(name) is not None for name in COLUMNS)


def check_texts_alone(row: Row) -> None:
    """Raise for a row with pictures and the like beside its texts, which would be left out."""
    for name in ("images", "videos", "audios"):
        if row.get(name):
            raise RowError(
                f"something under {name!r}, and only texts are trained on; remove the row, or, to train on its texts "
                "alone, that column and what stands for it in the texts"
            )


def turns_of(row: Row) -> tuple[str, Any]:
    """Return the column that has a row's conversation, and what it has, read where that is JSON, as in a CSV."""
    key = next((name for name in COLUMNS if row.get(name) is not None), None)
    if key is None:
        columns = ", ".join(name for name, value in row.items() if value is not None)
        raise RowError(f"nothing under 'messages' or 'conversations'; the row has {columns[:100] or 'nothing'}")
    turns = row[key]
    if isinstance(turns, str):
        read = read_json(turns, key)
        if isinstance(read, str):  # written as JSON twice
            read = read_json(read, key)
        if read is None:
            advice = _PYTHONS_ADVICE if _PYTHONS_MESSAGES.match(turns) else ""
            raise RowError(f"expected a list of messages, or its JSON, under {key!r}, got {turns!r:.60}{advice}")
        return key, read
    return key, turns


def with_lists(row: Row, *names: str) -> Row:
    """Return a row whose messages under some names are read where they are JSON, as in a CSV.

    They are texts, and the row stays as it is, unless each of them that is a text holds messages.

    Raises:
        RowError: if they hold messages in Python's notation, or JSON of which something would be lost.
    """
    texts = {name: row[name] for name in names if isinstance(row.get(name), str)}
    if not texts or not all(text.lstrip().startswith("[") for text in texts.values()):
        return row
    if all(map(_PYTHONS_MESSAGES.match, texts.values())):
        name, text = next(iter(texts.items()))
        raise RowError(f"expected a text, or messages as JSON, under {name!r}, got {text!r:.60}{_PYTHONS_ADVICE}")
    if not all(map(_holds_messages, texts.values())):
        return row
    return {**row, **{name: read_json(text, name) for name, text in texts.items()}}


_PYTHONS_MESSAGES = re.compile(r"\s*[\[(]\{'(role|content|from|value)': ")
_PYTHONS_ADVICE = "; these quotes are Python's: write the column with json.dumps"


def _holds_messages(text: str) -> bool:
    try:
        turns = json.loads(text)  # `read_json` would refuse what may be any text
    except (ValueError, RecursionError):
        return False
    turns = turns if isinstance(turns, list) else []
    return bool(turns) and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)


def read_json(text: str, place: str) -> Any:
    """Return what a text holds as JSON, None where it is none; what would be lost in reading is refused."""
    try:
        return parse_json(text, place)
    except UserError as error:
        raise RowError(str(error)) from None
    except ValueError:
        return None


def with_system(row: Row, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a row's messages behind the text of its column `system`, where they do not begin with one themselves."""
    system = row.get("system")
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise RowError(f"expected a text under 'system', got {system!r:.60}")
    return [{"role": "system", "content": system}, *messages]


def check_no_place(row: Row) -> None:
    """Raise where a row of raw texts has a system prompt or tools, which would be left out."""
    for name, value in (("system", row.get("system")), ("tools", tools_of(row).get("tools"))):
        if value:
            raise RowError(
                f"raw texts have no place for what is under {name!r}, {value!r:.60}; write it into the prompt, or the "
                "row as messages"
            )


def checked_messages(value: object, key: str) -> list[dict[str, str]]:
    """Check a list of `{"role", "content"}` (or ShareGPT's `{"from", "value"}`) and return it in the former shape."""
    if not isinstance(value, list) or not value:
        raise RowError(f"expected a list of messages under {key!r}, got {value!r:.60}")
    return [_message(message, f"{key}[{index}]") for index, message in enumerate(value)]


def _message(value: object, place: str) -> dict[str, str]:
    if isinstance(value, str) and isinstance(read := read_json(value, place), Mapping):
        value = read
    if not isinstance(value, Mapping):
        raise RowError(f"expected {{'role': ..., 'content': ...}} as {place}, got {value!r:.60}")
    if value.get("role") is None and value.get("from") is None:
        name, known = ("from", SPEAKERS) if {"from", "value"} & value.keys() else ("role", ROLES)
        raise RowError(
            f"nothing under {name!r} in {place}, which is whose turn it is; valid: {', '.join(sorted(known))}"
        )
    if value.get("from") is not None:  # columnar files have the other shape's keys, with nothing under them
        speaker = str(value["from"])
        if speaker not in SPEAKERS:
            raise RowError(f"unknown speaker {speaker!r:.60} in {place}; {did_you_mean(speaker, SPEAKERS)}")
        others = {name: item for name, item in value.items() if name not in ("from", "value")}
        said = {"content": value.get("value")}
        if speaker == "function_call":
            said = {"tool_calls": _calls_of(value.get("value"), place)}
        value = {**others, "role": SPEAKERS[speaker], **said}
    role = value.get("role")
    if role not in ROLES:
        raise RowError(f"unknown role {role!r:.60} in {place}; {did_you_mean(str(role)[:60], ROLES)}")
    calls = value.get("tool_calls")
    if calls and role != "assistant":
        raise RowError(f"tool_calls in {place}, whose role is {role}; the assistant calls tools")
    message = {"role": role, "content": _content(value.get("content"), place, may_be_missing=bool(calls))}
    if calls:
        message["tool_calls"] = json.dumps(_tool_calls(calls, place), ensure_ascii=False)
    if not _is_learned(value, place):
        message["weight"] = "0"
    for name, item in value.items():
        if name in ("role", "content", "tool_calls", *_LEARNED) or item is None or item != item:  # a table's NaN
            continue
        # for a template that reads it: what it writes nothing of is said
        message[name] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return message


def _is_learned(message: Mapping[str, Any], place: str) -> bool:
    """Read whether a message is learned: an assistant's turn with 0 or false under one of `_LEARNED` is not."""
    given = {name: message[name] for name in _LEARNED if message.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(f"expected 0 (not learned) or 1 under {name!r} in {place}, got {value!r:.60}")
        if message["role"] != "assistant" and value:
            role = message["role"]
            raise RowError(f"{name} 1 in {place}, whose role is {role}; the assistant's turns alone are learned")
    if len({bool(value) for value in given.values()}) > 1:
        raise RowError(f"{' and '.join(given)} in {place} disagree on whether it is learned; leave one of them")
    return message["role"] != "assistant" or all(given.values())


def _content(content: object, place: str, may_be_missing: bool) -> str:
    """Return a message's text: a string, or a list of text parts, which are put together."""
    if content is None and may_be_missing:
        return ""
    if content is None:
        raise RowError(f"no content in {place}; write its text, an empty one if it has none")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"expected a text as content of {place}, got {content!r:.60}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RowError(
                f"expected parts {{'type': 'text', 'text': ...}} as content of {place}, got {kind!r:.60}: only texts "
                "are trained on"
            )
    return "".join(part["text"] for part in content)


def _calls_of(value: object, place: str) -> list[Any]:
    """Return the calls that ShareGPT's speaker function_call writes as JSON, one or a list of them."""
    calls = read_json(value, place) if isinstance(value, str) else value
    if isinstance(calls, Mapping):
        return [calls]
    if not isinstance(calls, list) or not calls:
        raise RowError(
            'expected {"name": ..., "arguments": {...}}, or a list of such calls, as JSON alone under '
            f"'value' in {place}, whose speaker is function_call, got {value!r:.60}"
        )
    return calls


def _tool_calls(calls: object, place: str) -> list[dict[str, Any]]:
    """Return OpenAI's form of a message's calls, with arguments as an object: templates write them as JSON."""
    if not isinstance(calls, list):
        raise RowError(f"expected a list under 'tool_calls' in {place}, got {calls!r:.60}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(
                f"expected {{'function': {{'name': ..., 'arguments': {{...}}}}}} as {place}.tool_calls[{index}], got "
                f"{call!r:.60}"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = read_json(arguments, f"{place}.tool_calls[{index}]")
        elif arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise RowError(
                f"expected an object, or its JSON, as arguments of {place}.tool_calls[{index}], got "
                f"{function.get('arguments')!r:.60}"
            )
        extra = {name: call[name] for name in ("id",) if isinstance(call.get(name), str)}
        checked.append({"type": "function", **extra, "function": {"name": function["name"], "arguments": arguments}})
    return checked


def check_learnable(messages: Sequence[Mapping[str, str]], key: str) -> None:
    """Raise where the turns to be learned hold no text, in their content or in what they have beside it."""
    if not messages:
        raise RowError(f"no assistant turn under {key!r}: there is nothing to learn")
    messages = [message for message in messages if not has_no_weight(message)]
    if not messages:
        raise RowError(f"each assistant turn under {key!r} has weight 0: there is nothing to learn")
    if all(is_empty(message) for message in messages):
        raise RowError(f"expected something to learn under {key!r}, got empty assistant turns")


def is_empty(message: Mapping[str, Any]) -> bool:
    """Tell whether a message holds nothing but white space: no content, no call, nothing beside them."""
    return not any(text and str(text).strip() for name, text in message.items() if name not in BESIDE_TEXTS)


def has_no_weight(message: Mapping[str, Any]) -> bool:
    """Tell whether a message of a converted row is the assistant's and not to be learned."""
    return message.get("weight") == "0"


def tools_of(row: Row) -> dict[str, str]:
    """Return `{"tools"}`, the JSON of a row's tools in OpenAI's form, or nothing where it has none."""
    tools = row.get("tools")
    if not tools:
        return {}
    listed = read_json(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise RowError(f"expected a list of tools, or its JSON, under 'tools', got {tools!r:.60}")
    if not listed:  # as rows without any have it, beside others with some
        return {}
    if any(map(_is_bare, listed)):
        listed = [_wrapped(tool) if _is_bare(tool) else tool for tool in listed]
    elif isinstance(tools, str):
        return {"tools": tools}
    return {"tools": json.dumps(listed)}


def _is_bare(tool: Mapping[str, Any]) -> bool:
    """Tell whether a tool is written without what OpenAI's form has around it, which templates expect."""
    return isinstance(tool.get("name"), str) and "function" not in tool


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: item for name, item in tool.items() if name != "type"}}


def listed_tools(tools: str | None) -> list[Any] | None:
    """Return the tools of a converted row, whose JSON it holds, as chat templates take them."""
    return json.loads(tools) if tools else None


def as_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a converted row as chat templates take them, without the names that an Arrow table adds.

    A table has one column for each name that any message has; `None` is where this one has none.
    """
    turns = []
    for message in messages:
        turn: dict[str, Any] = {name: item for name, item in message.items() if item is not None}
        if "tool_calls" in turn:
            turn["tool_calls"] = json.loads(turn["tool_calls"])
        turns.append(turn)
    return turns


def messages_of(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the messages of a converted row, and at which of them what is to be learned begins (0: the first)."""
    if "messages" in row:
        return as_messages(row["messages"]), 0
    prompt = as_messages(row["prompt"])
    return [*prompt, *as_messages(row["completion"])], len(prompt)
