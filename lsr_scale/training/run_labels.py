"""A classifier's run and the labels of its rows: how many outputs the model has, and what they are called."""

from collections.abc import Sequence

from lsr_scale.config import RunConfig
from lsr_scale.config.conflicts import conflicts
from lsr_scale.config.yaml_text import dotted
from lsr_scale.data.formats import load_source
from lsr_scale.data.labels import Labels, find_labels
from lsr_scale.data.rows import Rows
from lsr_scale.errors import UserError


def labels_of(run: RunConfig, train: Sequence[Rows]) -> Labels | None:
    """Return a classifier's labels; None for a language model, and for rows without any, which their format refuses.

    Args:
        run: The run.
        train: The rows of its training sources.

    Raises:
        UserError: for labels that do not go together, see `find_labels`.
    """
    if run.model.task != "seq_cls" or not all("label" in rows.rows[0] for rows in train):
        return None
    return find_labels(train, run.model.labels, run.model.num_labels)


def with_labels(run: RunConfig, labels: Labels | None = None) -> RunConfig:
    """Return a classifier's run with all of its labels named and counted; any other as it is.

    Args:
        run: The run.
        labels: What `labels_of` returned; None reads the training rows where the run does not say how many there are.

    Raises:
        UserError: if rows cannot be read or their labels do not go together, or training.metric_for_best_model is none
            that so many labels have.
    """
    model = run.model
    if labels is None and model.task == "seq_cls" and model.num_labels is None and model.labels is None:
        labels = labels_of(run, [load_source(source, "train") for source in run.data.train])
    if labels is None:
        names = model.labels
        return run if names is None else _update(run, {"num_labels": len(names)})
    return _update(run, {"labels": list(labels.names) or None, "num_labels": labels.num_outputs})


def _update(run: RunConfig, found: dict[str, object]) -> RunConfig:
    run = run.with_model(**found)
    for path, text in conflicts(run):
        raise UserError(f"{dotted(path)}: {text}")
    return run
