"""The pictures and pages of finished trials: drawn at the end, when no step waits for them."""

from collections.abc import Callable, Sequence
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.config.alike import memory_key
from lsr_scale.errors import UserError
from lsr_scale.report.write import show_at_end
from lsr_scale.sweeping.folder import SweepFolder


def draw_trials(folder: SweepFolder, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Draw what the folders of finished trials lack; a failure is said, and the next one is drawn.

    Args:
        folder: The sweep's.
        names: The trials.
        say: Told what failed.
    """
    plan = Plans()
    for name in names:
        trial = folder.trial(name)
        if trial.report.exists() and trial.curve.exists():  # `lsr-scale report` writes the page alone
            continue
        try:
            line = show_at_end(trial, plan)
        except UserError as error:
            line = f"note: {error}"
        if line.startswith("note: "):
            say(f"{line} ({name})")


class Plans:
    """`planning.plan`, once for all runs of which it says the same."""

    def __init__(self) -> None:
        self._plans: dict[tuple[str, int, bool], Any] = {}

    def __call__(self, run: RunConfig, gpus: int = 1, trace: bool = True) -> Any:
        """Return a run's plan; see there."""
        from lsr_scale.planning import plan

        key = memory_key(run), gpus, trace
        if key not in self._plans:
            self._plans[key] = plan(run, gpus, trace)
        return self._plans[key]
