"""The base model: its name to a folder or hub id, its configuration, skeleton and tokenizer, and loading it frozen.

The base is held in bfloat16 (or another dtype), or with its linear layers in 4 bits (NF4, FP4; double quantization) or
8 bits by bitsandbytes; heads outside the base stay in the model's dtype. Code from a model repository is never run.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from lsr_scale.distributed import local_rank
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.kernels.attention import keep_cudnn_from_masks
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.model import builtin
from lsr_scale.model.folder_checks import check_config, check_weights, read_json
from lsr_scale.model.gather import gather_on_use, replicate
from lsr_scale.model.known_configs import known_config
from lsr_scale.model.names import NAME_FORMS, explained, local_folder, resolve
from lsr_scale.model.random_weights import random_base
from lsr_scale.model.shard import Sharding, full_shape

logger = logging.getLogger(__name__)

Task = Literal["causal_lm", "seq_cls"]
Quantization = Literal["nf4", "fp4", "int8", "none"]

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
        with explained(name, revision, "its config.json"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        _check_config_file(name, Path(cached).parent)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False, local_files_only=True)
    except Exception:  # not in the cache, or not readable there: the hub's own answer is the one to report
        pass
    config = known_config(name) if revision is None else None
    if config is not None:
        return config
    with explained(name, revision, "its config.json"):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


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


def skeleton(
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
        UserError: for a configuration of which Transformers makes no model, or one that no machine holds.
    """
    chosen = model_class(config, task)
    name = config.name_or_path or config.model_type
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if attention != "auto":
        kwargs["attn_implementation"] = attention
    with explained(name, None, "its config.json"):
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


def quantization_config(
    quantization: Quantization, double_quantization: bool, dtype: torch.dtype, skip: list[str] | None
) -> BitsAndBytesConfig | None:
    """Return bitsandbytes' configuration, None for "none".

    The 4-bit storage is always uint8: DeepSpeed's engine casts packed weights of any floating storage dtype other than
    its own, which destroys them silently.
    """
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip,
    )


def check_quantization(config: PreTrainedConfig, quantization: Quantization, name: str) -> None:
    """Refuse to hold weights in another way than a checkpoint that is quantized already has them.

    Transformers would take the checkpoint's own way, whatever is asked for.

    Raises:
        UserError: naming both.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    given = given if isinstance(given, dict) else given.to_dict() if hasattr(given, "to_dict") else None
    if given is None:
        raise UserError(f"model.name {name!r}: quantization_config in its config.json is no mapping; remove it")
    method = str(given.get("quant_method") or "bitsandbytes")
    if given.get("load_in_8bit"):
        held = "int8"
    elif given.get("load_in_4bit"):
        held = str(given.get("bnb_4bit_quant_type", "fp4"))
    else:
        raise UserError(
            f"model.name {name!r}: its weights are quantized already, by {method[:40]}; adapters are trained here on "
            "weights that bitsandbytes quantizes, or none: take the model's unquantized weights"
        )
    if held != quantization:
        raise UserError(
            f"model.quantization: {quantization}, but the weights of {name!r} are quantized already, in {held[:40]}; "
            f"set it to {held[:40]}, or take the model's unquantized weights"
        )


def local_device() -> torch.device:
    """Return this process's GPU (by LOCAL_RANK), or the CPU where there is none.

    Raises:
        UserError: if LOCAL_RANK is no number.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def head_modules(model: Any) -> list[str] | None:
    """Return the modules outside the base (lm_head, score, classifier, ...), which quantization leaves alone.

    None if the model does not tell its base apart; Transformers' own choice stands then.
    """
    children = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in children:
        return None
    return [name for name in children if name != model.base_model_prefix]


