"""How large the state of an optimizer of pairs is, before there is one: for `lsr-scale plan`."""

import torch
from torch import nn

from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.config.optimizers import OWN_OPTIMIZERS


def pair_state_bytes(name: str, model: nn.Module) -> int | None:
    """Return the bytes of an optimizer's state, None for one that is not of pairs: AdamW's is two moments a parameter.

    Args:
        name: `training.optim`.
        model: With the adapter in it, on any device, meta too.
    """
    if name not in OWN_OPTIMIZERS or not OWN_OPTIMIZERS[name].of_pairs:
        return None
    total, taken = 0, set()
    for module in model.modules():
        for adapter in active_adapters(module):
            factors = adapter.factors()
            taken |= {id(factor) for factor in factors.values()}
            with torch.no_grad():
                down, up = adapter.method.materialize(factors)
            if name == "lora_pro":
                total += 2 * up.shape[0] * down.shape[1]  # two moments of the weight's size
            else:
                # of each side a moment, a basis, what they are preconditioned by
                total += 2 * (down.numel() + up.numel() + len(down) ** 2 + 1)
    others = (one for one in model.parameters() if one.requires_grad and id(one) not in taken)
    return 4 * (total + 2 * sum(parameter.numel() for parameter in others))
