"""The `training` section: our defaults, the fields that are ours, and the rest as TRL and transformers declare them.

Any field of the method's class in TRL, such as `trl.SFTConfig` (`model.task: causal_lm`), or of
`transformers.TrainingArguments` (`seq_cls`) is taken by its own name and checked against the dataclass of the installed
version, so nothing here has to follow their releases.
"""

import dataclasses
import enum
import functools
import importlib
import types
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, create_model

from lsr_scale.config import declared
from lsr_scale.config.methods import METHODS, method_of
from lsr_scale.config.optimizers import OWN_OPTIMIZERS

Task = Literal["causal_lm", "seq_cls"]

# What a run gets where its file says nothing; every other field keeps the default of the installed libraries.
DEFAULTS: dict[str, Any] = {
    "method": "sft",  # see OWN_FIELDS
    "output_dir": None,  # null: a folder of its own under runs/
    "seed": 42,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": None,  # null: as memory has it
    "fused": "auto",
    "compute": "bf16",
    "keep_in_bf16": "auto",
    "compute_tolerance": 0.1,
    "cuda_graphs": "auto",
    "memory": "auto",
    "on_nonfinite": "stop",
    "condition_guard": "warn",
    "condition_tolerance": 2.0**-7,  # see lsr_scale/adapters/condition.py
    "early_stopping": None,
    "save_as_lora": False,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # would wait for the GPU at every step; on_nonfinite looks instead
    "save_strategy": "steps",
    "save_steps": 0.1,  # below 1: a share of all steps
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,  # the progress line is ours
}
TASK_DEFAULTS: dict[Task, dict[str, Any]] = {
    # Without prediction_loss_only, evaluation keeps the logits of the whole vocabulary for every token.
    "causal_lm": {"prediction_loss_only": True},
    "seq_cls": {"max_length": 512},
}

# What an evaluation on data.validation finds. A classifier's depends on its number of outputs: see `evaluated`.
_CLASSES = ("accuracy", "f1", "f1_macro", "matthews_correlation")
_SCORES = ("pearson", "spearmanr")
_OF_PREFERENCES = ("rewards/accuracies", "rewards/margins")
EVALUATED = tuple(f"eval_{name}" for name in ("loss", "reward", *_CLASSES, *_SCORES, *_OF_PREFERENCES))

_NO_FSDP = "sharding is DeepSpeed's: set deepspeed.config to zero3"
_NO_AUTOCAST = (
    "the base runs in model.dtype and the adapter's factors stay float32, so autocast is always off: set model.dtype"
)
_NOT_USED = "the trainer does not read it; what runs follows from the sections data and eval"

# Fields that the rest of the run decides, with what to set instead.
OWNED: dict[str, str] = {
    "deepspeed": "set deepspeed.config",
    "local_rank": "the launcher passes it: deepspeed --module lsr_scale.launch, or torchrun -m lsr_scale.launch",
    "bf16": _NO_AUTOCAST,
    "fp16": _NO_AUTOCAST,
    "bf16_full_eval": "it would cast the adapter's float32 factors: set model.dtype",
    "fp16_full_eval": "it would cast the adapter's float32 factors: set model.dtype",
    "model_init_kwargs": "the section model loads the model: set model.dtype, model.attention, model.quantization",
    "trust_remote_code": "models that bring their own code are not loaded: use one that transformers itself implements",
    "chat_template_path": "set model.chat_template",
    "pad_token": "TRL is about to remove it; the tokenizer's own pad token is used, or its end-of-text token",
    "resume_from_checkpoint": "resuming belongs to the command, not to the run: lsr-scale train --resume auto",
    "hub_token": "a run folder holds a copy of its configuration: log in with `hf auth login`, or set HF_TOKEN",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
    "parallelism_config": "it cannot be written in YAML, and tensor parallelism cannot split a quantized layer",
    "do_train": _NOT_USED,
    "do_eval": _NOT_USED,
    "do_predict": _NOT_USED,
}

