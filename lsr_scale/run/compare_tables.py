"""A comparison as tables for a terminal of 80 columns: at most a screen or two, everything with `show_all`."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lsr_scale.errors import shortened
from lsr_scale.run.compare import ABSENT, Comparison, Score
from lsr_scale.units import amount, byte_size, clock

MAX_KEYS = 12  # of the configuration, without --all
MAX_SCORES = 16  # rows of the table of scores, without --all
_SIDE_BY_SIDE = 3  # runs whose values have a column each in 80 columns
_FIRST_KEYS = ("model", "adapter", "data", "training.learning_rate", "training.seed")  # what a reader looks for first


def render(comparison: Comparison, show_all: bool = False) -> Group:
    """Return the comparison for a person, to be printed by a rich console."""
    letters = comparison.letters
    parts: list[Any] = [_runs(comparison, letters), _values(comparison, letters)]
    if any(run.scores for run in comparison.runs):
        parts.append(_scores(comparison, letters, show_all))
    parts.append(_config(comparison, letters, show_all))
    notes = comparison.notes if show_all else comparison.notes[:6]
    parts += [Text(f"note: {note}", style="yellow") for note in notes]
    if left := len(comparison.notes) - len(notes):
        parts.append(Text(f"... and {amount(left, 'more note')}: --all", style="dim"))
    return Group(*parts)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for people, "" where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def signed_percent(value: float) -> str:
    """Return a difference of shares in points, such as +1.5."""
    return f"{100 * value:+.1f}"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.title_style = "bold"
    table.caption = " "  # a line between one table and the next
    table.padding = (0, 1, 0, 0)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def _runs(comparison: Comparison, letters: Sequence[str]) -> Table:
    bases = [f"{run.model or '?'} {run.quantization or ''}".strip() for run in comparison.runs]
    same = len(set(bases)) == 1
    title = f"Runs on {shortened(bases[0], 70)}" if same else "Runs"
    columns = ("", "run", "method", *(() if same else ("base",)), "parameters", "file", "steps")
    table = _table(title, *columns, left=len(columns) - 3)
    for letter, name, base, run in zip(letters, comparison.short_names, bases, comparison.runs, strict=True):
        parameters = "" if run.parameters is None else f"{run.parameters:,}"
        size = "" if run.adapter_bytes is None else byte_size(run.adapter_bytes)
        steps = f"{run.steps:,}" if run.is_finished else f"{run.steps:,}, not ended"
        shown = () if same else (shortened(base.rpartition("/")[2], 24),)
        table.add_row(letter, shortened(name, 60), run.method or "?", *shown, parameters, size, steps)
    return table


def _values(comparison: Comparison, letters: Sequence[str]) -> Table:
    """Return the table of losses, or GRPO's rewards, with a column that tells them apart where there are both."""
    machines = {run.machine for run in comparison.runs}
    on = f", on {machines.pop()}" if len(machines) == 1 else ""
    both = len(comparison.objectives) > 1
    of = ("of",) if both else ()
    columns = ("", *of, "train", "eval", "best", "at step", "tokens/s", "memory", "time", *(() if on else ("machine",)))
    title = " or ".join(comparison.objectives).capitalize()
    table = _table(f"{title}, speed, peak memory, time{on}", *columns, left=1 + len(of))
    for letter, run in zip(letters, comparison.runs, strict=True):
        judged = run.judged
        table.add_row(
            letter,
            *((run.objective,) if both else ()),
            number(judged.train),
            number(judged.evaluation),
            number(judged.best),
            "" if judged.best_step is None else f"{judged.best_step:,}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "" if run.memory_gib is None else byte_size(run.memory_gib * 2**30),
            "" if run.wall_s is None else clock(run.wall_s),
            *(() if on else (shortened(run.machine, 24),)),
        )
    if all(run.judged.evaluation is None for run in comparison.runs):
        table.columns = [column for column in table.columns if column.header not in ("eval", "best", "at step")]
    return table


