"""Loading a model while a DeepSpeed ZeRO-3 run is set up, which makes Transformers shard whatever it creates."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations import deepspeed


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Make or load a model here as if there were no DeepSpeed."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


@contextmanager
def sharded_in(dtype: torch.dtype) -> Iterator[None]:
    """Shard a model that is loaded here in that dtype; nothing changes where ZeRO-3 is not on.

    DeepSpeed takes the dtype from its bf16 and fp16 sections and float32 without them, whatever the model is loaded
    in. Those sections must stay off in the engine, which would cast the adapter's float32 factors by them.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    reference = deepspeed._hf_deepspeed_config_weak_ref
    content: Any = copy.deepcopy(deepspeed.deepspeed_config())
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        content[name] = {"enabled": dtype == kind}
    for_loading = deepspeed.HfDeepSpeedConfig(content)
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        del for_loading
