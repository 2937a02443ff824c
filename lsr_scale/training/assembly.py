"""From a run to its trainer: TRL's SFTTrainer, for classifiers transformers' Trainer, with nothing of the loop our own.

The trainer's arguments come first: what is wrong with them costs seconds, a model takes minutes. The adapter is
injected by us, so that a refused target costs seconds too, and its factors are kept in float32: on a quantized base
SFTTrainer casts what trains to bfloat16 in place, which is undone after its constructor.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from packaging.version import Version
from peft import PeftConfig, PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from lsr_scale import adapters, config, distributed
from lsr_scale.adapters.coverage import left_out
from lsr_scale.adapters.files import find_start, load_adapter
from lsr_scale.adapters.identity import base_description
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.peft import last_names
from lsr_scale.config import RunConfig
from lsr_scale.config.training import checkpoints_layers, training_arguments_class
from lsr_scale.data.cache import cached
from lsr_scale.data.classification import count_classification, tokenize_classification
from lsr_scale.data.formats import Kind, build_dataset, load_source
from lsr_scale.data.model_limits import check_model_limits
from lsr_scale.data.token_counts import CountsTokens, TokenCounts
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, row_check, template_notes
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.fused import FuseReport, fuse
from lsr_scale.fused.cuda_graphs import StepGraphs, graphs_fallback_reason
from lsr_scale.model import load_base_for, load_config, meta_model, read_tokenizer, tokenizer_of
from lsr_scale.model.shard import Sharding, is_sharded
from lsr_scale.model.tokenizer import has_tokenizer, same_state
from lsr_scale.run.folder import RunFolder
from lsr_scale.scoring import classification
from lsr_scale.training.callbacks.memory import FitMemoryCallback, max_forward_tokens, row_lengths
from lsr_scale.training.checkpoint import select
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.settings import named
from lsr_scale.training.steps.deepspeed_api import check_release
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.graphs import GraphSteps, PackedCollator, host_bound
from lsr_scale.training.steps.head_loss import HeadCollator, HeadLoss, why_not_own_head
from lsr_scale.training.steps.loss_check import LossCheck


@dataclass(frozen=True)
class RunData:
    """The rows of a run, their kind (`KIND_MEANING`), where they came from, and the tokenizer that takes them.

    `sources` holds a list a part ("train", "validation"), of a `Provenance` as a dictionary a source.
    """

    train: Dataset
    validation: Dataset | None
    kind: Kind
    sources: dict[str, list[dict[str, Any]]]
    tokenizer: Any


def read_data(
    run: RunConfig, checkpoint: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> RunData:
    """Return a run's rows and tokenizer.

    Args:
        run: The run.
        checkpoint: What the run goes on from, whose tokenizer it keeps.
        say: Told, in a line each, what a user should know of the tokenizer.

    Raises:
        UserError: for a source that cannot be read, rows that do not fit the run's task, its chat template or its
            number of labels, or validation rows of another kind than those for training.
    """
    parts = {"train": run.data.train, "validation": run.data.validation or []}
    read = {part: [load_source(source, part) for source in sources] for part, sources in parts.items()}
    tokenizer = _tokenizer(run, checkpoint, lambda text: say(f"note: {text}"))
    options: dict[str, Any] = {"model_task": run.model.task, "check": row_check(tokenizer, run.model.num_labels)}
    train, kind = build_dataset(parts["train"], "train", loaded=read["train"], **options)
    validation = None
    if read["validation"]:
        validation, other = build_dataset(parts["validation"], "validation", loaded=read["validation"], **options)
        if other != kind:
            raise UserError(f"data.validation: is {other}, but data.train is {kind}; give rows of one kind")
    sources = {part: [rows.provenance.to_dict() for rows in found] for part, found in read.items()}
    return RunData(train, validation, kind, sources, tokenizer)


def build_trainer(
    run: RunConfig,
    folder: RunFolder,
    callbacks: list[TrainerCallback] | None = None,
    say: Callable[[str], None] = lambda text: None,
    data: RunData | None = None,
) -> Trainer:
    """Return the trainer of a run, its model loaded, quantized and adapted.

    Args:
        run: The run.
        folder: Where checkpoints go.
        callbacks: Added to the trainer's own.
        say: Told, in a line each, what a user should know of how the run is set up.
        data: What `read_data` returned; read here by default.

    Raises:
        UserError: for a model, data or adapter that do not go together.
    """
    _check_optimizer(run)
    if uses_deepspeed(run):
        check_release()
    arguments = _arguments(run, folder)
    data = data or read_data(run, say=say)
    tokenizer = data.tokenizer
    assistant_only = bool(run.training.get("assistant_only_loss"))
    prepared = prepare_tokenizer(tokenizer, data.kind, assistant_only=assistant_only)
    for note in (*prepared, *template_notes(data.train, tokenizer)):
        say(f"note: {note}")
    check_run_fits(run, data)
    start = _start_of(run)
    if uses_deepspeed(run) and (unused := config.without_effect(run.deepspeed.config or {})):
        how = "the frozen base is gathered a layer at a time, and gradients are averaged all at once"
        say(f"note: deepspeed.config: {', '.join(unused)}: no effect, {how}")
    with only_new_warnings():
        seed, sharding = run.training["seed"], _sharding(run, start)
        base = load_base_for(run.model, seed, sharding, lambda line: say(f"note: {line}"))
        model, differences = adapt(run, base, start)
    targets = run.adapter.options.get("target_modules")
    for note in (*differences, *left_out(model, run.model.quantization, targets, run.model.dtype)):
        say(f"note: {note}")
    if arguments.gradient_checkpointing and not base.supports_gradient_checkpointing:
        arguments.gradient_checkpointing = arguments.activation_checkpointing = False
        say(f"note: {base.config.model_type} models know no activation checkpointing: all activations are kept")
    report = _fuse(run, model, arguments)
    if report is not None:
        say(str(report))

    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "train_dataset": cached(data.train),
        "eval_dataset": None if data.validation is None else cached(data.validation),
    }
    with _factors_untouched(model), only_new_warnings(), named(run):
        trainer = _classifier_trainer(run, common) if run.model.task == "seq_cls" else _sft_trainer(common)
    limit, num_left = run.training["max_length"], len(trainer.train_dataset)  # pyright: ignore[reportArgumentType]
    if not num_left:
        raise UserError(
            f"data.train: training.max_length ({limit}) cuts off everything to be learned in all rows; raise it"
        )
    if trainer.eval_dataset is not None and not len(trainer.eval_dataset):  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"data.validation: training.max_length ({limit}) cuts off everything to be learned in all rows; raise it"
        )
    if (lost := len(data.train) - num_left) > 0 and not run.training.get("packing"):
        say(
            f"note: {lost:,} of {lost + num_left:,} training rows are left out: training.max_length ({limit}) cuts off "
            "all that is to be learned of them; raise it"
        )
    for split, where, rows in (("train", "data.train", data.train), ("eval", "data.validation", data.validation)):
        if rows is None:
            continue
        if run.model.task == "seq_cls":
            _, notes = count_classification(where, rows, tokenizer, limit)
        else:  # there are none where dataset_kwargs skips TRL's preparation
            count = getattr(trainer, "token_counts", {}).get(split, TokenCounts())
            notes = count.notes(where, tokenizer, run.training)
        for note in notes:
            say(f"note: {note}")
    stated, (longest, _) = getattr(base.config.get_text_config(), "max_position_embeddings", 0), row_lengths(trainer)
    if stated and longest is not None and longest > stated and not run.training.get("packing"):
        say(
            f"note: the longest row has {longest:,} tokens, more than the {stated:,} that {run.model.name} was made "
            "for (max_position_embeddings); what it predicts beyond is untrained"
        )
    if report is not None and report.fused and _fits_memory(run):
        trainer.add_callback(FitMemoryCallback(max_forward_tokens(trainer), say))
    if run.model.task == "causal_lm" and report is not None and report.fused:
        _use_own_head(run, trainer)
    if run.model.task == "causal_lm":
        _replay_steps(run, trainer, report, say)
    trainer.on_nonfinite = run.training["on_nonfinite"]  # pyright: ignore[reportAttributeAccessIssue]
    trainer.remove_callback(PrinterCallback)  # prints what Progress prints
    if not arguments.push_to_hub:
        trainer.create_model_card = lambda *_, **__: None  # a template for the hub, among files to be read
    return trainer


def check_run_fits(run: RunConfig, data: RunData) -> None:
    """Refuse data that a run's model has no embeddings or positions for, before the model is loaded.

    Raises:
        UserError: naming the row.
    """
    section = run.model
    model_config = load_config(section.name, section.revision)
    empty = partial(meta_model, model_config, section.task, section.num_labels)
    parts = {"train": data.train, "validation": data.validation}
    given = {name: dataset for name, dataset in parts.items() if dataset is not None}
    check_model_limits(given, data.kind, data.tokenizer, model_config, run.training, empty)


def _tokenizer(run: RunConfig, checkpoint: Path | None, note: Callable[[str], None]) -> Any:
    """Return a run's tokenizer: where it goes on, the one that it began with."""
    home = None if checkpoint is None else RunFolder(select.home(checkpoint)).tokenizer
    if home is None or not has_tokenizer(home):
        return tokenizer_of(run, say=note)
    saved = read_tokenizer(home)
    try:
        differs = not same_state(tokenizer_of(run, say=lambda text: None), saved)
    except UserError:
        differs = True
    if differs:
        note(
            "the end token, padding or chat template are no longer those that the run began with, or cannot be read; "
            f"it goes on with those in {home}"
        )
    return saved


