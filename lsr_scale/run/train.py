"""A run from its first line on the screen to a folder that a person can read: score, train, score again, save."""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer

from lsr_scale import distributed, files
from lsr_scale.adapters.identity import base_description
from lsr_scale.adapters.save_and_load import check_base_of, save_adapter, weight_mismatches
from lsr_scale.config import RunConfig
from lsr_scale.config.methods import METHODS, low_rate_note
from lsr_scale.config.training import compared_by, lower_is_better
from lsr_scale.data.formats import question_records
from lsr_scale.data.split import note_shared
from lsr_scale.data.tasks import Example
from lsr_scale.errors import UserError
from lsr_scale.exporting.as_lora import save_as_lora
from lsr_scale.model import local_device, without_bfloat16
from lsr_scale.model.gather import reshard
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.report.write import show_at_end
from lsr_scale.run import evaluate
from lsr_scale.run.backup import Backup, DiscardBackup
from lsr_scale.run.card import write_run_card
from lsr_scale.run.classifier import HeldOut, score_in_training
from lsr_scale.run.folder import RunFolder, step_of
from lsr_scale.run.metrics import read_metrics, summarize_metrics
from lsr_scale.run.rewards import describe_rewards, reward_changes
from lsr_scale.run.start import Start, begin, starting
from lsr_scale.run.tables import print_results
from lsr_scale.scoring.accuracy import TaskScore
from lsr_scale.scoring.scorer import EncodesOnce
from lsr_scale.screen import keeping_live_line, print_line
from lsr_scale.training.arguments import uses_deepspeed, zero_stage
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.callbacks.condition import ConditionCallback
from lsr_scale.training.callbacks.early_stopping import StopEarly, early_stopping_of
from lsr_scale.training.callbacks.progress import Progress
from lsr_scale.training.callbacks.reports import Reports, check_reporters
from lsr_scale.training.callbacks.samples import Samples
from lsr_scale.training.callbacks.signals import StopOnSignal, Terminated, end_with_peers, interrupts_kept
from lsr_scale.training.checkpoint import select
from lsr_scale.training.compute import check_compute
from lsr_scale.training.run_data import RunData, read_data
from lsr_scale.training.run_labels import with_labels
from lsr_scale.training.settings import naming_settings
from lsr_scale.training.shared import Shared
from lsr_scale.training.steps.nonfinite import check_finite
from lsr_scale.training.trainers import ignore_library_warnings
from lsr_scale.units import amount, clock

Say = Callable[[str], None]
Scores = dict[str, dict[str, TaskScore]]  # by "before" and "after", then by task