def _scores(comparison: Comparison, letters: Sequence[str], show_all: bool) -> Group:
    table = _table(
        "Scores, % of right answers", "task", "", "n", "before", "after", "over the first", "95 %", "p", left=2
    )
    others = _table("Other scores", "task", "", "n", "before", "after", "over the first", "95 %", left=2)
    tasks = dict.fromkeys(task for run in comparison.runs for task in run.scores)
    for task in tasks:
        shown = ""
        for letter, run in zip(letters, comparison.runs, strict=True):
            for name, score in run.scores.get(task, {}).items():
                if name == "acc_norm" and not show_all:
                    continue
                into = table if score.low is not None else others
                label = task if name == "accuracy" else f"{task} {name}"
                into.add_row("" if label == shown else shortened(label, 26), letter, *_score_cells(score))
                shown = label
    parts = []
    for part in (table, others):
        if not part.rows:
            continue
        left = len(part.rows) - MAX_SCORES
        if left > 0 and not show_all:
            _keep_rows(part, MAX_SCORES)
        parts.append(part)
        if left > 0 and not show_all:
            parts.append(Text(f"... and {amount(left, 'more row')}: --all", style="dim"))
    return Group(*parts)


def _keep_rows(table: Table, num: int) -> None:
    table.rows = table.rows[:num]
    for column in table.columns:
        column._cells = column._cells[:num]


def _score_cells(score: Score) -> list[str]:
    """Return n, before, after, over the first, its interval and, for a share of right answers, p."""
    paired = score.over_first
    if score.low is None:
        change = (
            ["", ""] if paired is None else [f"{paired.difference:+.3f}", f"{paired.low:+.3f} to {paired.high:+.3f}"]
        )
        return [f"{score.num_examples:,}", number(score.before, 3), number(score.value, 3), *change]
    before = "" if score.before is None else f"{100 * score.before:.1f}"
    change = ["", "", ""]
    if paired is not None and paired.p is not None:
        low, high = signed_percent(paired.low), signed_percent(paired.high)
        change = [signed_percent(paired.difference), f"{low} to {high}", f"{paired.p:.2g}"]
    return [f"{score.num_examples:,}", before, f"{100 * score.value:.1f}", *change]


def says_something(values: Sequence[Any]) -> bool:
    """Tell whether a difference is more than an option, empty here, that only some of the methods have."""
    return any(value not in (ABSENT, None, False, {}, []) for value in values)


def _config(comparison: Comparison, letters: Sequence[str], show_all: bool) -> Group:
    differing = {**comparison.config, **{f"version of {name}": row for name, row in comparison.versions.items()}}
    if not differing:
        return Group(Text("The configurations are the same, but for the folder.", style="bold"))
    keys = sorted(differing, key=lambda key: not key.startswith(_FIRST_KEYS))  # stable: the rest in the file's order
    telling = [key for key in keys if says_something(differing[key])]
    shown = keys if show_all else telling[:MAX_KEYS]
    side_by_side = len(letters) <= _SIDE_BY_SIDE
    columns = letters if side_by_side else ["values"]
    table = _table("What differs", "", *columns, left=1 + len(columns))
    for key in shown:
        texts = [value_text(value) for value in differing[key]]
        if not show_all:
            texts = [shortened(text, 34 if side_by_side else 50) for text in texts]
        table.add_row(key, *(texts if side_by_side else [grouped(texts, letters)]))
    more = len(keys) - len(shown)
    return Group(table, *([Text(f"... and {more} more: --all", style="dim")] if more else []))


def value_text(value: Any) -> str:
    """Return a value of a configuration in a line, as a person would write it."""
    if isinstance(value, dict):
        path = value.get("path")
        rest = {key: inner for key, inner in value.items() if key != "path" and inner not in (None, "auto")}
        inside = ", ".join(f"{key}: {value_text(inner)}" for key, inner in rest.items())
        return (f"{path} ({inside})" if inside else str(path)) if path else f"{{{inside}}}"
    if isinstance(value, list):
        return ", ".join(map(value_text, value)) or "none"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def grouped(texts: Sequence[str], letters: Sequence[str]) -> str:
    """Return values with the runs that have them: `8 (A, C), 16 (B)`."""
    runs: dict[str, list[str]] = {}
    for text, letter in zip(texts, letters, strict=True):
        runs.setdefault(text, []).append(letter)
    return "; ".join(f"{text} ({', '.join(of)})" for text, of in runs.items())
