"""Whether what a run reads is there: a look at its paths alone, before rows or a model are loaded."""

from collections.abc import Iterator, Sequence

from lsr_scale.config import RunConfig
from lsr_scale.config.trials import Sweep, TrialPlan
from lsr_scale.data.sources import check_is_there, nearest_sibling
from lsr_scale.errors import UserError
from lsr_scale.paths import looks_local, user_path


def missing_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each path, and list of sources, in which one is not there, and what is wrong with it.

    Models and datasets of the hub are not looked for. Where a run writes to is a path that can be made.
    """
    name, prompts = run.model.name, run.eval.prompts
    # and whether something has to lie there
    paths = {
        "model.name": (name, looks_local(name)),
        "model.chat_template": (run.model.chat_template, True),
        "adapter.start_from": (run.adapter.start_from, True),
        "eval.prompts": (prompts if isinstance(prompts, str) else None, True),
        "training.output_dir": (run.training["output_dir"], False),
    }
    for key, (text, is_read) in paths.items():
        try:
            path = None if text is None else user_path(text)
        except UserError as error:
            yield key, str(error)
            continue
        if path is not None and is_read and not path.exists():
            yield key, f"{text!r}: no such file or folder; {nearest_sibling(path)}"
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
