"""Accuracy of a model on multiple-choice tasks, and trying it out: the stages after training, which meet it on disk."""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lsr_scale import distributed
from lsr_scale.adapters.coverage import left_out
from lsr_scale.adapters.files import load_adapter
from lsr_scale.config import RunConfig, load_run, run_from_dict
from lsr_scale.config.training import EVALUATED
from lsr_scale.data.classification import tokenize_classification
from lsr_scale.data.formats import build_dataset, load_source, source_fields
from lsr_scale.data.model_limits import check_token_id, num_positions, stated_length
from lsr_scale.data.readers import check_characters
from lsr_scale.data.tasks import Example, examples
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, row_check
from lsr_scale.errors import UserError, printable
from lsr_scale.model import load_base_for, tokenizer_of
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.model.tokenizer import end_tokens, render_chat
from lsr_scale.run.folder import RunFolder, open_run
from lsr_scale.scoring import classification, score
from lsr_scale.scoring.accuracy import Prediction, TaskScore, mcnemar
from lsr_scale.screen import Screen, show_live

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


def load_tasks(section: Any) -> dict[str, list[Example]]:
    """Return the examples of every source in an `eval` section, by the name that its scores are filed under.

    The name is the task of the rows, else the end of the source's path; numbered where it stands twice.

    Raises:
        UserError: if a source cannot be read or a row does not fit.
    """
    found: dict[str, list[Example]] = {}
    for source in section.tasks:
        fields = source_fields(source)
        rows = load_source(source, None)
        name = _unused(rows.task or _end_of(fields["path"]), found)
        found[name] = examples(rows)[: section.limit]
    return found


def _end_of(path: str) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def _unused(plain: str, names: Collection[str]) -> str:
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
    found: dict[str, TaskScore] = {}
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "unconditional": unconditional, "distribute": True}
    for name, items in tasks.items():
        if live:
            options["progress"] = lambda done, total, name=name: show_live(f"{when}: {name} {done / total:.0%}")
        found[name] = result = score(model, tokenizer, items, **options)
        show_live("")
        say(f"{when}: {name} {_percent(result)} on {result.num_examples} questions")
    return found


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

    Those of other questions than the tasks have now, or that cannot be read, are left out, which is said.
    """
    found: dict[str, TaskScore] = {}
    for name, examples_now in tasks.items():
        file = folder.predictions(name, when)
        if not file.is_file():
            continue
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            hashes = [row.pop("question_sha256", None) for row in rows]
            predictions = [Prediction(**{**row, "log_likelihoods": tuple(row["log_likelihoods"])}) for row in rows]
            if hashes == [example.sha256() for example in examples_now]:
                found[name] = TaskScore.of(predictions)
            else:
                say(f"note: {file} is left out: it is not of the questions that {name} has now")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            say(f"note: {file} is left out: it cannot be read ({str(error)[:100]})")
    return {when: found} if found else {}


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


def print_results(folder: RunFolder, results: dict[str, Any], scores: dict[str, dict[str, TaskScore]]) -> None:
    """Print the small table at the end of a run, and where things lie."""
    from rich import box
    from rich.table import Table

    console = Screen()
    if scores:
        table = Table(title="Accuracy, % (standard error)", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column("task", overflow="fold")
        for column in ("n", *scores, "gained / lost", "p"):
            table.add_column(column, justify="right")
        for task, values in results["accuracy"].items():
            paired = values.get("mcnemar")
            table.add_row(
                task,
                str(next(by_task[task].num_examples for by_task in scores.values() if task in by_task)),
                *(_percent(scores[when][task]) if task in scores[when] else "" for when in scores),
                f"{paired['newly_right']} / {paired['newly_wrong']}" if paired else "",
                f"{paired['p']:.2g}" if paired else "",
            )
        console.print(table)
    if found := [f"{name.removeprefix('eval_')} {results[name]:.4f}" for name in EVALUATED if name in results]:
        console.print(f"validation  {', '.join(found)}", soft_wrap=True)
    size = results["adapter_bytes"] / 1e6
    console.print(
        f"adapter  {folder.adapter}  ({results['trainable_parameters']:,} parameters, {size:.1f} MB)\n"
        f"loss     {folder.curve}\nresults  {folder.results}",
        soft_wrap=True,
    )


def _percent(result: TaskScore) -> str:
    return f"{100 * result.accuracy:.1f} ({100 * result.accuracy_stderr:.1f})"


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    chat: bool = False,
    say: Callable[[str], None] = logger.warning,
) -> str:
    """Return the model's greedy continuation of a prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text; put into the chat template as a user's turn with `chat`.
        max_new_tokens: When to stop at the latest.
        chat: Use the chat template.
        say: Told that the model's positions ended before the text did.

    Raises:
        UserError: if there is no chat template, it fails, nothing is to be continued, the prompt holds half of a
            character or leaves the model no position to go on at, or the model's logits are not finite.
    """
    check_characters(prompt, "--prompt")
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: the model's tokenizer has no chat template; leave it out, or set model.chat_template")
    if chat:
        prompt = render_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("--prompt: expected some text to continue, got none")
    rows = model.get_input_embeddings().num_embeddings
    check_token_id(int(inputs["input_ids"].max()), rows, tokenizer, model.config, "--prompt")
    length, positions, made_for = inputs["input_ids"].shape[1], num_positions(model), stated_length(model.config)
    if positions is not None and length >= positions:
        raise UserError(f"--prompt: has {length:,} tokens, but the model has {positions:,} positions; shorten it")
    end = made_for if positions is None else positions
    # a prompt that goes beyond what the model is made for already, which RoPE allows, is gone on with as asked
    left = max_new_tokens if end is None or length >= end else min(max_new_tokens, end - length)
    out = model.generate(
        **inputs,
        max_new_tokens=left,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[_check_finite],
        eos_token_id=end_tokens(tokenizer, model.generation_config.eos_token_id) or None,
    )
    if left < max_new_tokens and out.shape[1] == end:
        say(f"stopped after {left:,} of {max_new_tokens:,} new tokens: the model is made for {end:,} in all")
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)


def _check_finite(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Raise where a model gives no number, whose largest would be the first token for ever; for `generate`."""
    if not (logits < torch.inf).all():  # NaN is not either; -inf is how models rule tokens out
        raise UserError(
            f"the model's logits are not finite after {ids.shape[1]} tokens: the adapter diverged, or the base "
            "overflows in model.dtype; --base-only tells which"
        )
    return logits


