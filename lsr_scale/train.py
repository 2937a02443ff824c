"""From a run to a trained adapter: the assembly. The loop is TRL's SFTTrainer; for classifiers transformers' Trainer.

    build_trainer(run, folder)   everything up to `trainer.train()`
    train(run, ...)              score, train, score again, save; what `lsr-scale train` and launch/train.py call

The trainer's arguments come first: under ZeRO-3 a DeepSpeed configuration must exist before the model is loaded. The
adapter is injected by us, so that a refused target costs seconds, and its factors are kept in float32: on a quantized
base SFTTrainer casts what trains to bfloat16 in place, which is undone after its constructor.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from lsr_scale import adapters, config, distributed, evaluate, record
from lsr_scale.adapter_files import is_sharded, save_adapter
from lsr_scale.config import RunConfig
from lsr_scale.data.formats import build_dataset
from lsr_scale.data.preview import prepare_tokenizer, tokenize_classification
from lsr_scale.errors import UserError
from lsr_scale.model import base_description, base_of, load_tokenizer
from lsr_scale.progress import Progress, clock, draw_losses, read_metrics
from lsr_scale.run_folder import RunFolder

logger = logging.getLogger(__name__)

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}


def build_trainer(run: RunConfig, folder: RunFolder, callbacks: list[TrainerCallback] | None = None) -> Trainer:
    """Return the trainer of a run, its model loaded, quantized and adapted.

    Args:
        run: The run.
        folder: Where checkpoints go.
        callbacks: Added to the trainer's own.

    Raises:
        UserError: for a model, data or adapter that do not go together.
    """
    arguments = _arguments(run, folder)
    tokenizer = load_tokenizer(run.model.name, revision=run.model.revision, chat_template=run.model.chat_template)
    datasets = {"train": build_dataset(run.data.train, "train", model_task=run.model.task)}
    if run.data.validation:
        datasets["eval"] = build_dataset(run.data.validation, "validation", model_task=run.model.task)
    kind = datasets["train"][1]
    if any(other != kind for _, other in datasets.values()):
        raise UserError(f"data.validation: is {datasets['eval'][1]}, but data.train is {kind}; give rows of one kind")
    for note in prepare_tokenizer(tokenizer, kind):
        logger.info(note)
    model = adapt(run, base_of(run.model, run.training["seed"]))

    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "train_dataset": datasets["train"][0],
        "eval_dataset": datasets["eval"][0] if "eval" in datasets else None,
    }
    with _factors_untouched(model), _only_new_warnings():
        trainer = _classifier_trainer(run, common) if run.model.task == "seq_cls" else _sft_trainer(common)
    trainer.remove_callback(PrinterCallback)  # prints what Progress prints
    return trainer


def _arguments(run: RunConfig, folder: RunFolder) -> Any:
    from lsr_scale.training_fields import training_arguments_class

    values = config.training_arguments(run) | {"output_dir": str(folder.path), "use_cpu": not torch.cuda.is_available()}
    if distributed.is_launched() and run.deepspeed.config is not None:
        values["deepspeed"] = run.deepspeed.config
    try:
        return training_arguments_class(run.model.task)(**values)
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from error


def adapt(run: RunConfig, base: Any) -> PeftModel:
    """Return the base with the run's adapter in it, initialized by the run's seed."""
    peft_config = adapters.peft_config(run.adapter.method, run.adapter.options, TASK_TYPES[run.model.task])
    set_seed(run.training["seed"])
    model = get_peft_model(base, peft_config)
    return model  # pyright: ignore[reportReturnType]


def _sft_trainer(common: dict[str, Any]) -> Trainer:
    from trl import SFTTrainer

    return SFTTrainer(**common)


def _classifier_trainer(run: RunConfig, common: dict[str, Any]) -> Trainer:
    for split in ("train_dataset", "eval_dataset"):
        if common[split] is not None:
            common[split] = tokenize_classification(
                common[split], common["processing_class"], run.training["max_length"]
            )
    return Trainer(**common, compute_metrics=_classification_metrics if run.model.num_labels != 1 else None)


def _classification_metrics(prediction: Any) -> dict[str, float]:
    hits = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(hits.mean())}


@contextmanager
def _factors_untouched(model: torch.nn.Module) -> Iterator[None]:
    """Undo SFTTrainer's cast of trainable parameters to bfloat16, rounding included."""
    kept = {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype == torch.float32
    }
    yield
    for name, parameter in model.named_parameters():
        if name in kept and parameter.dtype != torch.float32:
            parameter.data = kept[name].to(parameter.device)


