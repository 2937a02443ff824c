"""Evaluating a run's model: accuracy on multiple-choice tasks, or a classifier's metrics on labelled rows."""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lsr_scale import distributed
from lsr_scale.config import RunConfig, run_from_dict
from lsr_scale.config.training import EVALUATED
from lsr_scale.data.classification import tokenize_classification
from lsr_scale.data.formats import build_dataset, load_source, source_fields
from lsr_scale.data.split import split_by_hash
from lsr_scale.data.tasks import Example, examples
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, row_check
from lsr_scale.errors import UserError, printable
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.load import load_run_model, open_trained
from lsr_scale.run.tables import percent
from lsr_scale.scoring import classification, score
from lsr_scale.scoring.accuracy import Prediction, TaskScore, mcnemar
from lsr_scale.screen import show_live

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


def load_tasks(section: Any) -> dict[str, list[Example]]:
    """Return the examples of every source in an `eval` section, by the name that its scores are filed under.

    The name is the task of the rows, else the end of the source's path; numbered where it comes twice.

    Raises:
        UserError: if a source cannot be read or a row does not fit.
    """
    tasks: dict[str, list[Example]] = {}
    for source in section.tasks:
        fields = source_fields(source)
        rows = load_source(source, None)
        name = _unique_name(rows.task or _stem(fields["path"]), tasks)
        tasks[name] = examples(rows)[: section.limit]
    return tasks


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def _unique_name(plain: str, names: Collection[str]) -> str:
    """Return a name, numbered where it is among others already."""
    name, number = plain, 1
    while name in names:
        number += 1
        name = f"{plain}-{number}"
    return name


def score_tasks(
    tasks: dict[str, list[Example]],
    model: Any,
    tokenizer: Any,
    say: Say,
    when: str,
    batch_tokens: int,
    unconditional: bool = False,
    live: bool = False,
) -> dict[str, TaskScore]:
    """Score every task, the batches distributed over the processes.

    Args:
        tasks: What `load_tasks` returns.
        model: The model, adapter and all.
        tokenizer: Its tokenizer.
        say: Called with a line per task.
        when: For that line.
        batch_tokens: Padded tokens in one forward pass.
        unconditional: Score the choices without their contexts.
        live: Show how far it is, on a terminal.
    """
    scores: dict[str, TaskScore] = {}
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "unconditional": unconditional, "distribute": True}
    for name, items in tasks.items():
        if live:
            options["progress"] = lambda done, total, name=name: show_live(f"{when}: {name} {done / total:.0%}")
        scores[name] = result = score(model, tokenizer, items, **options)
        show_live("")
        say(f"{when}: {name} {percent(result)} on {result.num_examples} questions")
    return scores


def save_predictions(
    folder: RunFolder, tasks: dict[str, list[Example]], scores: dict[str, TaskScore], when: str
) -> None:
    """Write every prediction with its question's hash, one JSON object a line; main process only.

    Raises:
        UserError: if a file cannot be written.
    """
    if not distributed.is_main():
        return
    for task, result in scores.items():
        pairs = zip(result.predictions, tasks[task], strict=True)
        lines = ({**vars(prediction), "question_sha256": example.sha256()} for prediction, example in pairs)
        folder.write_predictions(task, when, lines)


def read_scores(
    folder: RunFolder, tasks: dict[str, list[Example]], when: str, say: Say
) -> dict[str, dict[str, TaskScore]]:
    """Return `{when: scores}` from the saved predictions of these tasks, empty where there are none.

    Those of other questions than the tasks have now, or that cannot be read, are left out, with a note.
    """
    scores: dict[str, TaskScore] = {}
    for name, examples_now in tasks.items():
        file = folder.predictions(name, when)
        if not file.is_file():
            continue
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            hashes = [row.pop("question_sha256", None) for row in rows]
            predictions = [Prediction(**{**row, "log_likelihoods": tuple(row["log_likelihoods"])}) for row in rows]
            if hashes == [example.sha256() for example in examples_now]:
                scores[name] = TaskScore.of(predictions)
            else:
                say(f"note: {file} is left out: it is not of the questions that {name} has now")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            say(f"note: {file} is left out: it cannot be read ({str(error)[:100]})")
    return {when: scores} if scores else {}


def summary(scores: dict[str, dict[str, TaskScore]]) -> dict[str, Any]:
    """Return accuracies by task and moment, with the paired test of before against after."""
    tasks: dict[str, Any] = {}
    for when, by_task in scores.items():
        for task, result in by_task.items():
            values = {key: value for key, value in result.to_dict().items() if key != "predictions"}
            tasks.setdefault(task, {})[when] = {
                k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()
            }
    for task in tasks:
        before, after = (scores.get(when, {}).get(task) for when in ("before", "after"))
        if before and after and [p.id for p in before.predictions] == [p.id for p in after.predictions]:
            gained, lost, p = mcnemar(before, after)
            tasks[task]["mcnemar"] = {"newly_right": gained, "newly_wrong": lost, "p": p}
    return tasks