def open_trained(
    path: str | Path, base_only: bool = False, tasks: Sequence[str] = ("causal_lm",)
) -> tuple[RunFolder, RunConfig]:
    """Return the folder and the configuration of a run that has an adapter.

    Args:
        path: The run's folder.
        base_only: An adapter is not needed.
        tasks: Values of `model.task` that will do: only a language model answers questions or generates.

    Raises:
        UserError: if the folder holds no run, none of such a task, or (unless `base_only`) no adapter yet.
    """
    folder = open_run(path)
    run = load_run(folder.config)
    if run.model.task not in tasks:
        raise UserError(f"{folder.path}: a {run.model.task} run; only language models answer questions or generate")
    if not base_only and not folder.adapter.is_dir():
        remedy = "it was interrupted: continue it with --resume auto" if folder.checkpoints() else "train it first"
        if folder.earlier.is_dir():
            remedy = "the one that it takes the place of comes back with train --resume auto, if this one has ended"
        raise UserError(f"{folder.path}: the run has no adapter yet; {remedy}")
    return folder, run


def load_run_model(
    path: str | Path, base_only: bool = False, tasks: Sequence[str] = ("causal_lm",), base: str | None = None
) -> tuple[Any, Any, RunConfig]:
    """Return the model of a finished run, its adapter loaded from disk, with its tokenizer and configuration.

    Args:
        path: The run's folder.
        base_only: Leave the adapter out; none is needed.
        tasks: Values of `model.task` that will do, as in `open_trained`.
        base: The base model's name, where it lies elsewhere than when the run began.

    Raises:
        UserError: if the folder holds no run, no adapter that fits, or the base is not to be found.
    """
    folder, run = open_trained(path, base_only, tasks)
    if base is not None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"name": base, "revision": None})})
    with suggest_base_option(base):
        return _load(folder, run, base_only)