def train(
    run: RunConfig,
    name: str = "run",
    resume: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    take: Callable[[Trainer], None] = lambda trainer: None,
    shared: Shared | None = None,
    stop_after_step: float | None = None,
) -> RunFolder:
    """Do a run: score, train, score again, and leave a folder that a person can read (`RunFolder`).

    Args:
        run: The run.
        name: Stem for the folder under `runs/` where the run names none.
        resume: "auto" for the newest checkpoint in the run's folder, or the path of a checkpoint.
        overwrite: Start again in a folder that holds a run.
        quiet: Print results only.
        take: Called with the trainer when all is done, on every process.
        shared: What it has in common with other runs of this process; nothing by default.
        stop_after_step: Train so far only, to be resumed; below 1 it is a share of all steps. The run is evaluated, if
            it is at all, and a checkpoint is saved, but no adapter and no results; all else, such as the schedule, is
            of the whole run.

    Returns:
        The run's folder.

    Raises:
        UserError: for what a user can fix.
        Terminated: if a signal ended the run.
    """
    began = time.monotonic()
    if shared is None:
        distributed.start(run.deepspeed.config is not None, run.training.get("ddp_timeout", distributed.TIMEOUT_S))
    live = distributed.is_main() and not quiet and shared is None
    notes: list[str] = []

    def say(text: str) -> None:
        if text.startswith("note: "):
            notes.append(text.removeprefix("note: "))
        if shared is not None:
            shared.say(text)
        elif live:
            print_line(text)

    with starting(run, name, resume, overwrite) as start:
        _announce(start, resume is not None, say)
        _announce_dtype(start, run.model.dtype, say)
        check_compute(start.run)
        tasks = evaluate.load_tasks(start.run.eval)
        encode = EncodesOnce() if shared is None else shared.encode
        stop = StopOnSignal(say, shared and shared.signals, stop_after_step)
        with interrupts_kept(), distributed.patient_barriers():
            data, trainer, samples = _prepare(start, stop, say, quiet, shared)
        asked = {f"eval.tasks, {task}": question_records(examples, data.kind) for task, examples in tasks.items()}
        for line in note_shared(data.train, asked):
            say(f"note: {line}")
        start = dataclasses.replace(start, run=with_labels(start.run, data.labels))
        _begin_folder(start, data, say)
        _announce_training(start.run, trainer, say)
        reports = Reports(trainer, start.folder.tensorboard, start.step if start.in_place else 0)
        samples.record = reports.samples
        scores = _score_before(start, tasks, trainer, say, live, encode)
        held_out = _held_out(start.run, data)
        of_classes = _score_held_out_before(start, held_out, trainer, say)
        if start.checkpoint is None:
            reports.scores(scores.get("before", {}), of_classes.get("before", {}), 0)
            samples.take(trainer.model, trainer.processing_class, 0, "before")
        trained = _run_trainer(start, trainer, stop, say, shared)
        if stop.paused:
            reports.close()
            take(trainer)
            return start.folder
        _save_adapter(start.folder, trainer, trained, start.run.training["save_as_lora"], say)
        if tasks:
            scores["after"] = _score(start, tasks, trainer, "after", say, live, encode)
        if held_out:
            of_classes["after"] = score_in_training(held_out, trainer, start.folder, "after", say)
        step = trained.best_step or trainer.state.global_step
        reports.scores(scores.get("after", {}), of_classes.get("after", {}), step)
        samples.take(trainer.model, trainer.processing_class, step, "after")
        reports.close()
        if distributed.is_main():
            results = _write_results(start, trainer, trained, scores, of_classes, began, notes)
            if shared is None:
                report = show_at_end(start.folder)
                print_results(start.folder, results, scores)
                print_line(report)
            say(f"done in {clock(time.monotonic() - began)}")
        take(trainer)
    if shared is None:
        distributed.stop()
    return start.folder


def _announce(start: Start, is_resumed: bool, say: Say) -> None:
    """Say where the run writes, what it resumes from, and what it runs on."""
    say(f"run folder: {start.folder.path}")
    for note in start.notes:
        say(f"note: {note}")
    if is_resumed:
        resumes_from = f"resuming from {start.checkpoint}"
        say(resumes_from if start.checkpoint else "nothing to resume: starting from the beginning")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    num = distributed.world_size()
    engine = f"DeepSpeed, ZeRO stage {zero_stage(start.run)}" if uses_deepspeed(start.run) else "no DeepSpeed"
    say(f"{amount(num, 'process')} on {device}, {engine}")
    if not distributed.is_launched() and torch.cuda.device_count() > 1:
        all_of_them = "deepspeed --module lsr_scale.launch --config ..."
        say(f"one of {torch.cuda.device_count()} GPUs is used; for all: {all_of_them}")


def _announce_dtype(start: Start, asked: str, say: Say) -> None:
    """Say which dtype auto is, and of a new run where the device is slow in the one that it asks for."""
    dtype, slow = start.run.model.dtype, without_bfloat16(local_device())
    if asked == "auto":
        because = ", as when the run began" if start.checkpoint else f", as {slow}" if slow else ""
        say(f"model.dtype: auto is {dtype} here{because}")
    elif dtype == "bfloat16" and slow and start.checkpoint is None:
        say(f"note: {slow}, so float32 is faster: --set model.dtype=auto")


