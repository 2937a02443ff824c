"""Proposals by rule, where no measured adapter fits: this package's defaults, and what `benchmarks/LOG.md` found.

A proposal says what of it was measured and what was extrapolated to another size. GUIDE.md has the figures.
"""

import math
from dataclasses import dataclass
from typing import Any

from lsr_scale.adapters.factorize import balanced_split, divisor_for_block
from lsr_scale.adapters.methods.kron_lora import BLOCK_SIZE
from lsr_scale.planning.at_size import MAX_RANK, MAX_TERMS, num_parameters

Sizes = list[tuple[int, int]]

# Of LSR-Adapt, where its sweep was measured. With fewer terms a lower rank is better: at 300,000 to 700,000 parameters
# rank 4 with 7 and 16 terms was as good as rank 16 with 8, while rank 64 with 4, and rank 16 with 4, were worse.
RANK, MIN_TERMS = 16, 8
NARROW = 1024  # the widest hidden size that counts as narrow
# Learning rate of a narrow model (hidden size up to 1,024), one between, and a wide one (from 4,096). Measured on the
# first (with 32 rows a step; with 128 the best were four times as high); the others are the rates that this package's
# configurations start from at LoRA's sizes, and LoRA-XS's is its authors', measured here on none.
LEARNING_RATES = {
    "lsr": (2e-3, 1e-3, 5e-4),
    "kron_lora": (2e-3, 5e-4, 3e-4),
    "lora": (2e-3, 5e-4, 2e-4),
    "lora_xs": (2e-3, 2e-3, 2e-3),
}


@dataclass(frozen=True)
class Proposal:
    """One method within the budget: the options of its `adapter` section, its rate, and where they come from.

    Attributes:
        method: The adapter's.
        parameters: Trained ones.
        share: Of the budget.
        options: Of its section; `target_modules` only where they are others than the run's.
        learning_rate: Of its training.
        splits: How its sides are split.
        why: Where the options come from.
        optimizer: `training.optim`, None for the default.
        nats: What the measured adapter lost a token, None where none was measured.
    """

    method: str
    parameters: int
    share: float
    options: dict[str, Any]
    learning_rate: float
    splits: list[str]
    why: str
    optimizer: str | None = None
    nats: float | None = None


def by_rule(sizes: Sizes, budget: int, hidden: int) -> list[Proposal]:
    """Return a proposal a method that fits, LoRA first where its rank 1 fits."""
    found = (function(sizes, budget, hidden) for function in (_lora, _lsr, _kron_lora, _lora_xs))
    return [proposal for proposal in found if proposal is not None]


def rate(method: str, hidden: int) -> float:
    """Return a method's learning rate at a width."""
    small, middle, large = LEARNING_RATES[method]
    return small if hidden <= NARROW else large if hidden >= 4096 else middle


def scaled_rate(method: str, measured: float, hidden: int) -> float:
    """Return a rate that was measured on a narrow model at another width, by the factor of the rates above.

    SLoRA's is LoRA's; methods of which nothing is known keep theirs.
    """
    known = {"slora": "lora"}.get(method, method)
    if known not in LEARNING_RATES:
        return measured
    return float(f"{measured * rate(known, hidden) / rate(known, NARROW):.3g}")


def _lsr(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return LSR-Adapt at its default rank with as many terms as fit; another rank only if too few or too many do."""

    def most_terms(rank: int, least: int) -> tuple[int, int] | None:
        for terms in range(MAX_TERMS, least - 1, -1):
            count = num_parameters("lsr", sizes, {"rank": rank, "separation_rank": terms})
            if count is not None and count <= budget:
                return terms, count
        return None

    fitting = {rank: most_terms(rank, MIN_TERMS) for rank in (RANK, RANK // 2, RANK // 4)}
    rank = next((rank for rank, terms in fitting.items() if terms is not None), None)
    if rank is None:
        smaller = {rank: most_terms(rank, 1) for rank in (4, 2, 1)}
        rank = next((rank for rank, terms in smaller.items() if terms is not None), None)
        fitting |= smaller
    best = fitting[rank] if rank is not None else None
    if rank is None or best is None:
        return None
    while rank < MAX_RANK and rank >= RANK:
        # more terms than the sweep had, or than a dense side allows, are left to a higher rank
        wider = most_terms(2 * rank, max(MIN_TERMS, best[0]))
        if wider is None or wider[1] <= best[1]:
            break
        rank, best = 2 * rank, wider
    terms, count = best
    options = {"rank": rank, "separation_rank": terms, "alpha": 2.0 * rank}
    measured = rank == RANK and hidden <= NARROW
    why = (
        "rank 16 with as many terms as fit, 8 at least: fewer cost accuracy"
        if measured
        else "as many terms as fit, no side larger than its dense form; measured on SmolLM2 only"
    )
    splits = [
        f"{in_features} -> {out_features}: in {_pair(balanced_split(in_features))}, out "
        f"{_pair(balanced_split(out_features))}, rank {_pair(balanced_split(rank))}"
        for in_features, out_features in dict.fromkeys(sizes)
    ]
    return Proposal("lsr", count, count / budget, options, rate("lsr", hidden), splits, why)


def _pair(split: tuple[int, int]) -> str:
    return f"{split[0]} x {split[1]}"


def _kron_lora(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return Kron-LoRA with the paper's split and scaling, of the largest rank that fits."""
    split = {"left_in": 2, "left_out": divisor_for_block(hidden, BLOCK_SIZE)}
    limit = min(min(size) for size in sizes) // max(split.values())
    for rank in range(min(limit, MAX_RANK), 0, -1):
        options = {"rank": rank, **split, "alpha": 4.0 * rank, "dropout": 0.0}
        count = num_parameters("kron_lora", sizes, options)
        if count is not None and count <= budget:
            splits = [f"A [{split['left_out']}, {split['left_in']}] in every module"]
            why = "the paper's split and scaling"
            return Proposal("kron_lora", count, count / budget, options, rate("kron_lora", hidden), splits, why)
    return None


def _lora_xs(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return LoRA-XS of the largest rank that fits, one for all modules."""
    rank = min(math.isqrt(budget // len(sizes)), min(min(size) for size in sizes))
    if rank < 1:
        return None
    count, options = len(sizes) * rank**2, {"rank": rank, "alpha": 2.0 * rank}
    why = "its authors' scaling and rate; not compared with the others here"
    return Proposal("lora_xs", count, count / budget, options, rate("lora_xs", hidden), [], why)


def _lora(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    rank = min(budget // sum(map(sum, sizes)), MAX_RANK, min(min(size) for size in sizes))
    if rank < 1:
        return None
    count = rank * sum(map(sum, sizes))
    options = {"rank": rank, "alpha": 2.0 * rank}
    why = "PEFT's own" + ("" if hidden <= NARROW else "; QLoRA's rate" if hidden >= 4096 else "")
    return Proposal("lora", count, count / budget, options, rate("lora", hidden), [], why)
