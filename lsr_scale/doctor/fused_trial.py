"""A fused decoder layer is tried: its loss and its factors' gradients, against it unfused; in 8 bits against bf16."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lsr_scale.config import RunConfig
from lsr_scale.doctor.report import Finding, Status
from lsr_scale.kernels.fp8 import fp8_fallback_reason
from lsr_scale.layers.frozen_linear import freeze_quantized

EightBits = Literal["fp8", "int8"]
RECIPES: dict[EightBits, str] = {
    "fp8": "e4m3 forward and backward",
    "int8": "int8 after a Hadamard rotation forward, e4m3 backward",
}
# e4m3's three bits err by 4 % in a product, and each of a layer's gradients is the end of several
MOST_BY_8_BITS = 0.3


@dataclass(frozen=True)
class Trial:
    """A layer that is tried, and its adapter.

    Attributes:
        config: Transformers' configuration of its model.
        base: `quantization`, `double_quantization` and `dtype` of its base, as a run names them.
        adapter: PEFT's configuration.
        description: What it is, for a person.
    """

    config: Any
    base: dict[str, Any]
    adapter: Any
    description: str


def small_layer(rank: int) -> Trial:
    """Return a small LLaMA layer in NF4 with an adapter of this rank, LSR-Adapt up to 16 and LoRA above."""
    from transformers import LlamaConfig

    from lsr_scale.adapters import peft_config

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    method, options = ("lsr", {"separation_rank": 4}) if rank <= 16 else ("lora", {})
    adapter = peft_config(method, {"target_modules": "all-linear", "rank": rank, **options}, "CAUSAL_LM")
    base = {"quantization": "nf4", "double_quantization": True, "dtype": "bfloat16"}
    return Trial(LlamaConfig(**sizes, **heads), base, adapter, f"a trial layer (rank {rank})")


def layer_of(run: RunConfig) -> Trial:
    """Return one layer of a run's model with the run's adapter."""
    from lsr_scale.adapters import peft_config
    from lsr_scale.model import chosen_dtype, load_config, local_device

    config: Any = load_config(run.model.name, run.model.revision)
    config = type(config).from_dict(
        config.to_dict() | {"vocab_size": 512, "pad_token_id": None, "num_hidden_layers": 1}
    )
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    base = {name: getattr(run.model, name) for name in ("quantization", "double_quantization")}
    base["dtype"] = chosen_dtype(run.model.dtype, local_device())
    options = {name: value for name, value in run.adapter.options.items() if not name.startswith("layers_")}
    adapter = peft_config(run.adapter.method, options, "CAUSAL_LM")
    return Trial(config, base, adapter, f"a layer of {run.model.name} with the run's {run.adapter.method}")


def try_fused(device: torch.device, trial: Trial) -> Finding:
    """Run one adapted layer fused and unfused, and compare the loss and every factor's gradient."""
    layers = "LLaMA, Mistral, Qwen2 and Qwen3 layers"
    if device.type == "cpu":
        return Finding("fast paths", "fused layers", f"on a GPU {layers} run as one function each; here unfused")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference, how = fused_against_unfused(device, trial)
    except Exception as error:
        text = " ".join(f"{trial.description}: {type(error).__name__}: {error}".split())[:200]
        if isinstance(error, ValueError):  # of PEFT's, which finds none of the modules in one layer, or ours
            return Finding("fast paths", "fused layers", f"not tried: {text}", "note")
        return Finding(
            "fast paths", "fused layers", text, "bad", "report it, with the output of lsr-scale doctor --json"
        )
    rounding = f"{trial.base['dtype']} rounding"
    found = f"{layers}; {how}; {trial.description} differs from unfused by {difference:.1%} ({rounding})"
    if difference > 0.05:
        return Finding("fast paths", "fused layers", found, "bad", "more than rounding explains: report it")
    return Finding("fast paths", "fused layers", found)


