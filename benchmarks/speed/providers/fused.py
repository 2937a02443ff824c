"""This library's providers: LSR-Adapt, Kron-LoRA and PEFT's LoRA on the fused path, and the frozen base alone."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import LINEARS
from benchmarks.speed.providers import MissingError
from benchmarks.speed.providers.base import LORA, Provider, base_model


def no_fp8_reason(device: torch.device) -> str | None:
    """Return why a device cannot compute in FP8, and so neither what "int8" does backward, or None."""
    from lsr_scale.kernels.fp8 import fp8_fallback_reason

    return fp8_fallback_reason(device)


class FusedAdapter(Provider):
    """An adapter of this library, or PEFT's LoRA, on the fused path; without a method, the frozen base alone."""

    method: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    fused = True
    cache_weights = False
    compute = "bf16"
    policy: Any = None

    def make(self) -> None:
        """Build the base, inject the adapter; `checkpoint` fuses."""
        if self.compute != "bf16" and (reason := no_fp8_reason(self.device)):
            raise MissingError(reason)
        from lsr_scale.adapters import peft_config
        from lsr_scale.layers.frozen_linear import freeze_quantized

        base = base_model(self.config)
        freeze_quantized(base)
        self.model = base
        if self.method is not None:
            from peft import get_peft_model

            options = {"target_modules": LINEARS, **self.options}
            self.model = get_peft_model(base, peft_config(self.method, options, "CAUSAL_LM"))
        else:
            base.enable_input_require_grads()

    def checkpoint(self, mode: str) -> None:
        """Fuse again with the wanted recomputation; unfused, Transformers' checkpointing."""
        if not self.fused:
            return super().checkpoint(mode)
        import lsr_scale

        lsr_scale.unfuse(self.model)
        recompute: Any = "full" if mode == "auto" else mode
        options: Any = {"recompute": recompute, "cache_weights": self.cache_weights, "compute": self.compute}
        report = lsr_scale.fuse(self.model, **options)
        self.notes = [str(report)]
        print(f"fuse({', '.join(f'{name}={value!r}' for name, value in options.items())}): {report}", flush=True)
        self.policy = None

    def first_step_begins(self, tokens: int) -> None:
        """With "auto", begin as a run's first step begins."""
        if self.mode == "auto" and self.policy is None and self.device.type == "cuda":
            from lsr_scale.training.callbacks.memory import FitMemoryCallback

            self.policy = FitMemoryCallback(tokens, self.notes.append, self.gpu)
            self.policy.on_train_begin(None, None, None)

    def first_step_ends(self) -> None:
        """With "auto", save as many activations as fit, as a run does after its first step."""
        if self.policy is not None:
            self.policy.on_step_end(None, None, None, model=self.model)

    def free_memory(self) -> None:
        """Free what the step allocated, cached weights too: the next turn makes them again."""
        if self.cache_weights or self.mode == "auto":
            from lsr_scale.fused import clear_weight_cache

            clear_weight_cache(self.model)
            self.mode = None
        super().free_memory()


class LsrAdapter(FusedAdapter):
    """LSR-Adapt, fused."""

    method = "lsr"
    options = {**LORA, "separation_rank": 16}  # noqa: RUF012


class LsrCachedWeights(LsrAdapter):
    """LSR-Adapt, fused, with the weights dequantized once and cached in bf16 beside the quantized ones."""

    cache_weights = True