# Bounds that the dataclasses leave to a crash later on; upper ones are beyond what anybody trains with.
_BOUNDS: dict[str, dict[str, float]] = {
    "seed": {"ge": 0, "lt": 2**32},
    "data_seed": {"ge": 0, "lt": 2**32},
    "num_train_epochs": {"gt": 0, "le": 100_000},
    "max_steps": {"le": 10**9},
    "per_device_train_batch_size": {"ge": 1, "le": 65_536},
    "per_device_eval_batch_size": {"ge": 1, "le": 65_536},
    "gradient_accumulation_steps": {"ge": 1, "le": 65_536},
    "eval_accumulation_steps": {"ge": 1, "le": 10**9},
    "max_length": {"ge": 1, "le": 2**24},
    "max_prompt_length": {"ge": 1, "le": 2**24},
    "max_completion_length": {"ge": 1, "le": 2**24},
    "num_generations": {"ge": 2, "le": 65_536},
    "num_generations_eval": {"ge": 1, "le": 65_536},
    "num_iterations": {"ge": 1, "le": 65_536},
    "steps_per_generation": {"ge": 1, "le": 65_536},
    "generation_batch_size": {"ge": 1, "le": 2**20},
    "temperature": {"gt": 0, "le": 100},
    "top_p": {"gt": 0, "le": 1},
    "top_k": {"ge": 0, "le": 10**9},
    "min_p": {"ge": 0, "le": 1},
    "repetition_penalty": {"ge": 0.01, "le": 100},
    "beta": {"ge": 0, "le": 1e6},
    "epsilon": {"gt": 0, "le": 1e6},
    "epsilon_high": {"gt": 0, "le": 1e6},
    "pad_to_multiple_of": {"ge": 1, "le": 65_536},
    "learning_rate": {"ge": 0, "le": 1e6},
    "warmup_steps": {"ge": 0, "le": 10**9},
    "warmup_ratio": {"ge": 0, "le": 1},
    "weight_decay": {"ge": 0, "le": 1e6},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0, "le": 1},
    "max_grad_norm": {"ge": 0, "le": 1e12},
    "neftune_noise_alpha": {"ge": 0, "le": 1e6},
    "label_smoothing_factor": {"ge": 0, "le": 1},
    "logging_steps": {"gt": 0, "le": 10**9},
    "save_steps": {"gt": 0, "le": 10**9},
    "eval_steps": {"gt": 0, "le": 10**9},
    "eval_delay": {"ge": 0, "le": 10**9},
    "save_total_limit": {"ge": 1, "le": 10**9},
    "torch_empty_cache_steps": {"ge": 1, "le": 10**9},
    "dataloader_num_workers": {"ge": 0, "le": 1024},
    "dataloader_prefetch_factor": {"ge": 1, "le": 65_536},
    "dataset_num_proc": {"ge": 1, "le": 1024},
    "ddp_timeout": {"ge": 1, "le": 10**7},
    "ddp_bucket_cap_mb": {"ge": 1, "le": 10**6},
    "condition_tolerance": {"gt": 0},
    "compute_tolerance": {"gt": 0},
}
_ROWS_PER_STEP = 2**20

# Linears of a decoder layer that read one input, as training.keep_in_bf16 names them: down, or 12.down of one layer.
LINEAR_GROUPS = ("qkv", "o", "gate_up", "down")


