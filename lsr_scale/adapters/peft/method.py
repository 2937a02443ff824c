"""What a method is: which factors it has, and how they make the update. Pure functions of tensors, no modules."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lsr_scale.adapters.kron_terms import leading_singular
from lsr_scale.adapters.peft.config import AdapterConfig

Params = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Pair = tuple[Tensor, Tensor]


def upcast(params: Params) -> Params:
    """Return the factors with half-precision ones in float32: what they are materialized in."""
    return {name: p.float() if p.dtype in (torch.bfloat16, torch.float16) else p for name, p in params.items()}


class AdapterMethod(ABC):
    """One adapter method: pure functions of shapes and tensors, any floating dtype, no modules.

    `params` maps the names in `factor_shapes` to tensors. The update of the weight is
    `scaling * delta_weight(params)`; the scaling is not the method's concern.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    parameter_names: ClassVar[tuple[str, ...]]
    # factors that are made of the base's weight and stay as they are: neither trained nor saved
    frozen_names: ClassVar[tuple[str, ...]] = ()
    # their making takes long enough to keep them in the cache folder
    cache_frozen: ClassVar[bool] = False
    # sums of Kronecker products, `sum_k <side>_left[k] (x) <side>_right[k]`, whose condition number is monitored
    sides: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def parameter_shapes(in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shape of every factor that may train for a linear layer; raise UserError for impossible ones."""

    @classmethod
    def frozen_shapes(cls, in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shape of every factor of `frozen_names` that a layer has with these options; none by default."""
        del in_features, out_features, config
        return {}

    @classmethod
    def factor_shapes(cls, in_features: int, out_features: int, config: Any) -> Shapes:
        """Return the shape of every factor, those that train and those that are frozen."""
        shapes = cls.parameter_shapes(in_features, out_features, config)
        return shapes | cls.frozen_shapes(in_features, out_features, config)

    @classmethod
    def weight_factors(cls, weight: Tensor, config: Any) -> Params:
        """Return what a method with `frozen_shapes` makes of the base's weight `[out, in]`, dequantized.

        The frozen factors, and where the factors that train start if that is not what `init_parameters` gives.
        """
        del weight, config
        return {}

    @staticmethod
    @abstractmethod
    def init_parameters(params: Params, config: Any) -> None:
        """Fill the factors in place."""

    @staticmethod
    @abstractmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return the unscaled dense update `[out, in]`: the method's definition, slow and obvious."""

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the exact low-rank pair `(down [R, in], up [out, R])` with `up @ down == delta_weight(params)`.

        The factors may carry equal leading dimensions (a stack of modules of one shape); so does the pair then.
        A method of full rank does not define this, but `delta_forward`.
        """
        raise NotImplementedError

    @classmethod
    def materialize_rows(
        cls, stacks: Params, slots: Tensor, scale: Tensor, index: Tensor, dtype: torch.dtype, out: Pair | None = None
    ) -> Pair:
        """Return the scaled pairs of the rows of a batch, `(down [B, J, R, in], up [B, J, out, R])`.

        Args:
            stacks: Factors of C adapters and J modules of one set of shapes, each `[C, J, ...]`.
            slots: `[A]`, which of the C adapters there are.
            scale: `[A, J]`, what each one's `up` is multiplied by.
            index: `[B]`, which of the A each row has.
            dtype: Of the pairs; they are computed in float32.
            out: Where to write them, contiguous.
        """
        down, up = cls.materialize(upcast({name: stacked[slots] for name, stacked in stacks.items()}))
        pair = down.to(dtype)[index], (up * scale[..., None, None]).to(dtype)[index]
        return pair if out is None else (out[0].copy_(pair[0]), out[1].copy_(pair[1]))

    @classmethod
    def delta_forward(cls, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return `x @ delta_weight^T` `[..., out]`, unscaled, in the dtype of `x`."""
        down, up = cls.materialize(params)
        return functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))

    @classmethod
    def is_low_rank(cls) -> bool:
        """Tell whether the method has a `materialize`, and with it the fused path and the exact exports."""
        return cls.materialize is not AdapterMethod.materialize

    @classmethod
    def prepare_config(cls, config: Any, hidden_size: int | None) -> None:
        """Resolve options that depend on the model, in place; `hidden_size` is None where the model has no config."""
        del config, hidden_size

    @classmethod
    def kron_sides(cls, params: Mapping[str, Tensor]) -> dict[str, tuple[str | None, str]]:
        """Return of "down" and "up" which factors make them, where each is a sum of Kronecker products; {} otherwise.

        The names of the left factors, None where they are the identity, and of the right ones: `[..., S, P, Q]` and
        `[..., S, p, q]`, or without S for a single product. Optimizers of pairs need it.
        """
        del params
        return {}

    @classmethod
    def start_from_gradient(cls, params: Params, gradient: Tensor, generator: torch.Generator) -> float:
        """Point freshly drawn factors along a gradient, in place; the update stays 0. `init: gradient` calls it.

        Each factor keeps the norm that it was drawn with, so that rates carry over. Methods without it have no such
        option.

        Args:
            params: The factors, as `init_parameters` left them.
            gradient: `[out, in]`, of the loss by the weight.
            generator: For what is drawn, on the CPU.

        Returns:
            Of the gradient's square, the share that the method's nearest update of these directions holds.
        """
        raise NotImplementedError

    @classmethod
    def oversized_sides(cls, in_features: int, out_features: int, config: Any) -> list[str]:
        """Return a line for each side that has more parameters than the dense matrix it replaces."""
        del in_features, out_features, config
        return []


class LowRankPair(AdapterMethod):
    """LoRA's own form, not registered: the factors are the pair. What `add_weighted_adapter` makes."""

    name = "lora"
    parameter_names = ("down", "up")

    @staticmethod
    def delta_weight(params: Mapping[str, Tensor]) -> Tensor:
        """Return `up down`."""
        return params["up"] @ params["down"]

    @staticmethod
    def materialize(params: Mapping[str, Tensor]) -> Pair:
        """Return the factors."""
        return params["down"], params["up"]

    @classmethod
    def kron_sides(cls, params: Mapping[str, Tensor]) -> dict[str, tuple[str | None, str]]:
        """Return each factor as a product with the number 1."""
        del params
        return {"down": (None, "down"), "up": (None, "up")}

    @classmethod
    def start_from_gradient(cls, params: Params, gradient: Tensor, generator: torch.Generator) -> float:
        """Take the first right singular vectors for `down` (LoRA-GA, arXiv 2407.05000); `up` is zero."""
        down = params["down"]
        _, values, rows = leading_singular(gradient, len(down), generator)
        down.copy_(rows * (down.norm() / rows.norm()))
        params["up"].zero_()
        return float(values.square().sum() / gradient.square().sum())