def _arguments(run: RunConfig, folder: RunFolder) -> Any:
    values = config.training_arguments(run) | {"output_dir": str(folder.path), "use_cpu": not torch.cuda.is_available()}
    values.pop("eos_token", None)  # the tokenizer has it; a run that goes on keeps the one that it began with
    values.setdefault("log_level_replica", "error")  # the main process speaks for all
    if run.model.task == "seq_cls":
        values.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens/s; SFTTrainer counts by itself
    if torch.cuda.is_available() and values.get("accelerator_config") is None:
        # or a batch's way to the GPU waits for the step before it
        values["accelerator_config"] = {"non_blocking": values.get("dataloader_pin_memory", True)}
    values.setdefault("ddp_find_unused_parameters", False)  # every factor takes part in every step
    if run.deepspeed.config is not None and uses_deepspeed(run):
        # accumulation follows the number of processes, whatever number stands there
        numbers = dict.fromkeys(config.OF_TRAINING, "auto")
        values["deepspeed"] = config.engine_config(run.deepspeed.config) | numbers
    with named(run):
        arguments: Any = training_arguments_class(run.model.task)(**values)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: torch's DataParallel cannot copy a quantized layer
    return arguments


def _sharding(run: RunConfig, start: Path | None) -> Sharding | None:
    """Return how a run's base is sharded among its processes, None where it is replicated.

    Modules that are fully trained stay replicated: `modules_to_save` of the run, or of the adapter that it starts from.
    """
    content = run.deepspeed.config
    if content is None or zero_stage(run) != 3 or not uses_deepspeed(run):
        return None
    options: Any = PeftConfig.from_pretrained(str(start)) if start else _peft_config(run)
    return Sharding(config.offloads_parameters(content), options.modules_to_save or ())