@contextmanager
def _only_new_warnings() -> Iterator[None]:
    """Leave out what transformers and TRL warn of in each other's names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b.*")
        # PEFT would compare the vocabulary with the hub's; no embedding is ever resized here
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


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
    distributed.start(run.deepspeed.config is not None)
    main = distributed.is_main()

    def say(text: str) -> None:
        if main and not quiet:
            print(text, flush=True)

    folder, checkpoint = _prepare_folder(run, name, resume, overwrite)
    say(f"run folder: {folder.path}")
    if resume is not None:
        say(f"resuming from {checkpoint}" if checkpoint else "nothing to resume: starting from the beginning")
    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    engine = f"DeepSpeed, ZeRO stage {_zero_stage(run)}" if _uses_deepspeed(run) else "one process"
    say(f"{distributed.world_size()} process(es) on {devices}, {engine}")
    say(f"loading {run.model.name} ({run.model.quantization}) and adapting it with {run.adapter.method}")

    progress = Progress(folder.metrics, quiet=quiet)
    trainer = build_trainer(run, folder, [progress])
    model: Any = trainer.model
    trainable, _ = model.get_nb_trainable_parameters()
    say(f"trainable parameters: {trainable:,} of {base_description(model)['num_parameters'] + trainable:,}")
    say(f"training rows: {len(trainer.train_dataset):,}")  # pyright: ignore[reportArgumentType]

    tokenizer: Any = trainer.processing_class
    scores: dict[str, dict[str, Any]] = {}
    if run.eval.tasks and run.eval.before and checkpoint is None:
        if is_sharded(model):
            say("the base is sharded: accuracy before training is left out (lsr-scale eval measures it)")
        else:
            scores["before"] = evaluate.score_tasks(run, model, tokenizer, say, "before training")
            evaluate.save_predictions(folder, scores["before"], "before")
    before_training = time.monotonic()
    say("training")
    with _only_new_warnings():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = time.monotonic()
    _check_finite(model)
    with _only_new_warnings():
        save_adapter(trainer, folder.adapter)
    say(f"adapter saved: {folder.adapter}")
    if run.eval.tasks:
        shared = trainer.is_deepspeed_enabled and _zero_stage(run) == 3
        scores["after"] = evaluate.score_tasks(run, model, tokenizer, say, "after training", split=not shared)
        evaluate.save_predictions(folder, scores["after"], "after")
        if "before" not in scores:
            scores |= evaluate.read_scores(folder, "before")
    if main:
        results = {
            "method": run.adapter.method,
            "model": run.model.name,
            "quantization": run.model.quantization,
            "trainable_parameters": trainable,
            "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.glob("*.safetensors")),
            "steps": trainer.state.global_step,
            "train_rows": len(trainer.train_dataset),  # pyright: ignore[reportArgumentType]
            **_last_metrics(folder),
            "training_s": round(trained - before_training, 1),
            "wall_s": round(time.monotonic() - started, 1),
            "num_processes": distributed.world_size(),
            "accuracy": evaluate.summary(scores),
        }
        record.write_json(folder.results, results)
        draw_losses(folder.metrics, folder.curve, f"{run.adapter.method} on {run.model.name}")
        evaluate.print_results(folder, results, scores)
        say(f"done in {clock(time.monotonic() - started)}")
    distributed.stop()
    return folder


def _prepare_folder(run: RunConfig, name: str, resume: str | None, overwrite: bool) -> tuple[RunFolder, Path | None]:
    """Choose the folder and the checkpoint to go on from, on the main process for all; write what is known already."""
    from lsr_scale import run_folder

    try:
        chosen: Any = None
        if distributed.is_main():
            if resume not in (None, "auto"):
                checkpoint = Path(str(resume)).expanduser()
                if not (checkpoint / "trainer_state.json").is_file():
                    raise UserError(f"--resume {resume}: not a checkpoint (there is no trainer_state.json in it)")
                where = run.training["output_dir"] or str(checkpoint.resolve().parent)
                chosen = run_folder.choose(where, name, True, False), checkpoint
            else:
                folder = run_folder.choose(run.training["output_dir"], name, resume == "auto", overwrite)
                saved = folder.checkpoints() if resume == "auto" else []
                chosen = folder, (saved[-1] if saved else None)
            folder, checkpoint = chosen
            if overwrite and folder.is_run():
                _clear(folder)
            record.write_text(folder.config, config.dump_yaml(run))
            record.write_json(folder.environment, record.environment())
    except UserError as error:
        chosen = str(error)
    chosen = distributed.broadcast(chosen)
    if isinstance(chosen, str):
        raise UserError(chosen)
    return chosen


def _clear(folder: RunFolder) -> None:
    """Remove what a run wrote, and nothing else that lies in its folder."""
    for path in (*folder.checkpoints(), folder.adapter, folder.path / "eval"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.metrics, folder.curve, folder.results):
        path.unlink(missing_ok=True)


def _check_finite(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(
                f"{name}: not finite after training, so the adapter is not saved; lower training.learning_rate, or "
                "resume from an earlier checkpoint with --resume PATH"
            )


def _zero_stage(run: RunConfig) -> int:
    return (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)


def _uses_deepspeed(run: RunConfig) -> bool:
    return distributed.is_launched() and run.deepspeed.config is not None


def _last_metrics(folder: RunFolder) -> dict[str, Any]:
    rows = [row for row in read_metrics(folder.metrics) if "loss" in row]
    if not rows:
        return {}
    last = rows[-max(1, len(rows) // 10) :]
    speeds = sorted(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    return {
        "final_loss": round(sum(row["loss"] for row in last) / len(last), 4),
        "tokens": rows[-1].get("num_tokens"),
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
    }