class EarlyStopping(BaseModel):
    """When training ends early."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    patience: int = Field(3, ge=1, le=10**6, description="Evaluations in a row without improvement that end training.")
    threshold: float = Field(0.0, ge=0, le=1e6, description="An improvement is by more than this.")


# Fields that neither TRL nor transformers has: type and description.
OWN_FIELDS: dict[str, tuple[Any, str]] = {
    "method": (
        Literal[tuple(METHODS)],  # pyright: ignore
        "What is learned, by TRL's trainer of that name: 'sft' (supervised fine-tuning), 'dpo' or 'orpo' (from chosen "
        "and rejected completions), 'kto' (from completions that are desirable or not), 'grpo' (from what the model's "
        "own completions are worth).",
    ),
    "fused": (
        Literal["auto", "on", "off"],
        "Run decoder layers fused: 'on', 'off', or 'auto' (on a GPU). Fused layers do their own checkpointing.",
    ),
    "compute": (
        Literal["bf16", "fp8", "int8"],
        "How fused layers multiply by the frozen weights: 'bf16'; 'fp8' (e4m3 forward and backward, the fastest); or "
        "'int8' (forward in int8 after a Hadamard rotation, a third of the rounding error; backward in e4m3). The "
        "latter two need a GPU of compute capability 8.9 or more. What is trained, norms, attention and the loss stay "
        "in bfloat16 or float32.",
    ),
    "keep_in_bf16": (
        Literal["auto"] | list[str],
        "With compute: fp8 or int8, the groups of linears that stay in bfloat16: of qkv, o, gate_up and down, in all "
        "layers ('down') or in one ('12.down'). 'auto': those whose error in the first step exceeds compute_tolerance.",
    ),
    "compute_tolerance": (
        float,
        "With keep_in_bf16: auto, the tolerated relative error in 8 bits of a group's outputs, and of its input "
        "gradients.",
    ),
    "cuda_graphs": (
        Literal["auto", "on", "off"],
        "Replay training steps as CUDA graphs: 'on', 'off', or 'auto' (where the host would take longer to launch a "
        "step than the GPU to compute it: with small models, and with compute: fp8 or int8 with 7B ones too). Needs "
        "fused layers, packing or padding_free, no dropout, one process.",
    ),
    "memory": (
        Literal["auto", "save", "speed"],
        "What memory is spent on: 'save' keeps each layer's input and recomputes the rest, 'speed' keeps everything, "
        "in fused layers the dequantized weights too, 'auto' starts as 'save' and lets fused layers keep what fits "
        "after the first step.",
    ),
    "on_nonfinite": (
        Literal["stop", "skip"],
        "A batch whose loss is not finite, or a step whose gradient is not, ends the run ('stop') or counts for "
        "nothing ('skip'); both are noted in nonfinite.jsonl.",
    ),
    "condition_guard": (
        Literal["warn", "rescale", "fp32"],
        "What is done where the terms of a sum of Kronecker products cancel so far that rounding the factors may "
        "change an update by more than condition_tolerance: 'warn', 'rescale' (orthogonal terms) or 'fp32'.",
    ),
    "condition_tolerance": (float, "Tolerated relative change of an update by rounding its factors."),
    "early_stopping": (
        EarlyStopping | None,
        "End training where metric_for_best_model (by default eval_loss) no longer improves: {patience, threshold}. "
        "Evaluations and saves then coincide, and the best checkpoint's adapter is kept, if the run says nothing else.",
    ),
    "save_as_lora": (
        bool,
        "Save beside adapter/ the same update as PEFT's LoRA, exactly: adapter_lora/, which loads without lsr_scale.",
    ),
}

# transformers 5.23 renames the first of each pair to the second; both are taken with every version.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def evaluated(task: Task, num_labels: int | None, method: str = "sft") -> tuple[str, ...]:
    """Return what an evaluation during training finds, without the `eval_` before each: metric_for_best_model's values.

    Args:
        task: The model's.
        num_labels: A classifier's outputs; one is a regression. None: what any number of them may have.
        method: How a language model is trained.
    """
    if task == "causal_lm":
        return METHODS[method].evaluated
    if num_labels is None:
        return "loss", *_CLASSES, *_SCORES
    if num_labels == 1:
        return "loss", *_SCORES
    return "loss", *(name for name in _CLASSES if name != "f1" or num_labels == 2)  # F1 of class 1, of two


class TrainingFields(BaseModel):
    """What the models of both tasks share; `training_model` adds the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _flag(value: Any) -> Any:
    """Take YAML 1.1's words for a boolean where, and only where, a boolean is expected."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool)]


def yaml_type(annotation: Any, choices: Any = None) -> Any:
    """Return the type that a dataclass field has in YAML: enumerations as their values, sets and tuples as lists.

    Args:
        annotation: The field's type.
        choices: The only values it takes, if the dataclass says so beside the type.
    """
    members = _members(annotation)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    values = [*(choices or ()), *(item.value for member in enums for item in member)]
    if values:
        rest = [yaml_type(member) for member in members if member is types.NoneType or get_origin(member) is list]
        return Union[(Literal[tuple(values)], *rest)]
    if len(members) > 1:
        # Beside str, "no" is text; a boolean there has to be written true or false.
        kinds = [member if member is bool and str in members else yaml_type(member) for member in members]
        return Union[tuple(kinds)]  # noqa: UP007
    if annotation is bool:
        return Flag
    if get_origin(annotation) in (list, set, frozenset, tuple):
        return list[yaml_type(get_args(annotation)[0])]
    return annotation


def training_arguments_class(task: Task, method: str = "sft") -> type:
    """Return the dataclass that the trainer of a task, and of a method, is given; the import takes seconds."""
    if task == "seq_cls":
        from transformers import TrainingArguments

        return TrainingArguments
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental")  # what TRL calls so, it says of all of it
        module = importlib.import_module(f"trl.{METHODS[method].module}")
    return getattr(module, METHODS[method].class_name)


def _declaration(task: Task, method: str) -> type:
    """Return a dataclass with the fields of `training_arguments_class`, without importing that where it can be told."""
    if not declared.already_imported():
        try:
            return declared.training_class(None if task == "seq_cls" else METHODS[method].arguments)
        except declared.UnreadableError:
            pass
    return training_arguments_class(task, method)


def defaults_of(task: Task, method: str) -> dict[str, Any]:
    """Return what a run of a task and a method gets where its file says nothing and we have something to say."""
    return {**DEFAULTS, **TASK_DEFAULTS[task], **(METHODS[method].defaults if task == "causal_lm" else {})}


def own_fields(task: Task, method: str) -> dict[str, tuple[Any, str]]:
    """Return the fields of a task and a method that neither TRL nor transformers has: type and description."""
    return {**OWN_FIELDS, **(METHODS[method].own if task == "causal_lm" else {})}


def longest_row(training: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a row has in training, completions included; None where nothing limits them."""
    if training["method"] == "grpo":
        return training["max_prompt_length"] + training["max_completion_length"]
    return training.get("max_length")