def _check_optimizer(run: RunConfig) -> None:
    """Refuse, before anything is loaded, an optimizer whose state belongs to no one parameter where ZeRO shards it."""
    name, stage = run.training["optim"], zero_stage(run)
    if uses_deepspeed(run) and stage > 0 and "8bit" in name:
        raise UserError(
            f"training.optim: {name} keeps its state in blocks over all parameters, which no checkpoint can hold by "
            f"parameter under ZeRO-{stage}; use adamw_torch, or set deepspeed.config to zero0"
        )


def _fuse(run: RunConfig, model: PeftModel, arguments: Any) -> FuseReport | None:
    """Make the model's layers run fused, if the run wants it and they can, and return what came of it."""
    wanted = run.training["fused"]
    if wanted == "off" or (wanted == "auto" and not torch.cuda.is_available()):
        return None
    recompute = "full" if checkpoints_layers(run.training) else "none"
    # what is gathered anew for every pass cannot be held from pass to pass
    holds = run.training["memory"] == "speed" and not is_sharded(model)
    report = fuse(model.train(), recompute, cache_weights=holds)
    layers = [*report.fused, *report.unfused]
    if layers:
        # the layers see to it themselves, fused or not; transformers 5.23 reads the second name
        arguments.gradient_checkpointing = arguments.activation_checkpointing = False
    return report


def _use_own_head(run: RunConfig, trainer: Any) -> None:
    """Have the fused head compute a trainer's loss, where it can."""
    if why_not_own_head(trainer.model.get_base_model(), vars(trainer.args)) is None:
        trainer.data_collator = HeadCollator(trainer.data_collator)


def _replay_steps(run: RunConfig, trainer: Any, report: FuseReport | None, say: Callable[[str], None]) -> None:
    """Have a trainer's steps replay CUDA graphs, if the run wants it and they can, and it pays.

    Raises:
        UserError: where the run insists on what cannot be.
    """
    wanted = run.training["cuda_graphs"]
    if wanted == "off":
        return
    model: Any = trainer.model
    longest, mean = row_lengths(trainer)
    reason = None
    if report is None or report.unfused or not report.fused:
        reason = "the decoder layers do not run fused"
    elif uses_deepspeed(run) or distributed.world_size() > 1:
        reason = "several processes, or DeepSpeed, handle gradients as they come"
    elif longest is None or mean is None:
        reason = "nobody knows how long rows are"
    reason = reason or graphs_fallback_reason(model.get_base_model(), vars(trainer.args))
    if reason is not None or longest is None or mean is None:
        if wanted == "on":
            raise UserError(f"training.cuda_graphs: on, but they cannot be: {reason}")
        return
    tokens = round(mean * trainer.args.per_device_train_batch_size)
    if wanted == "auto" and not host_bound(base_description(model)["num_parameters"], len(report.fused), tokens):  # pyright: ignore
        return
    trainer.graphs, trainer.say = StepGraphs(model.get_base_model()), say
    trainer.data_collator = PackedCollator(trainer.data_collator, longest)
    say("steps replay CUDA graphs from the third on")


