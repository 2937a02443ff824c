"""Whether a plan fits a card, with what is kept back of it, and the nearest change of the run that does if not."""

from collections.abc import Iterator
from dataclasses import dataclass

from lsr_scale.config import RunConfig
from lsr_scale.plan.planner import Memory, Plan, plan
from lsr_scale.training.callbacks.memory import MARGIN

CUDA_GIB = 0.5  # what nvidia-smi shows above what torch's allocator counts, as in the planner's docstring
MOST_GPUS, SHORT = 8, 512  # what is tried: so many GPUs, and rows of so many tokens


@dataclass(frozen=True)
class Fit:
    """A verdict, in GiB.

    `left` is what a card has left beside the run, its peak while it loads or trains, `kept_back` not counted; less than
    zero is what it lacks. `nearest` is what would fit, in words, where the run does not.
    """

    card: float
    kept_back: float
    left: float
    nearest: str | None

    def in_words(self) -> str:
        """Return the verdict as a sentence or two."""
        kept = f"{self.kept_back:.1f} kept back ({CUDA_GIB} for CUDA, {100 * MARGIN:.0f} % for fragments and NCCL)"
        if self.nearest is None:
            return f"fits on a card of {self.card:.4g} GiB: {self.left:.1f} left, {kept}"
        return (
            f"does not fit on a card of {self.card:.4g} GiB: {-self.left:.1f} lack, {kept}; what does: {self.nearest}"
        )


def kept_back(card: float) -> float:
    """Return how much of a card, in GiB, no run is to count on."""
    return CUDA_GIB + MARGIN * card


def left(memory: Memory, card: float) -> float:
    """Return what a card has left, in GiB; less than zero where it is too small to load or to train."""
    return card - kept_back(card) - max(memory.total, memory.loading)


def fit(run: RunConfig, result: Plan, card: float) -> Fit:
    """Return whether a run fits, and what does if not.

    Args:
        run: The run.
        result: Its plan.
        card: One card's memory in GiB: MiB as nvidia-smi shows them, over 1,024.
    """
    own = left(result.memory_gib, card)
    nearest = None
    if own < 0:
        nearest = next(_that_fit(run, result, card), f"nothing on up to {MOST_GPUS} GPUs")
    return Fit(card, round(kept_back(card), 2), round(own, 2), nearest)


def _that_fit(run: RunConfig, result: Plan, card: float) -> Iterator[str]:
    """Yield what fits: on these GPUs by another stage, by fewer tokens at once, by offloading; then on more GPUs."""
    rows, length = run.training["per_device_train_batch_size"], run.training["max_length"]
    fewer: list[tuple[str, dict[str, int]]] = []
    if rows > 1:
        fewer.append(("training.per_device_train_batch_size: 1", {"per_device_train_batch_size": 1}))
    if length and length > SHORT:
        fewer.append((f"training.max_length: {SHORT}", {"max_length": SHORT, "per_device_train_batch_size": 1}))
    yield from _rows_that_fit(result, card)
    for words, values in fewer:
        smaller = run.model_copy(update={"training": {**run.training, **values}})
        yield from (f"{words}, {row}" for row in _rows_that_fit(plan(smaller, result.gpus), card))
    yield from _rows_that_fit(result, card, offload=True)
    for gpus in (2, 4, MOST_GPUS):
        if gpus > result.gpus:
            yield from (f"{row}, on {gpus} GPUs" for row in _rows_that_fit(plan(run, gpus), card))


def _rows_that_fit(result: Plan, card: float, offload: bool = False) -> Iterator[str]:
    for row in result.table:
        if left(row.memory_gib, card) < 0 or ("offload" in row.stage) != offload:
            continue
        how = f"training.memory: {'save' if row.checkpointing else 'speed'}"
        yield how if result.gpus == 1 and row.stage == "zero0" else f"deepspeed.config: {row.stage}, {how}"
