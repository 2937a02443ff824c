"""The frozen base model of a run: loaded or drawn at random, quantized, sharded, on this process's device.

Its weights are in bfloat16 or another dtype, or those of its linear layers in 4 bits (NF4, FP4; double quantization)
or 8 bits by bitsandbytes; heads outside the base stay in the model's dtype. Code from a model repository is never run.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lsr_scale.distributed import local_rank
from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.kernels.attention import disable_cudnn_in_sdpa
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.model.architecture import (
    DTYPES,
    Task,
    head_modules,
    load_config,
    meta_model,
    model_class,
    with_commit,
)
from lsr_scale.model.dtype import chosen_dtype
from lsr_scale.model.folder_checks import check_weights, read_json
from lsr_scale.model.gather import gather_on_use, replicate
from lsr_scale.model.load_errors import explain_load_errors
from lsr_scale.model.names import resolve
from lsr_scale.model.quantize import (
    Quantization,
    check_quantization,
    quantization_config,
    skip_quantization,
    store_as_bytes,
)
from lsr_scale.model.random_weights import init_random_weights
from lsr_scale.model.shard import Sharding, full_shape

logger = logging.getLogger(__name__)


def local_device() -> torch.device:
    """Return this process's GPU (by LOCAL_RANK), or the CPU where there is none.

    Raises:
        UserError: if LOCAL_RANK is no number.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def load_base(
    name: str,
    *,
    revision: str | None = None,
    task: Task = "causal_lm",
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    quantization: Quantization = "nf4",
    double_quantization: bool = True,
    dtype: str | torch.dtype = "auto",
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
        task: "causal_lm", or "seq_cls" (a classifier; its head is trained from scratch if the checkpoint has none).
        num_labels: Number of labels of a classifier.
        labels: Their names, class 0 first, for its configuration.
        quantization: "nf4", "fp4", "int8" or "none".
        double_quantization: Quantize the 4-bit scales too.
        dtype: "bfloat16", "float16" or "float32": of everything not quantized, and the compute dtype; "auto" is the
            device's (`chosen_dtype`).
        attention: "auto" (SDPA where the model has it), or a name that Transformers knows.
        random_weights: Initialize at random, to measure speed and memory; needs no checkpoint.
        seed: Seed of the random weights and of a new head.
        device: Device of the weights; `local_device()` by default.
        sharding: How to shard it among the processes; replicated by default.
        say: Called with a line about weights that start at random, and one about weights that the model does not take.
        head_from_adapter: A head that the checkpoint lacks is loaded with the adapter: it does not start at random.

    Raises:
        UserError: for an unknown model or task; weights that are missing, damaged, pickled, in files elsewhere, of
            another shape, or quantized in another way; or too little memory.
    """
    device = device or local_device()
    if isinstance(dtype, str):
        chosen = chosen_dtype(dtype, device)
        if chosen not in DTYPES:
            raise UserError(f"model.dtype: {did_you_mean(chosen, ['auto', *DTYPES])}")
        dtype = DTYPES[chosen]
    disable_cudnn_in_sdpa()
    config = load_config(name, revision)
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_gpu, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        empty = meta_model(config, task, num_labels, dtype, attention)
        quantizer = quantization_config(quantization, double_quantization, dtype, head_modules(empty))
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        sharded = nullcontext(lambda module: None) if sharding is None else sharding.loading(tied)
        if random_weights:
            with sharded as shard, explain_load_errors(name, revision):
                model = init_random_weights(empty, quantizer, device, shard)
        else:
            nested = check_quantization(config, quantization, name)
            path = resolve(name)
            if Path(path).is_dir():
                auto_class = model_class(config, task).__name__
                check_weights(name, Path(path), auto_class, read_json(Path(path) / "config.json"))
            kwargs: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
            if nested is None:  # else the checkpoint has its own
                kwargs["quantization_config"] = quantizer
            elif task == "seq_cls":  # a list of layers that are not quantized names the head that the checkpoint has
                kwargs = {"config": skip_quantization(empty.config, head_modules(empty) or [])}
            if attention != "auto":
                kwargs["attn_implementation"] = attention
            with sharded as shard, explain_load_errors(name, revision, "its weights"):
                model, report = model_class(config, task).from_pretrained(
                    path,
                    revision=revision,
                    dtype=dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    device_map={"": str(device)},
                    **kwargs,
                )
                shard(model)
            if not Path(path).is_dir():
                with_commit(model.config, path, revision)
            _check_complete(name, model, report, task, say, head_from_adapter)
            _check_shapes(name, model, empty)
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):  # a checkpoint quantized already has a dtype of its own
                    module.compute_dtype = dtype
                    store_as_bytes(module.weight)
            if nested is not None:
                _cast_unquantized(model, empty, sharding)
    if labels is not None:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: number for number, name in enumerate(labels)}
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


def load_base_for(section: Any, seed: int, sharding: Sharding | None = None, **options: Any) -> PreTrainedModel:
    """Return `load_base` of a run's `model` section (`ModelSection`); `options` are more of its arguments."""
    names = ("revision", "task", "num_labels", "labels", "quantization", "double_quantization", "dtype", "attention")
    values = {name: getattr(section, name) for name in names}
    return load_base(
        section.name, random_weights=section.random_weights, seed=seed, sharding=sharding, **values, **options
    )


def _check_complete(
    name: str, model: PreTrainedModel, report: Any, task: Task, say: Callable[[str], None], head_from_adapter: bool
) -> None:
    """Raise if weights of the base are missing; say which of a head are missing, and which are not used."""
    prefix, missing = f"{model.base_model_prefix}.", sorted(report["missing_keys"])
    # a language model's head is pretrained with its base; a classifier's is new
    base = missing if task == "causal_lm" else [key for key in missing if key.startswith(prefix)]
    if base:
        raise UserError(
            f"model.name {name!r}: its weight files have no {_first(base)}, so they do not belong to the "
            "architecture in its config.json; fetch the model again"
        )
    if missing and not head_from_adapter:
        say(f"{name} has no weights for {_first(missing)}: they start at random")
    unexpected = sorted(key for key in report["unexpected_keys"] if key.startswith(prefix))
    if unexpected:
        say(f"{name} has weights that its architecture does not take: {_first(unexpected)}; they are left out")


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _cast_unquantized(model: PreTrainedModel, empty: PreTrainedModel, sharding: Sharding | None) -> None:
    """Cast embeddings, norms and heads to the dtypes of an empty model: of a checkpoint that is quantized already
    Transformers leaves them as they are stored.
    """
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    expected = dict(empty.named_parameters())
    for path, loaded in model.named_parameters():
        wanted = expected[path].dtype if path in expected else loaded.dtype
        if loaded.is_floating_point() and loaded.dtype != wanted and not any(name in path for name in kept):
            if sharding is not None and hasattr(loaded, "shard"):
                sharding.cast(loaded, wanted)
            else:
                loaded.data = loaded.data.to(wanted)


def _check_shapes(name: str, model: PreTrainedModel, empty: PreTrainedModel) -> None:
    """Raise if weights have other shapes than the architecture's, which some Transformers versions quantize anyway."""
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
