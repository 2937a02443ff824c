"""A group of linears whose products with the frozen base are computed in 8 bits, forward and backward.

    Y  = sx sw (Xq Wq^T) + xa up^T          xa = X down^T
    dX = sy sv (dYq Vq)  + ds down          ds = dY up

                forward: X and W                                   backward: dY and W
    "fp8"       e4m3: Xq = e4m3(X / sx), Wq = e4m3(W / sw)         e4m3: dYq = e4m3(dY / sy), Vq = Wq
    "int8"      int8: Xq = round(X H / sx), Wq = round(W H / sw)   as "fp8"

The error enters in Y and in dX alone, by the rounding of X, dY and W. What is trained never sees it directly: adapters'
products take bfloat16 operands (see `kernels.gemm_8bit`), their gradients come from X and dY as they are.

e4m3 has 4 significant bits and 15 binades. Scales are powers of two, a row's from its largest value, so nothing
saturates; `sw` is one number a group. Rows differ by orders of magnitude, tokens of X as well as of dY; within a row,
and within a weight, the format's own exponent serves, so finer scales gain nothing (benchmarks/LOG.md).

int8 has up to 8 bits for what is near a row's largest value and fewer below, so X and W are rotated first (see
`kernels.hadamard`): their rows are nearly Gaussian then, and the error is a third of e4m3's. Scales are a row's largest
value over 127, `sx [T]` and `sw [N]`. Input gradients are summed over N, another rotation of W; in e4m3 they cost less
time, and most of the harm is done in the forward pass.

The quantized base is dequantized to codes in the orientation that a product wants, `[N, K]` forward and `[K, N]`
backward: on Hopper both operands have the summed dimension contiguous.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.kernels.dequantize import fill_extension
from lsr_scale.kernels.fp8 import E4M3, power_of_two_scale
from lsr_scale.kernels.gemm_8bit import gemm_8bit
from lsr_scale.kernels.hadamard import BLOCK
from lsr_scale.kernels.quantize_rows import quantize_rows
from lsr_scale.kernels.rms_norm_quantize import rms_norm_quantize
from lsr_scale.layers.frozen_linear import (
    dequantize_fp8,
    dequantize_into,
    dequantize_rotated,
    largest_magnitude,
    rotated_row_scales,
)

# rows on which calibration compares a product with the one in bfloat16
SAMPLE_ROWS = 512
# what is counted, of X forward and of dY backward; what is compared, Y forward and dX backward
DIRECTIONS = ("input", "gradient")
PRODUCTS = ("output", "gradient")


@dataclass
class EightBitState:
    """What a group that computes in 8 bits keeps from pass to pass.

    Attributes:
        forward: The dtype of the codes of X and W in the forward pass.
        calibrates: Whether its products are compared with those in bfloat16, see `errors`.
        scales: By whether the weight is transposed, as in the backward pass, what its codes are multiplied by, float32:
            `[1]`, or of int8 `[N]`; made with the first pass.
        key: What `scales` and `codes` hold for: see `LinearGroup.weights_key`. Where that is None there are no `codes`,
            and `scales` stay: a weight that grows after the first pass saturates.
        codes: The weight's codes, `[N, K]` and transposed `[K, N]`, where the layer caches weights.
        counts: By direction, int64 `[2]`: how many values underflowed, of how many; since the last reset.
        errors: By "output" and "gradient", the relative error of Y and of dX at the last pass that compared: the root
            mean square of the rows' `|y - y_bf16| / |y_bf16|`.
    """

    forward: torch.dtype = E4M3
    calibrates: bool = False
    scales: dict[bool, Tensor] = field(default_factory=dict)
    key: tuple[Any, ...] | None = None
    codes: dict[bool, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: not what is made of the weights, which torch cannot unpickle either."""
        return {**vars(self), "scales": {}, "codes": {}, "key": None}

    def captured(self) -> tuple[Any, ...]:
        """Return what a CUDA graph of the group's products holds for: formats, and where it reads and counts."""
        kept = (*self.scales.values(), *self.codes.values(), *self.counts.values())
        return self.forward, self.calibrates, *(tensor.data_ptr() for tensor in kept)


class EightBitPairs(NamedTuple):
    """A group's pairs in the dtype of its input; the weight's codes are made when a product needs them."""

    ups: Tensor
    downs: Tensor