def evaluate_run(
    path: str | Path,
    tasks: list[str] | None = None,
    limit: int | None = None,
    base_only: bool = False,
    without_questions: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Score a run's saved adapter, loaded onto its base again: on questions, or a classifier's on labelled rows.

    Args:
        path: The run's folder.
        tasks: Task names, files or folders; those of the run by default, which for a classifier are its
            held-out rows.
        limit: Only the first so many questions, or rows, of each.
        base_only: Leave the adapter out.
        without_questions: A control: score the choices with no context.
        base: The base model's name, where it lies elsewhere than when the run began.

    Returns:
        `{"run", "scored", "accuracy": {task: {...}}}`, or for a classifier `{"run", "scored", "classification": {name:
        {"num_examples", "loss", ...}}}`; every prediction lies in the run folder under `eval/`.
    """
    folder, run = open_trained(path, base_only, ("causal_lm", "seq_cls"))
    if run.model.task == "seq_cls":
        if base_only or without_questions:
            raise UserError(
                f"{path}: a classifier's run; --base-only and --without-questions are for language models: a base "
                "without the adapter has no trained head, and there are no questions to leave out"
            )
        return evaluate_classifier(folder, run, tasks, limit, base)
    changes = {key: value for key, value in (("tasks", tasks), ("limit", limit)) if value is not None}
    run = run_from_dict({**run.model_dump(), "eval": {**run.eval.model_dump(), **changes}}, "lsr-scale eval")
    if not run.eval.tasks:
        raise UserError(
            f"{path}: the run names no tasks (eval.tasks); give some: lsr-scale eval {path} --tasks arc_easy"
        )
    loaded = load_tasks(run.eval)
    model, tokenizer, _ = load_run_model(path, base_only, base=base)
    when = ("base" if base_only else "adapter") + ("-without-questions" if without_questions else "")

    def say(text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    scores = score_tasks(
        loaded, model, tokenizer, say, when, run.eval.batch_tokens, unconditional=without_questions, live=True
    )
    with _noting_unwritable():
        save_predictions(folder, loaded, scores, f"eval-{when}")
    return {"run": str(path), "scored": when, "accuracy": summary({when: scores})}


@contextmanager
def _noting_unwritable() -> Iterator[None]:
    """Print a note where predictions cannot be written: the scores are valid all the same."""
    try:
        yield
    except UserError as error:
        print(f"note: the predictions are not written: {error}", file=sys.stderr, flush=True)


def evaluate_classifier(
    folder: RunFolder,
    run: RunConfig,
    sources: list[str] | None = None,
    limit: int | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Score a classifier's run as training does: transformers' trainer in batches of `per_device_eval_batch_size`.

    Args:
        folder: The run's folder, with an adapter.
        run: Its configuration.
        sources: Files or folders of labelled rows, each scored by itself; None takes the run's held-out rows.
        limit: Only the first so many rows of each.
        base: The base model's name, where it lies elsewhere than when the run began.

    Raises:
        UserError: if there are no rows, or a label that the classifier has no output for.
    """
    from transformers import Trainer, TrainingArguments

    if not sources and not run.data.has_validation:
        raise UserError(
            f"{folder.path}: the run has no held-out rows (data.validation); give some: lsr-scale eval {folder.path} "
            "--tasks FILE"
        )
    loaded: dict[str, Any] = {}
    options: dict[str, Any] = {"model_task": "seq_cls", "check": row_check(None, run.model.num_labels)}
    for source in sources or ():
        loaded[_unique_name(_stem(source), loaded)] = build_dataset([source], None, **options)[0]
    if not sources and run.data.validation_split:
        rows, _ = build_dataset(run.data.train, "train", **options)
        _, loaded["validation"] = split_by_hash(rows, run.data.validation_split)
    elif not sources:
        loaded["validation"] = build_dataset(run.data.validation, "validation", **options)[0]
    model, tokenizer, _ = load_run_model(folder.path, tasks=("seq_cls",), base=base)
    prepare_tokenizer(tokenizer, "classification")
    names = ("per_device_eval_batch_size", "label_smoothing_factor")  # what the losses of training depend on as well
    values: dict[str, Any] = {name: run.training[name] for name in names if name in run.training}
    values |= {"use_cpu": not torch.cuda.is_available(), "report_to": "none", "disable_tqdm": True}
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(output_dir=unused, **values)
        measure = classification.measure_prediction
        trainer = Trainer(model, arguments, processing_class=tokenizer, compute_metrics=measure)
        for name, rows in loaded.items():
            rows = rows.select(range(min(limit or len(rows), len(rows))))
            encoded: Any = tokenize_classification(rows, tokenizer, run.training["max_length"], run.model.num_labels)
            output: Any = trainer.predict(encoded, metric_key_prefix="eval")
            measured = {key.removeprefix("eval_"): value for key, value in output.metrics.items() if key in EVALUATED}
            results[name] = {"num_examples": len(rows), **{key: round(value, 6) for key, value in measured.items()}}
            lines = classification.predictions(output)
            with _noting_unwritable():
                folder.write_predictions(name, "eval-adapter", lines)
    return {"run": str(folder.path), "scored": "adapter", "classification": results}
