"""`fuse` and `unfuse`: replace the classes of a model's modules by fused ones, in place, and put them back.

Replaced are the causal language model (its loss is computed without logits), the model around the layers (what all
layers share is made once per forward), each decoder layer, and each adapted linear; see `modules`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lsr_scale.adapters.joint import JointLinear
from lsr_scale.adapters.peft import AdapterLinear
from lsr_scale.errors import UserError
from lsr_scale.fused.eight_bit import eight_bit_groups, use_eight_bits
from lsr_scale.fused.fallback import CAUSAL_LMS, DECODER_LAYERS, FAMILIES, layer_fallback_reason, linear_fallback_reason
from lsr_scale.fused.layer_state import GROUPS, Recompute
from lsr_scale.fused.linear_groups import CachedMatrix
from lsr_scale.fused.modules import FusedCausalLM, FusedDecoder, FusedLayer, FusedLinear
from lsr_scale.fused.subclass import Fused, original_class, subclass
from lsr_scale.kernels.attention import disable_cudnn_in_sdpa
from lsr_scale.layers.frozen_linear import freeze_quantized

Compute = Literal["bf16", "fp8", "int8"]

_DECODERS = {getattr(module, name + "Model") for name, module in FAMILIES.items()}
# what fused modules add to a module
_ATTRIBUTES = (
    *("recompute", "sizes", "weight_cache", "eight_bit", "fallback_check", "warned"),
    *("pair_cache", "joint_blocks", "max_tokens", "mask_is_needed"),
)


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        fused: Names of the decoder layers that will run fused.
        unfused: Names of the decoder layers that will not, with the reason.
        fused_linears: Number of adapted linears with fused operations of their own, which they use outside of fused
            layers.
        unfused_linears: Names of the adapted modules without, with the reason: they run as without `fuse`.
        eight_bit: Names of the groups of linears that compute in 8 bits in training: "12.down".
        not_eight_bit: Names of those that cannot, with the reason, where they were asked to.
    """

    fused: list[str]
    unfused: dict[str, str]
    fused_linears: int = 0
    unfused_linears: dict[str, str] = field(default_factory=dict)
    eight_bit: list[str] = field(default_factory=list)
    not_eight_bit: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line."""
        if self.fused or self.unfused:
            text = f"{len(self.fused)} of {len(self.fused) + len(self.unfused)} decoder layers run fused"
            reasons = sorted(set(self.unfused.values()))
            text += f"; the others unfused: {'; '.join(reasons)}" if reasons else ""
            if self.eight_bit or self.not_eight_bit:
                number, total = len(self.eight_bit), len(self.eight_bit) + len(self.not_eight_bit)
                text += f"; {number} of {total} groups of linears compute in 8 bits"
                reasons = sorted(set(self.not_eight_bit.values()))
                text += f" (the others cannot: {'; '.join(reasons)})" if reasons else ""
            return text
        names = ", ".join(FAMILIES)
        text = f"{self.fused_linears} adapted linears fused one by one (decoder layers fuse in {names} models)"
        reasons, number = sorted(set(self.unfused_linears.values())), len(self.unfused_linears)
        return text + (f"; {number} adapted modules unfused: {'; '.join(reasons)}" if reasons else "")


def fuse(
    model: nn.Module,
    recompute: Recompute = "none",
    cache_weights: bool = False,
    compute: Compute = "bf16",
    calibrate: bool = False,
) -> FuseReport:
    """Make a model run fused, in place: faster, with less memory, the same function.

    For training loops of your own. Call it on a PEFT model (LSR-Adapt, Kron-LoRA, LoRA) or a frozen one, after its
    adapters are injected, before any wrapper (DeepSpeed, DDP). `unfuse` undoes it. In LLaMA, Mistral, Qwen2 and Qwen3
    models each decoder layer becomes one autograd function, and the loss is computed without logits; in all others
    each adapted linear does. From then on `scaled_dot_product_attention` does without its cuDNN backend in this
    process, whose gradients under a mask are not finite.

    Args:
        model: The model.
        recompute: What the backward pass of a decoder layer recomputes instead of saving it: "none", "mlp" (gate and
            up) or "full" (everything but the layer's input). Leave transformers' own gradient checkpointing off: a
            layer that runs unfused is checkpointed. Models without such layers need their own checkpointing.
        cache_weights: Dequantize the weights of fused layers once and keep them in memory, in the compute dtype,
            beside the quantized ones: 2 more bytes a weight, 13 GiB for a 7B model. `fit_memory` chooses by layer.
        compute: What the base's products are computed in, in training: "bf16" (the model's dtype), "fp8" (e4m3 in both
            directions, the fastest) or "int8" (forward in int8 on rotated operands, a third of the error; backward as
            "fp8"); adapters and all else as before (see `eight_bit_group`). An evaluation is in bfloat16.
        calibrate: With the latter two, also compare every product with the one in bfloat16, until `compute_errors` is
            asked.

    Returns:
        Which layers run fused, and why others run unfused, as without `fuse`; checked again at every forward.

    Raises:
        UserError: if the model has neither such decoder layers nor adapters, for an unknown `recompute` or `compute`,
            or for 8 bits where they cannot run.
    """
    for name, value, known in (("recompute", recompute, Recompute), ("compute", compute, Compute)):
        if value not in get_args(known):
            raise UserError(f"{name}: expected one of {', '.join(get_args(known))}; got {value!r}")
    freeze_quantized(model)
    disable_cudnn_in_sdpa()
    report = FuseReport([], {})
    for name, module in list(model.named_modules()):
        original = original_class(module)
        for mixin, known in ((FusedLayer, DECODER_LAYERS), (FusedDecoder, _DECODERS), (FusedCausalLM, CAUSAL_LMS)):
            if original in known:
                module.__class__ = subclass(mixin, original)
        if isinstance(module, BaseTunerLayer):
            base: Any = module.get_base_layer()
            if isinstance(module, AdapterLinear | LoraLayer) and isinstance(
                base, nn.Linear
            ):  # checked at every forward
                module.__class__ = subclass(FusedLinear, original)  # falls back by itself where it must
            reason = linear_fallback_reason(module)
            if reason:
                report.unfused_linears[name] = reason
            else:
                report.fused_linears += 1
        if isinstance(module, FusedLayer):
            module.recompute, module.sizes, module.eight_bit = recompute, None, {}
            # no cached matrix is used in 8 bits: let none stay from before
            set_weight_cache(module, cache_weights and compute == "bf16")
            set_weight_cache(module, cache_weights)
            reason = layer_fallback_reason(module)
            if reason:
                report.unfused[name] = reason
            else:
                report.fused.append(name)
    if not (report.fused or report.unfused or report.fused_linears or report.unfused_linears):
        names = ", ".join(FAMILIES)
        raise UserError(f"{type(model).__name__} has no adapters, and no decoder layers that can fuse ({names})")
    if compute != "bf16":
        layers = [layer for layer in model.modules() if isinstance(layer, FusedLayer)]
        if not layers:
            names = ", ".join(FAMILIES)
            kind = type(model).__name__
            raise UserError(f"compute: {compute} needs decoder layers that can fuse ({names}); {kind} has none")
        if any(isinstance(module, JointLinear) for module in model.modules()):
            raise UserError(f"compute: {compute} has no form for the adapters of several trials; use bf16")
        if not report.fused:
            reasons = "; ".join(sorted(set(report.unfused.values())))
            raise UserError(f"compute: {compute} is for fused layers, and none can run fused: {reasons}")
        report.not_eight_bit = use_eight_bits(layers, compute, calibrate)
        report.eight_bit = [name for name in eight_bit_groups(model) if name not in report.not_eight_bit]
    return report


def set_weight_cache(layer: Any, enabled: bool) -> None:
    """Have a fused decoder layer cache its dequantized weights from its next forward on, or free them now."""
    if bool(layer.weight_cache) != enabled:
        layer.weight_cache = {name: CachedMatrix() for name in GROUPS} if enabled else {}
    if not enabled:
        for state in layer.eight_bit.values():
            state.codes = {}


def unfuse(model: nn.Module) -> None:
    """Give every module of a fused model its own class back; bitsandbytes layers stay in their frozen form."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__class__ = module.original
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
