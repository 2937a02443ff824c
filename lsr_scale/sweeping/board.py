"""What a sweep shows: a line as a trial ends, notes once, and on a terminal one line that tells where all are."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale.config.comparison import metric_words
from lsr_scale.errors import without_advice
from lsr_scale.screen import print_line, show_live
from lsr_scale.sweeping.folder import SweepState, TrialState
from lsr_scale.units import amount, clock

_SHOWN_EVERY_S = 0.1


class Board:
    """Lines on the screen, of one process's trials."""

    def __init__(self, quiet: bool = False, live: bool = True) -> None:
        """Take whether nothing is shown, and whether there is a line that changes."""
        self.quiet, self.live = quiet, live and not quiet
        self.steps: dict[str, tuple[int, int]] = {}  # of the trials at work: steps done, and of how many
        self.began: dict[str, float] = {}
        self.done = self.total = 0
        self._said: set[str] = set()
        self._shown = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            print_line(text)
            self._show(always=True)

    def of_trial(self, name: str) -> Callable[[str], None]:
        """Return what takes the lines of a trial: its notes are printed, each once for all trials."""

        def say(text: str) -> None:
            if text.startswith("note: ") and text not in self._said:
                self._said.add(text)
                self.say(f"{text} ({name})")

        return say

    def begin(self, trial: TrialState, state: SweepState) -> None:
        """Say that a trial begins."""
        self.count(state)
        number = list(state.trials).index(trial.name) + 1
        again = f", rung {trial.rung + 1}" if trial.rung else ""
        self.began[trial.name], self.steps[trial.name] = time.monotonic(), (0, 0)
        self.say(f"trial {number} of {len(state.trials)} begins: {trial.name}{again}")

    def end(self, trial: TrialState, state: SweepState) -> None:
        """Say how a trial ended, or where it paused."""
        self.count(state)
        self.steps.pop(trial.name, None)
        seconds = time.monotonic() - self.began.pop(trial.name, time.monotonic())
        words = trial.status if trial.error is None else f"{trial.status}: {without_advice(trial.error)}"
        score = "" if trial.score is None else f", {score_text(state.scored_by, trial.score)}"
        if trial.status == "paused":
            words, score = f"reached rung {trial.rung + 1}", f", {score_text(state.scored_by, trial.rung_scores[-1])}"
        self.say(f"{trial.name}: {words}{score} ({clock(seconds)})")

    def count(self, state: SweepState) -> None:
        """Take how many trials have ended."""
        self.done, self.total = sum(trial.has_ended for trial in state.trials.values()), len(state.trials)

    def step(self, name: str, done: int, total: int) -> None:
        """Take where a trial is."""
        self.steps[name] = done, total
        self._show()

    def show(self, state: SweepState) -> None:
        """Show how far all are, where other processes train them."""
        self.count(state)
        self.steps = {trial.name: (0, 0) for trial in state.trials.values() if trial.status == "running"}
        self._show()

    def clear(self) -> None:
        """Remove the live line."""
        if self.live:
            show_live("")

    def _show(self, always: bool = False) -> None:
        now = time.monotonic()
        if not self.live or not (always or now - self._shown > _SHOWN_EVERY_S):
            return
        self._shown = now
        work = ", ".join(f"{name} {done}/{total}" if total else name for name, (done, total) in self.steps.items())
        show_live(f"{self.done} of {amount(self.total, 'trial')} done" + (f"; at work: {work}" if work else ""))


class Watch(TrainerCallback):
    """Tells the board where a trial is."""

    def __init__(self, board: Board, name: str, begun: Callable[[Any], None]) -> None:
        """Take the board, the trial's name, and what is called with the model when training begins."""
        self.board, self.name, self.begun = board, name, begun

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell who waits for it."""
        self.begun(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell it."""
        self.board.step(self.name, state.global_step, state.max_steps)


def score_text(metric: str, value: float | None) -> str:
    """Return a score for people: `eval loss 1.2345`."""
    return f"{metric_words(metric)} {'-' if value is None else f'{value:.4f}'}"