def _prepare(
    start: Start, stop: StopOnSignal, say: Say, quiet: bool, shared: Shared | None
) -> tuple[RunData, Trainer, Samples]:
    """Return the data, the trainer, which fit the checkpoint, if there is one, and its samples; nothing is written yet.

    Raises:
        UserError: for a model, data, adapter or checkpoint that do not go together.
    """
    run, folder, checkpoint = start.run, start.folder, start.checkpoint
    begins_with = run.adapter.start_from
    where = f", starting from {begins_with}" if begins_with and not checkpoint else ""
    loading = f"loading {run.model.name} ({run.model.quantization}) and adapting it with {run.adapter.method}{where}"
    if begins_with and checkpoint and not METHODS[run.training["method"]].has_reference:
        # it has factors of its own, and tells what the adapter that was started from had that the run does not
        run = run.model_copy(update={"adapter": run.adapter.model_copy(update={"start_from": str(checkpoint)})})
    check_reporters(run.training["report_to"])
    watch = ConditionCallback(run.training["condition_tolerance"], run.training["condition_guard"], say)
    progress = Progress(folder.metrics, quiet=quiet or shared is not None)
    wanted = run.training["early_stopping"]
    early = [StopEarly(wanted["patience"], wanted["threshold"])] if wanted else []
    with suggest_base_option(None if checkpoint else run.model.name, "--set model.name=FOLDER"):
        read = read_data if shared is None or shared.rows is None else shared.rows.read
        data = read(run, checkpoint, say)
        if checkpoint:
            changed = reward_changes(select.run_folder_of(checkpoint).reward_record, run)
            for note in (*select.check_data(checkpoint, data.sources), *changed):
                say(f"note: {note}")
        for line in describe_rewards(run):
            say(line)
        if note := low_rate_note(run.training):
            say(f"note: {note}")
        say(loading)  # the rows were read before it, so that a mistake in one does not wait for the weights
        samples = Samples(data.prompts, run.eval.max_new_tokens, folder.samples, say)
        # in this order: progress refuses what is not finite, records what was measured before it, and counts the time
        # of no sample as a step's
        callbacks = [stop, *early, watch, samples, progress, DiscardBackup(folder)]
        callbacks += [] if shared is None else shared.callbacks
        trainer = build_trainer(run, folder, callbacks, say, data, checkpoint, shared)
    if checkpoint:
        for note in _check_adapter(trainer.model, checkpoint):
            say(f"note: {note}")
    return data, trainer, samples


def _check_adapter(model: Any, checkpoint: Path) -> list[str]:
    """Return how the base differs from the one of a checkpoint; raise where its adapter does not fit."""
    notes = check_base_of(checkpoint, model)
    if wrong := weight_mismatches(model, checkpoint):
        raise UserError(
            f"--resume {checkpoint}: its adapter does not fit this run's model and data\n" + "\n".join(wrong)
        )
    return notes


def _begin_folder(start: Start, data: RunData, say: Say) -> None:
    if outdated := begin(start, data):
        say(f"removed once a checkpoint is saved, what an earlier run left: {', '.join(outdated)}")


def _announce_training(run: RunConfig, trainer: Trainer, say: Say) -> None:
    """Say how much is trained, and on how much."""
    model: Any = trainer.model
    trainable = _num_trainable(trainer)
    say(f"trainable parameters: {trainable:,} of {base_description(model)['num_parameters'] + trainable:,}")
    say(f"training {'sequences' if run.training.get('packing') else 'rows'}: {_num_rows(trainer):,}")


def _num_trainable(trainer: Trainer) -> int:
    model: Any = trainer.model
    return model.get_nb_trainable_parameters()[0]


def _num_rows(trainer: Trainer) -> int:
    return len(trainer.train_dataset)  # pyright: ignore[reportArgumentType]


