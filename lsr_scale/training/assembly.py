"""From a run to its trainer, in named steps: arguments, data, adapted model, fused layers, trainer, how it steps.

What is wrong with an argument, a row or a refused target costs seconds, as it is seen before the model is loaded. The
adapter is injected here, not by TRL's trainer, and its factors are float32 (`trainers.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainerCallback, set_seed

from lsr_scale import adapters, config, distributed
from lsr_scale.adapters.coverage import coverage_notes
from lsr_scale.adapters.identity import base_description
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.peft import module_suffixes
from lsr_scale.adapters.save_and_load import load_adapter, resolve_start_from
from lsr_scale.config import RunConfig
from lsr_scale.config.methods import METHODS
from lsr_scale.config.training import checkpoints_layers, longest_row, wants_fused
from lsr_scale.data.chat_tokens import CONVERSATIONS
from lsr_scale.data.classification import count_classification
from lsr_scale.data.completions import count_completions
from lsr_scale.data.preferences import COMPLETIONS
from lsr_scale.data.token_counts import TokenCounts
from lsr_scale.data.tokenizer_setup import prepare_tokenizer, supervises_assistant, template_notes
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.fused import FuseReport, fuse, keep_in_bf16
from lsr_scale.fused.cuda_graphs import Shapes, StepGraphs, graphs_fallback_reason
from lsr_scale.model import load_base_for
from lsr_scale.model.shard import Sharding, is_sharded
from lsr_scale.rewards.checked import CheckedReward, checked_rewards
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.arguments import trainer_arguments, uses_deepspeed, zero_stage
from lsr_scale.training.callbacks.eight_bit import EightBitCallback
from lsr_scale.training.callbacks.memory import FitMemoryCallback, max_forward_tokens, row_lengths
from lsr_scale.training.checkpoint import select
from lsr_scale.training.compute import read_errors
from lsr_scale.training.gradient_start import start_from_gradient
from lsr_scale.training.run_data import RunData, check_run_fits, read_data
from lsr_scale.training.run_labels import with_labels
from lsr_scale.training.shared import Shared
from lsr_scale.training.steps.graphs import PackedCollator, host_bound
from lsr_scale.training.steps.head_loss import HeadCollator, head_loss_fallback_reason
from lsr_scale.training.steps.log_probs import head_fallback_reason, use_fused_head
from lsr_scale.training.trainers import ignore_library_warnings, make_trainer
from lsr_scale.units import amount

Say = Callable[[str], None]


def build_trainer(
    run: RunConfig,
    folder: RunFolder,
    callbacks: list[TrainerCallback] | None = None,
    say: Say = lambda text: None,
    data: RunData | None = None,
    checkpoint: Path | None = None,
    shared: Shared | None = None,
) -> Trainer:
    """Return the trainer of a run, its model loaded, quantized and adapted.

    Args:
        run: The run.
        folder: Where checkpoints go.
        callbacks: Added to the trainer's own.
        say: Told, in a line each, what a user should know of how the run is set up.
        data: What `read_data` returned; read here by default.
        checkpoint: What the run resumes from: what it found out when it began holds.
        shared: What the run has in common with others of its process, its base model above all.

    Raises:
        UserError: for a model, data or adapter that do not go together.
    """

    def note(text: str) -> None:
        say(f"note: {text}")

    arguments = trainer_arguments(run, folder)
    data = data or read_data(run, say=say)
    run = with_labels(run, data.labels)
    _make_ready(run, data, note)
    rewards = _rewards(run, data)  # their code runs before the model is loaded, so that a mistake costs seconds
    model = _adapted_model(run, note, shared)
    meets = shared is not None and shared.meet is not None
    _set_checkpointing(model, arguments, note)
    watch = _eight_bit_callback(run, folder, checkpoint, say)
    report = _fuse(run, model, arguments, calibrate=any(one.measures for one in watch), keeps_weights=not meets)
    if report is not None:
        say(str(report))
    callbacks = [*watch, *(callbacks or ())]  # it adds to the logs, which others record
    trainer = make_trainer(run, model, arguments, data, callbacks, rewards)
    if hasattr(trainer, "say"):
        trainer.say = say
    _check_rows_left(run, trainer, data, note)
    _say_supervised(trainer, data, say)
    _note_row_lengths(run, trainer, note)
    if shared is not None and shared.rows is not None:
        shared.rows.keep(data)
    if checkpoint is None and run.adapter.start_from is None:
        start_from_gradient(trainer, run, say, None if shared is None else shared.starts)
    if shared is not None and meets:  # the joint step has the graphs, and the memory
        trainer.meet, trainer.data_collator = shared.meet, HeadCollator(trainer.data_collator)
        longest, wanted = row_lengths(trainer)[0], run.training["cuda_graphs"] != "off"
        if longest and wanted and graphs_fallback_reason(trainer.model.get_base_model(), vars(trainer.args)) is None:
            trainer.data_collator = PackedCollator(trainer.data_collator, longest)
        return trainer
    if report is not None and report.fused:
        _use_fused_layers(run, trainer, say)
    if run.model.task == "causal_lm" and run.training["method"] == "sft":
        _replay_steps(run, trainer, report, say)
    return trainer


def _make_ready(run: RunConfig, data: RunData, note: Say) -> None:
    """Give the tokenizer what the rows need, such as padding, and note what its chat template does; once for all runs.

    Raises:
        UserError: for rows that do not fit the tokenizer or the model.
    """
    found = data.made.notes
    if found is None:
        found = prepare_tokenizer(data.tokenizer, data.kind, assistant_only=run.training.get("assistant_only_loss"))
        found += template_notes(data.train, data.tokenizer, supervises_assistant(run.training, data.kind))
    for line in found:
        note(line)
    if data.made.notes is None:
        check_run_fits(run, data)
        data.made.notes = found


def _rewards(run: RunConfig, data: RunData) -> list[CheckedReward]:
    """Return what completions are worth to a run of GRPO; nothing for another one.

    Raises:
        UserError: for a reward's file that cannot be loaded, or that must be given what rows do not have.
    """
    if run.training["method"] != "grpo":
        return []
    rewards = checked_rewards(run.training)
    for where, rows in (("data.train", data.train), ("data.validation", data.validation)):
        for reward in rewards:
            if rows is not None:
                reward.check_columns(rows.column_names, where)
    return rewards


def _adapted_model(run: RunConfig, note: Say, shared: Shared | None) -> PeftModel:
    """Return the base, quantized and sharded as the run says, with the adapter in it."""
    start = _start_of(run)
    if uses_deepspeed(run) and (unused := config.without_effect(run.deepspeed.config or {})):
        how = "the frozen base is gathered a layer at a time, and gradients are averaged all at once"
        note(f"deepspeed.config: {', '.join(unused)}: no effect, {how}")
    with ignore_library_warnings():
        if shared is not None:
            base = shared.base(run)
        else:
            base = load_base_for(run.model, run.training["seed"], _sharding(run, start), say=note)
        model, differences = adapt(run, base, start)
    targets = run.adapter.options.get("target_modules")
    for line in (*differences, *coverage_notes(model, run.model.quantization, targets, run.model.dtype)):
        note(line)
    return model


def _set_checkpointing(model: PeftModel, arguments: Any, note: Say) -> None:
    """Leave activation checkpointing out where the model has none."""
    base: Any = model.get_base_model()
    if arguments.gradient_checkpointing and not base.supports_gradient_checkpointing:
        arguments.gradient_checkpointing = arguments.activation_checkpointing = False
        note(f"{base.config.model_type} models have no activation checkpointing: all activations are kept")


def _eight_bit_callback(run: RunConfig, folder: RunFolder, checkpoint: Path | None, say: Say) -> list[EightBitCallback]:
    """Return what watches a run that computes in 8 bits, nothing where it computes in bfloat16."""
    training, compute, earlier = run.training, run.training["compute"], None
    if compute == "bf16":
        return []
    decides = training["keep_in_bf16"] == "auto"
    if decides and checkpoint is not None:
        file = select.run_folder_of(checkpoint).compute_errors
        earlier = read_errors(file, compute)
        if earlier is None:
            say(f"note: no {file} says what {compute} changed when the run began: it is measured now")
    return [EightBitCallback(folder, compute, training["compute_tolerance"], decides, earlier, say)]


def _fuse(run: RunConfig, model: PeftModel, arguments: Any, calibrate: bool, keeps_weights: bool) -> FuseReport | None:
    """Make the model's layers run fused, if the run wants it and they can, and return what came of it.

    Args:
        run: The run.
        model: Its model.
        arguments: Its trainer's.
        calibrate: Measure in the first step what 8 bits change in each group of linears.
        keeps_weights: Layers may keep weights dequantized, where the run spends memory on speed.

    Raises:
        UserError: for `training.compute: fp8` or `int8` where no layer runs fused.
    """
    compute, keep = (run.training[name] for name in ("compute", "keep_in_bf16"))
    if not wants_fused(run.training, pays=compute != "bf16" or torch.cuda.is_available()):
        return None
    recompute = "full" if checkpoints_layers(run.training) else "none"
    # what is gathered anew for every pass cannot be held from pass to pass
    holds = keeps_weights and run.training["memory"] == "speed" and not is_sharded(model)
    report = fuse(model.train(), recompute, cache_weights=holds, compute=compute, calibrate=calibrate)
    layers = [*report.fused, *report.unfused]
    if compute != "bf16":
        if not report.fused:
            raise UserError(
                f"training.compute: {compute} is for fused layers, but {report}; set training.compute: bf16"
            )
        if keep != "auto":
            keep_in_bf16(model, keep)
    if layers:
        # the layers see to it themselves, fused or not; transformers 5.23 reads the second name
        arguments.gradient_checkpointing = arguments.activation_checkpointing = False
    return report


def _check_rows_left(run: RunConfig, trainer: Any, data: RunData, note: Say) -> None:
    """Note which rows are left out or cut by `training.max_length`; refuse where nothing is left to be learned."""
    limit, num_left = longest_row(run.training), len(trainer.train_dataset)
    held_out = "data.validation_split" if run.data.validation_split else "data.validation"
    validation = trainer.eval_dataset
    for where, is_empty in (
        ("data.train", not num_left),
        (held_out, validation is not None and not len(validation)),
    ):
        if is_empty:
            raise UserError(
                f"{where}: training.max_length ({limit}) cuts off everything to be learned in all rows; raise it"
            )
    if (lost := len(data.train) - num_left) > 0 and not run.training.get("packing"):
        note(
            f"{lost:,} of {amount(lost + num_left, 'training row')} left out: training.max_length ({limit}) cuts off "
            "all that is to be learned of them; raise it"
        )
    for split, where, rows in (("train", "data.train", data.train), ("eval", held_out, data.validation)):
        if rows is None:
            continue
        if run.model.task == "seq_cls":
            encoded = trainer.train_dataset if split == "train" else trainer.eval_dataset
            _, _, notes = count_classification(where, rows, data.tokenizer, limit, encoded)
        elif data.kind in COMPLETIONS:
            counted = count_completions(where, rows, data.kind, data.tokenizer, run.training)
            notes = [note for _, _, of_part in counted for note in of_part]
        else:  # there are none where dataset_kwargs skips TRL's preparation
            count = getattr(trainer, "token_counts", {}).get(split, TokenCounts())
            notes = count.notes(where, data.tokenizer, run.training)
        for line in notes:
            note(line)


def _say_supervised(trainer: Any, data: RunData, say: Say) -> None:
    """Say of conversations how many turns and tokens are supervised."""
    counts = getattr(trainer, "token_counts", {}).get("train")
    if counts is not None and data.kind in CONVERSATIONS:
        every = "" if trainer.supervise_assistant else "every turn is supervised: "
        say(f"chat: {every}{counts.supervision()}")


def _note_row_lengths(run: RunConfig, trainer: Any, note: Say) -> None:
    """Note rows that are longer than the model was made for."""
    text_config = trainer.model.get_base_model().config.get_text_config()
    stated, (longest, _) = getattr(text_config, "max_position_embeddings", 0), row_lengths(trainer)
    if stated and longest is not None and longest > stated and not run.training.get("packing"):
        note(
            f"the longest row has {longest:,} tokens, more than the {stated:,} that {run.model.name} was made "
            "for (max_position_embeddings); what it predicts beyond is untrained"
        )


def _use_fused_layers(run: RunConfig, trainer: Any, say: Say) -> None:
    """Have a trainer of fused layers spend memory on speed as the run wants, and take its loss from the fused head."""
    if _fits_memory(run):
        tokens = max_forward_tokens(trainer, METHODS[run.training["method"]].sequences)
        trainer.add_callback(FitMemoryCallback(tokens, say))
    if run.model.task == "causal_lm" and run.training["method"] == "sft":
        _use_own_head(run, trainer)
    elif run.model.task == "causal_lm" and run.training["method"] != "grpo":  # whose trainer has seen to it
        base = trainer.model.get_base_model()
        reason = head_fallback_reason(base, trainer.args)
        if reason is None:
            use_fused_head(base)
            trainer.fused_head = True
        else:
            say(f"note: the log-probabilities are computed by TRL: {reason}")


def _fits_memory(run: RunConfig) -> bool:
    """Tell whether a run's fused layers keep what fits, on a GPU."""
    training = run.training
    return training["memory"] == "auto" and training["gradient_checkpointing"] is None and torch.cuda.is_available()


