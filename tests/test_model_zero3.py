"""Loading beside a ZeRO-3 run that is set up, as if it were not there; test_sharding.py has what two processes do."""

import pytest
import torch
from transformers import modeling_utils
from transformers.integrations import deepspeed

from lsr_scale.model.zero3 import is_sharded, sharding, without_deepspeed


@pytest.fixture
def set_up():
    """Hold a DeepSpeed configuration as the trainer's arguments do."""
    held = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    yield held
    deepspeed.unset_hf_deepspeed_config()


def test_a_model_can_be_made_whole_beside_it(set_up):
    with without_deepspeed():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed.deepspeed_config() is set_up.config


def test_nothing_happens_without_zero3():
    assert not deepspeed.is_deepspeed_zero3_enabled()
    warm_up = modeling_utils.caching_allocator_warmup
    with sharding() as shard, without_deepspeed():
        layer = torch.nn.Linear(2, 2)
        shard(layer)
        assert not is_sharded(layer)
        assert modeling_utils.caching_allocator_warmup is warm_up
