"""The trainer's arguments, from a run: made first, as what is wrong with them costs seconds, and a model minutes."""

import os
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lsr_scale import config, distributed
from lsr_scale.config import RunConfig
from lsr_scale.config.optimizers import OWN_OPTIMIZERS
from lsr_scale.config.training import training_arguments_class
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.settings import naming_settings
from lsr_scale.training.steps.deepspeed_api import check_release
from lsr_scale.units import amount


def trainer_arguments(run: RunConfig, folder: RunFolder) -> Any:
    """Return a run's arguments, TRL's of its method or a classifier's; checkpoints go to the folder.

    Raises:
        UserError: for a setting that the library refuses, an optimizer or method that cannot be sharded, or a DeepSpeed
            that cannot be patched.
    """
    if uses_deepspeed(run):
        check_stage(run)
    if run.training["method"] == "grpo":
        _check_completions(run)
    if uses_deepspeed(run):
        check_release()
    values = config.training_arguments(run) | {"output_dir": str(folder.path), "use_cpu": not torch.cuda.is_available()}
    values.pop("eos_token", None)  # the tokenizer has it; a run that resumes keeps the one that it began with
    values.setdefault("log_level_replica", "error")  # the main process speaks for all
    if run.model.task == "seq_cls":
        values.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens/s; SFTTrainer counts by itself
    if torch.cuda.is_available() and values.get("accelerator_config") is None:
        # or the copy of a batch to the GPU waits for the step before it
        values["accelerator_config"] = {"non_blocking": values.get("dataloader_pin_memory", True)}
    values.setdefault("run_name", folder.path.resolve().name)  # of W&B, which would draw one
    values.setdefault("ddp_find_unused_parameters", False)  # every factor takes part in every step
    if run.deepspeed.config is not None and uses_deepspeed(run):
        # accumulation follows the number of processes, whatever number stands there
        numbers = dict.fromkeys(config.OF_TRAINING, "auto")
        values["deepspeed"] = config.engine_config(run.deepspeed.config) | numbers
    _forget_engine()
    with naming_settings(run):
        arguments: Any = training_arguments_class(run.model.task, run.training["method"])(**values)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: torch's DataParallel cannot copy a quantized layer
    return arguments


def _forget_engine() -> None:
    """Let the run alone say which engine trains it, whatever trained one before it in this process.

    accelerate notes in the environment that DeepSpeed is used, and a run without it would be trained by an engine of
    default settings: ZeRO-2, gradients clipped otherwise. transformers keeps a trainer's DeepSpeed configuration for as
    long as the trainer lives, and shards what it loads if that is of ZeRO-3.
    """
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()


def check_stage(run: RunConfig) -> None:
    """Refuse, before anything is loaded, what DeepSpeed's processes cannot train under the run's ZeRO stage.

    What its file alone tells is refused by `config.conflicts`.

    Raises:
        UserError: for an optimizer, a start or a method that cannot be sharded like this.
    """
    _check_optimizer(run)
    _check_start(run)


def _check_completions(run: RunConfig) -> None:
    """Refuse, before anything is loaded, completions that do not come in whole groups, or that nothing can generate."""
    training = run.training
    rows, number = training["per_device_train_batch_size"], training["num_generations"]
    steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
    if training.get("generation_batch_size") is None and (rows * steps * distributed.world_size()) % number:
        processes = distributed.world_size()
        raise UserError(
            f"training.num_generations: is {number}, but {rows * steps * processes} completions are generated at a "
            f"time (per_device_train_batch_size {rows}, {steps} of these a generation, "
            f"{amount(processes, 'process')}), which is no multiple of it; set it to a divisor, or raise "
            "per_device_train_batch_size or gradient_accumulation_steps"
        )
    if training.get("use_vllm"):
        from trl.generation import vllm_generation

        if not vllm_generation.is_vllm_available():
            raise UserError("training.use_vllm: vLLM is not installed; install it (pip install vllm), or leave it out")
        return
    from transformers import GenerationConfig

    for name in training.get("generation_kwargs") or {}:
        if (instead := _OF_COMPLETIONS.get(name)) is not None:
            raise UserError(f"training.generation_kwargs.{name}: not to be set there; {instead}")
        if not hasattr(GenerationConfig(), name):
            nearest = did_you_mean(name, GenerationConfig().to_dict())
            raise UserError(
                f"training.generation_kwargs.{name}: transformers' generation has no such option; {nearest}"
            )


# options of transformers' generation that are training's own
_OF_COMPLETIONS = {
    **{name: f"set training.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **dict.fromkeys(("max_new_tokens", "max_length"), "set training.max_completion_length"),
    "num_return_sequences": "set training.num_generations",
    "cache_implementation": "set training.cache_implementation",
    **dict.fromkeys(
        ("do_sample", "return_dict_in_generate", "output_scores", "output_logits"),
        "completions are drawn: leave it out",
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "the tokenizer's is used: leave it out"),
}


def zero_stage(run: RunConfig) -> int:
    """Return the ZeRO stage of a run's DeepSpeed configuration."""
    return (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)


def uses_deepspeed(run: RunConfig) -> bool:
    """Tell whether these processes train a run under DeepSpeed."""
    return distributed.is_launched() and run.deepspeed.config is not None


def _check_start(run: RunConfig) -> None:
    """Refuse a start from the gradient of weights that no process has whole."""
    starts = run.adapter.options.get("init") == "gradient" and run.adapter.start_from is None
    if starts and zero_stage(run) == 3:
        raise UserError(
            "adapter.init: gradient runs the model before DeepSpeed is there, and ZeRO-3 shards it by then; set "
            "deepspeed.config to zero2 or less, or adapter.init: zero (or adapter.start_from, of a run on one process)"
        )


def _check_optimizer(run: RunConfig) -> None:
    """Refuse an optimizer whose state belongs to no one parameter where it is sharded."""
    name, stage = run.training["optim"], zero_stage(run)
    if stage == 0:
        return
    if name in OWN_OPTIMIZERS and OWN_OPTIMIZERS[name].of_pairs:
        raise UserError(
            f"training.optim: {name} steps both factors of a pair together, and ZeRO-{stage} cuts all parameters into "
            "shards of one vector; set deepspeed.config to zero0, or training.optim to adamw_torch_fused"
        )
    if "8bit" in name:
        raise UserError(
            f"training.optim: {name} keeps its state in blocks over all parameters, which no checkpoint can hold by "
            f"parameter under ZeRO-{stage}; use adamw_torch, or set deepspeed.config to zero0"
        )
