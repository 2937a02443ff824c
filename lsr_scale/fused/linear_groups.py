"""Linears that share an input, with their adapters, as one matrix: the K-extension.

For linears `W_i [N_i, K]` with pairs `(down_i [r_i, K], up_i [N_i, r_i])`, N = sum N_i and R = sum r_i padded, the
matrix

    rows 0 .. N:      [ W_0; W_1; ... (K columns) | block-diagonal of the up_i (R columns) ]
    rows N .. N + R:  [ down_0; down_1; ... (zero rows as padding)      | unused ]

turns forward and input gradient into one GEMM each, adapters included, with one rounding:

    Y  = [x  | x down^T] @ rows[:N]^T
    dX = [dY | dY up   ] @ rows[:, :K]

Nothing is ever added to a quantized weight: in bfloat16 an update 4e-4 of the weight's size would lose 91 % of itself.
The matrix lives as long as a pass needs it, in memory that the allocator reuses from group to group; where there is
memory to spare a layer caches it (`CachedMatrix`), and a pass writes only the pairs.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lsr_scale.adapters.joint import JointLinear
from lsr_scale.adapters.pairs import Pair
from lsr_scale.adapters.peft import version_counters
from lsr_scale.kernels.backend import is_fake
from lsr_scale.kernels.dequantize import Extension, fill_extension
from lsr_scale.kernels.output_gradients import output_gradients
from lsr_scale.kernels.rms_norm import rms_norm
from lsr_scale.kernels.rms_norm_project import rms_norm_project
from lsr_scale.kernels.swiglu import swiglu
from lsr_scale.kernels.swiglu_project import swiglu_project
from lsr_scale.layers.frozen_linear import dequantize_into

# cuBLAS is fastest with this many extra columns; 16 cost four times as much on an H100 (benchmarks/LOG.md)
ALIGNMENT = 64
# rows of a block of output_gradients, all of which must belong to one linear
BLOCK = 64


def base_layer(linear: nn.Module) -> Any:
    """Return the frozen linear layer under any adapters: PEFT's `get_base_layer`, which a plain linear has not."""
    if isinstance(linear, JointLinear):
        return linear.base_layer
    return linear.get_base_layer() if isinstance(linear, BaseTunerLayer) else linear


@dataclass
class CachedMatrix:
    """A group's matrix with its dequantized weights, cached from pass to pass.

    Attributes:
        matrix: `[N + R, K + R]`, or None until it is first needed.
        key: dtype, device, and each weight's version and address: one that was loaded, moved or merged is dequantized
            again.
    """

    matrix: Tensor | None = None
    key: tuple[Any, ...] | None = None


