"""Whether a plan fits a GPU's memory, with a reserve, and the nearest change of the run that does if not."""

from collections.abc import Iterator
from dataclasses import dataclass

from lsr_scale.config import RunConfig
from lsr_scale.fused.memory import MARGIN
from lsr_scale.planning.completions import vllm_share
from lsr_scale.planning.planner import Plan, count
from lsr_scale.planning.stages import CUDA_GIB, Memory

MAX_GPUS, SHORT_LENGTH = 8, 512  # the most GPUs that are tried, and a shorter max_length


@dataclass(frozen=True)
class Fit:
    """Whether a run fits a GPU's memory, in GiB.

    `free` is what is left beside the run's peak, while it loads or trains, and the `reserve`; negative is what is
    missing. `nearest` is what would fit, in words, if the run does not. `vllm` is what vLLM has of the card to itself.
    """

    card: float
    reserve: float
    free: float
    nearest: str | None
    vllm: float = 0.0

    def in_words(self) -> str:
        """Return it as a sentence or two."""
        reserve = f"{self.reserve:.1f} in reserve ({CUDA_GIB} for CUDA, {100 * MARGIN:.0f} % for fragments and NCCL)"
        if self.vllm:
            reserve += f", {self.vllm:.1f} vLLM's own"
        if self.nearest is None:
            return f"fits on a card of {self.card:.4g} GiB: {self.free:.1f} free, {reserve}"
        return (
            f"does not fit on a card of {self.card:.4g} GiB: {-self.free:.1f} missing, {reserve}; "
            f"what does: {self.nearest}"
        )


def reserve(card: float) -> float:
    """Return how much of a GPU's memory, in GiB, no run should count on."""
    return CUDA_GIB + MARGIN * card


def free(memory: Memory, card: float) -> float:
    """Return what is free beside a run and the reserve, in GiB; negative if the GPU is too small to load or train."""
    return card - reserve(card) - max(memory.total, memory.loading)


def fit(run: RunConfig, result: Plan, card: float) -> Fit:
    """Return whether a run fits, and what does if not.

    Args:
        run: The run.
        result: Its plan.
        card: Memory of one GPU in GiB: the MiB that nvidia-smi shows, over 1,024.
    """
    vllm = vllm_share(run) * card
    left = card - vllm
    remaining = free(result.memory_gib, left)
    nearest = None
    if remaining < 0:
        nearest = next(_fitting_changes(run, result, left), f"nothing on up to {MAX_GPUS} GPUs")
    return Fit(card, round(reserve(left), 2), round(remaining, 2), nearest, round(vllm, 2))


def _fitting_changes(run: RunConfig, result: Plan, card: float) -> Iterator[str]:
    """Yield changes that fit: another stage, fewer tokens at once, offloading; then more GPUs."""
    yield from _fitting_stages(result, card)
    for words, values in _fewer_tokens(run):
        smaller = run.model_copy(update={"training": {**run.training, **values}})
        yield from (f"{words}, {row}" for row in _fitting_stages(count(smaller).on(result.gpus), card))
    yield from _fitting_stages(result, card, offload=True)
    if result.gpus < MAX_GPUS:
        counted = count(run)
        for gpus in (2, 4, MAX_GPUS):
            if gpus > result.gpus:
                yield from (f"{row}, on {gpus} GPUs" for row in _fitting_stages(counted.on(gpus), card))


def _fewer_tokens(run: RunConfig) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield settings of `training`, in words and as values, with fewer tokens at once, the nearest first."""
    training = run.training
    rows, one = training["per_device_train_batch_size"], {"per_device_train_batch_size": 1}
    if training["method"] == "grpo":  # whose completions at a time are whole groups
        steps, group = rows * training["gradient_accumulation_steps"], training["num_generations"]
        if training.get("steps_per_generation") or training.get("generation_batch_size"):
            return
        for number in dict.fromkeys((steps, group)):
            if rows > 1 or number < steps:
                words = f"training.per_device_train_batch_size: 1, training.gradient_accumulation_steps: {number}"
                yield words, {**one, "gradient_accumulation_steps": number}
        return
    if rows > 1:
        yield "training.per_device_train_batch_size: 1", one
    if (length := training["max_length"]) and length > SHORT_LENGTH:
        yield f"training.max_length: {SHORT_LENGTH}", {"max_length": SHORT_LENGTH, **one}


def _fitting_stages(result: Plan, card: float, offload: bool = False) -> Iterator[str]:
    for row in result.table:
        if free(row.memory_gib, card) < 0 or ("offload" in row.stage) != offload:
            continue
        how = f"training.memory: {'save' if row.checkpointing else 'speed'}"
        if host := result.gpus * row.memory_gib.host:
            how += f", {host:.1f} GiB of the machine's own memory"
        yield how if result.gpus == 1 and row.stage == "zero0" else f"deepspeed.config: {row.stage}, {how}"
