"""What to train within a budget of parameters: adapters by what was measured at that size, with exact counts.

Counts come from the model's own layers. `evidence.py` has what was measured, carried to the model by `at_size.py`;
where nothing was, `rules.py` proposes.
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lsr_scale.config.yaml_text import dump
from lsr_scale.errors import UserError
from lsr_scale.model import DTYPES, Quantization, check_quantization, load_config, meta_model, own_quantization
from lsr_scale.planning import evidence
from lsr_scale.planning.at_size import Module, adapted_modules, fitted
from lsr_scale.planning.evidence import Comparison, Row, Size, Suite, Tuned
from lsr_scale.planning.rules import NARROW, Proposal, by_rule, scaled_rate

# where the losses of two do not separate the earlier one is proposed: PEFT's own, which all programs take; exact pairs
# of small factors, which export as such; factors made of the base's weight; those that run unfused, and are merged only
SIMPLEST = ("lora", "lsr", "kron_lora", "lora_xs", "slora", "vera", "tinylora", "krona")


@dataclass(frozen=True)
class Measured:
    """The measured rows that carry the first proposal: the suite, its size, and how the proposed row compares.

    Attributes:
        suite: Model, texts and base that were measured.
        hidden_size: Of that model.
        size: The size's name.
        share: Of LoRA r=8's parameters, measured.
        budget_share: The same of the budget.
        row: The proposed one; `benchmarks/results/frontier` has its trials.
        label: What it is called.
        nats: What it lost a token of held-out right answers.
        error: The standard error.
        seeds: How many were trained.
        other: The other row that it is compared with: the lowest of another method, None where there is none.
        difference: The loss of whichever of the two is higher, less the lower one's.
    """

    suite: str
    hidden_size: int
    size: str
    share: float
    budget_share: float
    row: str
    label: str
    nats: float
    error: float
    seeds: int
    other: str | None
    difference: Comparison | None


@dataclass(frozen=True)
class Budget:
    """What fits a budget on a model, the proposed adapter first; `measured` is None where no measurement carries it."""

    model: str
    budget: int
    adapted_modules: int
    proposals: list[Proposal]
    reason: str
    notes: list[str] = field(default_factory=list)
    targets: list[str] | str = "all-linear"
    quantization: Quantization = "nf4"
    measured: Measured | None = None

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
    quantization: Quantization | None = None,
) -> Budget:
    """Return what fits `budget` trainable parameters, a classifier's head not counted.

    Args:
        model: Hub name, local folder or `builtin:` name; its configuration is read, no weights.
        budget: Parameters of the adapter, all modules together.
        targets: What is adapted, as `adapter.target_modules` has it.
        task: "causal_lm" or "seq_cls".
        num_labels: Of a classifier.
        revision: Commit, branch or tag on the hub.
        quantization: How the base is held, as `model.quantization` has it; None: as its weights are already, or nf4.

    Raises:
        UserError: for an unknown model or target, or a budget that not even the smallest adapter fits.
    """
    config = load_config(model, revision)
    held: Quantization = quantization or own_quantization(config, model) or "nf4"
    check_quantization(config, held, model)

    def modules_of(names: list[str] | str) -> list[Module]:
        base = meta_model(config, task, num_labels, DTYPES["bfloat16"], "auto")  # pyright: ignore
        return adapted_modules(base, names, task)

    modules = modules_of(targets)
    hidden = config.get_text_config().hidden_size
    everything = modules if targets == "all-linear" else modules_of("all-linear")
    lora_8 = 8 * sum(sum(module.size) for module in everything)
    found = _by_evidence(modules, targets, budget, lora_8, hidden, held)
    if found is not None:
        proposals, measured, reason, notes = found
        if len(modules) < len(everything):
            notes.append("measured with all linears adapted, or some by their names; here the run's alone are")
        if task == "seq_cls":
            notes.append("measured on the likelihood of answers, not on classifiers")
        return Budget(model, budget, len(modules), proposals, reason, notes, targets, held, measured)
    sizes = [module.size for module in modules]
    proposals = by_rule(sizes, budget, hidden)
    lora_one = sum(map(sum, sizes))
    if not proposals:
        raise UserError(
            f"--budget {budget:,}: on these {len(sizes)} modules the smallest LoRA-XS has {len(sizes):,} parameters, "
            f"LoRA of rank 1 {lora_one:,}; raise it, or adapt fewer modules with --set adapter.target_modules"
        )
    if proposals[0].method == "lora":
        reason = (
            f"LoRA of rank {proposals[0].options['rank']} fits, and where they were compared at like parameters "
            "(SmolLM2-135M, commonsense questions, five seeds; GUIDE.md) none was more accurate: those are for fewer "
            "parameters"
        )
    else:
        reason = f"LoRA of rank 1 takes {lora_one:,} parameters here, more than the budget"
    without = "no comparison by size is in this release: there is no evidence which method is best at this one"
    if evidence.load():
        without = "no adapter that was compared by size fits here: there is no evidence which method is best"
    notes = [without]
    if hidden > NARROW:
        notes.append("learning rates were measured on a model of hidden size 576 only; tune them")
    return Budget(model, budget, len(sizes), proposals, reason, notes, targets, held)


def _by_evidence(
    modules: list[Module], targets: list[str] | str, budget: int, lora_8: int, hidden: int, quantization: str
) -> tuple[list[Proposal], Measured, str, list[str]] | None:
    """Return proposals by what was measured nearest to the budget, with reason and notes; None where nothing fits."""
    share = budget / lora_8
    near = evidence.nearest_first(evidence.load(), share, quantization, hidden)

    def fit(row: Tuned, suite: Suite) -> tuple[dict[str, Any], int] | None:
        if row.method == "tinylora" and quantization != "none":
            return None
        return fitted(row, suite.num_layers, modules, budget, targets)

    for suite, size in near:
        fitting: dict[str, Proposal] = {}
        for row in size.rows:
            if (found := fit(row, suite)) is not None:
                fitting[row.row] = _proposal(row, *found, budget, hidden, targets)
        rows = [row for row in size.rows if row.row in fitting]
        if not rows:
            continue
        chosen, other = _chosen(rows)
        comparison = None if other is None else (chosen.over.get(other.row) or other.over[chosen.row])
        measured = Measured(
            *(suite.in_words(), suite.hidden_size, size.name, size.share, share),
            *(chosen.row, chosen.label, chosen.nats, chosen.error, chosen.seeds),
            *(None if other is None else other.row, comparison),
        )
        proposals: dict[str, Proposal] = {}  # two measured ones can have one form here
        for row in [chosen, *rows]:
            one = fitting[row.row]
            proposals.setdefault(json.dumps([one.method, one.options, one.optimizer], sort_keys=True), one)
        named = " and ".join(row.row for row in (chosen, other) if row is not None)
        notes = [f"carried by {named} at {size.name} in benchmarks/results/frontier"]
        notes += _notes(suite, size, share, hidden)
        notes += _of_another_size(suite, size, fitting[chosen.row].parameters / lora_8)
        lower = [row for row in size.not_compared if row.tuned < chosen.tuned and fit(row, suite) is not None]
        notes += [_not_compared(chosen, lower)] if lower else []
        notes += [_elsewhere(*pair) for pair in near if pair[0] is not suite]
        reason = _reason(chosen, other, comparison, suite)
        for texts, of_texts in near:
            alike = (texts.model, texts.base) == (suite.model, suite.base) and texts is not suite
            if alike and of_texts.times(share) <= evidence.FAR:
                here = [row for row in of_texts.rows if fit(row, texts) is not None]
                if here and (there := _chosen(here)[0]).method != chosen.method:
                    reason += _disagreement(suite, texts, there)
        return list(proposals.values()), measured, reason, notes
    return None


def _proposal(
    row: Row, options: dict[str, Any], parameters: int, budget: int, hidden: int, targets: list[str] | str
) -> Proposal:
    own = {name: value for name, value in options.items() if name != "target_modules" or value != targets}
    why = f"as {row.label}: {row.parameters:,} parameters, rate {row.rate:g}, {row.nats:.4f} nats ({row.error:.4f})"
    rate = scaled_rate(row.method, row.rate, hidden)
    return Proposal(row.method, parameters, parameters / budget, own, rate, [], why, row.optimizer, row.nats)


def _chosen(rows: list[Row]) -> tuple[Row, Row | None]:
    """Return the row to propose, and the one that it is compared with, None where there is no other method.

    Proposed is the simplest of those that do not separate from the lowest, and compared with that; the lowest itself is
    compared with the lowest of another method. A row of which a seed ended worse than the base hardly separates
    from anything, so far do its seeds spread: it is no simpler choice.
    """
    lowest = rows[0]
    even = [row for row in rows[1:] if not row.over[lowest.row].separates and not row.worse_than_base]

    def simplicity(row: Row) -> tuple[int, bool, bool, float]:
        return SIMPLEST.index(row.method), row.optimizer is not None, "init" in row.options, row.nats

    chosen = min([lowest, *even], key=simplicity)
    if chosen is not lowest:
        return chosen, lowest
    return chosen, next((row for row in rows if row.method != chosen.method), None)


def _reason(chosen: Row, other: Row | None, comparison: Comparison | None, suite: Suite) -> str:
    nats = f"{chosen.nats:.4f} nats a token of held-out answers (standard error {chosen.error:.4f}, "
    on = f"with {chosen.parameters:,} parameters on {suite.in_words()}"
    lost = f"{on}, {chosen.label} lost {nats}{chosen.seeds} seeds)"
    if other is None or comparison is None:
        return f"{lost}; no other method was measured there that fits here"
    if chosen.nats > other.nats:
        words = f"{lost}; {other.label} lost less, but the two do not separate: {comparison.in_words()}"
        return f"{words}; the simpler one is proposed"
    if comparison.separates:
        words = f"{lost}, the least of those that fit here"
        return f"{words}; the next method, {other.label}, lost more: {comparison.in_words()}"
    words = f"{lost}; it does not separate from {other.label}, {comparison.in_words()}"
    return f"{words}, and is the simpler one"


def _notes(suite: Suite, size: Size, share: float, hidden: int) -> list[str]:
    notes, times = [f"nats are what the measured adapters lost, on {suite.model}"], size.times(share)
    if times > evidence.FAR:
        notes.append(
            f"far from what was measured: the budget is {100 * share:.2g} % of LoRA r=8's parameters, the nearest size "
            f"{100 * size.share:.2g} %, a factor of {times:.1f}"
        )
    rates = f"rates were tuned at hidden size {suite.hidden_size} with {suite.tokens_a_step:,} tokens a step (smaller "
    rates += "steps want lower ones)"
    if hidden > NARROW:
        notes.append(f"{rates}, and scaled to width {hidden:,} as this package's configurations are; tune them")
    else:
        notes.append(rates)
    return notes


def _of_another_size(suite: Suite, size: Size, share: float) -> list[str]:
    """Return that the proposed adapter, which fills a part of the budget, is of another size than was measured."""
    nearest = suite.nearest(share)
    if nearest is size:
        return []
    return [
        f"the evidence is of {100 * size.share:.2g} % of LoRA r=8's parameters; the proposed adapter has "
        f"{100 * share:.2g} % of them, nearer to {100 * nearest.share:.2g} %, which was measured too: --budget with "
        "its number of parameters proposes by that"
    ]


def _not_compared(chosen: Row, rows: list[Tuned]) -> str:
    """Return in a sentence which rows that are not compared lost less than the proposed one where rates are chosen."""
    texts = [
        f"{row.label} ({row.tuned:.4f}; {'a seed of it diverged' if row.diverged else 'without two seeds'})"
        for row in sorted(rows, key=lambda row: row.tuned)
    ]
    lost = f"lost less than {chosen.label} ({chosen.tuned:.4f} nats) where rates are chosen, and"
    return f"{' and '.join(texts)} {lost} cannot be compared on the test part"


def _disagreement(suite: Suite, other: Suite, there: Row) -> str:
    why = "was measured at more sizes" if len(suite.sizes) > len(other.sizes) else "comes first in the results"
    text = f"the kinds of text do not agree: on {other.texts} {there.label} would be proposed"
    return f"; {text}, and {suite.texts} is taken as it {why}"


def _elsewhere(suite: Suite, size: Size) -> str:
    lowest = size.rows[0]
    what = f"of those with {lowest.parameters:,} parameters or so"
    return f"on {suite.in_words()}, {what}, {lowest.label} lost least: {lowest.nats:.4f} nats"


def render(budget: Budget, values: Mapping[str, Any]) -> str:
    """Return the proposals as a run's file with the proposed adapter in it; what is for a person are its comments.

    Args:
        budget: The proposals.
        values: The other sections of that file.
    """
    first = budget.proposals[0]
    has_nats = budget.measured is not None
    rows = [["method", "parameters", "of budget", "rate", *(["nats"] if has_nats else []), "options"]]
    shown = {item.method: item for item in reversed(budget.proposals)}  # the first of each method
    for item in sorted(shown.values(), key=budget.proposals.index):
        share, nats = f"{100 * item.share:.0f} %", "" if item.nats is None else f"{item.nats:.4f}"
        cells = [item.method, f"{item.parameters:,}", share, f"{item.learning_rate:g}", *([nats] if has_nats else [])]
        rows.append([*cells, _options(item)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    comments = [f"{budget.budget:,} parameters on {budget.adapted_modules} modules of {budget.model}", ""]
    for method, *numbers, options in rows:
        cells = (method.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:-1], strict=True)))
        before = "  ".join((*cells, ""))
        comments += textwrap.wrap(options, 78, initial_indent=before, subsequent_indent=" " * len(before))
    if more := len(budget.proposals) - len(shown):
        comments.append(f"and {more} other forms of these: --json")
    comments += ["", *textwrap.wrap(f"{first.method}, because {budget.reason}.", 76)]
    for note in budget.notes:
        comments += textwrap.wrap(f"note: {note}", 76)
    sections = {name: dict(section) for name, section in values.items()}
    sections["adapter"] = {"method": first.method, "target_modules": budget.targets, **first.options}
    rate = {"learning_rate": first.learning_rate, **({"optim": first.optimizer} if first.optimizer else {})}
    sections["training"] = {**sections.get("training", {}), **rate}
    order = [name for name in ("model", "adapter", "data", "training") if name in sections]
    ordered = {name: sections[name] for name in (*order, *(set(sections) - set(order)))}
    text = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    return text + dump({name: section for name, section in ordered.items() if section}, short=True)


def _options(proposal: Proposal) -> str:
    """Return a proposal's options in a line."""
    words = [f"{name} {value:g}" for name, value in proposal.options.items() if isinstance(value, int | float)]
    words += [f"{name} {value}" for name, value in proposal.options.items() if isinstance(value, str)]
    if isinstance(targets := proposal.options.get("target_modules"), list):
        words.append(f"on {' '.join(targets)}")
    if layers := proposal.options.get("layers_to_transform"):
        words.append(f"in layers {layers[0]} to {layers[-1]}")
    return ", ".join([*words, *([f"optim {proposal.optimizer}"] if proposal.optimizer else [])])