def not_to_set(method: str) -> dict[str, str]:
    """Return the fields that no file of a method sets, with what to do instead."""
    return OWNED | METHODS[method].unused


@functools.cache
def training_model(task: Task, method: str = "sft") -> type[TrainingFields]:
    """Return the model of the `training` section: the installed dataclass, our defaults in place of its own."""
    source = _declaration(task, method)
    hints = get_type_hints(source)
    defaults, left_out = defaults_of(task, method), not_to_set(method)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        if field.init and field.name not in left_out:
            more = OWN_OPTIMIZERS if field.name == "optim" else ()
            kind = _buildable(yaml_type(hints[field.name], [*(field.metadata.get("choices") or ()), *more]))
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = field.metadata.get("help", "").replace("%%", "%")
            fields[field.name] = _field(field.name, kind, defaults.get(field.name, default), text)
    for old, new in RENAMED.items():
        kind, described = fields.get(new, fields[old])
        kind = kind if old.endswith("_kwargs") else Flag | None  # pyright: ignore[reportOperatorIssue]
        fields[old] = (kind, Field(default=DEFAULTS.get(old), description=described.description))
        fields[new] = (kind, Field(default=None, description=f"The name of {old} from transformers 5.23 on."))
    if task == "causal_lm" and method == "sft":
        text = "Supervise what the assistant says, its end tokens included, and no other turn. null: in conversations."
        kind = Flag | None  # pyright: ignore[reportOperatorIssue]
        fields["assistant_only_loss"] = (kind, Field(default=None, description=text))
    elif task == "seq_cls":
        text = "Longest sequence in tokens; longer ones are truncated."
        fields["max_length"] = _field("max_length", int | None, defaults["max_length"], text)
    for name, (kind, text) in own_fields(task, method).items():
        fields[name] = _field(name, Flag if kind is bool else kind, defaults[name], text)
    return create_model("TrainingSection", __base__=TrainingFields, **fields)


def check_training(values: Any, task: Task, context: Any = None) -> dict[str, Any]:
    """Return the section as written, checked, with our defaults for what it leaves out.

    Args:
        values: The section.
        task: The model's.
        context: Pydantic's: under "folder" what the paths of rewards are relative to.

    Raises:
        pydantic.ValidationError: for unknown names and wrong types or values.
        ValueError: for the two names of a renamed field, set differently.
    """
    method = method_of(values)
    checked = training_model(task, method).model_validate(values, context=context)
    written = {name: _as_written(values[name], getattr(checked, name)) for name in values}
    for name, value in written.items():
        if name.endswith("_kwargs") and isinstance(value, str) and not value.lstrip().startswith("{"):
            raise ValueError(f"{name}: expected a mapping, such as {{key: value}}, got {value!r:.60}")
    values = dict(written)
    for old, new in RENAMED.items():
        if new in values:
            if values.get(old, values[new]) != values[new]:
                raise ValueError(f"{old} and {new} are two names of one field, set to different values; keep one")
            values[old] = values.pop(new)
    filled = {**defaults_of(task, method), **_early_stopping_defaults(values), **values}
    if (max_steps := filled.get("max_steps", -1)) != -1 and max_steps < 1:
        raise ValueError(f"max_steps: expected a number of steps, or -1 for num_train_epochs, got {max_steps}")
    if (rows := filled["per_device_train_batch_size"] * filled["gradient_accumulation_steps"]) > _ROWS_PER_STEP:
        raise ValueError(
            f"per_device_train_batch_size times gradient_accumulation_steps is {rows:,} rows a step; expected at most "
            f"{_ROWS_PER_STEP:,}"
        )
    checkpointing, memory = filled["gradient_checkpointing"], filled["memory"]
    if checkpointing is not None and memory != "auto" and checkpointing != (memory == "save"):
        name = next(name for pair in RENAMED.items() for name in pair if name in written)
        raise ValueError(f"memory: {memory} and {name}: {checkpointing} contradict each other; keep one")
    return filled


