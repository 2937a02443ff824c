"""Which groups of a fused model's linears compute in 8 bits, what they count and how far off they are.

A group's name is "layer.group": "12.down" is down_proj of decoder layer 12; the groups of a layer are qkv, o, gate_up
and down, linears that share an input.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lsr_scale.errors import UserError
from lsr_scale.fused.eight_bit_group import DIRECTIONS, PRODUCTS, EightBitState, eight_bit_shape_reason
from lsr_scale.fused.fallback import layer_fallback_reason
from lsr_scale.fused.layer_state import GROUPS, layer_linears
from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.fused.modules import FusedLayer
from lsr_scale.kernels.backend import is_fake
from lsr_scale.kernels.fp8 import E4M3, fp8_fallback_reason

# the dtype of the codes in the forward pass; backward it is e4m3
FORWARD = {"fp8": E4M3, "int8": torch.int8}


def use_eight_bits(layers: Iterable[Any], compute: str, calibrate: bool) -> dict[str, str]:
    """Have fused layers compute in 8 bits in training, group by group.

    Args:
        layers: Fused decoder layers.
        compute: "fp8" or "int8": see `eight_bit_group`.
        calibrate: Compare each product with the one in bfloat16, until `compute_errors` is asked.

    Returns:
        Groups that stay in bfloat16, with the reason; all of a layer that cannot run fused.

    Raises:
        UserError: if their GPU has no FP8, or they are not in bfloat16.
    """
    reasons: dict[str, str] = {}
    for layer in layers:
        weight = layer.input_layernorm.weight
        if weight.dtype != torch.bfloat16:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"compute: {compute} needs a model in bfloat16; this one is in {dtype}: load it in bfloat16"
            )
        if not is_fake(weight) and weight.device.type != "meta":
            reason = fp8_fallback_reason(weight.device)
            if reason:
                raise UserError(f"compute: {compute} cannot run here: {reason}; use compute: bf16")
        linears, states = layer_linears(layer), {}
        for name, part in GROUPS.items():
            group = LinearGroup(linears[part], [None] * len(linears[part]))
            reason = eight_bit_shape_reason(group, FORWARD[compute])
            if reason:
                reasons[f"{_index(layer)}.{name}"] = reason
            else:
                states[name] = EightBitState(FORWARD[compute], calibrate)
        layer.eight_bit = states
        unfused = layer_fallback_reason(layer)
        if unfused:
            reasons.update({f"{_index(layer)}.{name}": unfused for name in GROUPS})
    return reasons


def eight_bit_groups(model: nn.Module) -> list[str]:
    """Return the names of the groups that compute in 8 bits."""
    return [name for name, _ in _states(model)]


def underflow_counts(model: nn.Module) -> dict[str, Tensor]:
    """Return how many values underflowed, and of how many, int64 `[2]`, since `reset_underflow_counts`.

    In e4m3 a value underflows if it is not zero and less than 2^-6 of its row's scale, at most 2^-14 of the row's
    largest value: its code has fewer than 4 significant bits, or is zero. In int8, if it is not zero and its code is.

    Returns:
        By "layer.group.input" and "layer.group.gradient": of the group's input, and of its output's gradient.
    """
    return {
        f"{name}.{direction}": state.counts[direction]
        for name, state in _states(model)
        for direction in DIRECTIONS
        if direction in state.counts
    }


def reset_underflow_counts(model: nn.Module) -> None:
    """Set all counts to zero."""
    counts = list(underflow_counts(model).values())
    if counts:
        torch._foreach_zero_(counts)


def compute_errors(model: nn.Module) -> dict[str, float]:
    """Return each group's relative errors in 8 bits beside bfloat16.

    From the last training step after `fuse(..., compute="int8", calibrate=True)`, or "fp8", on a sample of its rows.
    Nothing is compared after this call.

    Returns:
        By "layer.group.output" and "layer.group.gradient": of the group's output, and of its input's gradient. The
        latter is missing where no gradient is computed: before the first linear that is adapted.
    """
    errors: dict[str, Tensor] = {}
    for name, state in _states(model):
        state.calibrates = False
        errors.update({f"{name}.{product}": state.errors[product] for product in PRODUCTS if product in state.errors})
        state.errors = {}
    return dict(zip(errors, to_numbers(errors.values()), strict=True))


def to_numbers(tensors: Iterable[Tensor]) -> list[Any]:
    """Return tensors of one shape, of layers on any devices, as numbers or lists of them; the host waits once."""
    tensors = list(tensors)
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []


def measure_compute_errors(model: nn.Module) -> None:
    """Compare each product with the one in bfloat16 from the next step on, until `compute_errors` is asked."""
    for _, state in _states(model):
        state.calibrates = True


def keep_in_bf16(model: nn.Module, names: Iterable[str]) -> None:
    """Have groups compute in bfloat16 again: "12.down", or "down" for that of every layer.

    Raises:
        UserError: for a name that no group has.
    """
    layers = {str(_index(layer)): layer for layer in model.modules() if isinstance(layer, FusedLayer)}
    names = list(names)
    for name in names:
        index, _, group = name.rpartition(".")
        if group not in GROUPS or (index and index not in layers):
            raise UserError(
                f"{name!r} is no group of linears: expected one of {', '.join(GROUPS)}, alone or after a layer's "
                f"number (0 to {len(layers) - 1}), as in 12.down"
            )
    for name in names:
        index, _, group = name.rpartition(".")
        for layer in [layers[index]] if index else layers.values():
            layer.eight_bit = {key: state for key, state in layer.eight_bit.items() if key != group}


def _states(model: nn.Module) -> Iterator[tuple[str, EightBitState]]:
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            for name, state in layer.eight_bit.items():
                yield f"{_index(layer)}.{name}", state


def _index(layer: Any) -> int:
    return layer.self_attn.layer_idx
