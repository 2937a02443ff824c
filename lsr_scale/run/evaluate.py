"""Evaluating a run's model: accuracy on multiple-choice tasks, or a classifier's metrics on labelled rows."""

import json
import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lsr_scale import distributed
from lsr_scale.config import RunConfig, run_from_dict
from lsr_scale.config.training import wants_fused
from lsr_scale.data.formats import load_source, source_fields
from lsr_scale.data.tasks import Example, examples
from lsr_scale.errors import UserError, printable
from lsr_scale.fused import fuse
from lsr_scale.run.classifier import evaluate_classifier, noting_unwritable, unique_name
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.load import load_run_model, open_trained
from lsr_scale.run.tables import percent
from lsr_scale.scoring.accuracy import Prediction, TaskScore, mcnemar
from lsr_scale.scoring.scorer import EncodedExamples, encode_examples, score
from lsr_scale.screen import show_live
from lsr_scale.units import amount

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
        name = unique_name(rows.task or _stem(fields["path"]), tasks)
        tasks[name] = examples(rows)[: section.limit]
    return tasks


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def score_tasks(
    tasks: dict[str, list[Example]],
    model: Any,
    tokenizer: Any,
    say: Say,
    when: str,
    batch_tokens: int,
    unconditional: bool = False,
    live: bool = False,
    encode: Callable[..., EncodedExamples] = encode_examples,
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
        encode: Encodes the examples: see `score`.
    """
    scores: dict[str, TaskScore] = {}
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "unconditional": unconditional, "distribute": True}
    options["encode"] = encode
    for name, items in tasks.items():
        if live:
            options["progress"] = lambda done, total, name=name: show_live(f"{when}: {name} {done / total:.0%}")
        scores[name] = result = score(model, tokenizer, items, **options)
        show_live("")
        say(f"{when}: {name} {percent(result)} on {amount(result.num_examples, 'question')}")
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


def _fuse(model: Any, run: RunConfig) -> None:
    """Let the model run fused where its training does: faster, and what was scored after training is scored again."""
    if wants_fused(run.training, pays=next(model.parameters()).is_cuda):
        with suppress(UserError):  # no layer can
            fuse(model)


def evaluate_run(
    path: str | Path,
    tasks: list[str] | None = None,
    limit: int | None = None,
    base_only: bool = False,
    without_questions: bool = False,
    base: str | None = None,
    data: list[str] | None = None,
) -> dict[str, Any]:
    """Score a run's saved adapter, loaded onto its base again: on questions, or a classifier's on labelled rows.

    Args:
        path: The run's folder, or a checkpoint's in it.
        tasks: Task names, files or folders; those of the run by default, which for a classifier are its
            held-out rows.
        limit: Only the first so many questions, or rows, of each.
        base_only: Leave the adapter out.
        without_questions: A control: score the choices with no context.
        base: The base model's name, where it lies elsewhere than when the run began.
        data: Of a classifier the same as `tasks`: files or folders of labelled rows.

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
        return evaluate_classifier(folder, run, [*(tasks or ()), *(data or ())], limit, base)
    if data:
        raise UserError(f"{path}: a language model's run; --data is for classifiers: name questions with --tasks")
    changes = {key: value for key, value in (("tasks", tasks), ("limit", limit)) if value is not None}
    run = run_from_dict({**run.model_dump(), "eval": {**run.eval.model_dump(), **changes}}, "lsr-scale eval")
    if not run.eval.tasks:
        raise UserError(
            f"{path}: the run names no tasks (eval.tasks); give some: lsr-scale eval {shlex.quote(str(path))} --tasks "
            "arc_easy"
        )
    loaded = load_tasks(run.eval)
    model, tokenizer, _ = load_run_model(path, base_only, base=base)
    _fuse(model, run)
    when = ("base" if base_only else folder.adapter_name()) + ("-without-questions" if without_questions else "")

    def say(text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    scores = score_tasks(
        loaded, model, tokenizer, say, when, run.eval.batch_tokens, unconditional=without_questions, live=True
    )
    with noting_unwritable():
        save_predictions(folder, loaded, scores, f"eval-{when}")
    return {"run": str(path), "scored": when, "accuracy": summary({when: scores})}