def _score_before(
    start: Start, tasks: dict[str, list[Example]], trainer: Trainer, say: Say, live: bool, encode: EncodesOnce
) -> Scores:
    """Return the scores before training, where they are wanted: a run that resumes reads those that it began with."""
    if tasks and start.checkpoint is not None:
        return evaluate.read_scores(start.folder, tasks, "before", say)
    if tasks and start.run.eval.before:
        return {"before": _score(start, tasks, trainer, "before", say, live, encode)}
    return {}


def _score(
    start: Start,
    tasks: dict[str, list[Example]],
    trainer: Trainer,
    when: str,
    say: Say,
    live: bool,
    encode: EncodesOnce,
) -> dict[str, TaskScore]:
    """Return the scores of the model as it is, every prediction saved."""
    model: Any = trainer.model
    tokenizer, batch_tokens = trainer.processing_class, start.run.eval.batch_tokens
    where = f"{when} training"
    scores = evaluate.score_tasks(tasks, model, tokenizer, say, where, batch_tokens, live=live, encode=encode)
    reshard(model)
    evaluate.save_predictions(start.folder, tasks, scores, when)
    return scores


def _held_out(run: RunConfig, data: RunData) -> HeldOut | None:
    """Return the rows that a classifier is scored on, None for a language model or where none are held out."""
    if run.model.task != "seq_cls" or data.validation is None:
        return None
    return HeldOut("validation", data.validation, run)


def _score_held_out_before(
    start: Start, held_out: HeldOut | None, trainer: Trainer, say: Say
) -> dict[str, dict[str, float]]:
    """Return a classifier's scores before training, where they are wanted; a run that resumes reads them."""
    if held_out is None:
        return {}
    if start.checkpoint is not None:
        outputs = held_out.read(start.folder, "before", say)
        return {} if outputs is None else {"before": held_out.score(outputs)}
    if not start.run.eval.before:
        return {}
    return {"before": score_in_training(held_out, trainer, start.folder, "before", say)}


class Trained(NamedTuple):
    """What came of training: how long it took, whose adapter it ended with, and a signal that came too late for it."""

    seconds: float
    best_step: int | None  # None: the last one's
    late_signal: int  # 0: none


def _run_trainer(start: Start, trainer: Trainer, stop: StopOnSignal, say: Say, shared: Shared | None) -> Trained:
    """Train to the end, or as far as `stop` says.

    Raises:
        Terminated: if a signal stopped training before its end.
        UserError: for numbers that are not finite, or a setting that a library refuses.
    """
    began = time.monotonic()
    say("training")
    with ExitStack() as around:
        if shared is None:
            for of_process in (ignore_library_warnings(), stop.signals.listening(), end_with_peers()):
                around.enter_context(of_process)
        around.enter_context(naming_settings(start.run))
        if shared is None:
            around.enter_context(keeping_live_line())
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    late_signal = stop.late_signal()  # every process asks, so none ends before all are here
    step = trainer.state.global_step
    if stop.stopped:
        raise Terminated(stop.stopped, f"after step {step}, a checkpoint is saved in {start.folder.path}")
    if stop.paused:
        say(f"stopped after step {step}, a checkpoint is saved")
        return Trained(time.monotonic() - began, None, late_signal)
    if start.checkpoint and start.step == step:
        say("nothing was left to train: the checkpoint is of the last step")
    early = early_stopping_of(trainer)
    if early and early.stopped:
        say(early.in_words(trainer.args, trainer.state))
    if start.folder.nonfinite.exists():
        counts = _count_nonfinite(start.folder)
        say(f"note: what was not finite counted for nothing (training.on_nonfinite: skip): {counts}")
    best_step = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if best_step:
        say(f"the adapter is that of step {best_step}, the best by {trainer.args.metric_for_best_model}")
    else:
        why = " (training.load_best_model_at_end: false)" if early and early.stopped else ""
        say(f"the adapter is that of the last step, {step}{why}")
        if better := _better_step(trainer, compared_by(start.run.model.task, start.run.training["method"])):
            say(better)
    return Trained(time.monotonic() - began, best_step, late_signal)