def _early_stopping_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run that may stop early has where it says nothing: to keep the best, what is evaluated is saved."""
    if values.get("early_stopping") is None:
        return {}
    saves = values.get("save_strategy", DEFAULTS["save_strategy"])
    strategy = values.get("eval_strategy", saves if saves in ("steps", "epoch") else "steps")
    every = values.get("eval_steps", values.get("save_steps", DEFAULTS["save_steps"]))
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward" if values.get("method") == "grpo" else "eval_loss",
        "eval_strategy": strategy,
        "save_strategy": strategy,
        **({"eval_steps": every, "save_steps": every} if strategy == "steps" else {}),
    }


def checkpoints_layers(training: Mapping[str, Any]) -> bool:
    """Tell whether a run's layers recompute activations in the backward pass, in its first step at least."""
    chosen = training["gradient_checkpointing"]
    return training["memory"] != "speed" if chosen is None else chosen


def training_kwargs(training: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return keyword arguments for TRL's class of the method, or `TrainingArguments`, of the installed version.

    `bf16` and `fp16` are explicitly off, for TRL turns bf16 on by itself: the factors are float32 in the forward, and
    the base computes in the dtype it was loaded in.
    """
    known = {field.name for field in dataclasses.fields(training_arguments_class(task, training["method"]))}
    kwargs = dict(training)
    kwargs["gradient_checkpointing"] = checkpoints_layers(kwargs)
    for name in own_fields(task, training["method"]):
        del kwargs[name]
    if kwargs["optim"] in OWN_OPTIMIZERS:  # made by training/optimizers/; LoRA+ of what this names
        kwargs["optim"], kwargs["optim_args"] = "adamw_torch_fused", None
    kwargs.pop("assistant_only_loss", None)  # labels come from lsr_scale/data/chat_tokens.py, for any chat template
    if task == "seq_cls":
        del kwargs["max_length"]  # ours: the tokenizer cuts, not the trainer
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):  # torch takes no integer beside a float
        if name in kwargs:
            kwargs[name] = float(kwargs[name])
    if kwargs["output_dir"] is None:
        del kwargs["output_dir"]
    for old, new in RENAMED.items():
        if old in kwargs and new in known:
            kwargs[new] = kwargs.pop(old)
    return {**kwargs, "bf16": False, "fp16": False}


def _field(name: str, kind: Any, default: Any, text: str) -> tuple[Any, Any]:
    if name in _BOUNDS:
        numbers = [member for member in _members(kind) if member in (int, float)]
        bounded = Annotated[Union[tuple(numbers)], Field(**_BOUNDS[name])]  # noqa: UP007  # pyright: ignore
        words = Literal[default] if isinstance(default, str) else str  # beside a number text is one word, such as auto
        rest = [words if member is str else member for member in _members(kind) if member not in numbers]
        kind = Union[(bounded, *rest)]
    return kind, Field(default=default.value if isinstance(default, enum.Enum) else default, description=text)


def _members(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _buildable(annotation: Any) -> Any:
    """Return `annotation` if pydantic can check it, else Any: a release may declare what no file can hold."""
    try:
        TypeAdapter(annotation).json_schema()
    except Exception:
        return Any
    return annotation


def _as_written(raw: Any, checked: Any) -> Any:
    """Keep `10` an integer where the field is a float, so that a resolved run reads as it was written."""
    if isinstance(checked, BaseModel):
        return {name: _as_written(raw.get(name), value) for name, value in checked}
    if isinstance(checked, list) and checked and isinstance(checked[0], BaseModel):
        return [one.model_dump(exclude_none=True) for one in checked]
    return raw if isinstance(raw, int) and isinstance(checked, float) else checked