def _load(folder: RunFolder, run: RunConfig, base_only: bool) -> tuple[Any, Any, RunConfig]:
    tokenizer = tokenizer_of(run, folder.tokenizer)
    model: Any = load_base_for(run.model, run.training["seed"])
    if not base_only:
        model, notes = load_adapter(model, folder.adapter)
        targets = run.adapter.options.get("target_modules")
        for note in (*notes, *left_out(model, run.model.quantization, targets, run.model.dtype)):
            print(printable(f"note: {note}"), file=sys.stderr)
    return model.eval(), tokenizer, run


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
        tasks: Task names, files or folders; those of the run by default, which for a classifier are `data.validation`.
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
    with _unless_unwritable():
        save_predictions(folder, loaded, scores, f"eval-{when}")
    return {"run": str(path), "scored": when, "accuracy": summary({when: scores})}


@contextmanager
def _unless_unwritable() -> Iterator[None]:
    """Say that predictions could not be written; the scores are there all the same."""
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
        sources: Files or folders of labelled rows, each scored by itself; None takes `data.validation` as a whole.
        limit: Only the first so many rows of each.
        base: The base model's name, where it lies elsewhere than when the run began.

    Raises:
        UserError: if there are no rows, or a label that the classifier has no output for.
    """
    from transformers import Trainer, TrainingArguments

    if not sources and not run.data.validation:
        raise UserError(
            f"{folder.path}: the run has no held-out rows (data.validation); give some: lsr-scale eval {folder.path} "
            "--tasks FILE"
        )
    loaded: dict[str, Any] = {}
    options: dict[str, Any] = {"model_task": "seq_cls", "check": row_check(None, run.model.num_labels)}
    for source in sources or ():
        loaded[_unused(_end_of(source), loaded)] = build_dataset([source], None, **options)[0]
    if not sources:
        loaded["validation"] = build_dataset(run.data.validation, "validation", **options)[0]
    model, tokenizer, _ = load_run_model(folder.path, tasks=("seq_cls",), base=base)
    prepare_tokenizer(tokenizer, "classification")
    names = ("per_device_eval_batch_size", "label_smoothing_factor")  # what the losses of training depend on as well
    values: dict[str, Any] = {name: run.training[name] for name in names if name in run.training}
    values |= {"use_cpu": not torch.cuda.is_available(), "report_to": "none", "disable_tqdm": True}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(output_dir=unused, **values)
        measure = classification.measure_prediction
        trainer = Trainer(model, arguments, processing_class=tokenizer, compute_metrics=measure)
        for name, rows in loaded.items():
            rows = rows.select(range(min(limit or len(rows), len(rows))))
            encoded: Any = tokenize_classification(rows, tokenizer, run.training["max_length"], run.model.num_labels)
            output: Any = trainer.predict(encoded, metric_key_prefix="eval")
            measured = {key.removeprefix("eval_"): value for key, value in output.metrics.items() if key in EVALUATED}
            found[name] = {"num_examples": len(rows), **{key: round(value, 6) for key, value in measured.items()}}
            lines = classification.predictions(output)
            with _unless_unwritable():
                folder.write_predictions(name, "eval-adapter", lines)
    return {"run": str(folder.path), "scored": "adapter", "classification": found}


def print_accuracy(result: dict[str, Any]) -> None:
    """Print what `evaluate_run` returns as a table."""
    from rich import box
    from rich.table import Table

    if "classification" in result:
        found = result["classification"]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", *found):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for name in next(iter(found.values())):
            shown = (values[name] for values in found.values())
            table.add_row(name, *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in shown))
        console = Screen()
        console.print(f"{result['run']}: {result['scored']}", soft_wrap=True)
        console.print(table)
        return
    title = f"{result['run']}: accuracy, % (standard error), {result['scored']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("task", "accuracy", "length-normalized", "questions"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, by_moment in result["accuracy"].items():
        values = by_moment[result["scored"]]
        pairs = (("accuracy", "accuracy_stderr"), ("acc_norm", "acc_norm_stderr"))
        shown = [f"{100 * values[mean]:.1f} ({100 * values[error]:.1f})" for mean, error in pairs]
        table.add_row(task, *shown, str(values["num_examples"]))
    Screen().print(table)
