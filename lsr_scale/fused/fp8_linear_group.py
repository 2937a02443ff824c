"""A group of linears whose products with the frozen base are computed in FP8, forward and backward.

    Y  = sx sw (Xq Wq^T) + xa up^T          Xq = e4m3(X / sx), sx [T] one per row         xa = X down^T
    dX = sy sw (dYq Wq)  + ds down          dYq = e4m3(dY / sy), sy [T] one per row       ds = dY up
    Wq = e4m3(W / sw), sw one number a group

The error enters in Y and in dX alone, by the rounding of X, dY and W to 4 significant bits. What is trained never sees
it directly: adapters' products take bfloat16 operands (see `kernels.fp8_gemm`), their gradients come from X and dY as
they are. Scales are powers of two, a row's from its largest value, so nothing saturates. Rows differ by orders of
magnitude, tokens of X as well as of dY; within a row, and within a weight, e4m3 has 15 binades of its own, so finer
scales gain nothing (benchmarks/LOG.md). One scale a group serves W and its transpose: forward and backward see one
weight.

The quantized base is dequantized to codes in the orientation that a product wants, `[N, K]` forward and `[K, N]`
backward: on Hopper both operands have the summed dimension contiguous.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.kernels.dequantize import fill_extension
from lsr_scale.kernels.fp8 import E4M3, power_of_two_scale
from lsr_scale.kernels.fp8_gemm import fp8_gemm
from lsr_scale.kernels.fp8_quantize import quantize_rows
from lsr_scale.kernels.rms_norm_quantize import rms_norm_quantize
from lsr_scale.layers.frozen_linear import dequantize_fp8, dequantize_into, largest_magnitude

# rows on which calibration compares a product with the one in bfloat16
SAMPLE_ROWS = 512
# what is counted and compared in each direction
DIRECTIONS = ("input", "gradient")


@dataclass
class Fp8State:
    """What a group that computes in FP8 keeps from pass to pass.

    Attributes:
        calibrates: Whether its products are compared with those in bfloat16, see `errors`.
        scale: sw, float32 `[1]`, made with the first pass.
        key: What `scale` and `codes` hold for: see `LinearGroup.weights_key`.
        codes: Cached Wq `[N, K]` (False) and its transpose (True), where the layer caches weights.
        counts: By direction, int64 `[2]`: how many values underflowed, of how many; since the last reset.
        errors: By direction, the relative error of Y and of dX at the last pass that compared: the root mean square of
            the rows' `|y - y_bf16| / |y_bf16|`.
    """

    calibrates: bool = False
    scale: Tensor | None = None
    key: tuple[Any, ...] | None = None
    codes: dict[bool, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)


class Fp8Pairs(NamedTuple):
    """A group's pairs in the dtype of its input; the weight's codes are made when a product needs them."""

    ups: Tensor
    downs: Tensor


class Fp8Input(NamedTuple):
    """A group's input: codes `[T, K]`, scales `[T]`, `xa [T, R]` or None; when calibrating some rows as they were."""

    codes: Tensor
    scales: Tensor
    xa: Tensor | None
    sample: Tensor | None = None


def fp8_shape_reason(group: LinearGroup) -> str | None:
    """Return why linears of these shapes cannot compute in FP8, or None."""
    for count, side in ((group.in_features, "inputs"), (group.out_features, "outputs")):
        if count % 16:
            return f"{count} {side}, no multiple of 16"
    return None


