"""What to train within a budget of parameters: a proposal per method, with exact counts and measured learning rates.

Counts come from the model's own layers. The rest is this package's defaults and what `benchmarks/LOG.md` found; a
proposal says what of it was measured and what was extrapolated to another size. GUIDE.md has the figures.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from lsr_scale import adapters
from lsr_scale.adapters.factorize import balanced_split, divisor_for_block
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.methods.kron_lora import BLOCK_SIZE
from lsr_scale.adapters.peft import in_out_features
from lsr_scale.config.yaml_text import dump
from lsr_scale.errors import UserError
from lsr_scale.model import DTYPES, load_config, meta_model

Sizes = list[tuple[int, int]]

# Of LSR-Adapt, where its sweep was measured. With fewer terms a lower rank is better: at 300,000 to 700,000 parameters
# rank 4 with 7 and 16 terms was as good as rank 16 with 8, while rank 64 with 4, and rank 16 with 4, were worse.
RANK, MIN_TERMS, MAX_TERMS = 16, 8, 48
MAX_RANK = 256
# Learning rate of a narrow model (hidden size up to 1,024), one between, and a wide one (from 4,096). Measured on the
# first (with 32 rows a step; with 128 the best were four times as high); the others are the rates that this package's
# configurations start from, and LoRA-XS's is its authors', measured here on none.
LEARNING_RATES = {
    "lsr": (2e-3, 1e-3, 5e-4),
    "kron_lora": (2e-3, 5e-4, 3e-4),
    "lora": (2e-3, 5e-4, 2e-4),
    "lora_xs": (2e-3, 2e-3, 2e-3),
}


@dataclass(frozen=True)
class Proposal:
    """One method within the budget: the options of its `adapter` section, its rate, and where they come from."""

    method: str
    parameters: int
    share: float
    options: dict[str, Any]
    learning_rate: float
    splits: list[str]
    why: str


@dataclass(frozen=True)
class Budget:
    """What fits a budget on a model, the proposed method first; `lora` is not in it where not even its rank 1 fits."""

    model: str
    budget: int
    adapted_modules: int
    proposals: list[Proposal]
    reason: str
    notes: list[str] = field(default_factory=list)
    targets: list[str] | str = "all-linear"

    def to_json(self) -> str:
        """Return it as a JSON document."""
        return json.dumps(asdict(self), indent=2)


def propose(
    model: str,
    budget: int,
    targets: list[str] | str = "all-linear",
    task: str = "causal_lm",
    num_labels: int | None = None,
    revision: str | None = None,
) -> Budget:
    """Return what fits `budget` trainable parameters, a classifier's head not counted.

    Args:
        model: Hub name, local folder or `builtin:` name; its configuration is read, no weights.
        budget: Parameters of the adapter, all modules together.
        targets: What is adapted, as `adapter.target_modules` has it.
        task: "causal_lm" or "seq_cls".
        num_labels: Of a classifier.
        revision: Commit, branch or tag on the hub.

    Raises:
        UserError: for an unknown model or target, or a budget that not even the smallest adapter fits.
    """
    config = load_config(model, revision)
    sizes = _sizes(meta_model(config, task, num_labels, DTYPES["bfloat16"], "auto"), targets, task)  # pyright: ignore
    hidden = config.get_text_config().hidden_size
    found = (_lsr(sizes, budget, hidden), _kron_lora(sizes, budget, hidden), _lora_xs(sizes, budget, hidden))
    ours = [proposal for proposal in found if proposal is not None]
    lora_one = sum(map(sum, sizes))
    lora = _lora(sizes, budget, hidden)
    if not ours and lora is None:
        raise UserError(
            f"--budget {budget:,}: on these {len(sizes)} modules the smallest LoRA-XS has {len(sizes):,} parameters, "
            f"LoRA of rank 1 {lora_one:,}; raise it, or adapt fewer modules with --set adapter.target_modules"
        )
    if lora is None:
        reason = f"LoRA of rank 1 takes {lora_one:,} parameters here, more than the budget"
        proposals = ours
    else:
        reason = (
            f"LoRA of rank {lora.options['rank']} fits, and where they were compared at like parameters (SmolLM2-135M, "
            "commonsense questions, five seeds; GUIDE.md) none was more accurate: those are for fewer parameters"
        )
        proposals = [lora, *ours]
    notes = [] if hidden <= 1024 else ["learning rates were measured on a model of hidden size 576 only; tune them"]
    return Budget(model, budget, len(sizes), proposals, reason, notes, targets)


def _sizes(base: Any, targets: list[str] | str, task: str) -> Sizes:
    """Return (in_features, out_features) of every adapted module, found by injecting an adapter."""
    model = inject(base, "lora", {"target_modules": targets, "rank": 1}, task)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [size for layer in layers if (size := in_out_features(layer.get_base_layer())) is not None]


def _count(method: str, sizes: Iterable[tuple[int, int]], options: dict[str, Any]) -> int | None:
    """Return a method's parameters over all modules; None where one of them cannot take these options."""
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


