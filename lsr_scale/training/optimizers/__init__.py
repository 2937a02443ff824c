"""Optimizers of the pair (down, up) that a low-rank update is, whatever factors make it.

kron_side.py       from the gradients of a side's Kronecker factors to that of the side, and back from its step
eigh.py            eigendecompositions of many small matrices at once
sides.py           sides of one shape as a stack, out of one vector of all factors and back into it
stacks.py          a step of all pairs, and their state, which stays stacked
pair_optimizer.py  what such an optimizer has in common: gradients, checkpoints, AdamW for all else
lora_rite.py       LoRA-RITE
lora_pro.py        LoRA-Pro
state_bytes.py     what their state takes, for `lsr-scale plan`
create.py          from `training.optim` to an optimizer; LoRA+ is PEFT's
"""