def _use_own_head(run: RunConfig, trainer: Any) -> None:
    """Have the fused head compute a trainer's loss, where it can."""
    if head_loss_fallback_reason(trainer.model.get_base_model(), vars(trainer.args)) is None:
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
    if run.training["method"] != "sft":
        reason = f"steps of {run.training['method']} have none"
    elif report is None or report.unfused or not report.fused:
        reason = "the decoder layers do not run fused"
    elif uses_deepspeed(run) or distributed.world_size() > 1:
        reason = "several processes, or DeepSpeed, handle gradients as they come"
    elif longest is None or mean is None:
        reason = "nobody knows how long rows are"
    reason = reason or graphs_fallback_reason(model.get_base_model(), vars(trainer.args))
    if reason is not None or report is None or longest is None or mean is None:
        if wanted == "on":
            raise UserError(f"training.cuda_graphs: on, but they cannot be: {reason}")
        return
    tokens = round(mean * trainer.args.per_device_train_batch_size)
    parameters: Any = base_description(model)["num_parameters"]
    if wanted == "auto" and not host_bound(parameters, len(report.fused), tokens, bool(report.eight_bit)):
        return
    trainer.graphs = StepGraphs(model.get_base_model())
    shapes = None if trainer.args.dataloader_num_workers else Shapes()  # each worker would have its own
    trainer.data_collator = PackedCollator(trainer.data_collator, longest, shapes)
    say("steps replay CUDA graphs from the third on")


