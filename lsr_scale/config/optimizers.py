"""Optimizers of this package, or PEFT's, as `training.optim` names them beside transformers' own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsr_scale.errors import did_you_mean

if TYPE_CHECKING:
    from lsr_scale.config.run import RunConfig


@dataclass(frozen=True)
class OwnOptimizer:
    """What a file may say of an optimizer.

    Attributes:
        methods: The adapter methods whose factors it trains.
        arguments: Of `training.optim_args`, with their defaults.
        of_pairs: Its state is that of a pair of factors, which must not be cut into shards.
    """

    methods: tuple[str, ...]
    arguments: dict[str, bool | float]
    of_pairs: bool


# LoRA's factors are a pair; these others' sides are sums of Kronecker products (`AdapterMethod.kron_sides`)
_PAIR_METHODS = ("lora", "lsr", "kron_lora")
OWN_OPTIMIZERS = {
    "lora_rite": OwnOptimizer(_PAIR_METHODS, {"escaped_mass": True}, of_pairs=True),
    "lora_pro": OwnOptimizer(_PAIR_METHODS, {}, of_pairs=True),
    "lora_plus": OwnOptimizer(("lora",), {"lr_ratio": 16.0}, of_pairs=False),
}


def optimizer_arguments(name: str, text: Any) -> dict[str, Any]:
    """Return the arguments of an optimizer above, as `training.optim_args` has them: `escaped_mass=false`.

    Raises:
        ValueError: for one that it does not have, or a value of another type.
    """
    values: dict[str, Any] = dict(OWN_OPTIMIZERS[name].arguments)
    for part in filter(None, (piece.strip() for piece in (text or "").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in values:
            known = did_you_mean(key, values) if values else "it takes none; leave it out"
            raise ValueError(f"{key!r:.60} is no argument of {name}; {known}")
        if isinstance(values[key], bool):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"{key}: expected true or false, got {value!r:.60}")
            values[key] = value.lower() == "true"
            continue
        try:
            values[key] = float(value)
        except ValueError:
            raise ValueError(f"{key}: expected a number, got {value!r:.60}") from None
        if not 0 < values[key] <= 1e6:
            raise ValueError(f"{key}: expected a number above 0, at most 1e6, got {value}")
    return values


def optimizer_conflicts(run: "RunConfig") -> Iterator[tuple[tuple[str, str], str]]:
    """Yield what does not go with a run's optimizer, if it is one of those above: where, and the words."""
    name, method = run.training["optim"], run.adapter.method
    own = OWN_OPTIMIZERS.get(name)
    if own is None:
        return
    if method not in own.methods:
        yield (
            ("training", "optim"),
            f"{name} is for adapter.method: {' or '.join(own.methods)}, and this is {method}; set it to "
            "adamw_torch_fused",
        )
    if own.of_pairs and run.adapter.options.get("term_weights"):
        yield (
            ("adapter", "term_weights"),
            f"{name} takes each side's terms as products of two factors, not of three; set it to false, or "
            "training.optim to adamw_torch_fused",
        )
    try:
        optimizer_arguments(name, run.training.get("optim_args"))
    except ValueError as error:
        yield (("training", "optim_args"), str(error))
