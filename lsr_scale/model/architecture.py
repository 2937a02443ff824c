"""A model's architecture without its weights: its configuration by name, its class for a task, its meta model.

Code from a model repository is never run.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.model import builtin
from lsr_scale.model.folder_checks import check_config, read_json
from lsr_scale.model.known_configs import known_config
from lsr_scale.model.load_errors import explain_load_errors
from lsr_scale.model.names import NAME_FORMS, local_folder

Task = Literal["causal_lm", "seq_cls"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_PARAMETERS = 10**13
_MODEL_CLASSES: dict[str, Any] = {"causal_lm": AutoModelForCausalLM, "seq_cls": AutoModelForSequenceClassification}
_CLASS_NAMES = {
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq_cls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return the configuration of a model, no weights and, where it can be avoided, no network.

    A local folder is read; a hub name is looked up in the hub cache, then among the well-known models that come with
    this package (`known_configs.json`), then on the hub.

    Raises:
        UserError: for an unknown model, an unreadable configuration, or one that needs code from its repository.
    """
    if name.startswith(builtin.PREFIX):
        config = known_config(builtin.find(name).hub_name)
        assert config is not None
        return config
    folder = local_folder(name)
    if folder is not None:
        _check_config_file(name, folder)
        with explain_load_errors(name, revision, "its config.json"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        _check_config_file(name, Path(cached).parent)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, local_files_only=True)
        return with_commit(config, name, revision)
    except Exception:  # not in the cache, or not readable there: the hub's own answer is the one to report
        pass
    config = known_config(name) if revision is None else None
    if config is not None:
        return config
    with explain_load_errors(name, revision, "its config.json"):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return with_commit(config, name, revision)


def with_commit(config: PreTrainedConfig, name: str, revision: str | None) -> PreTrainedConfig:
    """Note in a hub model's configuration which commit of it the hub's cache has.

    The name is one that Transformers leaves out where it saves a configuration, and no longer sets itself.
    """
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        config._commit_hash = Path(cached).parent.name  # pyright: ignore[reportAttributeAccessIssue]
    return config


def snapshot_of(config: PreTrainedConfig) -> Path | None:
    """Return the folder in the hub's cache that has the files of a model's commit; None where it is not from there."""
    commit = getattr(config, "_commit_hash", None)
    with suppress(HFValidationError):  # that of random weights, which are none of the hub's
        name = str(config.name_or_path)
        cached = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def _check_config_file(name: str, folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model.name {name!r}: this is an adapter, without its base model; name the base that its "
                "adapter_config.json gives as base_model_name_or_path"
            )
        raise UserError(f"model.name {name!r}: there is no config.json in this folder; expected {NAME_FORMS}")
    content = read_json(file)
    if "model_type" not in content:
        raise UserError(f"{file}: there is no model_type in it, which says the architecture; fetch the model again")
    check_config(file, content)


def model_class(config: PreTrainedConfig, task: Task) -> Any:
    """Return the auto class for a task.

    Raises:
        UserError: if the architecture has no such head, or is an encoder asked to be a causal language model.
    """
    if task not in _MODEL_CLASSES:
        raise UserError(f"model.task {task!r}: {did_you_mean(task, _MODEL_CLASSES)}")
    kind = config.model_type
    trained_as = ", ".join(config.architectures or ()) or kind
    if kind not in _CLASS_NAMES[task]:
        raise UserError(
            f"model.task: {trained_as} (model_type {kind!r}) cannot do {task}; choose another model, or "
            f"{'causal_lm' if task == 'seq_cls' else 'seq_cls'} if that is what you want to train"
        )
    is_encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    if task == "causal_lm" and is_encoder and not causal:
        raise UserError(
            f"model.task: {trained_as} (model_type {kind!r}) is an encoder, it sees the words that it should predict; "
            "set model.task: seq_cls, or choose a decoder"
        )
    return _MODEL_CLASSES[task]


def meta_model(
    config: PreTrainedConfig,
    task: Task = "causal_lm",
    num_labels: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
) -> PreTrainedModel:
    """Return the model on the meta device: every module and shape, nothing allocated.

    Args:
        config: Its configuration; left as it is.
        task: The head.
        num_labels: Number of labels of a classifier.
        dtype: dtype of its parameters.
        attention: Name of the attention implementation, or "auto" (SDPA where the model has it).

    Raises:
        UserError: for a configuration that Transformers makes no model of, or one larger than any machine's memory.
    """
    chosen = model_class(config, task)
    name = config.name_or_path or config.model_type
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if attention != "auto":
        kwargs["attn_implementation"] = attention
    with explain_load_errors(name, None, "its config.json"):
        config = type(config).from_dict(config.to_dict())
        if num_labels is not None:
            config.num_labels = num_labels
        with torch.device("meta"):
            model = chosen.from_config(config, **kwargs)
    size = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    if size > MAX_PARAMETERS:
        raise UserError(
            f"model.name {name!r}: its config.json describes a model of {size:.3g} parameters, more than any machine "
            "holds; fetch the model again"
        )
    return model.requires_grad_(False)


def head_modules(model: Any) -> list[str] | None:
    """Return the modules outside the base (lm_head, score, classifier, ...), which are not quantized.

    None if the model has no base model of its own; then Transformers chooses.
    """
    children = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in children:
        return None
    return [name for name in children if name != model.base_model_prefix]
