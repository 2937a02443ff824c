"""What a run's folder says of it, finished or not: read from its files alone, no model and no torch.

A file that is missing, damaged or of another shape takes away what it would have said, with a note, and nothing else.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsr_scale import files
from lsr_scale.config import yaml_text
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder, open_run, step_of
from lsr_scale.run.metrics import finite_values, read_metrics, summarize_metrics
from lsr_scale.units import amount

_PREDICTIONS = re.compile(r"(?P<task>.+?)(\+[0-9a-f]{16})?-(?P<when>before|after|eval-adapter)\.jsonl")
_MAX_BYTES = 2**30  # of a file of predictions: that of a million questions is far smaller
# of the adapter after training: what training scored, or `lsr-scale eval` later
AFTER = ("after", "eval-adapter")


@dataclass(frozen=True)
class Answers:
    """The predictions of a task: what a model answered, by question.

    Attributes:
        task: The task's name.
        when: "before" or "after" training, or "eval-adapter" where `lsr-scale eval` scored it later.
        rows: Its predictions by what tells a question from the others: its hash (or its number and label), and which of
            several equal ones it is.
    """

    task: str
    when: str
    rows: dict[tuple[str, int], dict[str, Any]]

    @property
    def is_multiple_choice(self) -> bool:
        """Tell questions with a right answer from a classifier's rows."""
        return "log_likelihoods" in next(iter(self.rows.values()))


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says.

    Attributes:
        folder: The folder.
        name: How the run is called where several are shown: its path as it was given.
        config: The resolved configuration.
        results: `results.json`, empty for a run that has not ended.
        metrics: The rows of `metrics.jsonl`.
        environment: Versions and machine.
        data: Sources of the rows.
        compute_errors: What 8 bits changed in each group of linears, `compute.json`; empty where that was not measured.
        answers: Predictions by task and moment.
        samples: Generations, the rows of `samples.jsonl`.
        notes: What could not be read, a line each.
    """

    folder: RunFolder
    name: str
    config: dict[str, Any]
    results: dict[str, Any]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    data: dict[str, Any]
    compute_errors: dict[str, Any]
    answers: dict[tuple[str, str], Answers]
    samples: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def setting(self, *keys: str) -> Any:
        """Return a value of the configuration, None where it has none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, key: str) -> float | None:
        """Return a number of the results, else of what the metrics say so far."""
        for source in (self.results, summarize_metrics(self.folder.metrics)):
            if values := finite_values([source], key):
                return values[0]
        return None

    @property
    def is_finished(self) -> bool:
        """Tell whether the run came to its end."""
        return bool(self.results)

    @property
    def steps(self) -> int:
        """The last training step that is known of."""
        saved = [step_of(path) for path in self.folder.own_checkpoints()]
        return max([int(self.number("steps") or 0), *saved, *(row["step"] for row in self.metrics)], default=0)

    @property
    def compute(self) -> str:
        """How the base's products were computed: "bf16", "fp8" or "int8"."""
        return str(self.setting("training", "compute") or "bf16")

    @property
    def machine(self) -> str:
        """What the run ran on."""
        gpus = [str(name) for name in _list(self.environment.get("gpus"))]
        if gpus:
            counted = Counter(name.removeprefix("NVIDIA ") for name in gpus)
            return ", ".join(name if number == 1 else f"{number} x {name}" for name, number in counted.items())
        return str(self.environment.get("cpu") or "unknown")

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of a column of the metrics."""
        return [(row["step"], float(row[key])) for row in self.metrics if finite_values([row], key)]

    def after(self) -> dict[str, Answers]:
        """Return the trained adapter's answers by task: those with the most questions where there are several."""
        best: dict[str, Answers] = {}
        for when in AFTER:
            for (task, moment), answers in self.answers.items():
                if moment == when and (task not in best or len(answers.rows) > len(best[task].rows)):
                    best[task] = answers
        return best


def read_run(path: str | Path) -> RunRecord:
    """Return what a run's folder says.

    Raises:
        UserError: if no run was started there.
    """
    folder = open_run(path)
    if not folder.is_marked():
        raise UserError(
            f"{path}: not a run folder: its config.yaml is no run's of lsr-scale (there is neither an env.json nor a "
            "checkpoint of one); give the folder of a run"
        )
    notes: list[str] = []
    objects = (folder.results, folder.environment, folder.data, folder.compute_errors)
    results, environment, data, errors = (_object(file, notes) for file in objects)
    config = _config(folder, notes)
    return RunRecord(
        folder=folder,
        name=str(path).rstrip("/") or str(path),
        config=config,
        results=results,
        metrics=read_metrics(folder.metrics),
        environment=environment,
        data=data,
        compute_errors=_compute_errors(errors, config),
        answers=_all_answers(folder, _task_names(folder, results), _labels(config), notes),
        samples=_rows(folder.samples, notes),
        notes=notes,
    )


