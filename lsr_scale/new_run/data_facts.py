"""What lies in the files that somebody wants to train on: format, rows, columns, labels, and mistakes by their line."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from lsr_scale.data.formats import build_dataset, fitting_formats, load_source
from lsr_scale.data.labels import Labels, find_labels
from lsr_scale.data.preferences import COMPLETIONS, judgement_of
from lsr_scale.data.readers import suffix
from lsr_scale.data.rows import Rows
from lsr_scale.data.split import split_by_hash
from lsr_scale.data.tasks import TASKS
from lsr_scale.errors import UserError, quoted, shortened
from lsr_scale.paths import looks_local, user_path
from lsr_scale.units import amount

Kind = Literal["chat", "classify", "commonsense"]
KINDS: tuple[Kind, ...] = ("chat", "classify", "commonsense")
_TAKES = {
    "chat": "conversations (messages), prompts with their completions, or texts without labels",
    "classify": "a text (or sentence1 and sentence2) with a label",
    "commonsense": "multiple-choice questions, such as {question, choices, answer}",
}
# of which there must be some on either side of a split, and more to tell of a loss
_ROWS_FOR_5_PERCENT, _ROWS_FOR_10_PERCENT = 400, 40


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What was found.

    Attributes:
        kind: What the rows are good for.
        sources: As they were named.
        num_rows: Of all sources, None where one of them is not on this machine.
        prompt: The beginning of a row, for a look at what the model makes of it: a user's turn, or a text. The row is
            one of those that `validation_split` holds out, where it does.
        is_conversation: The rows have turns, which the chat template joins.
        labels: A classifier's.
        held_out: Sources of questions to score, which are not trained on.
        lines: What is to be said of them.
    """

    kind: Kind
    sources: tuple[str, ...]
    num_rows: int | None = None
    prompt: str | None = None
    is_conversation: bool = False
    labels: Labels | None = None
    held_out: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def validation_split(self) -> float | None:
        """The share of rows to hold out, None where there are too few to do without, or nobody counted them."""
        if self.num_rows is None or self.num_rows < _ROWS_FOR_10_PERCENT:
            return None
        return 0.05 if self.num_rows >= _ROWS_FOR_5_PERCENT else 0.1


def look_at_data(sources: Sequence[str], kind: Kind | None) -> DataFacts:
    """Read files and say what is in them; what is no local file or folder is left to the run.

    Args:
        sources: Files, folders, or names of tasks and hub datasets, as `data.train` takes them.
        kind: What they are to be used for; None finds it in the rows.

    Raises:
        UserError: for a file that cannot be read, a row that does not fit (line named), or rows of another kind.
    """
    if not sources:
        return DataFacts(kind or "chat", ())
    elsewhere = [source for source in sources if not _is_here(source)]
    if elsewhere:
        tasks = tuple(source for source in sources if source in TASKS)
        if kind is None and len(tasks) < len(sources):
            raise UserError(
                f"--data {elsewhere[0]}: not on this machine, so it takes you to say what it is for: lsr-scale init "
                f"{' or '.join(KINDS)}; for a file, check its path"
            )
        said = tuple(f"{source}: not on this machine, so nobody looked at it" for source in elsewhere)
        return DataFacts(kind or "commonsense", tuple(sources), held_out=tasks, lines=said)
    loaded = [load_source(source) for source in sources]
    fitting = [fitting_formats(rows.rows[0]) for rows in loaded]
    found = _kind_of(fitting)
    kind = kind or found
    if kind != found and not (kind == "chat" and found == "commonsense"):
        raise UserError(
            f"{sources[0]}: {kind} takes {_TAKES[kind]}, got rows with the columns {_columns(loaded[0])}; write: "
            f"lsr-scale init {found}"
        )
    if kind == "chat" and (judged := judgement_of(loaded[0].rows[0])):
        _refuse_judged(sources[0], judged)
    labels = find_labels(loaded, None, None) if kind == "classify" else None
    dataset, form = build_dataset(
        sources, loaded=loaded, labels=labels, model_task="seq_cls" if kind == "classify" else "causal_lm"
    )
    if form in COMPLETIONS:
        _refuse_judged(sources[0], form)
    lines = [
        f"{source}: {amount(len(rows.rows), 'row')}, {_format(formats, kind)}; columns {_columns(rows)}"
        for source, rows, formats in zip(sources, loaded, fitting, strict=True)
    ]
    lines += _label_lines(labels)
    held_out = tuple(source for source in sources if kind == "commonsense" and _has_held_out(source))
    num_rows = sum(len(rows.rows) for rows in loaded)
    turns = form in ("messages", "chat_prompt_completion")
    facts = DataFacts(kind, tuple(sources), num_rows, None, turns, labels, held_out, tuple(lines))
    if kind != "chat":
        return facts
    if facts.validation_split is not None:
        _, dataset = split_by_hash(dataset, facts.validation_split)
    prompts = (_prompt(row, form) for row in dataset)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(facts, prompt=next(filter(None, prompts), None))


def _refuse_judged(source: str, form: str) -> NoReturn:
    what, method = ("chosen and rejected", "dpo") if "preference" in form else ("desirable and other", "kto")
    more = "" if method == "dpo" else f"--set training.method={method} "
    raise UserError(
        f"{source}: rows of {what} completions are for training.method: {method}; begin with "
        f"lsr-scale train mistral_dpo {more}--set 'data.train=[{source}]' --set 'data.validation=[]'"
    )


def _is_here(source: str) -> bool:
    """Tell whether a source is to be read now: it exists, or is written like a file, whose absence is a mistake."""
    path = user_path(source, "--data")
    is_local = looks_local(source) or suffix(Path(source)) is not None
    return path.exists() or is_local or source.startswith("builtin:")


def _kind_of(fitting: Sequence[Sequence[str]]) -> Kind:
    if all("multiple_choice" in formats for formats in fitting):
        return "commonsense"
    return "classify" if all("classification" in formats for formats in fitting) else "chat"


def _format(formats: Sequence[str], kind: Kind) -> str:
    wanted = {"classify": "classification", "commonsense": "multiple_choice"}.get(kind)
    return wanted if wanted is not None and wanted in formats else ", ".join(formats)


def _columns(rows: Rows) -> str:
    return shortened(", ".join(rows.rows[0]), 120)


def _label_lines(labels: Labels | None) -> list[str]:
    if labels is None:
        return []
    counts = zip(labels.names, labels.counts, strict=False)
    listed = shortened(", ".join(f"{name} ({count:,})" for name, count in counts), 200)
    return [f"labels: {listed}" if labels.names else "labels: scores (a regression)", *labels.notes]


def _has_held_out(source: str) -> bool:
    """Tell whether a source has questions beside those that it is trained on."""
    if not source.startswith("builtin:") and not user_path(source).is_dir():
        return False
    try:
        return load_source(source, None).provenance.split not in (None, "train")
    except UserError:
        return False


def _prompt(row: dict[str, Any], form: str) -> str | None:
    """Return what a user says first, if it is short enough to be read in a file of settings."""
    text = row.get("prompt")
    turns = row.get("messages") if form == "messages" else text if isinstance(text, list) else None
    if turns is not None:
        text = next((turn["content"] for turn in turns if turn["role"] == "user"), None)
    return text if isinstance(text, str) and text.strip() and len(quoted(text)) <= 80 else None