@dataclass
class LinearGroup:
    """Linears that read one input, the pair of each (None: no active adapter), and their matrix's cache, if any."""

    linears: Sequence[nn.Module]
    pairs: Sequence[Pair | None]
    cache: CachedMatrix | None = None
    trials: ClassVar[int | None] = None  # a `JointGroup`'s

    def __post_init__(self) -> None:
        self.base_layers = [base_layer(linear) for linear in self.linears]
        self.in_features: int = self.base_layers[0].in_features
        self.sizes: list[int] = [base.out_features for base in self.base_layers]
        self.out_features = sum(self.sizes)
        self.ranks = [0 if pair is None else pair[0].shape[-2] for pair in self.pairs]
        rank = sum(self.ranks)
        self.width = -(-rank // ALIGNMENT) * ALIGNMENT

    def columns(self, index: int) -> slice:
        """Return the columns of a linear's adapter among the group's R."""
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])

    def rows(self, index: int) -> slice:
        """Return the rows of a linear among the group's N."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the group's matrix `[N + R, K + R]`, weights dequantized or cached, pairs written into it."""
        N, K, R = self.out_features, self.in_features, self.width
        key = self.weights_key(dtype, device)
        matrix, cache = None, None if key is None else self.cache
        if cache is not None:
            if cache.matrix is not None and cache.key == key and cache.matrix.shape[1] >= K + R:
                matrix = cache.matrix[: N + R, : K + R]
            else:
                cache.matrix = None  # freed before another is allocated
        if matrix is not None:
            for index in range(len(self.base_layers)):
                fill_extension(matrix[self.rows(index), K:], self._extension(index, matrix[N:, :K]))
            return matrix
        # a cached matrix serves training too, so it is no inference tensor
        with torch.inference_mode(cache is None and torch.is_inference_mode_enabled()):
            matrix = torch.empty(N + R, K + R, dtype=dtype, device=device)
        for index, base in enumerate(self.base_layers):
            dequantize_into(base, matrix[self.rows(index)], self._extension(index, matrix[N:, :K]))
        if cache is not None:
            cache.matrix, cache.key = matrix, key
        return matrix

    def weights_key(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...] | None:
        """Return what is another after a weight was loaded, moved or merged; None where nobody can tell (ZeRO-3)."""
        counts = version_counters(base.weight for base in self.base_layers)
        if counts is None:
            return None
        return dtype, device, counts, *(base.weight.data_ptr() for base in self.base_layers)

    def cached_bytes(self, itemsize: int) -> int:
        """Return what a cache of the group's weights takes, for elements of so many bytes."""
        return (self.out_features + self.width) * (self.in_features + self.width) * itemsize

    def _extension(self, index: int, downs: Tensor) -> Extension:
        """Return where a linear's pair goes: `down` to `downs [R, K]`, the last one's with the padding below it."""
        down, up = self.pairs[index] or (None, None)
        columns = self.columns(index)
        end = len(downs) if index == len(self.base_layers) - 1 else columns.stop
        return Extension(up, columns.start, down, downs[columns.start : end] if end > columns.start else None)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the concatenated biases `[N]`, or None."""
        if all(base.bias is None for base in self.base_layers):
            return None
        device = next(base.bias.device for base in self.base_layers if base.bias is not None)
        parts = [
            torch.zeros(size, dtype=dtype, device=device) if base.bias is None else base.bias.to(dtype)
            for base, size in zip(self.base_layers, self.sizes, strict=True)
        ]
        return torch.cat(parts)

    def input_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Return an uninitialized `[T, K + R]` for the group's input and `x down^T`."""
        return like.new_empty(rows, self.in_features + self.width)

    def gradient_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Return an uninitialized `[T, N + R]` for the output gradient, whose tail `output_products` fills."""
        return like.new_empty(rows, self.out_features + self.width)

    def extended(self, grad: Tensor) -> Tensor:
        """Return a copy of the output gradient `[T, N]` in a `gradient_buffer`."""
        buffer = self.gradient_buffer(len(grad), grad)
        buffer[:, : self.out_features] = grad
        return buffer

    def downs(self, matrix: Any) -> Tensor:
        """Return the view `[R, K]` of the matrix with every `down`, then zero rows."""
        return matrix[self.out_features :, : self.in_features]

    def ups(self, matrix: Any) -> Tensor:
        """Return the view `[N, R]` of the matrix with every `up`, block-diagonal."""
        return matrix[: self.out_features, self.in_features :]

    def normed_input(self, norm: Any, x: Tensor, matrix: Any, **sums: Tensor) -> tuple[Any, Tensor, Tensor | None]:
        """Return the group's input from what is normalized first, in one pass over it.

        Args:
            norm: An RMSNorm.
            x: `[T, K]`.
            matrix: The group's.
            sums: `residual` and `residual_out` of `rms_norm`.

        Returns:
            What `multiply` takes, here `[T, K + R]`: n, the normalized x, and `n down^T`; rstd; the latter again, None
            without adapters.
        """
        normed = self.input_buffer(len(x), x)
        if not self.width:
            return normed, rms_norm(x, norm.weight, norm.variance_epsilon, normed, **sums), None
        xa, downs, rank = x.new_empty(len(x), self.width), self.downs(matrix), sum(self.ranks)
        rstd = rms_norm_project(x, norm.weight, norm.variance_epsilon, normed, downs, xa, rank=rank, **sums)
        return normed, rstd, xa

    def swiglu_input(self, gate_up: Tensor, matrix: Any) -> tuple[Any, Tensor | None]:
        """Return the group's input h from gate and up `[T, 2K]`: what `multiply` takes, and `h down^T` or None."""
        hidden = self.input_buffer(len(gate_up), gate_up)
        if not self.width:
            swiglu(gate_up, hidden)
            return hidden, None
        xa = gate_up.new_empty(len(gate_up), self.width)
        swiglu_project(gate_up, hidden, self.downs(matrix), xa, rank=sum(self.ranks))
        return hidden, xa

    def multiply(self, x: Any, matrix: Any) -> Tensor:
        """Return `Y [T, N]` from the input `[T, K + R]` with `x down^T` in its tail."""
        return _gemm(x, matrix[: self.out_features].t(), self.bias(x.dtype))

    def project(self, x: Tensor, matrix: Any) -> tuple[Tensor, Tensor | None]:
        """Return `(Y [T, N], xA [T, R])` from an input `[T, K]` without a tail: a thin GEMM adds the adapters."""
        N, K = self.out_features, self.in_features
        out = _gemm(x, matrix[:N, :K].t(), self.bias(x.dtype))
        if not self.width:
            return out, None
        xa = x @ self.downs(matrix).t()
        return out.addmm_(xa, self.ups(matrix).t()), xa

    def gradient_codes(self, grad: Tensor) -> dict[str, Tensor]:
        """Return what of `rms_norm_backward`'s arguments takes the output gradient's codes: nothing here.

        Args:
            grad: The output gradient `[T, N]`, to be written.
        """
        del grad
        return {}

    def gradient_input(
        self, grad: Tensor, matrix: Any, fill_tail: bool = False, codes: Mapping[str, Tensor] = MappingProxyType({})
    ) -> tuple[Any, Tensor]:
        """Return what `input_gradient` takes, and `ds = dY up [T, R]`, from the output gradient `[T, N + R]`.

        Args:
            grad: With ds in its tail, unless `fill_tail`. Its memory is not needed any more where the result is other.
            matrix: The group's.
            fill_tail: Make ds.
            codes: What `gradient_codes` made, filled, where the gradient is quantized already.
        """
        del codes
        if fill_tail and self.width:
            torch.mm(grad[:, : self.out_features], self.ups(matrix), out=self.tail(grad))
        return grad, self.tail(grad)

    def input_gradient(self, grad: Any, matrix: Any) -> Tensor:
        """Return `dX [T, K]` from what `gradient_input` returned first."""
        return grad @ matrix[:, : self.in_features]

    def tail(self, grad: Tensor) -> Tensor:
        """Return the tail `ds [T, R]` of an output gradient `[T, N + R]`."""
        return grad[:, self.out_features :]

    def output_products(self, grad: Tensor, xa: Tensor, matrix: Any) -> list[Tensor | None]:
        """Fill the tail of `grad [T, N + R]` with `dY up`, and return each `d up_i = dY_i^T xA_i` in float32."""
        N, up = self.out_features, self.ups(matrix)
        width = -(-max(self.ranks) // 16) * 16
        if grad.is_cuda and len(grad) and width <= BLOCK and all(size % BLOCK == 0 for size in self.sizes):
            offsets = _offsets(tuple(self.sizes), tuple(self.ranks), grad.device)
            _, d_up = output_gradients(grad[:, :N], xa, up, offsets, width, ds_out=self.tail(grad))
            return [d_up[self.rows(index), :rank] if rank else None for index, rank in enumerate(self.ranks)]
        torch.mm(grad[:, :N], up, out=self.tail(grad))
        return self.up_gradients(grad, xa)

    def up_gradients(self, grad: Tensor, xa: Tensor) -> list[Tensor | None]:
        """Return each `d up_i = dY_i^T xA_i` in float32, from the output gradient `[T, >= N]`."""
        return [
            mm_float(grad[:, self.rows(index)].t(), xa[:, self.columns(index)]) if rank else None
            for index, rank in enumerate(self.ranks)
        ]

    def down_gradients(self, ds: Tensor, x: Tensor, scale: Tensor | None = None) -> list[Tensor | None]:
        """Return each `d down_i = ds_i^T x` in float32, times `scale [K]` if there is one."""
        d_down = mm_float(ds.t(), x)
        d_down = d_down if scale is None else d_down * scale
        return [d_down[self.columns(index)] if rank else None for index, rank in enumerate(self.ranks)]

    def normed_down_gradients(self, ds: Tensor, x: Tensor, rstd: Tensor, norm: Any) -> list[Tensor | None]:
        """Return each `d down_i = ds_i^T n`, n = x rstd weight; n is not computed: rstd and weight go to thin sides."""
        return self.down_gradients((ds * rstd[:, None]).to(ds.dtype), x, norm.weight)


@functools.cache
def _offsets(sizes: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the first adapter column of every block of rows, int32 on the device (made once per shape)."""
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    blocks = [start for start, size in zip(starts, sizes, strict=True) for _ in range(size // BLOCK)]
    return torch.tensor(blocks, dtype=torch.int32, device=device)


def _gemm(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


def mm_float(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` in float32 (float64 for such operands), never rounded to half precision."""
    if is_fake(a):
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a.float() @ b.float()) if a.dtype in (torch.bfloat16, torch.float16) else a @ b
