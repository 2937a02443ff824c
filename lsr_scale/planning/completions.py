"""What GRPO's completions take on each GPU while they are generated: keys and values, and the logits of a step."""

from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.config.training import longest_row
from lsr_scale.model import DTYPES
from lsr_scale.planning.stages import GIB

_LOGITS_COPIES = 3  # in float32: the step's own, what is drawn from, and its softmax


def num_completions(run: RunConfig, gpus: int = 1) -> int:
    """Return how many completions a run of GRPO generates at a time on each GPU."""
    training = run.training
    if (number := training.get("generation_batch_size")) is not None:
        return number // gpus
    steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
    return training["per_device_train_batch_size"] * steps


def generation_bytes(run: RunConfig, text_config: Any, gpus: int = 1) -> tuple[int, int]:
    """Return the bytes of keys and values, and of logits, for all completions of a time at their longest.

    Args:
        run: The run.
        text_config: The model's configuration.
        gpus: How many share a generation_batch_size.
    """
    rows, length = num_completions(run, gpus), longest_row(run.training) or 0
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    states = (getattr(text_config, "num_key_value_heads", None) or heads) * size
    cache = 2 * text_config.num_hidden_layers * states * rows * length * DTYPES[run.model.dtype].itemsize
    return cache, _LOGITS_COPIES * 4 * rows * text_config.vocab_size


def completions_note(run: RunConfig, text_config: Any, gpus: int = 1) -> str:
    """Return in words what the completions of a run take, which its training steps do not."""
    cache, logits = generation_bytes(run, text_config, gpus)
    return (
        f"{num_completions(run, gpus):,} completions at a time take about {cache / GIB:.2f} GiB of keys and values and "
        f"{logits / GIB:.2f} GiB of logits beside the weights, free again before a step's own passes; the reference is "
        "the base itself, and takes nothing"
    )
