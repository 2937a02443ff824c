"""Log-probabilities of completions by the fused head, in TRL's trainers that take them: of preferences, and GRPO's.

TRL's ask the model for them with `fused_lm_head=True`, and its own head (`add_fused_lm_head`) makes no logits of all
tokens either. Here a chunk's gradient is made with its loss, where TRL's computes the logits again; and the reference's
pass, under which nothing is differentiated, describes no distributions, which nobody logs.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor

from lsr_scale.errors import UserError
from lsr_scale.fused.fallback import lm_head_fallback_reason
from lsr_scale.fused.loss import Distributions, token_losses
from lsr_scale.fused.modules import FusedDecoder
from lsr_scale.training.steps.unpadded import KnownRows, Rows, reads_documents, shares_prefixes

# by which configurations scale or bound logits
_LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def head_fallback_reason(base: Any, settings: Any) -> str | None:
    """Return why TRL must compute the log-probabilities of a causal language model, or None.

    Args:
        base: The model (`LlamaForCausalLM` or the like), fused or not.
        settings: Its trainer's arguments.
    """
    if getattr(settings, "use_weighting", False):
        return "use_weighting needs sums over squared probabilities"
    config = base.config.get_text_config()
    if not hasattr(base, "lm_head") or not hasattr(base, "model"):
        return f"{type(base).__name__} has no lm_head on a model"
    if scaled := next((name for name in _LOGIT_OPTIONS if getattr(config, name, None) is not None), None):
        return f"{scaled} changes the logits"
    if getattr(config, "output_router_logits", False):
        return "the model's experts have a loss of their own"
    if any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters()):
        return "lm_head is trained"
    return lm_head_fallback_reason(base, {})


def use_fused_head(base: Any, temperature: float = 1.0, only_entropy: bool = False) -> None:
    """Have a causal language model answer `fused_lm_head=True`, as TRL's trainers ask, by the fused head.

    Args:
        base: The model, of a trainer that was just made: TRL has given it a forward of its own, but ORPO's.
        temperature: What logits are divided by.
        only_entropy: Of the distributions nothing else is asked for.

    Raises:
        UserError: if this release of TRL asks in another way.
    """
    from trl.trainer import utils

    trls = base.forward
    output = getattr(utils, "FusedCausalLMOutput", None)
    if output is None or not hasattr(utils, "add_fused_lm_head"):
        raise UserError(
            "this release of TRL does not ask the model for log-probabilities as 1.15 and 1.16 do; install "
            "'trl>=1.15,<1.17', or set training.fused: off"
        )
    trl_has_head, known = "forward" in vars(base), KnownRows()

    @functools.wraps(type(base).forward)
    def forward(module: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or args or kwargs.get("shift_labels") is not None:
            if labels is not None:
                kwargs["labels"] = labels
            return trls(*args, **kwargs, **({"fused_lm_head": fused_lm_head} if trl_has_head else {}))
        kwargs.pop("num_items_in_batch", None)
        logged = torch.is_grad_enabled() or not module.training
        ids = kwargs.get("input_ids")
        unpads = ids is not None and reads_documents(module.model)
        shares = shares_prefixes(module.model)
        rows = known.of(labels if ids is None else ids, kwargs.get("attention_mask"), labels, unpads, shares)
        log_probs, described = completion_log_probs(
            module, rows, described=logged, only_entropy=only_entropy, temperature=temperature, **kwargs
        )
        mask = rows.mask
        of_all = {
            name: _at(mask, value)
            for name in ("entropy", "mean_logits", "is_top1")
            if described is not None
            if (value := getattr(described, name)) is not None
        }
        return output(log_probs=_at(mask, log_probs), label_mask=mask, **of_all)

    base.forward = types.MethodType(forward, base)


def completion_log_probs(
    module: Any,
    rows: Rows,
    described: bool = False,
    only_entropy: bool = False,
    temperature: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Distributions | None]:
    """Return the log-probability of each label that is not ignored, and what its distribution is like.

    Args:
        module: The causal language model.
        rows: What is known of the batch.
        described: Describe the distributions too.
        only_entropy: By their entropies alone.
        temperature: What logits are divided by.
        kwargs: The model's, such as `input_ids`.

    Returns:
        `[N]` in float32, in the rows' order; the distributions or None.
    """
    kwargs |= {"use_cache": False}
    decoder: Any = module.model
    if isinstance(module.model, FusedDecoder) and "input_ids" in kwargs:
        kwargs |= rows.inputs(kwargs["input_ids"], kwargs.pop("attention_mask", None))
    hidden = decoder(**kwargs).last_hidden_state.flatten(0, 1)
    weight = module.get_output_embeddings().weight
    chosen = hidden.index_select(0, rows.predicting.to(hidden.device)).to(weight.dtype)
    found = Distributions.empty(chosen, only_entropy) if described else None
    return -token_losses(chosen, weight, rows.targets.to(hidden.device), found, temperature), found


def _at(mask: Tensor, values: Tensor) -> Tensor:
    """Return values at the places of a mask, zeros elsewhere; differentiable, also where there are none."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
