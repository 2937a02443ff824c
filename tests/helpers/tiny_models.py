"""Tiny random models of the tests, on whatever this process has; importing this sets the process up for them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; read when one is decorated, so before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bitsandbytes as bnb
import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# Tiny tensors: threads would only wait for each other, above all when test processes run side by side.
torch.set_num_threads(1)

two_processes = pytest.mark.skipif(
    torch.cuda.device_count() == 1 and os.environ.get("LSR_SCALE_BACKEND") != "gloo",
    reason="two processes need two GPUs or none, or LSR_SCALE_BACKEND=gloo",
)

SEVEN_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# grouped-query attention, dimensions that are no powers of two
TINY_SIZES = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=0,
    attn_implementation="sdpa",
)


def tiny_llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    """Return a random two-layer LLaMA of `TINY_SIZES`."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_SIZES, **changes})).to(dtype)


def quantize(model: nn.Module, kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace every linear layer of the decoder by a bitsandbytes one of that kind: nf4, nf4-single, fp4 or int8."""
    model = model.to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        bias = module.bias is not None
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=bias, has_fp16_weights=False)
            # from the CPU: it is the way to its device that quantizes
            new.weight = bnb.nn.Int8Params(module.weight.data.cpu(), has_fp16_weights=False, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=bias,
                compute_dtype=dtype,
                compress_statistics=kind != "nf4-single",
                quant_type=kind.split("-")[0],
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data,
                requires_grad=False,
                compress_statistics=kind != "nf4-single",
                quant_type=kind.split("-")[0],
                module=new,
            )
        if bias:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new.to(module.weight.device))
    return model


def randomize(model: nn.Module, seed: int = 1, scale: float = 0.3) -> nn.Module:
    """Give every trainable parameter new values, so that no adapter is at its zero start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((noise * scale).to(parameter.dtype))
    return model
