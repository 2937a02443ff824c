"""What is right by itself in a run and wrong together: settings that exclude, or need, each other."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lsr_scale.config import declared
from lsr_scale.config.deepspeed import OF_TRAINING
from lsr_scale.config.messages import Problem
from lsr_scale.config.methods import method_of
from lsr_scale.config.optimizers import optimizer_conflicts
from lsr_scale.config.reporters import REPORTERS, reporter_names
from lsr_scale.config.rewards import rewards_of
from lsr_scale.config.training import LINEAR_GROUPS, evaluated
from lsr_scale.errors import did_you_mean
from lsr_scale.option_checks import LAYERS_BESIDE_EXPRESSION

if TYPE_CHECKING:
    from lsr_scale.config.run import RunConfig

# as models name them; which others there are, the model itself tells once it is loaded
_EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "transformer.word_embeddings", "gpt_neox.embed_in")

# optimizers for which transformers passes over optim_args
_WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adafactor")


def conflicts(run: "RunConfig") -> Iterator[Problem]:
    """Yield every conflict of a run, each with the setting to change."""
    yield from _model(run)
    yield from _adapter(run)
    yield from _training(run)
    yield from (Problem(*found) for found in optimizer_conflicts(run))
    yield from _compute(run)
    yield from _deepspeed(run)
    yield from _data(run)
    if run.training["method"] != "sft" and run.model.task == "causal_lm":
        yield from _preferences(run)
    if run.training["method"] == "grpo" and run.model.task == "causal_lm":
        yield from _completions(run)


def _completions(run: "RunConfig") -> Iterator[Problem]:
    training = run.training
    if not training["reward"]:
        yield Problem(
            ("training", "reward"),
            "nothing says what a completion is worth; set it, such as reward: [exact_answer] for numbers, "
            "[multiple_choice], or [file.py:function]",
        )
    yield from _rewards(training)
    batch, number = training["per_device_train_batch_size"], training["num_generations"]
    steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
    if training.get("generation_batch_size") is None and batch * steps % number and number % (batch * steps):
        yield Problem(
            ("training", "num_generations"),
            f"is {number}, but {batch * steps} completions are generated at a time on a process (per_device_train_"
            f"batch_size {batch} times gradient_accumulation_steps, or steps_per_generation, {steps}); set it to a "
            "divisor of that",
        )
    if not training.get("use_vllm"):
        return
    if training.get("vllm_mode", "colocate") != "colocate":
        yield Problem(
            ("training", "vllm_mode"),
            "server is sent all weights by TRL, the adapter merged into them; set colocate, which is sent the adapter",
        )
    if training.get("vllm_enable_sleep_mode"):
        yield Problem(("training", "vllm_enable_sleep_mode"), "would drop the base, which is not sent again; remove it")
    if not declared.is_low_rank(run.adapter.method):
        words = f"{run.adapter.method}'s updates are of full rank, and vLLM is sent a LoRA; leave it out"
        yield Problem(("training", "use_vllm"), words)
    if run.adapter.options.get("modules_to_save"):
        words = "vLLM is sent a LoRA, which has no fully trained modules; leave it out, or adapter.modules_to_save"
        yield Problem(("training", "use_vllm"), words)


def _rewards(training: dict[str, Any]) -> Iterator[Problem]:
    """Yield what makes a run's rewards the same for all completions, or the same reward twice."""
    rewards, most = rewards_of(training), training["max_completion_length"]
    for index, reward in enumerate(rewards):
        if any(reward.is_as(other) for other in rewards[:index]):
            words = f"{reward.name} is named twice; name it once, with the weight that both have together"
            yield Problem(("training", "reward", index), words)
        if reward.tokens is not None and reward.tokens >= most:
            yield Problem(
                ("training", "reward", index, "tokens"),
                f"is {reward.tokens}, and completions have at most {most} tokens (max_completion_length): nothing is "
                "ever taken off; set it lower, or leave it out",
            )
    if rewards and not any(reward.weight for reward in rewards):
        words = "every weight is 0, so that all completions are worth the same; give one another weight"
        yield Problem(("training", "reward"), words)


def _nothing_learned(training: dict[str, Any], method: str) -> Iterator[Problem]:
    """Yield what leaves the loss of preferences without a gradient, or makes it none at all."""
    losses = training.get("loss_type", [])
    if method in ("dpo", "kto") and training["beta"] == 0 and losses != ["sft"]:
        yield Problem(("training", "beta"), f"at 0 {method} has no gradient: nothing is learned; set it above, as 0.1")
    if method == "kto" and training.get("desirable_weight") == training.get("undesirable_weight") == 0:
        words = "is 0, and so is undesirable_weight: nothing is learned; set one above"
        yield Problem(("training", "desirable_weight"), words)
    if method == "dpo" and "exo_pair" in losses and not training.get("label_smoothing"):
        yield Problem(("training", "loss_type"), "exo_pair needs label_smoothing above 0; its paper has 1e-3")


