"""The prompt forms of lm-eval 0.4.13: from an `Item` to contexts, continuations and their normalizers."""

import re
import string
from collections.abc import Iterable

from lsr_scale.data.rows import RowError
from lsr_scale.data.task_layouts import Item

Parts = tuple[list[str], list[str], list[int]]  # contexts, continuations, normalizers


def scored_pair(context: str, continuation: str) -> tuple[str, str]:
    """Move white space at the end of `context` to the front of `continuation`, as lm-eval does before encoding.

    A tokenizer joins a space to the word behind it, so a context that ends with one would not be a token prefix.
    """
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _hellaswag_text(text: str) -> str:
    """Remove WikiHow's markup, as lm-eval's `hellaswag/utils.py` does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _answers(context: str, choices: Iterable[str]) -> Parts:
    """One context, one continuation a choice."""
    listed = list(choices)
    return [context] * len(listed), [f" {choice}" for choice in listed], [len(choice) for choice in listed]


def form_question(item: Item) -> Parts:
    """Return the form of ARC, PIQA and rows of no known task."""
    passage = f"{item.passage}\n" if item.passage else ""
    return _answers(f"{passage}Question: {item.question}\nAnswer:", item.choices)


def form_boolq(item: Item) -> Parts:
    """Return the form of BoolQ: the passage, the question with one question mark, no or yes."""
    passage = f"{item.passage}\n" if item.passage else ""
    return _answers(f"{passage}Question: {item.question.rstrip('?')}?\nAnswer:", item.choices)


def form_stem(item: Item) -> Parts:
    """Return the form of OpenBookQA: the bare stem, continued."""
    return _answers(item.question, item.choices)


def form_hellaswag(item: Item) -> Parts:
    """Return the form of HellaSwag: the bare text, continued, without its markup."""
    return _answers(_hellaswag_text(item.question), [_hellaswag_text(choice) for choice in item.choices])


def form_social_iqa(item: Item) -> Parts:
    """Return the form of Social IQA."""
    passage = f"{item.passage} " if item.passage else ""
    return _answers(f"Q: {passage}{item.question}\nA:", item.choices)


def form_lettered(item: Item) -> Parts:
    """Return the form of CommonsenseQA: listed choices, of which the letters are scored."""
    if len(item.choices) > len(string.ascii_uppercase):
        raise RowError(f"expected at most {len(string.ascii_uppercase)} choices, one a letter, got {len(item.choices)}")
    letters = string.ascii_uppercase[: len(item.choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, item.choices, strict=True))
    return _answers(f"Question: {item.question.strip()}\n{listed}Answer:", letters)


def form_partial(item: Item) -> Parts:
    """Partial evaluation (Trinh and Le, 2018): each option completes the context, the same rest is scored."""
    before, blank, rest = item.question.partition("_")
    if not blank or not rest.strip():
        raise RowError(f"expected a sentence with a blank '_' and words behind it, got {item.question!r:.80}")
    rest, num_choices = rest.strip(), len(item.choices)
    return [before + choice for choice in item.choices], [f" {rest}"] * num_choices, [len(rest)] * num_choices