class EightBitInput(NamedTuple):
    """A group's input: codes `[T, K]`, scales `[T]`, `xa [T, R]` or None; when calibrating some rows as they were.

    Or its output gradient: codes `[T, N]`, and ds in the place of xa.
    """

    codes: Tensor
    scales: Tensor
    xa: Tensor | None
    sample: Tensor | None = None


def eight_bit_shape_reason(group: LinearGroup, forward: torch.dtype) -> str | None:
    """Return why linears of these shapes cannot compute in 8 bits, or None."""
    of_inputs = BLOCK if forward == torch.int8 else 16
    for count, side, unit in ((group.in_features, "inputs", of_inputs), (group.out_features, "outputs", 16)):
        if count % unit:
            return f"{count} {side}, no multiple of {unit}"
    return None


@dataclass
class EightBitGroup(LinearGroup):
    """A `LinearGroup` that computes in 8 bits, of bfloat16 hidden states; its "matrix" is `EightBitPairs`."""

    state: EightBitState = field(default_factory=EightBitState)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> EightBitPairs:
        """Return the pairs, rounded to the dtype: ups `[N, R]`, block-diagonal, and downs `[R, K]`."""
        ups = torch.empty(self.out_features, self.width, dtype=dtype, device=device)
        downs = torch.empty(self.width, self.in_features, dtype=dtype, device=device)
        if self.width:
            for index in range(len(self.base_layers)):
                fill_extension(ups[self.rows(index)], self._extension(index, downs))
        return EightBitPairs(ups, downs)

    def cached_bytes(self, itemsize: int) -> int:
        """Return what a cache of the weight's codes takes, in both orientations."""
        return 2 * self.out_features * self.in_features

    def ups(self, matrix: EightBitPairs) -> Tensor:
        """Return every `up`, block-diagonal, `[N, R]`."""
        return matrix.ups

    def downs(self, matrix: EightBitPairs) -> Tensor:
        """Return every `down`, then zero rows, `[R, K]`."""
        return matrix.downs

    def normed_input(
        self, norm: Any, x: Tensor, matrix: EightBitPairs, **sums: Tensor
    ) -> tuple[EightBitInput, Tensor, Tensor | None]:
        """Return the group's input, rstd and `n down^T`, as `LinearGroup.normed_input` does."""
        codes, scales = self._empty_codes(x, self.in_features, self.state.forward)
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
        return EightBitInput(codes, scales, xa, sample), rstd, xa

    def swiglu_input(self, gate_up: Tensor, matrix: EightBitPairs) -> tuple[EightBitInput, Tensor | None]:
        """Return the group's input h, and `h down^T` or None, as `LinearGroup.swiglu_input` does."""
        hidden, xa = super().swiglu_input(gate_up, matrix)
        return self._quantized(hidden[:, : self.in_features])._replace(xa=xa), xa

    def multiply(self, x: EightBitInput, matrix: EightBitPairs) -> Tensor:
        """Return `Y [T, N]`."""
        out = torch.empty(len(x.codes), self.out_features, dtype=matrix.ups.dtype, device=x.codes.device)
        bias, up = self.bias(out.dtype), None if x.xa is None else matrix.ups
        weight, scale = self._weight(out, transposed=False)
        gemm_8bit(x.codes, x.scales, weight, scale, out, thin=x.xa, up=up, bias=bias)
        if x.sample is not None:
            rows = _sample_rows(out)
            expected = (x.sample @ self._dequantized(out).t()).float()
            expected += 0.0 if bias is None else bias.float()
            if x.xa is not None:
                expected += (x.xa[rows] @ matrix.ups.t()).float()
            self.state.errors["output"] = _error(out[rows], expected)
        return out

    def project(self, x: Tensor, matrix: EightBitPairs) -> tuple[Tensor, Tensor | None]:
        """Return `(Y [T, N], xA [T, R])`."""
        xa = x.new_empty(len(x), self.width) if self.width else None
        quantized = self._quantized(x, matrix.downs if self.width else None, xa)
        return self.multiply(quantized, matrix), xa

    def gradient_codes(self, grad: Tensor) -> dict[str, Tensor]:
        """Return room for the codes and scales of an output gradient `[T, N]` that a norm's backward pass writes."""
        codes, scales = self._empty_codes(grad, self.out_features, E4M3)
        return {"codes": codes, "scales": scales, "counts": self._counts("gradient", grad)}

    def gradient_input(
        self,
        grad: Tensor,
        matrix: EightBitPairs,
        fill_tail: bool = False,
        codes: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[EightBitInput, Tensor]:
        """Return the output gradient quantized, and ds, as `LinearGroup.gradient_input` does."""
        d_y, ds, ups = grad[:, : self.out_features], self.tail(grad), None
        if fill_tail and self.width:
            ds, ups = torch.empty_like(ds, memory_format=torch.contiguous_format), matrix.ups.t().contiguous()
        if codes:
            quantized, scales = codes["codes"], codes["scales"]
        else:
            quantized, scales = self._empty_codes(d_y, self.out_features, E4M3)
            self._quantize(d_y, quantized, scales, "gradient", ups, None if ups is None else ds)
        sample = d_y[_sample_rows(d_y)] if self.state.calibrates else None
        return EightBitInput(quantized, scales, ds if self.width else None, sample), ds

    def input_gradient(self, grad: EightBitInput, matrix: EightBitPairs) -> Tensor:
        """Return `dX [T, K]` from what `gradient_input` returned first."""
        out = torch.empty(len(grad.codes), self.in_features, dtype=matrix.ups.dtype, device=grad.codes.device)
        weight, scale = self._weight(out, transposed=True)
        down = None if grad.xa is None else matrix.downs
        gemm_8bit(grad.codes, grad.scales, weight, scale, out, thin=grad.xa, down=down)
        if grad.sample is not None:
            rows = _sample_rows(out)
            expected = (grad.sample @ self._dequantized(out)).float()
            if grad.xa is not None:
                expected += (grad.xa[rows] @ matrix.downs).float()
            self.state.errors["gradient"] = _error(out[rows], expected)
        return out

    def _quantized(self, x: Tensor, downs: Tensor | None = None, xa: Tensor | None = None) -> EightBitInput:
        """Return an input `[T, K]` quantized, and with `xa = x downs^T` from the same read where that is asked for."""
        codes, scales = self._empty_codes(x, self.in_features, self.state.forward)
        self._quantize(x, codes, scales, "input", downs, xa)
        return EightBitInput(codes, scales, xa, x[_sample_rows(x)] if self.state.calibrates else None)

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
    def _empty_codes(like: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes = torch.empty(len(like), columns, dtype=dtype, device=like.device)
        return codes, torch.empty(len(like), dtype=torch.float32, device=like.device)

    def _counts(self, direction: str, like: Tensor) -> Tensor:
        counts = self.state.counts.get(direction)
        if counts is None or counts.device != like.device:
            # they are added to in other passes too, so they are no inference tensors
            with torch.inference_mode(False):
                counts = self.state.counts[direction] = torch.zeros(2, dtype=torch.int64, device=like.device)
        return counts

    def _weight(self, like: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """Return the weight's codes, `[N, K]` or transposed `[K, N]`, cached or dequantized now, and their scale."""
        state, key = self.state, self.weights_key(E4M3, like.device)
        if state.key != key:
            state.scales, state.codes, state.key = {}, {}, key
        if self.cache is None:
            state.codes = {}
        rotated = state.forward == torch.int8 and not transposed
        if transposed not in state.scales:
            state.scales[transposed] = self._rotated_scales() if rotated else self._scale()
        scales, codes = state.scales[transposed], state.codes.get(transposed)
        if codes is None:
            shape = self.out_features, self.in_features
            dtype = E4M3 if transposed else state.forward
            codes = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=like.device)
            for index, base in enumerate(self.base_layers):
                rows = self.rows(index)
                if rotated:
                    dequantize_rotated(base, codes[rows], scales[rows])
                else:
                    dequantize_fp8(base, codes[:, rows] if transposed else codes[rows], scales, transposed)
            if self.cache is not None and key is not None:
                state.codes[transposed] = codes
        return codes, scales

    def _scale(self) -> Tensor:
        """Return sw for e4m3, `[1]`: the same for the weight and its transpose."""
        largest = torch.stack([largest_magnitude(base).view(()) for base in self.base_layers]).max()
        return power_of_two_scale(largest).view(1)

    def _rotated_scales(self) -> Tensor:
        """Return sw for int8, `[N]`."""
        return torch.cat([rotated_row_scales(base) for base in self.base_layers])

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
