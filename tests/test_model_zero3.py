"""Loading beside a ZeRO-3 run that is set up: in the right dtype, or as if it were not there."""

import pytest
import torch
from transformers.integrations import deepspeed

from lsr_scale.model.zero3 import sharded_in, without_deepspeed


@pytest.fixture
def set_up():
    """Hold a DeepSpeed configuration as the trainer's arguments do."""
    held = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    yield held
    deepspeed.unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [(torch.bfloat16, True, False), (torch.float16, False, True), (torch.float32, False, False)],
)
def test_a_base_is_sharded_in_its_own_dtype_and_the_engine_stays_as_it_was(set_up, dtype, bf16, fp16):
    with sharded_in(dtype):
        assert deepspeed.is_deepspeed_zero3_enabled()
        content = deepspeed.deepspeed_config()
        assert (content["bf16"]["enabled"], content["fp16"]["enabled"]) == (bf16, fp16)
    assert deepspeed.deepspeed_config() is set_up.config
    assert "bf16" not in set_up.config


def test_a_model_can_be_made_whole_beside_it(set_up):
    with without_deepspeed():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed.deepspeed_config() is set_up.config


def test_nothing_happens_without_zero3():
    assert not deepspeed.is_deepspeed_zero3_enabled()
    with sharded_in(torch.bfloat16), without_deepspeed():
        assert deepspeed.deepspeed_config() is None