def try_eight_bits(device: torch.device, trial: Trial, compute: str) -> Finding:
    """Tell whether a device computes in 8 bits; where it does, run one adapted layer so, and compare it with bfloat16.

    Args:
        device: Where a run would compute.
        trial: The layer.
        compute: What a run asks for; "bf16" where none asks for 8 bits.
    """
    name, remedy = f"compute: {', '.join(RECIPES)}", "set training.compute: bf16"
    reason = fp8_fallback_reason(device)
    if reason is not None:
        is_bad = compute != "bf16"
        return Finding("fast paths", name, f"no: {reason}", "bad" if is_bad else "ok", remedy if is_bad else "")
    statuses: list[Status] = []
    found: dict[str, list[str]] = {}
    for one in RECIPES:
        status, words = _try_recipe(device, trial, one, one == compute)
        statuses.append(status)
        found.setdefault(words, []).append(one)
    text = "; ".join(f"{', '.join(names)} {words}" for words, names in found.items())
    status = max(statuses, key=lambda one: get_args(Status).index(one))
    return Finding("fast paths", name, f"{trial.description}: {text}", status, remedy if status == "bad" else "")


def _try_recipe(device: torch.device, trial: Trial, compute: EightBits, wanted: bool) -> tuple[Status, str]:
    """Return how it stands with one way to compute in 8 bits, and the words for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference, problem = eight_bits_against_bf16(device, trial, compute)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, ValueError):
            return "note", f"not tried: {text}"
        return "bad", f"fails, report it: {text}"
    if problem is not None:
        return "bad" if wanted else "note", f"not tried: {problem}"
    text = f"({RECIPES[compute]}) differs from bf16 by {difference:.1%}"
    if not difference < MOST_BY_8_BITS:
        return "bad", f"{text}, more than rounding explains: report it"
    return "ok", text


def fused_against_unfused(device: torch.device, trial: Trial) -> tuple[float, str]:
    """Return the largest relative difference among loss and gradients, and how it was computed, in words."""
    from lsr_scale.fused import fuse
    from lsr_scale.kernels.attention import Sequences, choose_backend

    model, ids = _trial_model(device, trial)
    unfused = _loss_and_gradients(model, ids)
    report = fuse(model)
    worst = _worst(_loss_and_gradients(model, ids), unfused)
    if not report.fused:
        return worst, str(report)
    config, dtype = trial.config, model.dtype
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q = torch.empty(1, 64, config.num_attention_heads, head_dim, dtype=dtype, device=device)
    return worst, f"attention by {choose_backend(q, q[:, :, : config.num_key_value_heads], Sequences(scale=1.0))}"


def eight_bits_against_bf16(device: torch.device, trial: Trial, compute: EightBits) -> tuple[float, str | None]:
    """Return the largest relative difference among loss and gradients in 8 bits, and why there is none, if so.

    Both are of the fused layer; `compute` is "fp8" or "int8".
    """
    from lsr_scale.fused import fuse

    model, ids = _trial_model(device, trial)
    report = fuse(model)
    if not report.fused:
        return 0.0, str(report)
    exact = _loss_and_gradients(model, ids)
    report = fuse(model, compute=compute)
    if not report.eight_bit:
        return 0.0, str(report)
    return _worst(_loss_and_gradients(model, ids), exact), None


def _trial_model(device: torch.device, trial: Trial) -> tuple[Any, torch.Tensor]:
    """Return the layer as a model in training, its factors not at their start, and tokens."""
    from peft import get_peft_model

    from lsr_scale.model import DTYPES, head_modules, meta_model, quantization_config
    from lsr_scale.model.random_weights import init_random_weights

    dtype = DTYPES[trial.base["dtype"]]
    empty = meta_model(trial.config, dtype=dtype)
    quantizer = quantization_config(
        trial.base["quantization"], trial.base["double_quantization"], dtype, head_modules(empty)
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        base = init_random_weights(empty, quantizer, device)
        freeze_quantized(base)  # as a run does it
        model: Any = get_peft_model(base, trial.adapter).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # not at its start, where one side is zero
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model, torch.randint(512, (2, 64), device=device)


def _loss_and_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(1)  # for dropout
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return [loss.detach().float(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a loss and gradients from those expected."""
    # a gradient much smaller than the others is the rest of sums that cancel, which roundings move by any share of it
    floor = 0.1 * max(float(gradient.norm()) for gradient in expected[1:])
    return max(float((a - b).norm()) / max(float(b.norm()), floor) for a, b in zip(found, expected, strict=True))
