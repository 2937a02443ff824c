"""An adapter that was measured on one model, on another one and within a number of parameters."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from lsr_scale import adapters, option_checks
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.peft import in_out_features
from lsr_scale.errors import UserError
from lsr_scale.planning.evidence import Tuned

MAX_RANK, MAX_TERMS = 256, 48
# what makes a method larger; KronA's size follows from the layers alone
KNOBS = {
    **dict.fromkeys(("lora", "slora", "lora_xs", "kron_lora", "vera"), "rank"),
    **{"lsr": "separation_rank", "tinylora": "u"},
}


@dataclass(frozen=True)
class Module:
    """An adapted linear: the last part of its name, the index of its layer (None outside of layers), in x out."""

    leaf: str
    layer: int | None
    size: tuple[int, int]


def adapted_modules(base: Any, targets: list[str] | str, task: str) -> list[Module]:
    """Return every module of a meta model that an adapter would have, found by injecting one."""
    model = inject(base, "lora", {"target_modules": targets, "rank": 1}, task)
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (size := in_out_features(layer.get_base_layer())) is not None:
            parts = name.split(".")
            found.append(Module(parts[-1], next((int(part) for part in parts if part.isdigit()), None), size))
    return found


def num_parameters(method: str, sizes: Iterable[tuple[int, int]], options: dict[str, Any]) -> int | None:
    """Return a method's parameters over modules of these sizes; None where one of them cannot take these options."""
    sizes = list(sizes)
    if method == "lora":
        return options["rank"] * sum(map(sum, sizes))
    if method == "vera":
        return sum(options["rank"] + out_features for _, out_features in sizes)
    if method == "tinylora":
        return options["u"] * len(sizes)
    tuner = adapters.METHODS[method]
    config = tuner.config_class(**options)
    counts: dict[tuple[int, int], int] = {}
    for size in set(sizes):
        try:
            shapes = tuner.parameter_shapes(*size, config)
        except UserError:
            return None
        if tuner.oversized_sides(*size, config):
            return None  # a dense side would be smaller, and could do more
        counts[size] = sum(math.prod(shape) for shape in shapes.values())
    return sum(counts[size] for size in sizes)


def largest(
    method: str, sizes: list[tuple[int, int]], options: dict[str, Any], budget: int
) -> tuple[dict[str, Any], int] | None:
    """Return a method's options with the largest rank (terms, length) that fits a budget, alpha in proportion.

    Returns:
        The options and their number of parameters; None where not even the smallest fits.
    """
    knob = KNOBS.get(method)
    if knob is None:
        only = num_parameters(method, sizes, options)
        return None if only is None or only > budget else (options, only)

    def of(value: int) -> dict[str, Any]:
        scaled = {"alpha": options["alpha"] / options["rank"] * value} if knob == "rank" and "alpha" in options else {}
        return {**options, knob: value, **scaled}

    def parameters(value: int) -> float:
        found = num_parameters(method, sizes, of(value))
        return math.inf if found is None else found

    smallest_side = min(min(size) for size in sizes)
    limits = {
        **{"lora": min(MAX_RANK, smallest_side), "kron_lora": min(MAX_RANK, smallest_side)},
        # no side bounds these: VeRA's rank is of matrices that all modules share
        **{"lsr": MAX_TERMS, "tinylora": options.get("rank", 1) ** 2, "vera": min(budget, option_checks.MAX_RANK)},
    }
    value = bisect.bisect_right(range(1, limits.get(method, smallest_side) + 1), budget, key=parameters)
    return (of(value), int(parameters(value))) if value else None


def fitted(
    row: Tuned, num_layers: int, modules: Sequence[Module], budget: int, targets: list[str] | str
) -> tuple[dict[str, Any], int] | None:
    """Return a measured adapter's options on a model's modules, of the largest size within a budget.

    Its form is kept: the same linears, the same part of the layers, and but for its knob the same options. LSR-Adapt
    gets as many terms as fit, and another rank only where those are less than two thirds of the budget.

    Args:
        row: What was measured.
        num_layers: Layers of the model that it was measured on.
        modules: Those of the other model that may be adapted.
        budget: Parameters at most.
        targets: How a run names these modules.

    Returns:
        The options, `target_modules` among them, and the number of parameters; None where it has less than half of the
        budget, or does not fit these modules.
    """
    leaves = row.options.get("target_modules")
    named = dict.fromkeys(module.leaf for module in modules)
    if leaves is not None and not named.keys() >= set(leaves):
        return None
    chosen = [module for module in modules if leaves is None or module.leaf in leaves]
    options = {name: value for name, value in row.options.items() if name != "target_modules"}
    where: dict[str, Any] = {"target_modules": targets if leaves is None else leaves}
    if row.last_layers is None:
        found = _in_its_form(row.method, [module.size for module in chosen], options, budget)
    else:
        layers = sorted({module.layer for module in chosen if module.layer is not None})
        where["target_modules"] = list(named) if leaves is None else leaves
        found = None
        for number in range(max(1, round(len(layers) * row.last_layers / num_layers)), 0, -1):
            last = layers[len(layers) - number :]
            sizes = [module.size for module in chosen if module.layer in last]
            if sizes and (found := _in_its_form(row.method, sizes, options, budget)) is not None:
                where["layers_to_transform"] = last
                break
    if found is None or 2 * found[1] < budget:
        return None
    return {**where, **found[0]}, found[1]


def _in_its_form(
    method: str, sizes: list[tuple[int, int]], options: dict[str, Any], budget: int
) -> tuple[dict[str, Any], int] | None:
    if method != "lsr":
        return largest(method, sizes, options, budget)

    found: list[tuple[dict[str, Any], int]] = []
    for power in (
        0,
        -1,
        1,
        -2,
        2,
        -3,
        3,
        -4,
        4,
        -5,
        5,
        -6,
        6,
    ):  # the nearest rank that fills the budget, or the fullest
        rank = options["rank"] * 2.0**power
        if rank < 1 or rank > MAX_RANK or rank % 1:
            continue
        scaled = {**options, "rank": int(rank), "alpha": options["alpha"] / options["rank"] * rank}
        if (one := largest(method, sizes, scaled, budget)) is not None:
            if 3 * one[1] >= 2 * budget:
                return one
            found.append(one)
    return max(found, key=lambda one: one[1], default=None)