def _preferences(run: "RunConfig") -> Iterator[Problem]:
    training, method = run.training, run.training["method"]
    if training["cuda_graphs"] == "on":
        words = f"steps of {method} take no packed rows, which graphs need; set cuda_graphs: auto"
        yield Problem(("training", "cuda_graphs"), words)
    yield from _nothing_learned(training, method)
    if method != "kto" or training.get("loss_type", "kto") != "kto":
        return
    if training.get("train_sampling_strategy", "sequential") != "sequential":
        yield Problem(
            ("training", "train_sampling_strategy"),
            "KTO takes its KL from each row's neighbours in the batch, so rows keep their order; leave it out",
        )
    if training["per_device_train_batch_size"] < 2:
        yield Problem(
            ("training", "per_device_train_batch_size"),
            "KTO estimates its KL from the other completions of a batch; set 2 or more, or loss_type: "
            "apo_zero_unpaired",
        )


def _model(run: "RunConfig") -> Iterator[Problem]:
    model = run.model
    if model.task == "seq_cls":
        if run.training["method"] != "sft":
            yield Problem(
                ("training", "method"),
                f"{run.training['method']} trains a language model; set model.task: causal_lm, or remove it",
            )
        if model.labels is not None and model.num_labels not in (None, len(model.labels)):
            yield Problem(
                ("model", "num_labels"),
                f"is {model.num_labels}, but model.labels has {len(model.labels)}; leave it out",
            )
        if run.eval.tasks:
            yield Problem(
                ("eval", "tasks"),
                "multiple-choice questions are scored by a language model (task: causal_lm); for seq_cls put the "
                "held-out rows under data.validation, or set data.validation_split",
            )
        if run.eval.prompts:
            yield Problem(
                ("eval", "prompts"), "a classifier completes no prompts; leave them out, or set model.task: causal_lm"
            )
    else:
        for name in ("num_labels", "labels"):
            if getattr(model, name) is not None:
                words = "only task seq_cls has labels; set model.task: seq_cls, or remove it"
                yield Problem(("model", name), words)
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem(
            ("model", "attention"), "flash_attention_2 has no float32; set model.dtype: bfloat16, or attention: sdpa"
        )