def _sharding(run: RunConfig, start: Path | None) -> Sharding | None:
    """Return how a run's base is sharded among its processes, None where it is replicated.

    Modules that are fully trained stay replicated: `modules_to_save` of the run, or of the adapter that it starts from.
    """
    content = run.deepspeed.config
    if content is None or zero_stage(run) != 3 or not uses_deepspeed(run):
        return None
    options: Any = PeftConfig.from_pretrained(str(start)) if start else _peft_config(run)
    return Sharding(config.offloads_parameters(content), options.modules_to_save or ())


def _start_of(run: RunConfig) -> Path | None:
    """Return the folder of the adapter that a run starts from, looked at before anything large is loaded."""
    if run.adapter.start_from is None:
        return None
    return resolve_start_from(run.adapter.start_from, _peft_config(run))


def _peft_config(run: RunConfig) -> Any:
    return adapters.peft_config(run.adapter.method, run.adapter.options, adapters.TASK_TYPES[run.model.task])


def adapt(run: RunConfig, base: Any, start: Path | None = None) -> tuple[PeftModel, list[str]]:
    """Return the base with the run's adapter in it, and differences from an earlier training that a user should know.

    Args:
        run: The run.
        base: Its base model.
        start: Folder of the adapter whose factors are taken; None draws them by the run's seed.
    """
    _check_modules_to_save(run, base)
    set_seed(run.training["seed"])
    if start:
        return load_adapter(base, start, trainable=True)
    return inject(base, run.adapter.method, run.adapter.options, run.model.task), []


def _check_modules_to_save(run: RunConfig, base: torch.nn.Module) -> None:
    """Refuse modules_to_save that the base does not have, of which PEFT says nothing, or holds in few bits."""
    modules = {name: module for name, module in base.named_modules() if name}
    for wanted in run.adapter.options.get("modules_to_save") or ():
        matched = [module for name, module in modules.items() if name.endswith(wanted)]
        if not matched:
            near = did_you_mean(wanted, module_suffixes(modules))
            raise UserError(f"adapter.modules_to_save: {wanted!r} is no module of {run.model.name}; {near}")
        if not all(parameter.is_floating_point() for module in matched for parameter in module.parameters()):
            raise UserError(
                f"adapter.modules_to_save: {wanted!r} is quantized ({run.model.quantization}), which cannot be "
                "fully trained; name modules that are not, such as lm_head, embed_tokens or norm, or adapt it with "
                "adapter.target_modules"
            )