def _rate(method: str, hidden: int) -> float:
    small, middle, large = LEARNING_RATES[method]
    return small if hidden <= 1024 else large if hidden >= 4096 else middle


def _lsr(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return LSR-Adapt at its default rank with as many terms as fit; another rank only if too few or too many do."""

    def most_terms(rank: int, least: int) -> tuple[int, int] | None:
        for terms in range(MAX_TERMS, least - 1, -1):
            count = _count("lsr", sizes, {"rank": rank, "separation_rank": terms})
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
    measured = rank == RANK and hidden <= 1024
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
    return Proposal("lsr", count, count / budget, options, _rate("lsr", hidden), splits, why)


def _pair(split: tuple[int, int]) -> str:
    return f"{split[0]} x {split[1]}"


def _kron_lora(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return Kron-LoRA with the paper's split and scaling, of the largest rank that fits."""
    split = {"left_in": 2, "left_out": divisor_for_block(hidden, BLOCK_SIZE)}
    limit = min(min(size) for size in sizes) // max(split.values())
    for rank in range(min(limit, MAX_RANK), 0, -1):
        options = {"rank": rank, **split, "alpha": 4.0 * rank, "dropout": 0.0}
        count = _count("kron_lora", sizes, options)
        if count is not None and count <= budget:
            splits = [f"A [{split['left_out']}, {split['left_in']}] in every module"]
            why = "the paper's split and scaling"
            return Proposal("kron_lora", count, count / budget, options, _rate("kron_lora", hidden), splits, why)
    return None


def _lora_xs(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    """Return LoRA-XS of the largest rank that fits, one for all modules."""
    rank = min(math.isqrt(budget // len(sizes)), min(min(size) for size in sizes))
    if rank < 1:
        return None
    count, options = len(sizes) * rank**2, {"rank": rank, "alpha": 2.0 * rank}
    why = "its authors' scaling and rate; not compared with the others here"
    return Proposal("lora_xs", count, count / budget, options, _rate("lora_xs", hidden), [], why)


def _lora(sizes: Sizes, budget: int, hidden: int) -> Proposal | None:
    rank = min(budget // sum(map(sum, sizes)), MAX_RANK, min(min(size) for size in sizes))
    if rank < 1:
        return None
    count = rank * sum(map(sum, sizes))
    options = {"rank": rank, "alpha": 2.0 * rank}
    why = "PEFT's own" + ("" if hidden <= 1024 else "; QLoRA's rate" if hidden >= 4096 else "")
    return Proposal("lora", count, count / budget, options, _rate("lora", hidden), [], why)


def render(budget: Budget, values: Mapping[str, Any]) -> str:
    """Return the proposals as a run's file with the proposed adapter in it; what is for a person are its comments.

    Args:
        budget: The proposals.
        values: The other sections of that file.
    """
    first = budget.proposals[0]
    rows = [("method", "parameters", "of budget", "rate", "options")]
    for item in budget.proposals:
        options = ", ".join(f"{name} {value:g}" for name, value in item.options.items())
        share = f"{100 * item.share:.0f} %"
        rows.append((item.method, f"{item.parameters:,}", share, f"{item.learning_rate:g}", options))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    comments = [f"{budget.budget:,} parameters on {budget.adapted_modules} modules of {budget.model}", ""]
    for method, parameters, share, rate, options in rows:
        cells = (method.ljust(widths[0]), parameters.rjust(widths[1]), share.rjust(widths[2]), rate.rjust(widths[3]))
        before = "  ".join((*cells, ""))
        comments += textwrap.wrap(options, 78, initial_indent=before, subsequent_indent=" " * len(before))
    comments += ["", *textwrap.wrap(f"{first.method}, because {budget.reason}.", 76)]
    for note in budget.notes:
        comments += textwrap.wrap(f"note: {note}", 76)
    sections = {name: dict(section) for name, section in values.items()}
    adapter = {"method": first.method, "target_modules": budget.targets, **first.options}
    sections["adapter"] = adapter
    sections["training"] = {**sections.get("training", {}), "learning_rate": first.learning_rate}
    order = [name for name in ("model", "adapter", "data", "training") if name in sections]
    ordered = {name: sections[name] for name in (*order, *(set(sections) - set(order)))}
    text = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    return text + dump({name: section for name, section in ordered.items() if section}, short=True)