def load_base(
    name: str,
    *,
    revision: str | None = None,
    task: Task = "causal_lm",
    num_labels: int | None = None,
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    dtype: str | torch.dtype = "bfloat16",
    attention: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
    device: torch.device | None = None,
    sharding: Sharding | None = None,
    say: Callable[[str], None] = logger.warning,
    head_from_adapter: bool = False,
) -> PreTrainedModel:
    """Return the frozen base model on this process's device, ready for an adapter.

    Args:
        name: Hub name, local folder, or `builtin:` name.
        revision: Commit, branch or tag on the hub.
        task: "causal_lm", or "seq_cls" (a classifier; a new head trains if the checkpoint has none).
        num_labels: Number of labels of a classifier.
        quantization: "nf4", "fp4", "int8" or "none".
        double_quantization: Quantize the 4-bit scales too.
        dtype: "bfloat16", "float16" or "float32": of everything not quantized, and of the computation.
        attention: "auto" (SDPA where the model has it), or a name that Transformers knows.
        random_weights: Take the architecture with random weights, for speed and memory work; needs no checkpoint.
        seed: Seed of the random weights and of a new head.
        device: Where to; `local_device()` by default.
        sharding: How to shard it among the processes; replicated by default.
        say: Told, in a line each, of weights that start at random and of weights that the model does not take.
        head_from_adapter: A head that the checkpoint lacks is loaded with the adapter: it does not start at random.

    Raises:
        UserError: for an unknown model or task; weights that are missing, damaged, pickled, in files elsewhere, of
            another shape, or quantized in another way; or too little memory.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str):
        raise UserError(f"model.dtype: {did_you_mean(dtype, DTYPES)}")
    device = device or local_device()
    keep_cudnn_from_masks()
    config = load_config(name, revision)
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_gpu, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        empty = skeleton(config, task, num_labels, dtype, attention)
        quantizer = quantization_config(quantization, double_quantization, dtype, head_modules(empty))
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        sharded = nullcontext(lambda module: None) if sharding is None else sharding.loading(tied)
        if random_weights:
            with sharded as shard, explained(name, revision):
                model = random_base(empty, quantizer, device, shard)
        else:
            check_quantization(config, quantization, name)
            path = resolve(name)
            if Path(path).is_dir():
                auto_class = model_class(config, task).__name__
                check_weights(name, Path(path), auto_class, read_json(Path(path) / "config.json"))
            kwargs: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
            if attention != "auto":
                kwargs["attn_implementation"] = attention
            with sharded as shard, explained(name, revision, "its weights"):
                model, report = model_class(config, task).from_pretrained(
                    path,
                    revision=revision,
                    dtype=dtype,
                    quantization_config=quantizer,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    device_map={"": str(device)},
                    **kwargs,
                )
                shard(model)
            _check_complete(name, model, report, task, say, head_from_adapter)
            _check_shapes(name, model, empty)
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    module.compute_dtype = dtype  # a checkpoint quantized already has one of its own
    model.requires_grad_(False)
    model.config.use_cache = False
    # before anything can run a forward: bitsandbytes' own eval-mode forward repacks 4-bit weights on some CPUs
    freeze_quantized(model)
    if sharding is not None and sharding.active:
        trained = [*sharding.replicated, *(head_modules(model) or [] if task == "seq_cls" else [])]
        for name, module in model.named_modules():
            if name.endswith(tuple(trained)):  # as PEFT understands modules_to_save
                replicate(module)
        gather_on_use(model, sharding.offload)
    return model


def base_of(section: Any, seed: int, sharding: Sharding | None = None, **options: Any) -> PreTrainedModel:
    """Return the frozen base model that a run's `model` section describes; `options` as `load_base` takes them."""
    names = ("revision", "task", "num_labels", "quantization", "double_quantization", "dtype", "attention")
    values = {name: getattr(section, name) for name in names}
    return load_base(
        section.name, random_weights=section.random_weights, seed=seed, sharding=sharding, **values, **options
    )


def _check_complete(
    name: str, model: PreTrainedModel, report: Any, task: Task, say: Callable[[str], None], head_from_adapter: bool
) -> None:
    """Raise if the checkpoint lacks weights of the base; say what of a head it lacks, and what of it is left out."""
    prefix, missing = f"{model.base_model_prefix}.", sorted(report["missing_keys"])
    # a language model's head is learned with its base; a classifier's is new
    base = missing if task == "causal_lm" else [key for key in missing if key.startswith(prefix)]
    if base:
        raise UserError(
            f"model.name {name!r}: its weight files lack {_first(base)}, so they do not belong to the "
            "architecture in its config.json; fetch the model again"
        )
    if missing and not head_from_adapter:
        say(f"{name} has no weights for {_first(missing)}: they start at random")
    left = sorted(key for key in report["unexpected_keys"] if key.startswith(prefix))
    if left:
        say(f"{name} has weights that its architecture does not take: {_first(left)}; they are left out")


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _check_shapes(name: str, model: PreTrainedModel, empty: PreTrainedModel) -> None:
    """Raise if weights have other shapes than the architecture: some Transformers quantize them as they are."""
    wrong = []
    loaded: Any
    expected = dict(empty.named_parameters())
    for path, loaded in model.named_parameters():
        if path not in expected:
            continue
        state = getattr(loaded, "quant_state", None)
        shape = list(state.shape if state is not None else full_shape(loaded))
        wanted = list(expected[path].shape)
        if loaded.dtype in (torch.uint8, torch.int8) and isinstance(
            empty.get_submodule(path.rpartition(".")[0]), Conv1D
        ):
            wanted.reverse()  # GPT-2's layers hold [in, out] until they are quantized
        if shape != wanted:
            wrong.append(f"{path}: {shape} instead of {wanted}")
    if wrong:
        raise UserError(
            f"model.name {name!r}: its weight files do not have the shapes that its config.json says "
            f"({_first(wrong)}); fetch the model again"
        )
