"""A run from its first line on the screen to a folder that a person can read: score, train, score again, save."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import config, distributed, files
from lsr_scale.adapters.files import check_description, misfits, save_adapter
from lsr_scale.adapters.identity import base_description
from lsr_scale.config import RunConfig
from lsr_scale.errors import UserError
from lsr_scale.model import save_tokenizer
from lsr_scale.model.gather import reshard
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.paths import user_path
from lsr_scale.run import evaluate
from lsr_scale.run.folder import RunFolder, step_of
from lsr_scale.run.metrics import cut_back, read_metrics, summarize_metrics
from lsr_scale.run.plots import draw_conditions, draw_losses
from lsr_scale.run.start import Earlier, choose, recover
from lsr_scale.scoring.accuracy import TaskScore
from lsr_scale.screen import print_line
from lsr_scale.training.assembly import RunData, build_trainer, only_new_warnings, read_data, uses_deepspeed, zero_stage
from lsr_scale.training.callbacks.condition import WatchCondition
from lsr_scale.training.callbacks.progress import Progress, clock
from lsr_scale.training.callbacks.signals import StopOnSignal, Terminated, ends_with_others
from lsr_scale.training.checkpoint import select
from lsr_scale.training.settings import named
from lsr_scale.training.steps.nonfinite import check_finite


def train(
    run: RunConfig,
    name: str = "run",
    resume: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> RunFolder:
    """Do a run: score, train, score again, and leave a folder that a person can read (`RunFolder`).

    Args:
        run: The run.
        name: Stem for the folder under `runs/` where the run names none.
        resume: "auto" for the newest checkpoint in the run's folder, or the path of a checkpoint.
        overwrite: Start again in a folder that holds a run.
        quiet: Print results only.

    Returns:
        The run's folder.

    Raises:
        UserError: for what a user can mend.
    """
    started = time.monotonic()
    distributed.start(run.deepspeed.config is not None, run.training.get("ddp_timeout", distributed.TIMEOUT_S))

    def say(text: str) -> None:
        if distributed.is_main() and not quiet:
            print_line(text)

    chosen, lock = _agree(run, name, resume, overwrite)
    folder = chosen[1]
    try:
        with lock:
            try:
                return _train(*chosen, started=started, say=say, quiet=quiet, resumes=resume is not None)
            finally:
                if distributed.is_main():
                    Earlier(folder).settle_at_the_end()
    finally:
        if distributed.is_main():
            folder.release()


class _DropsEarlier(TrainerCallback):
    """Lets what stood in the folder before go once a step of this run is saved."""

    def __init__(self, folder: RunFolder) -> None:
        self.earlier = Earlier(folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.earlier.drop()


def _train(
    run: RunConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    notes: list[str],
    *,
    started: float,
    say: Callable[[str], None],
    quiet: bool,
    resumes: bool,
) -> RunFolder:
    """Do a run in the folder that was chosen for it."""
    main = distributed.is_main()
    live = main and not quiet
    say(f"run folder: {folder.path}")
    for note in notes:
        say(f"note: {note}")
    if resumes:
        say(f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting from the beginning")
    _say_machine(run, say)
    tasks = evaluate.load_tasks(run.eval)
    start = run.adapter.start_from
    where = f", starting from {start}" if start and not checkpoint else ""
    # a checkpoint has factors of its own, and says what the adapter that was started from had that the run does not
    start = str(checkpoint) if start and checkpoint else start
    begins = run.model_copy(update={"adapter": run.adapter.model_copy(update={"start_from": start})})
    say(f"loading {run.model.name} ({run.model.quantization}) and adapting it with {run.adapter.method}{where}")
    progress = Progress(folder.metrics, quiet=quiet)
    stop = StopOnSignal(say)
    watch = WatchCondition(run.training["condition_tolerance"], run.training["condition_guard"], say)
    # in this order: progress refuses what is not finite, and records what was measured before it
    with suggest_base_option(None if checkpoint else run.model.name, "--set model.name=FOLDER"):
        data = read_data(run, checkpoint, say)
        if checkpoint:
            for note in select.check_data(checkpoint, data.sources):
                say(f"note: {note}")
        trainer = build_trainer(begins, folder, [stop, watch, progress, _DropsEarlier(folder)], say, data)
    model: Any = trainer.model
    if checkpoint:
        for note in _check_adapter(model, checkpoint):
            say(f"note: {note}")
    _begin(run, folder, checkpoint, data, say)
    num_rows = len(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
    trainable, _ = model.get_nb_trainable_parameters()
    say(f"trainable parameters: {trainable:,} of {base_description(model)['num_parameters'] + trainable:,}")
    say(f"training {'sequences' if run.training.get('packing') else 'rows'}: {num_rows:,}")

    scores: dict[str, dict[str, TaskScore]] = {}

    def score(when: str) -> None:
        scores[when] = evaluate.score_tasks(
            tasks,
            model,
            trainer.processing_class,
            say,
            f"{when} training",
            run.eval.batch_tokens,
            live=live,
        )
        reshard(model)
        evaluate.save_predictions(folder, tasks, scores[when], when)

    if tasks and run.eval.before and checkpoint is None:
        score("before")
    elif tasks and checkpoint is not None:
        scores |= evaluate.read_scores(folder, tasks, "before", say)
    before_training = time.monotonic()
    begins_at = select.step(checkpoint) if checkpoint else 0  # training may remove the checkpoint
    say("training")
    with only_new_warnings(), stop.listening(), ends_with_others(), named(run):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    late = stop.came_late()  # every process asks, so none ends before all are here
    if stop.stopped:
        step = trainer.state.global_step
        raise Terminated(stop.stopped, f"after step {step}, a checkpoint is saved in {folder.path}")
    if checkpoint and begins_at == trainer.state.global_step:
        say("nothing was left to train: the checkpoint is of the last step")
    if folder.nonfinite.exists():
        say(f"note: what was not finite counted for nothing (training.on_nonfinite: skip): {_nonfinite(folder)}")
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if best:
        say(f"the adapter is that of step {best}, the best by {trainer.args.metric_for_best_model}")
    trained = time.monotonic()
    check_finite(model, "after training")
    with only_new_warnings():
        save_adapter(trainer, folder.adapter)
    if main:
        Earlier(folder).drop()
    say(f"adapter saved: {folder.adapter}")
    if late:
        raise Terminated(late, f"after the last step, the adapter is saved in {folder.adapter}")
    if tasks:
        score("after")
    if main:
        results = {
            "method": run.adapter.method,
            "model": run.model.name,
            "quantization": run.model.quantization,
            "trainable_parameters": trainable,
            "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors")),
            "steps": trainer.state.global_step,
            "train_rows": num_rows,
            **summarize_metrics(folder.metrics, best),
            "training_s": round(trained - before_training, 1),
            "wall_s": round(time.monotonic() - started, 1),
            "num_processes": distributed.world_size(),
            "accuracy": evaluate.summary(scores),
        }
        files.write_json(folder.results, results)
        title = f"{run.adapter.method} on {run.model.name}"
        draw_losses(folder.metrics, folder.curve, title)
        draw_conditions(folder.metrics, folder.condition, title)
        evaluate.print_results(folder, results, scores)
        say(f"done in {clock(time.monotonic() - started)}")
    distributed.stop()
    return folder


def _nonfinite(folder: RunFolder) -> str:
    """Return how many batches and steps of a run were left out, and where more is said of them."""
    rows = read_metrics(folder.nonfinite)
    losses = sum("loss" in row for row in rows)
    return f"{losses:,} losses of batches, {len(rows) - losses:,} gradients of steps; see {folder.nonfinite}"


def _say_machine(run: RunConfig, say: Callable[[str], None]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    num = distributed.world_size()
    engine = f"DeepSpeed, ZeRO stage {zero_stage(run)}" if uses_deepspeed(run) else "no DeepSpeed"
    say(f"{num} process{'es' if num > 1 else ''} on {device}, {engine}")
    if not distributed.is_launched() and torch.cuda.device_count() > 1:
        say(f"one of {torch.cuda.device_count()} GPUs is used; for all: deepspeed launch/train.py --config ...")


_Chosen = tuple[RunConfig, RunFolder, Path | None, list[str]]


def _agree(run: RunConfig, name: str, resume: str | None, overwrite: bool) -> tuple[_Chosen, ExitStack]:
    """Return what `_choose` returns to the main process, or raise what it raises, on every process.

    With it comes what keeps the folder to this run until it is left.
    """
    _check_alike(run, resume, overwrite)
    chosen: Any = None
    lock = ExitStack()
    if distributed.is_main():
        try:
            fitted, *rest = _choose(run, name, resume, overwrite, lock)
            chosen = (fitted.training, *rest)  # a run cannot be pickled
        except UserError as error:
            lock.close()
            chosen = str(error)
    chosen = distributed.broadcast(chosen)
    if isinstance(chosen, str):
        raise UserError(chosen)
    training, *rest = chosen
    return (run.model_copy(update={"training": training}), *rest), lock


def _check_alike(run: RunConfig, resume: str | None, overwrite: bool) -> None:
    """Raise, on every process, where one of them was started with another run or other options than the first."""
    started = distributed.gather([{**run.model_dump(), "--resume": resume, "--overwrite": overwrite}])
    for rank, other in enumerate(started):
        if differing := [text for _, text in select.changes(started[0], other)]:
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise UserError(
                f"rank {rank} was started with another configuration than rank 0: {'; '.join(differing[:8])}{more}; "
                "start all processes with one file and the same options"
            )


def _choose(run: RunConfig, name: str, resume: str | None, overwrite: bool, lock: ExitStack) -> _Chosen:
    """Return the run, its folder, the checkpoint to go on from, and what the user should know about that.

    The run is the one given, but for the gradient accumulation where another number of processes goes on.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite starts it again: give one of them")
    output_dir = run.training["output_dir"]

    def check(checkpoint: Path) -> tuple[RunConfig, list[str]]:
        fitted = select.fit(checkpoint, run, distributed.world_size())
        return fitted, select.check(checkpoint, fitted, distributed.world_size())

    if resume not in (None, "auto"):
        checkpoint = user_path(resume, "--resume")
        home = select.home(checkpoint)
        recover(RunFolder(home))
        run, notes = check(checkpoint)
        goes_on = output_dir is None or user_path(output_dir, "training.output_dir").resolve() == home
        return run, choose(output_dir or str(home), name, goes_on, overwrite, lock), checkpoint, notes
    folder = choose(output_dir, name, resume == "auto", overwrite, lock)
    if resume is None:
        return run, folder, None, []
    newest, notes = select.newest(folder)
    if newest is not None:
        run, changed = check(newest)
        return run, folder, newest, [*notes, *changed]
    if folder.has_adapter():
        raise UserError(
            f"{folder.path}: the run is finished, and no whole checkpoint is left to go on from; --overwrite starts "
            "it again"
        )
    if notes:
        raise UserError(
            f"{folder.path}: no checkpoint is whole; mend or remove them, or --overwrite starts again\n"
            + "\n".join(notes)
        )
    return run, folder, None, []


