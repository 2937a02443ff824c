"""A sweep's pictures: trials' losses or rewards over the steps, and their scores by parameters and learning rate."""

from collections.abc import Sequence
from typing import Any

from lsr_scale import files
from lsr_scale.config.comparison import Objective, metric_words
from lsr_scale.run.metrics import finite_values, read_metrics
from lsr_scale.run.plots import COLORS, Curves, curves_figure, picture_text, save_figure
from lsr_scale.sweeping.folder import SweepFolder, SweepState, TrialState

_NAMED = 12  # curves at most that are told apart; of more trials the best ones


def draw(folder: SweepFolder, state: SweepState, rates: dict[str, float]) -> None:
    """Draw both: the curves of GRPO's rewards, of others' losses, and the scores.

    Args:
        folder: Where.
        state: The sweep's.
        rates: Each trial's learning rate.
    """
    trials = state.ranked()
    curves = {trial.name: _curves(folder, trial) for trial in trials[:_NAMED]}
    title = (
        f"{folder.path.name}: the best {_NAMED} of {len(trials)} trials" if len(trials) > _NAMED else folder.path.name
    )
    # a sweep's trials are all of GRPO, or none is
    rewarded = any("reward" in of_trial for of_trial in curves.values())
    picture, other = (folder.rewards, folder.losses) if rewarded else (folder.losses, folder.rewards)
    if any(points for of_trial in curves.values() for points in of_trial.values()):
        save_figure(curves_figure(curves, title), picture)
    if files.is_own_picture(other):  # of an earlier sweep here
        other.unlink()
    if (figure := scores_figure(trials, state.scored_by, rates, folder.path.name)) is not None:
        save_figure(figure, folder.scores)


def _curves(folder: SweepFolder, trial: TrialState) -> Curves:
    """Return a trial's rewards over its steps where it has them, as only GRPO has, else its losses."""
    rows = read_metrics(folder.trial(trial.name).metrics)
    rewarded = any("reward" in row or "eval_reward" in row for row in rows)
    objective: Objective = "reward" if rewarded else "loss"
    keys = (objective, f"eval_{objective}")
    return {key: [(row["step"], row[key]) for row in rows if finite_values([row], key)] for key in keys}


def scores_figure(trials: Sequence[TrialState], metric: str, rates: dict[str, float], title: str) -> Any:
    """Return the figure of scores against trained parameters and against the learning rate, None where none has one.

    Trials that were stopped are hollow: they have the score of fewer steps.
    """
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), dpi=120, layout="constrained")
    best = next((trial for trial in scored if trial.status == "finished"), None)
    # the best one's name may be longer than there is room beside its point
    heading = [title, *([f"star: {best.name}"] if best else [])]
    if any(trial.status != "finished" for trial in scored):
        heading.append("hollow: ended before its last step, with the score that it had by then")
    figure.suptitle("\n".join(picture_text(line) for line in heading), fontsize=10)
    axes = figure.subplots(1, 2, sharey=True)
    values = {
        "trained parameters": {trial.name: trial.results.get("trainable_parameters") for trial in scored},
        "learning rate": rates,
    }
    for panel, (label, of_trial) in zip(axes, values.items(), strict=True):
        points = [(value, trial) for trial in scored if (value := of_trial.get(trial.name))]
        for value, trial in points:
            face = COLORS[0] if trial.status == "finished" else "none"
            panel.plot(value, trial.score, "o", color=COLORS[0], markerfacecolor=face, markersize=6)
        if len({value for value, _ in points}) > 1:
            _logarithmic(panel, [value for value, _ in points])
        if best is not None and (value := of_trial.get(best.name)):
            panel.plot(value, best.score, "*", color=COLORS[1], markersize=14, markeredgecolor="white", zorder=5)
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(metric_words(metric))
    return figure


def _logarithmic(panel: Any, values: Sequence[float]) -> None:
    """Make a panel's horizontal axis logarithmic, with numbers as they are written at a few ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if min(values) >= 1 else "{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
