"""Whether what a run reads is there: a look at its paths alone, before rows or a model are loaded."""

from collections.abc import Iterator, Sequence

from lsr_scale.config import RunConfig
from lsr_scale.config.trials import Sweep, TrialPlan
from lsr_scale.data.sources import check_is_there
from lsr_scale.errors import UserError


def missing_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each list of sources in which one is not there, and what is wrong with it.

    A dataset of the hub is not looked for.
    """
    parts = {"data.train": run.data.train, "data.validation": run.data.validation, "eval.tasks": run.eval.tasks}
    for key, sources in parts.items():
        for source in sources or ():
            try:
                check_is_there(source.path)
            except UserError as error:
                yield key, str(error)


def missing_of(trials: Sequence[TrialPlan], sweep: Sweep) -> list[str]:
    """Return in lines which sources of some of a sweep's trials are not there, each once."""
    found: dict[tuple[str, str], str] = {}
    for trial in trials:
        for key, text in missing_sources(trial.run):
            place = sweep.place_of(trial, key)
            found.setdefault((place, text), f"{place}: trial {trial.name}: {key}: {text}")
    return list(found.values())