def _fits_memory(run: RunConfig) -> bool:
    """Tell whether a run's fused layers shall keep what fits, and have a GPU to fit it into."""
    training = run.training
    return training["memory"] == "auto" and training["gradient_checkpointing"] is None and torch.cuda.is_available()


def _start_of(run: RunConfig) -> Path | None:
    """Return the folder of the adapter that a run starts from, looked at before anything large is loaded."""
    if run.adapter.start_from is None:
        return None
    return find_start(run.adapter.start_from, _peft_config(run))


def _peft_config(run: RunConfig) -> Any:
    return adapters.peft_config(run.adapter.method, run.adapter.options, adapters.TASK_TYPES[run.model.task])


def adapt(run: RunConfig, base: Any, start: Path | None = None) -> tuple[PeftModel, list[str]]:
    """Return the base with the run's adapter in it, and differences from an earlier training that a user should know.

    Args:
        run: The run.
        base: Its base model.
        start: Folder of the adapter whose factors are taken; None draws them by the run's seed.
    """
    _check_whole(run, base)
    set_seed(run.training["seed"])
    if start:
        return load_adapter(base, start, trainable=True)
    return inject(base, run.adapter.method, run.adapter.options, run.model.task), []


def _check_whole(run: RunConfig, base: torch.nn.Module) -> None:
    """Refuse modules to be trained whole that the base does not have, of which PEFT says nothing, or in few bits."""
    modules = {name: module for name, module in base.named_modules() if name}
    for wanted in run.adapter.options.get("modules_to_save") or ():
        matched = [module for name, module in modules.items() if name.endswith(wanted)]
        if not matched:
            near = did_you_mean(wanted, last_names(modules))
            raise UserError(f"adapter.modules_to_save: {wanted!r} is no module of {run.model.name}; {near}")
        if not all(parameter.is_floating_point() for module in matched for parameter in module.parameters()):
            raise UserError(
                f"adapter.modules_to_save: {wanted!r} is quantized ({run.model.quantization}), which cannot be "
                "trained whole; name modules that are not, such as lm_head, embed_tokens or norm, or adapt it with "
                "adapter.target_modules"
            )


def _sft_trainer(common: dict[str, Any]) -> Trainer:
    import trl
    from trl import SFTTrainer

    has_triton = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if Version(trl.__version__) < Version("1.16") and not has_triton:
        raise UserError(
            f"TRL {trl.__version__} computes its loss with Triton, on a GPU only; to train on the CPU: "
            "pip install 'trl>=1.16,<1.17'"
        )

    class OurSFTTrainer(CountsTokens, Resumable, LossCheck, EngineSteps, GraphSteps, HeadLoss, SFTTrainer):
        pass

    return OurSFTTrainer(**common)


class OurTrainer(Resumable, LossCheck, EngineSteps, Trainer):
    """Transformers' trainer, with checkpoints and faults as ours are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers tells by forward's signature whether a model divides its loss by all of a step's labels;
        # classifiers would, and do not: theirs is their batch's mean
        self.model_accepts_loss_kwargs = False


def _classifier_trainer(run: RunConfig, common: dict[str, Any]) -> Trainer:
    for split in ("train_dataset", "eval_dataset"):
        if common[split] is not None:
            common[split] = tokenize_classification(
                common[split], common["processing_class"], run.training["max_length"], run.model.num_labels
            )
    return OurTrainer(**common, compute_metrics=classification.measure_prediction)


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
def only_new_warnings() -> Iterator[None]:
    """Leave out what transformers and TRL warn of in each other's names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\b.*")
        # PEFT would compare the vocabulary with the hub's; no embedding is ever resized here
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


def zero_stage(run: RunConfig) -> int:
    """Return the ZeRO stage of a run's DeepSpeed configuration."""
    return (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)


def uses_deepspeed(run: RunConfig) -> bool:
    """Tell whether these processes train a run under DeepSpeed."""
    return distributed.is_launched() and run.deepspeed.config is not None
