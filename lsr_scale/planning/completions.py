"""What GRPO's completions take on each GPU while they are generated, when nothing of a training step is there.

A time of completions is P prompts with G answers each, R = P G rows, of S tokens of prompt and C of completion, in a
model of L layers, H key/value heads of size D, and V words; E bytes an element, T = S + C as `Decoder` rounds it up.

    cache     2 L H D E R T      keys and values, of fixed size from the first token on
    prefill   2 L H D E P S      those of the prompts, until they are copied, and a layer's keys for all rows: H D E R S
    logits    R V (E + 3 * 4)    of a step: the model's, and in float32 what is drawn from, that scaled, its softmax

Prefill's end and a step's logits do not meet: the most is the cache and the larger of both.
"""

from dataclasses import dataclass
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.config.training import longest_row
from lsr_scale.fused.cuda_graphs import rounded
from lsr_scale.generation.decoder import LEAST_LENGTH, LENGTHS_PER_DOUBLING
from lsr_scale.model import DTYPES

_FLOAT32_LOGITS = 3
VLLM_SHARE = 0.3  # of a GPU, where training.vllm_gpu_memory_utilization is not set: TRL's default


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes of a generation, beside the weights.

    Attributes:
        rows: Completions at a time.
        cache: Keys and values.
        prefill: Keys and values of the prompts, beside the cache.
        logits: Of one step.
    """

    rows: int
    cache: int
    prefill: int
    logits: int

    @property
    def peak(self) -> int:
        """The most that is allocated at any time."""
        return self.cache + max(self.prefill, self.logits)


def vllm_share(run: RunConfig) -> float:
    """Return the share of each GPU that vLLM has to itself, for a base of its own and its cache; 0 without it."""
    training = run.training
    return (training.get("vllm_gpu_memory_utilization") or VLLM_SHARE) if training.get("use_vllm") else 0.0


def num_completions(run: RunConfig, gpus: int = 1) -> int:
    """Return how many completions a run of GRPO generates at a time on each GPU."""
    training = run.training
    if (number := training.get("generation_batch_size")) is not None:
        return number // gpus
    steps = training.get("steps_per_generation") or training["gradient_accumulation_steps"]
    return training["per_device_train_batch_size"] * steps


def generation_memory(run: RunConfig, text_config: Any, gpus: int = 1) -> GenerationMemory:
    """Return what all completions of a time take, prompts and completions at their longest.

    Args:
        run: The run.
        text_config: The model's configuration.
        gpus: How many share a generation_batch_size.
    """
    rows, element = num_completions(run, gpus), DTYPES[run.model.dtype].itemsize
    prompt, heads = run.training["max_prompt_length"], text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    # of a token in a layer, keys and values
    token = 2 * (getattr(text_config, "num_key_value_heads", None) or heads) * size * element
    length = max(LEAST_LENGTH, rounded(longest_row(run.training) or 0, LENGTHS_PER_DOUBLING))
    prompts = -(-rows // run.training["num_generations"])
    layers = text_config.num_hidden_layers
    return GenerationMemory(
        rows,
        cache=layers * token * rows * length,
        prefill=layers * token * prompts * prompt + token * rows * prompt // 2,  # keys are copied before values
        logits=rows * text_config.vocab_size * (element + 4 * _FLOAT32_LOGITS),
    )
