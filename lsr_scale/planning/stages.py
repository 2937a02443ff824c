"""One GPU's memory under each ZeRO stage: how weights, gradients, optimizer and activations add up and are divided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lsr_scale.config import offloads_optimizer, offloads_parameters
from lsr_scale.planning.memory import StepMemory
from lsr_scale.planning.sizes import FrozenBytes

GIB = 2**30
CUDA_GIB = 0.5  # what nvidia-smi shows above what torch's allocator counts, as in the planner's docstring
# PyTorch's own cuBLAS workspace on a GPU of compute capability 9.0 (CUBLAS_WORKSPACE_CONFIG :4096:8).
CUBLAS_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class Memory:
    """One GPU's memory in GiB, by its use.

    `weights` is the frozen base and the adapter, with `training.memory: speed` also what fused layers keep of their
    dequantized weights, which is `dequantized`; `activations` is what the forward pass saves for the backward pass,
    `workspace` everything temporary beyond that (gradients of activations, a dequantized weight, tiles of the head,
    cuBLAS, DeepSpeed's buckets, and the layers that are all-gathered under ZeRO-3). `loading` is the peak while the
    base is loaded, before there is anything else: all that stays of it, and one weight that is being quantized.
    `generation` is what GRPO's completions take while neither activations nor workspace are there; `total` has the
    larger of the two. `host` is what is offloaded to the machine's own memory, where it is pinned.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    total: float
    loading: float
    generation: float = 0.0
    dequantized: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class RunMemory:
    """A run's memory in bytes, and how each ZeRO stage divides it among GPUs."""

    frozen: FrozenBytes
    trainable: int
    steps: Mapping[bool, StepMemory]
    hidden_size: int
    num_layers: int
    gpus: int
    optimizer_state: int | None = None  # bytes, where it is not AdamW's
    generation: int = 0

    def under(self, deepspeed: Mapping[str, Any], checkpointing: bool, keeps_weights: bool = False) -> Memory:
        """Return one GPU's memory; an empty `deepspeed` is a run without it.

        With `keeps_weights` fused layers keep their dequantized weights, but for those that stage 3 gathers anew.

        AdamW holds two moments of each trainable parameter. From stage 1 on DeepSpeed also holds a float32 master copy,
        all three sharded; stage 3 shards the frozen matrices too, a few of which are unsharded at a time, see
        `_gathered`. Gradients are copied into a buffer to be averaged, see `_gradient_buffer`.
        """
        zero = deepspeed.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        step = self.steps[checkpointing]
        weights = self.frozen.total + self.trainable
        loading = self.frozen.total + self.frozen.largest
        gradients, optimizer = self.trainable, 2 * self.trainable
        if self.optimizer_state is not None:
            optimizer = self.optimizer_state
        workspace = step.peak - step.saved + CUBLAS_WORKSPACE
        whole = host = 0  # of the base, gathered while completions are generated
        if stage >= 1 or self.gpus > 1:
            workspace += self._gradient_buffer(deepspeed)
        if stage >= 1 and self.optimizer_state is None:  # one of pairs would be refused
            optimizer = 3 * self.trainable // self.gpus
        if stage == 3:
            offloaded = offloads_parameters(deepspeed)
            share = self.frozen.matrices // self.gpus
            if offloaded:
                share, host = 0, share
            weights = self.frozen.state + self.trainable + share
            loading = self.frozen.state + share + self.frozen.largest
            # one process that has all matrices uses them where they are
            if self.gpus > 1 or offloaded:
                workspace += sum(self._gathered().values())
                whole = self.frozen.matrices
        dequantized = step.dequantized if keeps_weights and stage < 3 else 0
        weights += dequantized
        if offloads_optimizer(deepspeed):
            optimizer, host = 0, host + optimizer
        parts = [weights, gradients, optimizer, step.saved, workspace]
        generation = self.generation + whole + CUBLAS_WORKSPACE if self.generation else 0
        total = sum(parts[:3]) + max(sum(parts[3:]), generation)
        return Memory(*(round(part / GIB, 4) for part in (*parts, total, loading, generation, dequantized, host)))

    def _gathered(self) -> dict[str, int]:
        """Return the bytes of what is unsharded at once: a layer, and what is prefetched after it."""
        layer = self.frozen.layers // self.num_layers
        return {
            "an unsharded layer": layer,
            "the next one, or the head, prefetched": max(layer, self.frozen.head, self.frozen.embedding),
        }

    def sharded(self, deepspeed: Mapping[str, Any], checkpointing: bool) -> dict[str, int]:
        """Return how `under` adds up for a stage-3 configuration, in bytes, in the phase that takes the most."""
        step = self.steps[checkpointing]
        packed = self.frozen.matrices / GIB
        of_a_step = {
            **(self._gathered() if self.gpus > 1 else {}),
            f"saved activations of {self.num_layers} layers": step.saved,
            "one layer's other activations and dequantized weights": step.peak - step.saved,
            "cuBLAS, and the gradients' buffer": CUBLAS_WORKSPACE + self._gradient_buffer(deepspeed),
        }
        of_generation = {
            **({"all frozen matrices, gathered to generate with": self.frozen.matrices} if self.gpus > 1 else {}),
            "cache and logits of the completions": self.generation,
            "cuBLAS": CUBLAS_WORKSPACE,
        }
        generates = self.generation and sum(of_generation.values()) > sum(of_a_step.values())
        return {
            f"1/{self.gpus} of the frozen matrices' {packed:.2f}": self.frozen.matrices // self.gpus,
            "quantization states, vectors and buffers, replicated": self.frozen.state,
            "the adapter": self.trainable,
            "its gradients": self.trainable,
            f"1/{self.gpus} of its master copy and moments": 3 * self.trainable // self.gpus,
            **(of_generation if generates else of_a_step),
        }

    def _gradient_buffer(self, deepspeed: Mapping[str, Any]) -> int:
        """Return the bytes of the buffer that gradients are averaged in: of all, or DeepSpeed's bucket."""
        if not offloads_optimizer(deepspeed):
            return self.trainable
        elements = deepspeed["zero_optimization"].get("reduce_bucket_size", 500_000_000)
        return 4 * (self.hidden_size**2 if elements == "auto" else int(elements))  # auto: as Transformers fills it in
