"""`sweep.md`: a row a trial, the best first, and the command that runs the best one again, alone."""

import shlex
from collections.abc import Sequence
from typing import Any

from lsr_scale import files
from lsr_scale.config.comparison import metric_words
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState
from lsr_scale.units import amount

# columns beside the score; the loss of GRPO, whose mean over a group is 0, tells nothing
_OF_LOSSES = ("eval_loss", "eval_rewards/accuracies", "final_loss")
_OF_REWARDS = ("eval_reward", "final_reward")


def write_table(folder: SweepFolder, state: SweepState) -> None:
    """Write the table."""
    ended = sum(trial.has_ended for trial in state.trials.values())
    done = f"{ended} of {amount(len(state.trials), 'trial')} done; sorted by {metric_words(state.scored_by)}."
    heading = f"# {folder.path.name}\n\n{done}\n"
    columns, rows = table(state)
    heading += "".join(f"\nNote: {note}.\n" for note in state.notes)
    lines = [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    text = "\n".join([heading, *lines]) + "\n"
    if best := best_of(state):
        text += f"\nThe best one again, alone:\n\n    {again(folder, best)}\n"
    failures = [f"- {trial.name}: {trial.error}" for trial in state.trials.values() if trial.error]
    if failures:
        text += "\n" + "\n".join(["What diverged or failed:", "", *failures]) + "\n"
    files.write_text(folder.table, text)


def best_of(state: SweepState) -> TrialState | None:
    """Return the best trial that finished, None where none has a score."""
    return next((trial for trial in state.ranked() if trial.status == "finished" and trial.score is not None), None)


def again(folder: SweepFolder, trial: TrialState) -> str:
    """Return the command that runs a trial again by itself."""
    place = f"training.output_dir=runs/{trial.name}"
    return f"lsr-scale train {shlex.quote(str(folder.trial(trial.name).config))} --set {shlex.quote(place)}"


def table(state: SweepState) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows, as text: what was changed, and what came of it."""
    trials = state.ranked()
    changed = list(dict.fromkeys(key for trial in trials for key in trial.changes))
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.results.get("accuracy", {})))
    columns = ["trial", *changed, "parameters", "steps", metric_words(state.scored_by)]
    known = _OF_REWARDS if _any_has(trials, "final_reward") else _OF_LOSSES
    others = [name for name in known if name != state.scored_by and _any_has(trials, name)]
    columns += [*map(metric_words, others), *tasks, "status"]
    return columns, [
        [
            trial.name,
            *(_value(trial.changes[key]) if key in trial.changes else "" for key in changed),
            _count(trial.results.get("trainable_parameters")),
            _count(trial.results.get("steps")),
            _number(trial.score),
            *(_number(trial.results.get(name)) for name in others),
            *(_percent(trial.results.get("accuracy", {}).get(task)) for task in tasks),
            trial.status,
        ]
        for trial in trials
    ]


def _any_has(trials: Sequence[TrialState], name: str) -> bool:
    return any(name in trial.results for trial in trials)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else ""
