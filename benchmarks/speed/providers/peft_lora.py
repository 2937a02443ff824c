"""PEFT's providers: its LoRA on Transformers and on Liger's kernels, LoKr, and Liger without adapters."""

from typing import Any

from benchmarks.models import LINEARS
from benchmarks.speed.providers.base import LORA, Provider, base_model


class PeftLora(Provider):
    """PEFT's LoRA on Transformers."""

    packages = ("peft",)
    liger = False

    def make(self) -> None:
        """Build the base and inject PEFT's adapter."""
        if self.liger:
            self.apply_liger()
        self.model = self.adapted(base_model(self.config))

    def adapted(self, base: Any) -> Any:
        """Return the base with its adapters."""
        from peft import LoraConfig, get_peft_model

        shared = {"target_modules": LINEARS, "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
        return get_peft_model(base, LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], **shared))

    def apply_liger(self) -> None:
        """Patch the model's architecture before it is made: RoPE, RMSNorm, SwiGLU, fused linear cross-entropy."""
        from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports]

        kind = self.config["values"]["model_type"]
        apply = getattr(liger, f"apply_liger_kernel_to_{kind}")
        apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)


class PeftLoraFloat32(PeftLora):
    """PEFT's LoRA computing in float32 on the very weights that bfloat16 computes with: the reference of a loss."""

    autocast = False

    def make(self) -> None:
        """Build the base, inject PEFT's adapter, dequantize for good."""
        from benchmarks.speed.parity import in_float32

        super().make()
        self.model = in_float32(self.model)


class PeftLoraLiger(PeftLora):
    """PEFT's LoRA on Liger's kernels."""

    packages = ("peft", "liger_kernel")
    liger = True


class PeftKbitLiger(PeftLoraLiger):
    """PEFT's documented recipe for quantized bases on Liger's kernels: `prepare_model_for_kbit_training` comes first.

    It holds norms, embeddings and head in float32, and with them the hidden states.
    """

    def adapted(self, base: Any) -> Any:
        """Return the base with its adapters."""
        from peft import prepare_model_for_kbit_training

        return super().adapted(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))


class PeftFrozenLiger(PeftLoraLiger):
    """Liger's kernels without adapters; the embeddings' output requires a gradient, so it flows through every layer."""

    def adapted(self, base: Any) -> Any:
        """Return the base itself."""
        base.enable_input_require_grads()
        return base


class PeftLokr(PeftLora):
    """PEFT's LoKr; it does not take a quantized base."""

    def adapted(self, base: Any) -> Any:
        """Return the base with LoKr adapters."""
        from peft import LoKrConfig, get_peft_model

        config = LoKrConfig(r=LORA["rank"], alpha=LORA["alpha"], target_modules=LINEARS, task_type="CAUSAL_LM")
        return get_peft_model(base, config)