@dataclass
class Fp8LinearGroup(LinearGroup):
    """A `LinearGroup` that computes in FP8; its "matrix" is `Fp8Pairs`. Hidden states and gradients are bfloat16."""

    state: Fp8State = field(default_factory=Fp8State)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Fp8Pairs:
        """Return the pairs, rounded to the dtype: ups `[N, R]`, block-diagonal, and downs `[R, K]`."""
        ups = torch.empty(self.out_features, self.width, dtype=dtype, device=device)
        downs = torch.empty(self.width, self.in_features, dtype=dtype, device=device)
        if self.width:
            for index in range(len(self.base_layers)):
                fill_extension(ups[self.rows(index)], self._extension(index, downs))
        return Fp8Pairs(ups, downs)

    def cached_bytes(self, itemsize: int) -> int:
        """Return what a cache of the weight's codes takes, in both orientations."""
        return 2 * self.out_features * self.in_features

    def ups(self, matrix: Fp8Pairs) -> Tensor:
        """Return every `up`, block-diagonal, `[N, R]`."""
        return matrix.ups

    def downs(self, matrix: Fp8Pairs) -> Tensor:
        """Return every `down`, then zero rows, `[R, K]`."""
        return matrix.downs

    def normed_input(
        self, norm: Any, x: Tensor, matrix: Fp8Pairs, **sums: Tensor
    ) -> tuple[Fp8Input, Tensor, Tensor | None]:
        """Return the group's input, rstd and `n down^T`, as `LinearGroup.normed_input` does."""
        codes, scales = self._empty_codes(len(x), self.in_features, x.device)
        downs = xa = None
        if self.width:
            downs, xa = matrix.downs, x.new_empty(len(x), self.width)
        rstd = rms_norm_quantize(
            *(x, norm.weight, norm.variance_epsilon, codes, scales),
            **{"down": downs, "xa_out": xa, "rank": sum(self.ranks), "counts": self._counts("input", x), **sums},
        )
        sample = None
        if self.state.calibrates:
            rows = _sample_rows(x)
            n = sums.get("residual_out", x)[rows].float() * rstd[rows, None] * norm.weight.float()
            sample = n.to(x.dtype)
        return Fp8Input(codes, scales, xa, sample), rstd, xa

    def swiglu_input(self, gate_up: Tensor, matrix: Fp8Pairs) -> tuple[Fp8Input, Tensor | None]:
        """Return the group's input h, and `h down^T` or None, as `LinearGroup.swiglu_input` does."""
        hidden, xa = super().swiglu_input(gate_up, matrix)
        return self._quantized(hidden[:, : self.in_features])._replace(xa=xa), xa

    def multiply(self, x: Fp8Input, matrix: Fp8Pairs) -> Tensor:
        """Return `Y [T, N]`."""
        out = torch.empty(len(x.codes), self.out_features, dtype=matrix.ups.dtype, device=x.codes.device)
        bias, up = self.bias(out.dtype), None if x.xa is None else matrix.ups
        weight, scale = self._weight(out, transposed=False)
        fp8_gemm(x.codes, x.scales, weight, scale, out, thin=x.xa, up=up, bias=bias)
        if x.sample is not None:
            rows = _sample_rows(out)
            expected = (x.sample @ self._dequantized(out).t()).float()
            expected += 0.0 if bias is None else bias.float()
            if x.xa is not None:
                expected += (x.xa[rows] @ matrix.ups.t()).float()
            self.state.errors["input"] = _error(out[rows], expected)
        return out

    def project(self, x: Tensor, matrix: Fp8Pairs) -> tuple[Tensor, Tensor | None]:
        """Return `(Y [T, N], xA [T, R])`."""
        xa = x.new_empty(len(x), self.width) if self.width else None
        quantized = self._quantized(x, matrix.downs if self.width else None, xa)
        return self.multiply(quantized, matrix), xa

    def input_gradient(self, grad: Tensor, matrix: Fp8Pairs, fill_tail: bool = False) -> Tensor:
        """Return `dX [T, K]` from the output gradient `[T, N + R]`, as `LinearGroup.input_gradient` does."""
        d_y = grad[:, : self.out_features]
        codes, scales = self._empty_codes(len(d_y), self.out_features, d_y.device)
        ups = tail = thin = None
        if self.width:
            thin = self.tail(grad)
            if fill_tail:
                ups, tail = matrix.ups.t().contiguous(), thin
        self._quantize(d_y, codes, scales, "gradient", ups, tail)
        out = torch.empty(len(d_y), self.in_features, dtype=grad.dtype, device=grad.device)
        weight, scale = self._weight(out, transposed=True)
        fp8_gemm(codes, scales, weight, scale, out, thin=thin, down=None if thin is None else matrix.downs)
        if self.state.calibrates:
            rows = _sample_rows(out)
            expected = (d_y[rows] @ self._dequantized(out)).float()
            if thin is not None:
                expected += (thin[rows] @ matrix.downs).float()
            self.state.errors["gradient"] = _error(out[rows], expected)
        return out

    def _quantized(self, x: Tensor, downs: Tensor | None = None, xa: Tensor | None = None) -> Fp8Input:
        """Return an input `[T, K]` quantized, and with `xa = x downs^T` from the same read where that is asked for."""
        codes, scales = self._empty_codes(len(x), self.in_features, x.device)
        self._quantize(x, codes, scales, "input", downs, xa)
        return Fp8Input(codes, scales, xa, x[_sample_rows(x)] if self.state.calibrates else None)

    def _quantize(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        direction: str,
        projection: Tensor | None,
        product: Tensor | None,
    ) -> None:
        rank, counts = sum(self.ranks), self._counts(direction, x)
        quantize_rows(x, codes, scales, counts=counts, projection=projection, product=product, rank=rank)

    @staticmethod
    def _empty_codes(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        codes = torch.empty(rows, columns, dtype=E4M3, device=device)
        return codes, torch.empty(rows, dtype=torch.float32, device=device)

    def _counts(self, direction: str, like: Tensor) -> Tensor:
        counts = self.state.counts.get(direction)
        if counts is None or counts.device != like.device:
            counts = self.state.counts[direction] = torch.zeros(2, dtype=torch.int64, device=like.device)
        return counts

    def _weight(self, like: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """Return the weight's codes, `[N, K]` or transposed `[K, N]`, cached or dequantized now, and their scale."""
        state, key = self.state, self.weights_key(E4M3, like.device)
        if state.scale is None or state.key != key:
            largest = torch.stack([largest_magnitude(base).view(()) for base in self.base_layers]).max()
            state.scale, state.key, state.codes = power_of_two_scale(largest).view(1), key, {}
        if self.cache is None:
            state.codes = {}
        codes = state.codes.get(transposed)
        if codes is None:
            shape = self.out_features, self.in_features
            codes = torch.empty(shape[::-1] if transposed else shape, dtype=E4M3, device=like.device)
            for index, base in enumerate(self.base_layers):
                part = codes[:, self.rows(index)] if transposed else codes[self.rows(index)]
                dequantize_fp8(base, part, state.scale, transposed)
            if self.cache is not None and key is not None:
                state.codes[transposed] = codes
        return codes, state.scale

    def _dequantized(self, like: Tensor) -> Tensor:
        """Return the weight `[N, K]` in the dtype of a tensor: what calibration compares with."""
        weight = torch.empty(self.out_features, self.in_features, dtype=like.dtype, device=like.device)
        for index, base in enumerate(self.base_layers):
            dequantize_into(base, weight[self.rows(index)])
        return weight


def _sample_rows(x: Tensor) -> Tensor:
    """Return the rows that calibration looks at: of few all, of many some at equal distances."""
    count = min(len(x), SAMPLE_ROWS)
    return torch.arange(count, device=x.device) * len(x) // max(1, count)


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """Return the root mean square over rows of `|found - expected| / |expected|`; rows of zeros do not count."""
    norms = expected.norm(dim=1)
    errors = (found.float() - expected).norm(dim=1) / norms
    errors = torch.where(norms > 0, errors, torch.zeros_like(errors))
    return errors.square().mean().sqrt()