class ReplayedSteps(FusedAdapter):
    """A fused adapter whose forward and backward passes are replayed as CUDA graphs, as `lsr-scale train` does."""

    replays = True
    graphs: Any = None

    def inputs(self, ids: Tensor) -> Any:
        """Return the batches in the form that graphs take, with the number of supervised tokens."""
        return [self.prepared({"input_ids": rows, "labels": rows}, longest=ids.shape[2]) for rows in ids]

    def prepared(self, batch: dict[str, Tensor], longest: int) -> tuple[dict[str, Any], float]:
        """Return a batch without its padding, a row after another, on the device; how many labels are supervised.

        Args:
            batch: `input_ids`, `labels` and, if there is padding, `attention_mask`, all `[rows, length]`, on the CPU.
            longest: An upper bound on the rows' lengths, the same for all batches.
        """
        from lsr_scale.fused.cuda_graphs import StepGraphs, static_batch

        if self.graphs is None:
            self.graphs = StepGraphs(self.model.get_base_model())
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        labels = batch["labels"].masked_fill(positions == 0, -100)
        static = static_batch(*(values[real][None] for values in (ids, labels, positions)), longest=longest)
        count = float(static["weights"].sum())
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in static.items()}, count

    def loss_of(self, batch: Any) -> Tensor:
        """Replay the batch's graph, which makes the gradients as well."""
        loss, gradients = self.graphs.replay(*batch)
        self.graphs.add_to_grads(gradients)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Do nothing more."""

    def free_memory(self) -> None:
        """Free the graphs."""
        self.graphs = None
        super().free_memory()


class LsrGraphs(ReplayedSteps, LsrAdapter):
    """LSR-Adapt, its steps replayed."""


class LsrUnfused(LsrAdapter):
    """LSR-Adapt, every linear by itself."""

    fused = False


class KronLoraAdapter(FusedAdapter):
    """Kron-LoRA at its defaults, without the dropout that would leave the fused path."""

    method = "kron_lora"
    options = {"dropout": 0.0}  # noqa: RUF012


class LoraAdapter(FusedAdapter):
    """PEFT's LoRA modules on the fused path."""

    method = "lora"
    options = LORA


class LoraGraphs(ReplayedSteps, LoraAdapter):
    """PEFT's LoRA modules on the fused path, its steps replayed."""


class KronLoraGraphs(ReplayedSteps, KronLoraAdapter):
    """Kron-LoRA, its steps replayed."""


class Frozen(FusedAdapter):
    """No adapters: what a step costs whose gradient only flows through the base."""


class LsrFp8(LsrAdapter):
    """LSR-Adapt, the base's products in FP8."""

    compute = "fp8"


class KronLoraFp8(KronLoraAdapter):
    """Kron-LoRA, the base's products in FP8."""

    compute = "fp8"


class LoraFp8(LoraAdapter):
    """PEFT's LoRA modules, the base's products in FP8."""

    compute = "fp8"


class FrozenFp8(Frozen):
    """No adapters, the base's products in FP8."""

    compute = "fp8"


class LsrGraphsFp8(LsrGraphs):
    """LSR-Adapt, the base's products in FP8, its steps replayed."""

    compute = "fp8"


class LoraGraphsFp8(LoraGraphs):
    """PEFT's LoRA modules, the base's products in FP8, its steps replayed."""

    compute = "fp8"


class KronLoraGraphsFp8(KronLoraGraphs):
    """Kron-LoRA, the base's products in FP8, its steps replayed."""

    compute = "fp8"


class LsrInt8(LsrAdapter):
    """LSR-Adapt, the base's products forward in rotated int8."""

    compute = "int8"


class KronLoraInt8(KronLoraAdapter):
    """Kron-LoRA, the base's products forward in rotated int8."""

    compute = "int8"


class LoraInt8(LoraAdapter):
    """PEFT's LoRA modules, the base's products forward in rotated int8."""

    compute = "int8"


class FrozenInt8(Frozen):
    """No adapters, the base's products forward in rotated int8."""

    compute = "int8"


class LsrGraphsInt8(LsrGraphs):
    """LSR-Adapt, the base's products forward in rotated int8, its steps replayed."""

    compute = "int8"


class LoraGraphsInt8(LoraGraphs):
    """PEFT's LoRA modules, the base's products forward in rotated int8, its steps replayed."""

    compute = "int8"


class KronLoraGraphsInt8(KronLoraGraphs):
    """Kron-LoRA, the base's products forward in rotated int8, its steps replayed."""

    compute = "int8"