def _begin(
    run: RunConfig,
    folder: RunFolder,
    checkpoint: Path | None,
    data: RunData,
    say: Callable[[str], None],
) -> None:
    """Make the folder this run's, once nothing stands in its way any more; what an earlier one left is set aside."""
    if distributed.is_main():
        goes_on = checkpoint is not None and select.home(checkpoint) == folder.path.resolve()
        after = select.step(checkpoint) if checkpoint is not None and goes_on else -1
        old = [path for path in folder.own_checkpoints() if step_of(path) > after]
        if goes_on:  # somebody renamed or copied these, and may miss them
            old = [path for path in old if not select.is_misnamed(path)]
        if old:
            say(f"removed once a step is saved, what an earlier run left: {', '.join(path.name for path in old)}")
        begins_with = folder.config, folder.environment, folder.data, folder.metrics
        Earlier(folder).keep(old if goes_on else [*folder.written(), *old], begins_with if goes_on else (), after)
        for path in folder.path.glob(".checkpoint-*.part"):  # a kill left it in the midst of a save
            files.remove(path)
        if goes_on and folder.nonfinite.exists():  # what is done again is noted again
            cut_back(folder.nonfinite, after)
        files.write_json(folder.environment, files.environment())
        files.write_json(folder.data, data.sources)
        save_tokenizer(data.tokenizer, folder.tokenizer)
        begun = select.as_begun(checkpoint, run) if checkpoint is not None else run
        files.write_text(folder.config, config.dump_yaml(begun))  # last: it makes the folder a run
    distributed.broadcast(None)  # nobody writes before that


def _check_adapter(model: Any, checkpoint: Path) -> list[str]:
    """Return how the base differs from the one of a checkpoint; raise where its adapter does not fit."""
    notes = check_description(model, checkpoint)
    wrong = misfits(model, checkpoint)
    if wrong:
        raise UserError(
            f"--resume {checkpoint}: its adapter does not fit this run's model and data\n" + "\n".join(wrong)
        )
    return notes
