"""What was measured of adapters by their size: `frontier.json`, made of the committed results by `benchmarks.report`.

A suite is a model, a kind of text and a way to hold the base; at each of its sizes every row is an adapter that was
tuned and then trained with several seeds; those that were only tuned, or of which a seed diverged, are beside them. A
row's score is the negative log-likelihood of held-out right answers, in nats a
token. Sizes are shares of the parameters that LoRA of rank 8 has on all linears of the model, so that they can be
carried to another one.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("frontier.json")
FAR = (
    1.5  # a measured size so many times the budget, or less than it, is far: measured ones are a factor of 2 to 5 apart
)
SIGNIFICANT = 0.05
OURS = ("lsr", "kron_lora")


@dataclass(frozen=True)
class Comparison:
    """The loss of a row less that of a lower one, with its 95 % interval.

    p is corrected for the row's comparisons with all others at its size.
    """

    difference: float
    low: float
    high: float
    p: float

    @property
    def separates(self) -> bool:
        """Whether the two rows differ by more than chance explains."""
        return self.p < SIGNIFICANT

    def in_words(self) -> str:
        """Return it as a sentence has it."""
        p = "< 0.0001" if self.p < 1e-4 else f"= {self.p:.2g}"
        return f"{self.difference:+.4f} nats (95 %: {self.low:+.4f} to {self.high:+.4f}), corrected p {p}"


@dataclass(frozen=True)
class Tuned:
    """One adapter at one size, of which rates were tried.

    Attributes:
        row: Its name in the results.
        label: What a person calls it.
        method: The adapter's.
        options: The rest of its section, without where it is if that is every layer.
        last_layers: How many layers it adapts, the last ones; None for all.
        optimizer: `training.optim`, None for AdamW.
        parameters: Trained ones.
        rate: The learning rate that was best.
        tuned: Nats a token at that rate, on the part that rates are chosen on.
        seeds: How many were trained at it.
        diverged: How many of them diverged.
    """

    row: str
    label: str
    method: str
    options: dict[str, Any]
    last_layers: int | None
    optimizer: str | None
    parameters: int
    rate: float
    tuned: float
    seeds: int
    diverged: int


@dataclass(frozen=True)
class Row(Tuned):
    """One adapter at one size that is compared.

    Attributes:
        nats: A token of held-out right answers, over all seeds.
        error: Its standard error.
        worse_than_base: How many of its seeds lost more than the base without an adapter.
        over: By the name of each row with a lower loss: the comparison with it.
    """

    nats: float
    error: float
    worse_than_base: int
    over: dict[str, Comparison]


@dataclass(frozen=True)
class Size:
    """The rows at a size, the lowest loss first, and those not compared; `share` is of LoRA r=8's parameters."""

    name: str
    share: float
    rows: list[Row]
    not_compared: list[Tuned]

    @property
    def is_open(self) -> bool:
        """Whether it does not tell which method is best: LSR-Adapt and Kron-LoRA, or all others, were only tuned."""
        return len({row.method in OURS for row in self.rows}) < 2 and bool(self.not_compared)

    def times(self, share: float) -> float:
        """Return by which factor, from 1 on, another share is larger or smaller."""
        return math.exp(abs(math.log(share / self.share)))


@dataclass(frozen=True)
class Suite:
    """What was measured on one model, with one kind of text and one way to hold the base."""

    model: str
    texts: str
    base: str
    hidden_size: int
    num_layers: int
    lora_8: int
    tokens_a_step: int
    sizes: list[Size]

    def nearest(self, share: float) -> Size:
        """Return the measured size that is nearest to a share, of those that are not open if there are any."""
        known = [size for size in self.sizes if not size.is_open] or self.sizes
        return min(known, key=lambda size: size.times(share))

    def in_words(self) -> str:
        """Return what it is called."""
        return f"{self.model}, {self.texts}, base in {'bf16' if self.base == 'none' else self.base}"


def load() -> list[Suite]:
    """Return all that was measured; nothing where no results are committed."""
    return _read(FILE)


@functools.cache
def _read(file: Path) -> list[Suite]:
    return [_suite(values) for values in json.loads(file.read_text(encoding="utf-8"))["suites"]]


def _suite(values: dict[str, Any]) -> Suite:
    return Suite(**{**values, "sizes": [_size(size) for size in values["sizes"]]})


def _size(values: dict[str, Any]) -> Size:
    rows = [_row(row) for row in values["rows"]]
    return Size(values["name"], values["share"], rows, [Tuned(**row) for row in values["not_compared"]])


def _row(values: dict[str, Any]) -> Row:
    return Row(**{**values, "over": {name: Comparison(*numbers) for name, numbers in values["over"].items()}})


def nearest_first(suites: Sequence[Suite], share: float, quantization: str, hidden: int) -> list[tuple[Suite, Size]]:
    """Return every suite with its size nearest to a share; first those that are nearest to a run.

    That is, in this order: a size that is not open; one that is not far, and else the nearest; a base that is held
    alike (quantized or not); a model of like width; more measured sizes, which budgets near each other have alike.

    Args:
        suites: What was measured.
        share: The budget, as a share of LoRA r=8's parameters on the run's model.
        quantization: The run's `model.quantization`.
        hidden: Its hidden size.
    """

    def distance(pair: tuple[Suite, Size]) -> tuple[bool, float, bool, float, int]:
        suite, size = pair
        unlike = (suite.base == "none") != (quantization == "none")
        width = abs(math.log(hidden / suite.hidden_size))
        return size.is_open, max(FAR, size.times(share)), unlike, width, -len(suite.sizes)

    return sorted(((suite, suite.nearest(share)) for suite in suites if suite.sizes), key=distance)