def _better_step(trainer: Trainer, metric: str) -> str:
    """Return a line on the evaluation that was better than the last one, and how to keep its adapter; "" for none.

    Args:
        trainer: After its last step.
        metric: What tells the better one where the run says nothing.
    """
    args = trainer.args
    name = f"eval_{(args.metric_for_best_model or metric).removeprefix('eval_')}"
    greater = args.greater_is_better if args.metric_for_best_model else not lower_is_better(metric)
    found = {row["step"]: row[name] for row in trainer.state.log_history if math.isfinite(row.get(name, math.nan))}
    if not found:
        return ""
    last = found[max(found)]
    best = (max if greater else min)(found, key=lambda step: found[step])
    if f"{found[best]:.4f}" == f"{last:.4f}":
        return ""
    if early_stopping_of(trainer):
        how = "training.load_best_model_at_end: true keeps the best step's adapter"
    else:
        how = (
            "training.early_stopping: {patience: 3} keeps the best step's adapter, and stops where it gets no better "
            "(training.load_best_model_at_end: true keeps it without stopping, where save_strategy and save_steps are "
            "those of the evaluations)"
        )
    return f"{name} was {found[best]:.4f} at step {best}, and is {last:.4f} at the last, {max(found)}; {how}"


def _count_nonfinite(folder: RunFolder) -> str:
    """Return how many batches and steps of a run were left out, and where more is said of them."""
    rows = read_metrics(folder.nonfinite)
    losses = sum("loss" in row for row in rows)
    steps = amount(len(rows) - losses, "step")
    return f"the loss of {amount(losses, 'batch')}, the gradient of {steps}; see {folder.nonfinite}"


def _save_adapter(folder: RunFolder, trainer: Trainer, trained: Trained, as_lora: bool, say: Say) -> None:
    """Save the adapter, and where that is asked for, as LoRA too.

    Raises:
        Terminated: if a signal came after the last step: the run ends here.
        UserError: if a factor is not finite, or the folder cannot be written.
    """
    model: Any = trainer.model
    check_finite(model, "after training")
    with ignore_library_warnings():
        save_adapter(trainer, folder.adapter)
    if distributed.is_main():
        Backup(folder).discard()
    say(f"adapter saved: {folder.adapter}")
    if as_lora and distributed.is_main():
        save_as_lora(folder, trainer.accelerator.unwrap_model(model))
        say(f"the same as PEFT's LoRA: {folder.lora}")
    if trained.late_signal:
        left = "what comes after it (scores, results.json, the report) was left out"
        if any(step_of(path) == trainer.state.global_step for path in folder.own_checkpoints()):
            left += "; for that, and no training: the same command with --resume auto"
        when = f"after the last step: training is complete, the adapter is saved in {folder.adapter}"
        raise Terminated(trained.late_signal, when, left)


def _write_results(
    start: Start,
    trainer: Trainer,
    trained: Trained,
    scores: Scores,
    of_classes: dict[str, dict[str, float]],
    began: float,
    notes: list[str],
) -> dict[str, Any]:
    """Write `results.json`, which is returned, and the card."""
    run, folder = start.run, start.folder
    results = {
        "method": run.adapter.method,
        **({} if run.training["method"] == "sft" else {"training_method": run.training["method"]}),
        "model": run.model.name,
        "quantization": run.model.quantization,
        "compute": run.training["compute"],
        "trainable_parameters": _num_trainable(trainer),
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors")),
        "steps": trainer.state.global_step,
        "train_rows": _num_rows(trainer),
        **summarize_metrics(folder.metrics, trained.best_step),
        "training_s": round(trained.seconds, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "num_processes": distributed.world_size(),
        "accuracy": evaluate.summary(scores),
        "notes": list(dict.fromkeys(notes)),
    }
    if of_classes:
        rounded = {when: {name: round(value, 6) for name, value in found.items()} for when, found in of_classes.items()}
        results |= {"labels": run.model.labels, "classification": {"validation": rounded}}
    files.write_json(folder.results, results)
    write_run_card(folder, run, results)
    return results
