"""Frozen bitsandbytes linear layers for training: the weight is dequantized when needed, and no tensor is saved.

bitsandbytes' own autograd functions save the packed weight (4-bit) or the input activation (int8) for the backward
pass, which defeats activation checkpointing and ZeRO-3, and its 4-bit layer repacks the weight in eval mode on CPUs
with AVX512-BF16, after which gradients silently stop. The layers here save only the module, read its weight again in
the backward pass, and never repack.

int8 means weight-only here, on every path: `y = x (CB * SCB / 127)^T` with activations in their own dtype (bf16 in
training). bitsandbytes' `Linear8bitLt` quantizes the activations too (LLM.int8()); results differ by that rounding.
"""

import functools
import math
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.errors import UserError
from lsr_scale.kernels import dequantize as kernels
from lsr_scale.kernels import dequantize_fp8 as fp8_kernels
from lsr_scale.kernels import dequantize_rotated as int8_kernels
from lsr_scale.kernels.backend import is_fake, use_triton
from lsr_scale.kernels.hadamard import int8_scale, rotate_reference

_DEQUANTIZED_FROM = "dequantized_from"


def dequantize(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weight of a frozen linear layer: a new tensor where it is quantized.

    Args:
        layer: A `Linear4bit` (NF4 or FP4, double quantization or not) or `Linear8bitLt` with a quantized weight, or a
            plain linear layer.
        dtype: dtype of the result; the arithmetic is bitsandbytes' own (float32 for int8).

    Returns:
        The weight, `[out_features, in_features]`.

    Raises:
        UserError: if the weight was never quantized, or is in bitsandbytes' packed CPU inference layout.
    """
    if not isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
        return layer.weight.to(dtype)
    if _kernel_fits(layer, dtype):
        out = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device=layer.weight.device)
        dequantize_into(layer, out)
        return out
    if isinstance(layer, bnb.nn.Linear4bit):
        state = _quant_state(layer)
        if layer.in_features % state.blocksize and layer.weight.device.type == "cpu":
            # bitsandbytes' kernel for AVX512 CPUs gives wrong weights where a block goes over the end of a row
            size = layer.out_features, layer.in_features
            values = kernels.decode_4bit_reference(layer.weight.data, num_values=math.prod(size), **_tables(state))
            return values.view(size).to(dtype)
        return bnb_functional.dequantize_4bit(layer.weight.data, state).to(dtype)
    scale = _row_scales(layer)
    return bnb_functional.int8_vectorwise_dequant(layer.weight.data, scale).to(dtype)


def quantization_of(layer: nn.Module) -> str:
    """Return how a linear layer's weight is held: none, int8, nf4 or fp4; or was, before it was `dequantized`."""
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: Any = layer.weight
        return str(weight.quant_type)
    return "int8" if isinstance(layer, bnb.nn.Linear8bitLt) else getattr(layer, _DEQUANTIZED_FROM, "none")


def _quant_state(layer: bnb.nn.Linear4bit) -> Any:
    """Return the quant_state of a 4-bit weight; raise UserError if there is none, or one for inference only."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise UserError(
            f"Linear4bit {layer.in_features} -> {layer.out_features}: the weight is not quantized yet; "
            "move the model to its device (.to('cpu') or .to('cuda')) before the first forward"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            f"Linear4bit {layer.in_features} -> {layer.out_features}: the weight was repacked for CPU inference "
            "(bitsandbytes does so on an eval-mode forward), which has no gradient; load the model again and "
            "inject the adapter, or call lsr_scale.layers.frozen_linear.freeze_quantized(model), before any forward"
        )
    return state


def _tables(state: Any) -> dict[str, Any]:
    """Return what the 4-bit kernels ask of a quantization state."""
    nested = (state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize) if state.nested else None
    return {"absmax": state.absmax, "code": state.code, "block_size": state.blocksize, "nested": nested}


def _row_scales(layer: bnb.nn.Linear8bitLt) -> Tensor:
    """Return the row scales of an int8 weight, on its device; raise UserError if there are none."""
    weight: Any = layer.weight
    scale = weight.SCB if weight.SCB is not None else layer.state.SCB
    if scale is None or weight.dtype != torch.int8:
        raise UserError(
            f"Linear8bitLt {layer.in_features} -> {layer.out_features}: the weight is {weight.dtype}, not int8 with "
            "row scales; move the model to its device before the first forward"
        )
    if scale.device != weight.device:
        # model.to() does not move this attribute of its weights; a copy per call would stall the GPU
        weight.SCB = scale = scale.to(weight.device)
    return scale


def dequantize_into(layer: nn.Linear, out: Tensor, extension: kernels.Extension = kernels.NOTHING) -> None:
    """Write the weight of a frozen linear layer, and an adapter's pair beside and below it, into a matrix.

    One launch per layer on a GPU, for NF4, FP4 and int8 alike, bit-equal to `dequantize(layer, out.dtype)`.

    Args:
        layer: A `Linear4bit`, a `Linear8bitLt`, or a plain linear layer.
        out: `[out_features, in_features + R]`, unit column stride: the weight, then `up` in R columns of zeros.
        extension: The pair, and where it goes.

    Raises:
        UserError: as `dequantize`.
    """
    weight: Any = layer.weight
    quantized = isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    if not _kernel_fits(layer, out.dtype):
        full = dequantize(layer, out.dtype) if quantized else weight
        kernels.copy_weight_reference(full, out, extension=extension)
    elif not quantized:
        kernels.copy_weight(weight, out, extension=extension)
    elif isinstance(layer, bnb.nn.Linear4bit):
        tables, packed = _tables(_quant_state(layer)), weight.data.view(torch.uint8)
        kernels.dequantize_4bit(packed, out=out, **tables, extension=extension)
    else:
        kernels.dequantize_int8(weight.data, _row_scales(layer), out, extension=extension)


def dequantize_fp8(layer: nn.Linear, out: Tensor, weight_scale: Tensor, transposed: bool) -> None:
    """Write the weight of a frozen linear layer in e4m3, `out = e4m3(W / weight_scale)`, as it is or transposed.

    One launch on a GPU, for NF4, FP4, int8 and plain weights alike, rounded once from bitsandbytes' float32 values.

    Args:
        layer: A `Linear4bit`, a `Linear8bitLt`, or a plain linear layer.
        out: `[out_features, in_features]`, or transposed `[in_features, out_features]`, float8_e4m3fn, unit column
            stride: rows, or transposed columns, of a group's matrix.
        weight_scale: A power of two, float32 `[1]`, on the device: `power_of_two_scale(largest_magnitude(layer))`, or
            a larger one that the layer shares with others.
        transposed: Write the transpose.

    Raises:
        UserError: as `dequantize`.
    """
    run = fp8_kernels.dequantize_4bit_fp8, fp8_kernels.dequantize_int8_fp8, fp8_kernels.encode_weight
    _encode(layer, out, run, weight_scale=weight_scale, transposed=transposed)


def dequantize_rotated(layer: nn.Linear, out: Tensor, row_scales: Tensor) -> None:
    """Write the weight of a frozen linear layer, rotated, in int8, `out = round(rot(W) / row_scales)`.

    W is the weight in bfloat16, rot the rotation of `lsr_scale.kernels.hadamard`. One launch on a GPU, for NF4, FP4,
    int8 and plain weights alike.

    Args:
        layer: A `Linear4bit`, a `Linear8bitLt`, or a plain linear layer, of a multiple of 64 input features.
        out: `[out_features, in_features]`, int8, unit column stride: rows of a group's matrix.
        row_scales: Float32 `[out_features]`, on the device: `rotated_row_scales(layer)`.

    Raises:
        UserError: as `dequantize`.
    """
    run = int8_kernels.dequantize_4bit_rotated, int8_kernels.dequantize_int8_rotated, int8_kernels.encode_rotated
    _encode(layer, out, run, row_scales=row_scales)


def _encode(layer: nn.Linear, out: Tensor, run: tuple[Any, Any, Any], **options: Any) -> None:
    """Run the one of three operations that takes a weight as it is stored: in 4 bits, in int8, plain.

    On a FakeTensor nothing runs, as nothing is allocated, but a weight that is not quantized yet is refused there too.
    """
    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        stored = {"packed": weight.data.view(torch.uint8), **_tables(_quant_state(layer))}
        encode = functools.partial(run[0], **stored)
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        encode = functools.partial(run[1], weight.data, _row_scales(layer))
    else:
        encode = functools.partial(run[2], weight.data)
    if not is_fake(out):
        encode(out=out, **options)


# of float32 values that are rotated at a time: 32 MiB
_ROTATED_VALUES = 2**23


@torch.no_grad()
def rotated_row_scales(layer: nn.Linear) -> Tensor:
    """Return the scales of a frozen linear layer's weight in rotated int8, float32 `[out_features]`, on its device.

    The largest magnitude of each row of rot(W), W in bfloat16, over 127 (`int8_scale`). It takes the memory of W in
    bfloat16, and no more than a few chunks of rows in float32. Nothing waits for the GPU.

    Raises:
        UserError: as `dequantize`.
    """
    largest = torch.empty(layer.out_features, device=layer.weight.device)
    if is_fake(layer.weight):
        return largest
    weight = dequantize(layer, torch.bfloat16)
    rows = max(1, _ROTATED_VALUES // layer.in_features)
    for part, of in zip(largest.split(rows), weight.split(rows), strict=True):
        part.copy_(rotate_reference(of).abs().amax(1))
    return int8_scale(largest)


def largest_magnitude(layer: nn.Linear) -> Tensor:
    """Return the largest magnitude of a frozen linear layer's weight, float32 `[1]`, on its device.

    From the scales of a quantized weight, without dequantizing it: that of its largest block if a code in it is the
    table's largest (bitsandbytes' scales are made so), else more. Nothing waits for the GPU.

    Raises:
        UserError: as `dequantize`.
    """
    if isinstance(layer, bnb.nn.Linear4bit):
        tables = _tables(_quant_state(layer))
        scales = kernels.block_scales(tables["absmax"], tables["nested"])
        largest = scales.abs().amax() * tables["code"].float().abs().amax()
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        # the code of a row's largest magnitude is 127
        largest = _row_scales(layer).float().amax()
    else:
        # no copy of the magnitudes
        smallest, largest = torch.aminmax(layer.weight.data)
        largest = torch.maximum(-smallest, largest).float()
    return largest.view(1)


def _kernel_fits(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Tell whether the dequantization kernel takes a layer: on a GPU, rows and blocks of a multiple of 8 elements."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    divisible = layer.in_features % 8 == 0 and (state is None or state.blocksize % 8 == 0)
    return divisible and use_triton(weight, dtype)


class _FrozenLinearFunction(torch.autograd.Function):
    """`y = x W^T + b` with W dequantized in forward and again in backward; only the module is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, dequantize(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_x = grad @ dequantize(ctx.layer, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class FrozenLinear(nn.Linear):
    """A linear layer that is not quantized and saves no weight for the backward pass; `nn.Linear` saves its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`."""
        return _FrozenLinearFunction.apply(x, self.bias, self)  # pyright: ignore


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A `Linear4bit` whose forward saves no weight for the backward pass and never repacks it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` in the dtype of `x`, computed in the layer's compute dtype where one is set."""
        compute_dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        return _FrozenLinearFunction.apply(x.to(compute_dtype), bias, self).to(x.dtype)  # pyright: ignore


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """A `Linear8bitLt` computed weight-only: dequantized weight, activations untouched (see the module docstring)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenLinearFunction.apply(x, bias, self)  # pyright: ignore


def freeze_quantized(model: nn.Module) -> int:
    """Change the class of every bitsandbytes linear layer of `model`, itself included, to the frozen one, in place.

    Layers keep their identity, parameters, hooks and `isinstance` relations. int8 layers that still train in fp16
    (`has_fp16_weights`) stay as they are.

    Returns:
        Number of frozen layers, those from before included.
    """
    num_frozen = 0
    for layer in model.modules():
        if type(layer) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4):
            layer.__class__ = FrozenLinear4bit
        elif type(layer) is bnb.nn.Linear8bitLt and not layer.state.has_fp16_weights:
            layer.__class__ = FrozenLinear8bit
            weight: Any = layer.weight
            if weight.SCB is None:
                weight.SCB = layer.state.SCB
            # a second reference to the codes would keep them unsharded on every rank under ZeRO-3
            weight.CB = None
            layer.state.reset_grads()
        num_frozen += isinstance(layer, FrozenLinear4bit | FrozenLinear8bit)
    return num_frozen


def dequantize_all(model: nn.Module) -> None:
    """Replace the quantized linear layers of a model by plain ones with the weights they stand for, in place.

    The function is the same, bit for bit, and faster where a forward is of few tokens, for which each layer would
    dequantize its weight anew. The model takes `dequantized_bytes` for it.
    """
    for name, layer in _quantized_layers(model):
        model.set_submodule(name, dequantized(layer, _compute_dtype(layer)))


def dequantized(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a plain layer with the weight that a quantized one stands for; what quantized it stays known."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(dequantize(layer, dtype), requires_grad=False)
    plain.bias = layer.bias
    setattr(plain, _DEQUANTIZED_FROM, quantization_of(layer))
    return plain


def dequantized_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that `dequantize_all` makes, 0 where nothing is quantized."""
    layers = [layer for _, layer in _quantized_layers(model)]
    return sum(layer.in_features * layer.out_features * _compute_dtype(layer).itemsize for layer in layers)


def _quantized_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    modules = model.named_modules()
    return [(name, layer) for name, layer in modules if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]


def _compute_dtype(layer: nn.Linear) -> torch.dtype:
    """Return the dtype that a layer computes in: an int8 layer that of its input, bfloat16 in this package's models."""
    return getattr(layer, "compute_dtype", None) or torch.bfloat16
