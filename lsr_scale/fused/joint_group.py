"""Linears that share an input, with the adapters of several trials, each for its own rows: the base's GEMM and `bmm`s.

For n trials x has `n t` rows, t of each trial, one trial after another. With the trials' pairs side by side,
`down [n, R, K]` and block-diagonal `up [n, N, R]`, and i the trial of a row,

    Y_i  = x_i W^T + (x_i down_i^T) up_i^T
    dX_i = dY_i W + (dY_i up_i) down_i

The products with W are one GEMM over all rows, which adds to what the thin ones wrote: there is one rounding more than
in a `LinearGroup`, of the update itself. The matrix is not extended by the adapters, as it is there: n trials' columns
would cost more than the thin products do. No trial's numbers are ever multiplied by another's, zeros included, so one
that diverged leaves the others as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.kernels.backend import is_fake
from lsr_scale.kernels.rms_norm import rms_norm
from lsr_scale.kernels.swiglu import swiglu
from lsr_scale.layers.frozen_linear import FrozenLinear

# columns of the thin products are a multiple of what tensor cores read at once
RANK_UNIT = 8


class JointMatrix(NamedTuple):
    """A group's weight `[N, K]`, and its trials' pairs in that dtype: downs `[n, R, K]` and ups `[n, N, R]`."""

    weight: Tensor
    downs: Tensor
    ups: Tensor


class JointInput(NamedTuple):
    """A group's input `[T, K]`, and `xa [T, R]`, each trial's rows with its own down."""

    x: Tensor
    xa: Tensor


@dataclass
class JointGroup(LinearGroup):
    """A `LinearGroup` of several trials: down of a linear's pair is `[n, r, K]`, up `[n, N_i, r]`, n the same for all.

    Trials whose rank is smaller have zeros beyond it, trials without an adapter zeros alone. Its "matrix" is
    `JointMatrix`.
    """

    trials: int = field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trials = next(pair[0].shape[0] for pair in self.pairs if pair is not None)
        self.rank = -(-sum(self.ranks) // RANK_UNIT) * RANK_UNIT
        self.base = LinearGroup(self.linears, [None] * len(self.linears), self.cache)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> JointMatrix:
        """Return the weight, dequantized, cached, or a single plain one itself; and the pairs, rounded to the dtype."""
        n, N, K, R = self.trials, self.out_features, self.in_features, self.rank
        downs = torch.empty(n, R, K, dtype=dtype, device=device)
        downs[:, sum(self.ranks) :].zero_()
        single = self.ranks == [R]
        ups = (torch.empty if single else torch.zeros)(n, N, R, dtype=dtype, device=device)
        for index, pair in enumerate(self.pairs):
            if pair is not None:
                downs[:, self.columns(index)] = pair[0]
                ups[:, self.rows(index), self.columns(index)] = pair[1]
        if self._reads_the_weight(dtype):
            return JointMatrix(self.base_layers[0].weight, downs, ups)
        return JointMatrix(self.base.matrix(dtype, device), downs, ups)

    def _reads_the_weight(self, dtype: torch.dtype) -> bool:
        """Tell whether the group is one linear whose weight can be multiplied with as it is."""
        first = self.base_layers[0]
        return len(self.base_layers) == 1 and type(first) in (nn.Linear, FrozenLinear) and first.weight.dtype == dtype

    def cached_bytes(self, itemsize: int) -> int:
        """Return what a cache of the group's weights takes, for elements of so many bytes."""
        weight = self.base_layers[0].weight
        cached = weight.element_size() != itemsize or not self._reads_the_weight(weight.dtype)
        return self.base.cached_bytes(itemsize) if cached else 0

    def downs(self, matrix: JointMatrix) -> Tensor:
        """Return every trial's `down`s, then zero rows, `[n, R, K]`."""
        return matrix.downs

    def ups(self, matrix: JointMatrix) -> Tensor:
        """Return every trial's `up`s, block-diagonal, `[n, N, R]`."""
        return matrix.ups

    def by_trial(self, x: Tensor) -> Tensor:
        """Return rows `[T, M]` as a view `[n, t, M]`.

        Raises:
            ValueError: if the trials cannot have equally many rows.
        """
        if len(x) % self.trials:
            raise ValueError(f"{len(x)} rows of {self.trials} trials: every trial must have equally many")
        return x.unflatten(0, (self.trials, -1))

    def normed_input(self, norm: Any, x: Tensor, matrix: JointMatrix, **sums: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return the group's input, rstd and `n down^T [T, R]`, as `LinearGroup.normed_input` does."""
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = rms_norm(x, norm.weight, norm.variance_epsilon, normed, **sums)
        xa = self._thin(normed, matrix.downs)
        return JointInput(normed, xa), rstd, xa

    def swiglu_input(self, gate_up: Tensor, matrix: JointMatrix) -> tuple[JointInput, Tensor]:
        """Return the group's input h, and `h down^T [T, R]`, as `LinearGroup.swiglu_input` does."""
        hidden = gate_up.new_empty(len(gate_up), self.in_features)
        swiglu(gate_up, hidden)
        xa = self._thin(hidden, matrix.downs)
        return JointInput(hidden, xa), xa

    def _thin(self, x: Tensor, downs: Tensor) -> Tensor:
        return torch.bmm(self.by_trial(x), downs.transpose(1, 2)).flatten(0, 1)

    def multiply(self, x: JointInput, matrix: JointMatrix) -> Tensor:
        """Return `Y [T, N]`."""
        out = x.x.new_empty(len(x.x), self.out_features)
        bias, xa, ups = self.bias(out.dtype), self.by_trial(x.xa), matrix.ups.transpose(1, 2)
        if bias is None:
            torch.bmm(xa, ups, out=self.by_trial(out))
        else:
            torch.baddbmm(bias, xa, ups, out=self.by_trial(out))
        return out.addmm_(x.x, matrix.weight.t())

    def project(self, x: Tensor, matrix: JointMatrix) -> tuple[Tensor, Tensor]:
        """Return `(Y [T, N], xA [T, R])` from an input `[T, K]`."""
        xa = self._thin(x, matrix.downs)
        return self.multiply(JointInput(x, xa), matrix), xa

    def gradient_input(
        self,
        grad: Tensor,
        matrix: JointMatrix,
        fill_tail: bool = False,
        codes: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor]:
        """Return the output gradient as it is, and ds, as `LinearGroup.gradient_input` does."""
        del codes
        if fill_tail:
            self._fill_tail(grad, matrix)
        return grad, self.tail(grad)

    def _fill_tail(self, grad: Tensor, matrix: JointMatrix) -> None:
        d_y = self.by_trial(grad[:, : self.out_features])
        torch.bmm(d_y, matrix.ups, out=self.by_trial(self.tail(grad)))

    def input_gradient(self, grad: Tensor, matrix: JointMatrix) -> Tensor:
        """Return `dX [T, K]` from what `gradient_input` returned first."""
        out = grad.new_empty(len(grad), self.in_features)
        torch.bmm(self.by_trial(self.tail(grad)), matrix.downs, out=self.by_trial(out))
        return out.addmm_(grad[:, : self.out_features], matrix.weight)

    def tail(self, grad: Tensor) -> Tensor:
        """Return the tail `ds [T, R]` of an output gradient's buffer."""
        return grad[:, self.out_features : self.out_features + self.rank]

    def output_products(self, grad: Tensor, xa: Tensor, matrix: JointMatrix) -> list[Tensor | None]:
        """Fill the tail of an output gradient's buffer with ds; return each `d up_i [n, N_i, r]` in float32."""
        self._fill_tail(grad, matrix)
        return self.up_gradients(grad, xa)

    def up_gradients(self, grad: Tensor, xa: Tensor) -> list[Tensor | None]:
        """Return each `d up_i [n, N_i, r]` in float32, from the output gradient `[T, >= N]`."""
        d_y = self.by_trial(grad[:, : self.out_features])
        d_up = bmm_float(d_y.transpose(1, 2), self.by_trial(xa))
        return [
            d_up[:, self.rows(index), self.columns(index)] if rank else None for index, rank in enumerate(self.ranks)
        ]

    def down_gradients(self, ds: Tensor, x: Tensor, scale: Tensor | None = None) -> list[Tensor | None]:
        """Return each `d down_i [n, r, K]` in float32, times `scale [K]` if there is one."""
        d_down = bmm_float(self.by_trial(ds).transpose(1, 2), self.by_trial(x))
        d_down = d_down if scale is None else d_down * scale
        return [d_down[:, self.columns(index)] if rank else None for index, rank in enumerate(self.ranks)]


def bmm_float(a: Tensor, b: Tensor) -> Tensor:
    """Return the products `a_i @ b_i` in float32 (float64 for such operands), never rounded to half precision."""
    if is_fake(a):
        return a.new_empty(*a.shape[:2], b.shape[2], dtype=torch.promote_types(a.dtype, torch.float32))
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float()) if a.dtype in (torch.bfloat16, torch.float16) else torch.bmm(a, b)
