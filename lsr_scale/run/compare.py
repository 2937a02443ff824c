"""Comparing runs by what lies in their folders: what differs, and what came of it. No model is loaded."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsr_scale.config.comparison import OBJECTIVES, Objective, objective_of, plural
from lsr_scale.config.methods import METHODS
from lsr_scale.config.training import EVALUATED, lower_is_better
from lsr_scale.errors import UserError
from lsr_scale.run.record import Answers, RunRecord, flat, read_run
from lsr_scale.scoring.paired import Paired, paired_accuracy, paired_bootstrap, wilson
from lsr_scale.units import amount

if TYPE_CHECKING:
    import numpy as np

# where a run writes and how often it says so: no two runs have the same folder, and nothing else comes of it
_OF_THE_FOLDER = ("training.output_dir", "training.run_name", "training.logging_dir")
_NAMES_OF_CHOICE = {"accuracy": "choice", "acc_norm": "choice_norm"}
ABSENT = "(absent)"  # a key that a run's configuration does not have


@dataclass(frozen=True)
class Loss:
    """A run's losses in nats per token (per row for a classifier), or GRPO's rewards; None where there is none.

    Attributes:
        train: The mean over the last tenth of the training steps.
        evaluation: The last evaluation's.
        best: The best evaluation's: the lowest loss, the highest reward.
        best_step: After which step that was.
    """

    train: float | None
    evaluation: float | None
    best: float | None
    best_step: int | None


@dataclass(frozen=True)
class Score:
    """A run's score on a task.

    Attributes:
        value: The score: a share of right answers, a correlation, an F1.
        num_examples: How many examples it is of.
        low: Lower end of its own 95 % interval; None for what is no share of right answers.
        high: Upper end.
        before: The score before training, on the same examples.
        gain: From before to after training, paired.
        over_first: From the first run that has the task to this one, paired on the examples that both have; None for
            that run, and where no example is common.
    """

    value: float
    num_examples: int
    low: float | None = None
    high: float | None = None
    before: float | None = None
    gain: Paired | None = None
    over_first: Paired | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a comparison says of one run.

    Attributes:
        name: The run's path as it was given.
        is_finished: Whether it came to its end.
        steps: The last step that is known of.
        model: The base model's name.
        quantization: How the base is held.
        task: "causal_lm" or "seq_cls".
        compute: How the base's products were computed: "bf16", "fp8" or "int8".
        method: The adapter's method.
        parameters: How many are trained; None where the run has not ended.
        adapter_bytes: Bytes of the adapter's file.
        objective: What it is judged by: "loss", of GRPO "reward".
        loss: Its losses.
        reward: Its rewards, of GRPO alone.
        evaluated: The last evaluation's other values (accuracy, F1, ... of a classifier's validation rows).
        scores: By task, then by the score's name.
        tokens_per_s: The median over logging steps.
        memory_gib: The peak of one GPU; the process's resident memory where there was none.
        training_s: Seconds of training.
        wall_s: Seconds of the whole run.
        num_processes: How many processes trained.
        machine: What it ran on.
        on_gpu: Whether that was a GPU.
        versions: Of what it ran with.
        curves: (step, value) of "loss", "eval_loss", "reward" and "eval_reward".
    """

    name: str
    is_finished: bool
    steps: int
    model: str | None
    quantization: str | None
    task: str | None
    compute: str
    method: str | None
    parameters: int | None
    adapter_bytes: int | None
    objective: Objective
    loss: Loss
    reward: Loss
    evaluated: dict[str, float]
    scores: dict[str, dict[str, Score]]
    tokens_per_s: float | None
    memory_gib: float | None
    training_s: float | None
    wall_s: float | None
    num_processes: int | None
    machine: str
    on_gpu: bool
    versions: dict[str, str]
    curves: dict[str, list[tuple[int, float]]] = field(repr=False)

    @property
    def judged(self) -> Loss:
        """The values of what it is judged by: its losses, or its rewards."""
        return self.reward if self.objective == "reward" else self.loss


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        runs: A summary of each, in the order given.
        config: What differs in the configuration: the values by dotted key, one a run, `ABSENT` where it has none.
        versions: What differs in the versions of what they ran with, as in `config`.
        notes: What a reader should know before believing a difference, a sentence each.
    """

    runs: list[RunSummary]
    config: dict[str, list[Any]]
    versions: dict[str, list[Any]]
    notes: list[str]

    def curves(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return what each run is judged by over its steps, by letters and names, as `plots.curves_figure` takes it."""
        named = zip(self.letters, self.short_names, self.runs, strict=True)
        return {
            f"{letter}: {name}": {key: run.curves[key] for key in (run.objective, f"eval_{run.objective}")}
            for letter, name, run in named
        }

    @property
    def objectives(self) -> list[Objective]:
        """What the runs are judged by: losses, rewards, or both where GRPO's stand beside others."""
        return _objectives(self.runs)

    @property
    def short_names(self) -> list[str]:
        """The runs' names without the folder in which all of them lie."""
        names = [run.name for run in self.runs]
        shared = os.path.commonpath(list(map(os.path.dirname, names))) if len(names) > 1 else ""
        return [os.path.relpath(name, shared) if shared else name for name in names]

    @property
    def letters(self) -> list[str]:
        """A short name for each run: A, B, ..., Z, A2, ..."""
        return [chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else "") for i in range(len(self.runs))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the curves are left out, they are each run's `metrics.jsonl`."""
        content = dataclasses.asdict(self)
        for run in content["runs"]:
            del run["curves"]
        return content


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Compare runs by what lies in their folders; unfinished ones are compared as far as they are.

    Scores of two runs are compared question by question, on the questions that both answered: with McNemar's test and a
    95 % interval of the paired difference (`scoring/paired.py`).

    Args:
        runs: Two run folders or more. One that is named twice counts once.

    Raises:
        UserError: for a folder that is no run's, or fewer than two different ones.
    """
    distinct: dict[str, str | Path] = {}
    notes = []
    for path in runs:
        place = os.path.realpath(os.path.expanduser(path))
        if place in distinct:
            notes.append(f"{path} is the same run as {distinct[place]}, and is compared once")
        distinct.setdefault(place, path)
    records = [read_run(path) for path in distinct.values()]
    if len(records) < 2:
        quoted = shlex.quote(records[0].name) if records else "RUN"
        also = " (the same one was named several times)" if len(runs) > 1 else ""
        raise UserError(f"expected two runs or more to compare{also}; for one run: lsr-scale report {quoted}")
    return compare_records(records, notes)


def compare_records(records: Sequence[RunRecord], notes: Sequence[str] = ()) -> Comparison:
    """Return the comparison of runs that were read already; of a single one it is its summary."""
    firsts: dict[str, Answers] = {}
    said: list[str] = []
    summaries = []
    for record in records:
        scores = {}
        for task, answers in record.after().items():
            scores[task] = _scores(record, answers, firsts.get(task), said)
            firsts.setdefault(task, answers)
        summaries.append(_summary(record, scores))
    keys = [{key: value for key, value in flat(record.config).items()} for record in records]
    config = _differing(keys, leave_out=_OF_THE_FOLDER)
    versions = _differing([summary.versions for summary in summaries])
    # what the columns mean comes first: a screen has the first notes only
    said = [*_both_objectives(summaries), *notes, *said, *_cautions(records, summaries)]
    said += [note for record in records for note in record.notes]
    return Comparison(summaries, config, versions, list(dict.fromkeys(said)))


def _summary(record: RunRecord, scores: dict[str, dict[str, Score]]) -> RunSummary:
    def whole(key: str) -> int | None:
        value = record.number(key)
        return None if value is None else int(value)

    def text(*keys: str) -> str | None:
        value = record.setting(*keys)
        return None if value is None else str(value)

    versions = {key: str(value) for key, value in record.environment.items() if key not in ("gpus", "cpu", "system")}
    return RunSummary(
        name=record.name,
        is_finished=record.is_finished,
        steps=record.steps,
        model=text("model", "name"),
        quantization=text("model", "quantization"),
        task=text("model", "task"),
        compute=record.compute,
        method=text("adapter", "method"),
        parameters=whole("trainable_parameters"),
        adapter_bytes=whole("adapter_bytes"),
        objective=objective_of(record.setting("model", "task"), record.setting("training", "method")),
        loss=_values_of(record, "loss"),
        reward=_values_of(record, "reward"),
        evaluated={name: value for name in EVALUATED[1:] if (value := record.number(name)) is not None},
        scores=scores,
        tokens_per_s=record.number("tokens_per_s"),
        memory_gib=record.number("peak_memory_gib"),
        training_s=record.number("training_s"),
        wall_s=record.number("wall_s") or max((row for _, row in record.curve("wall_s")), default=None),
        num_processes=whole("num_processes"),
        machine=record.machine,
        on_gpu=bool(record.environment.get("gpus")),
        versions=versions,
        curves={key: record.curve(key) for name in OBJECTIVES for key in (name, f"eval_{name}")},
    )


def _values_of(record: RunRecord, objective: Objective) -> Loss:
    metric = f"eval_{objective}"
    evaluations = record.curve(metric)
    better = min if lower_is_better(metric) else max
    best_step, best = better(evaluations, key=lambda point: point[1], default=(None, None))
    return Loss(record.number(f"final_{objective}"), evaluations[-1][1] if evaluations else None, best, best_step)


def _differing(mappings: Sequence[dict[str, Any]], leave_out: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Return the keys whose values are not the same in all mappings, in their order, with those values."""
    keys = [key for key in dict.fromkeys(key for mapping in mappings for key in mapping) if key not in leave_out]
    values = {key: [mapping.get(key, ABSENT) for mapping in mappings] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _scores(record: RunRecord, after: Answers, first: Answers | None, notes: list[str]) -> dict[str, Score]:
    """Return a run's scores on a task; `notes` is told where the questions are not the first run's."""
    before = record.answers.get((after.task, "before"))
    gains = {} if before is None else _paired(before, after)
    over_first: dict[str, Paired] = {}
    if first is not None:
        over_first = _paired(first, after)
        common = len(first.rows.keys() & after.rows.keys())
        if not common:
            notes.append(f"{after.task}: {record.name} answered other questions than the first run: not compared")
        elif {common} != {len(first.rows), len(after.rows)}:
            notes.append(
                f"{after.task}: of {amount(len(after.rows), 'question')} of {record.name} and {len(first.rows):,} of "
                f"the first run {common:,} are common, and compared"
            )
    scores = {}
    for name, value in _values(after, list(after.rows)).items():
        interval: tuple[float | None, float | None] = (None, None)
        if name in _NAMES_OF_CHOICE:
            interval = wilson(round(value * len(after.rows)), len(after.rows))
        gain = gains.get(name)
        shared_before = _values(before, list(before.rows)).get(name) if before is not None and gain else None
        scores[name] = Score(value, len(after.rows), *interval, shared_before, gain, over_first.get(name))
    return scores


def _values(answers: Answers, keys: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Return the scores of the answers to these questions, by name."""
    rows = [answers.rows[key] for key in keys]
    if answers.is_multiple_choice:
        names = [name for name, choice in _NAMES_OF_CHOICE.items() if choice in rows[0]]
        return {name: sum(_hits(rows, name)) / len(rows) for name in names}
    from lsr_scale.scoring.classification import measure  # imports torch, which no language model's runs need here

    return measure(*_outputs_and_labels(rows))


def _paired(first: Answers, second: Answers) -> dict[str, Paired]:
    """Compare two runs' answers to the questions that both have, by the score's name."""
    keys = [key for key in first.rows if key in second.rows]
    if not keys or first.is_multiple_choice != second.is_multiple_choice:
        return {}
    pair = [[answers.rows[key] for key in keys] for answers in (first, second)]
    if first.is_multiple_choice:
        return {name: paired_accuracy(*(_hits(rows, name) for rows in pair)) for name in _values(first, keys)}
    from lsr_scale.scoring.classification import measure

    (outputs, labels), (others, _) = (_outputs_and_labels(rows) for rows in pair)
    if outputs.shape != others.shape:
        return {}
    found = {}
    for name in measure(outputs, labels):
        if name == "accuracy":
            right = [list(values.argmax(-1) == labels) for values in (outputs, others)]
            found[name] = paired_accuracy(*right)
        else:
            score = lambda values, index, name=name: measure(values[index], labels[index]).get(name, 0.0)  # noqa: E731
            found[name] = paired_bootstrap(lambda index, of=score: (of(outputs, index), of(others, index)), len(keys))
    return found


def _hits(rows: Sequence[dict[str, Any]], name: str) -> list[bool]:
    return [row.get(_NAMES_OF_CHOICE[name]) == row["answer"] for row in rows]


def _outputs_and_labels(rows: Sequence[dict[str, Any]]) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np

    outputs = np.array([row["outputs"] for row in rows], dtype=np.float64)
    labels = np.array([row["label"] for row in rows])
    return outputs, labels


def _objectives(runs: Sequence[RunSummary]) -> list[Objective]:
    return [name for name in OBJECTIVES if any(run.objective == name for run in runs)]


def _both_objectives(runs: Sequence[RunSummary]) -> list[str]:
    """Return a line that says which runs have rewards, which losses, where GRPO's stand beside others."""
    if len(_objectives(runs)) < 2:
        return []
    return [
        "runs of grpo are shown by their rewards, the highest best, the others by their losses, the lowest best: a "
        "reward and a loss do not compare"
    ]


def _cautions(records: Sequence[RunRecord], runs: Sequence[RunSummary]) -> list[str]:
    """Return what makes numbers of these runs incomparable, or less than they seem."""
    said = []
    pairs = list(zip(records, runs, strict=True))
    judged = _objectives(runs)
    values = " and ".join(map(plural, judged))
    by_reward = [record for record, run in pairs if run.objective == "reward"]
    for name in METHODS["grpo"].scaled_by:
        if any(record.setting("training", name) != by_reward[0].setting("training", name) for record in by_reward):
            said.append(f"runs of grpo differ in training.{name}: their {plural('reward')} are not defined alike")
    for record, run in pairs:
        if not run.is_finished:
            resume = "resume it with --resume auto" if record.folder.own_checkpoints() else "it has no checkpoint"
            said.append(f"{run.name} has not ended (step {run.steps:,}); {resume}")
    by_loss = [run for run in runs if run.objective == "loss"]
    if len({run.task for run in by_loss}) > 1:
        said.append("a classifier stands beside a language model: their losses are of different things")
    elif len({run.model for run in by_loss}) > 1:
        said.append("the base models differ: losses in nats per token compare under one tokenizer only")
    for part in ("train", "validation"):
        of = "training" if part == "train" else "evaluations"
        for name in judged:  # a reward's rows need not be a loss's
            sources = [_fingerprints(one.data.get(part)) for one, run in pairs if run.objective == name]
            if any(one != sources[0] for one in sources):
                said.append(
                    f"data.{part}: the rows are not the same in all runs: {plural(name)} of {of} are of different rows"
                )
    if len({(run.machine, run.num_processes) for run in runs if run.is_finished}) > 1:
        said.append("the machines differ: so do tokens/s, memory and time")
    computes = sorted({run.compute for run in runs})
    if len(computes) > 1:
        said.append(
            f"the base's products are not computed alike, but in {' and '.join(computes)} (training.compute): {values} "
            "differ by it"
        )
    kept = {
        (record.compute, *sorted(map(str, record.compute_errors.get("kept", []))))
        for record in records
        if record.compute != "bf16"
    }
    if len(kept) > len({compute for compute, *_ in kept}):  # alike computed, otherwise kept
        said.append(
            f"not the same groups of linears stayed in bfloat16 (training.keep_in_bf16; compute.json): {values} differ "
            "by it"
        )
    if len({run.on_gpu for run in runs}) > 1 or not any(run.on_gpu for run in runs):
        said.append("memory of a run without a GPU is that of its process")
    return said


def _fingerprints(sources: Any) -> list[Any]:
    """Return what tells the rows of a part from others, wherever they lie."""
    entries = [source for source in sources or [] if isinstance(source, dict)] if isinstance(sources, list) else []
    return [(one.get("sha256") or one.get("fingerprint"), one.get("num_rows")) for one in entries]