def _adapter(run: "RunConfig") -> Iterator[Problem]:
    model = run.model
    if run.adapter.method == "lokr" and model.quantization in ("nf4", "fp4"):
        yield Problem(
            ("adapter", "method"),
            "PEFT's LoKr reads the base weight's shape, which a 4-bit weight does not have; set method: kron_lora, or "
            "model.quantization: none",
        )
    if run.adapter.method == "tinylora" and model.quantization != "none":
        yield Problem(
            ("adapter", "method"),
            "PEFT's TinyLoRA decomposes the weight as it is stored, not a quantized one; set method: lora_xs, or "
            "model.quantization: none",
        )
    if run.adapter.method == "tinylora" and (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage") == 3:
        yield Problem(
            ("adapter", "method"),
            "PEFT's TinyLoRA decomposes the weight as it lies on one GPU, not a part of it; set method: lora_xs, or "
            "deepspeed.config: zero2",
        )
    if run.adapter.options.get("init") == "gradient" and method_of(run.training) != "sft":
        yield Problem(
            ("adapter", "init"),
            f"gradient is that of supervised rows' loss, and training.method is {method_of(run.training)}; set it to "
            "zero, or start_from an adapter that was trained on such rows",
        )
    targets, excluded = (run.adapter.options.get(name) for name in ("target_modules", "exclude_modules"))
    if isinstance(targets, str) and not _is_pattern(targets):
        yield Problem(
            ("adapter", "target_modules"),
            f"{targets!r} is text, which is taken as a regular expression for a module's whole name; write a list of "
            "names, such as [q_proj, v_proj], or all-linear",
        )
    elif isinstance(targets, str) and targets != "all-linear" and run.adapter.options.get("layers_to_transform"):
        yield Problem(("adapter", "layers_to_transform"), LAYERS_BESIDE_EXPRESSION)
    elif model.task == "causal_lm" and _named(targets, "lm_head"):
        yield Problem(
            ("adapter", "target_modules"),
            "SFTTrainer computes the loss from lm_head's own weight, so an adapter there would never train; remove it, "
            "or train the whole matrix with adapter.modules_to_save: [lm_head]",
        )
    elif table := next((name for name in _EMBEDDINGS if _named(targets, name) and not _named(excluded, name)), None):
        yield Problem(
            ("adapter", "target_modules"),
            f"{table} is a table of embeddings and no linear layer; leave it out, or train the whole table with "
            f"adapter.modules_to_save: [{table.rpartition('.')[2]}]",
        )


def _training(run: "RunConfig") -> Iterator[Problem]:
    model, training = run.model, run.training
    if (metric := training.get("metric_for_best_model")) is not None:
        labels = len(model.labels) if model.labels else model.num_labels
        measured = evaluated(model.task, labels, training["method"])
        if metric.removeprefix("eval_") not in measured:
            names = [f"eval_{name}" for name in measured]
            yield Problem(("training", "metric_for_best_model"), f"{metric!r}: {did_you_mean(metric, names)}")
    names = reporter_names(training["report_to"])
    for name in names:
        if name not in REPORTERS and (name not in ("all", "none") or len(names) > 1):
            known = [*REPORTERS, "all", "none"] if len(names) == 1 else REPORTERS
            yield Problem(("training", "report_to"), f"{name!r:.60}: {did_you_mean(name, known)}")
    if training.get("optim_args") and training["optim"] in _WITHOUT_ARGUMENTS:
        yield Problem(
            ("training", "optim_args"),
            f"has no effect with training.optim: {training['optim']}, which takes learning_rate, weight_decay and "
            "adam_* alone; leave it out",
        )
    method = run.adapter.method
    if training["save_as_lora"] and method == "lora":
        yield Problem(("training", "save_as_lora"), "the adapter is PEFT's LoRA already; remove it")
    elif training["save_as_lora"] and method in ("vera", "tinylora"):
        yield Problem(
            ("training", "save_as_lora"), f"PEFT's own {method} is not exported here; remove it, or set method: lora_xs"
        )
    elif training["save_as_lora"] and not declared.is_low_rank(method):
        yield Problem(
            ("training", "save_as_lora"),
            f"{method}'s updates are of full rank, so no LoRA holds them; remove it (export --to merged makes "
            "a whole model), or set adapter.method: lsr or kron_lora",
        )
    optimizer = training["optim"]
    if training["on_nonfinite"] == "skip" and optimizer.endswith(("lomo", "_layerwise")):
        yield Problem(
            ("training", "on_nonfinite"),
            f"skip leaves out a step by its whole gradient, but {optimizer} updates each parameter within the backward "
            "pass; set it to stop, or training.optim to another one",
        )


def _compute(run: "RunConfig") -> Iterator[Problem]:
    training, where = run.training, ("training", "keep_in_bf16")
    for name in training["keep_in_bf16"] if isinstance(training["keep_in_bf16"], list) else ():
        layer, dot, group = name.rpartition(".")
        if group not in LINEAR_GROUPS:
            yield Problem(where, f"{name!r:.60}: {did_you_mean(group, LINEAR_GROUPS)}")
        elif dot and not re.fullmatch("[0-9]{1,9}", layer):
            yield Problem(where, f"{name!r:.60}: expected a layer's number before the dot, such as 12.{group}")
    compute = training["compute"]
    if compute == "bf16":
        return
    for is_so, found, remedy in (
        (training["fused"] == "off", "training.fused is off", "set training.fused: auto"),
        (run.model.dtype not in ("auto", "bfloat16"), f"model.dtype is {run.model.dtype}", "set model.dtype: bfloat16"),
        (run.model.attention == "eager", "model.attention is eager", "set model.attention: sdpa"),
        (
            bool(run.adapter.options.get("dropout")),
            f"adapter.dropout is {run.adapter.options.get('dropout')}",
            "set adapter.dropout: 0",
        ),
    ):
        if is_so:
            yield Problem(
                ("training", "compute"),
                f"{compute} is for fused layers in bfloat16, and {found}; {remedy}, or training.compute: bf16",
            )


def _deepspeed(run: "RunConfig") -> Iterator[Problem]:
    training = run.training
    for name, ours in OF_TRAINING.items():
        value = (run.deepspeed.config or {}).get(name, "auto")
        if value not in ("auto", training[ours]):
            yield Problem(
                ("deepspeed", "config", name),
                f"is {value!r}, but training.{ours} is {training[ours]!r}; set that one, and this to auto",
            )
    stage = (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)
    if stage > 0 and training["condition_guard"] != "warn":
        yield Problem(
            ("training", "condition_guard"),
            f"{training['condition_guard']!r} rewrites factors, whose masters ZeRO-{stage} keeps in parts; set it to "
            "warn, or deepspeed.config: zero0",
        )


def _data(run: "RunConfig") -> Iterator[Problem]:
    training = run.training
    if run.data.validation and run.data.validation_split:
        yield Problem(
            ("data", "validation_split"),
            "holds out training rows, and data.validation gives other rows for that; keep one of them",
        )
    if training["early_stopping"] and (training["eval_strategy"] == "no" or not run.data.has_validation):
        lacking = (
            "data.validation_split: 0.05 or data.validation" if not run.data.has_validation else "eval_strategy: steps"
        )
        yield Problem(("training", "early_stopping"), f"goes by evaluations, and the run has none; add {lacking}")
    elif training["eval_strategy"] != "no" and not run.data.has_validation:
        yield Problem(
            ("training", "eval_strategy"),
            f"{training['eval_strategy']!r} needs rows to evaluate on; add data.validation or data.validation_split, "
            "or set it to no",
        )
    if training.get("packing") and training["max_length"] is None:
        yield Problem(("training", "max_length"), "packing fills sequences of this length; set it, such as 1024")


def _is_pattern(text: str) -> bool:
    """Tell a regular expression, or all-linear, from a plain name or several with commas between."""
    return re.fullmatch(r"\w+(\s*,\s*\w+)*", text) is None


def _named(names: list[str] | str | None, module: str) -> bool:
    """Tell whether a regular expression for whole names, or the end of a name in a list, is a module's."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(name.rpartition(".")[2] == module.rpartition(".")[2] for name in names or ())