def _compute_errors(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what `compute.json` says, where it holds for the run's configuration: a run may have resumed with another.

    It does not for another `compute`, nor where `keep_in_bf16` names the groups.
    """
    is_one = isinstance(content.get("errors"), dict) and isinstance(content.get("kept"), list)
    training = config.get("training")
    if not is_one or not isinstance(training, dict) or training.get("keep_in_bf16", "auto") != "auto":
        return {}
    compute = training.get("compute")
    return content if compute and content.get("compute") == compute else {}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; lists, and mappings that are empty, are values."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _config(folder: RunFolder, notes: list[str]) -> dict[str, Any]:
    try:
        content, _ = yaml_text.parse(yaml_text.read(folder.config), str(folder.config))
    except UserError as error:
        notes.append(str(error))
        return {}
    return content if isinstance(content, dict) else {}


def _object(file: Path, notes: list[str]) -> dict[str, Any]:
    """Return a JSON object, empty where there is none."""
    if not file.exists():
        return {}
    try:
        content = files.read_json(file, "description of the run")
    except UserError as error:
        notes.append(str(error))
        return {}
    if not isinstance(content, dict):
        notes.append(f"{file}: left out: it is no JSON object")
        return {}
    return content


def _rows(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; what is none, such as a line that a kill cut short, is passed over."""
    if not file.is_file() or file.stat().st_size > _MAX_BYTES:
        return []
    rows, bad = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{file}: {amount(bad, 'line')} left out: no JSON object")
    return rows


def _labels(config: dict[str, Any]) -> list[Any]:
    """Return the names of a classifier's classes in the order of its outputs."""
    model = config.get("model")
    return _list(model.get("labels")) if isinstance(model, dict) else []


def _task_names(folder: RunFolder, results: dict[str, Any]) -> dict[str, str]:
    """Return the names of tasks by the stems of their files, which leave out what a file's name cannot have."""
    scored = (results.get(kind) for kind in ("accuracy", "classification"))
    names = [name for by_task in scored if isinstance(by_task, dict) for name in by_task]
    return {folder.predictions(name, "").stem.removesuffix("-"): name for name in names}


def _all_answers(
    folder: RunFolder, names: dict[str, str], labels: list[Any], notes: list[str]
) -> dict[tuple[str, str], Answers]:
    found: dict[tuple[str, str], Answers] = {}
    for file in sorted((folder.path / "eval").glob("*.jsonl")):
        match = _PREDICTIONS.fullmatch(file.name)
        if match is None:
            continue
        rows = _rows(file, notes)
        numbered = [_with_number(row, labels) for row in rows]
        sound = [row for row in numbered if _is_choice(row) or _is_classified(row)]
        if len(sound) < len(rows):
            notes.append(f"{file}: {len(rows) - len(sound):,} of {amount(len(rows), 'line')} left out: no prediction")
        if not sound or len({_is_choice(row) for row in sound}) > 1:
            continue
        seen: Counter[str] = Counter()
        keyed = {}
        for row in sound:
            key = _question(row)
            keyed[key, seen[key]] = row
            seen[key] += 1
        stem = file.name.removesuffix(f"-{match['when']}.jsonl")
        task = names.get(stem, match["task"])
        found[task, match["when"]] = Answers(task, match["when"], keyed)
    return found


def _question(row: dict[str, Any]) -> str:
    """Return what tells a question from others: its hash; of a classifier's rows their texts, else their number."""
    for name in ("question_sha256", "id"):
        if isinstance(row.get(name), str):
            return row[name]
    texts = [row.get("text"), row.get("text_pair")] if "text" in row else row.get("row")
    return json.dumps([texts, row.get("label")])


def _with_number(row: dict[str, Any], labels: list[Any]) -> dict[str, Any]:
    """Return a classifier's row with the number of its class, or its score, as "label"."""
    if "gold" not in row or "label" in row:
        return row
    gold = row["gold"]
    return {**row, "label": labels.index(gold) if gold in labels else gold}


def _is_choice(row: dict[str, Any]) -> bool:
    return isinstance(row.get("log_likelihoods"), list) and all(
        type(row.get(key)) is int for key in ("choice", "answer")
    )


def _is_classified(row: dict[str, Any]) -> bool:
    outputs = row.get("outputs")
    return (
        isinstance(outputs, list)
        and len(outputs) > 0
        and all(isinstance(value, int | float) and math.isfinite(value) for value in outputs)
        and isinstance(row.get("label"), int | float)
        and (len(outputs) == 1 or 0 <= row["label"] < len(outputs))
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
