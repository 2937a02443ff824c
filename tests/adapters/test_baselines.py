"""The papers' baselines, KronA, KAdaptation and PEFT's LoKr: what the contract over all methods does not say."""

from typing import Any

import pytest
import torch
from peft import LoKrConfig, get_peft_model

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, options, peft_config
from lsr_scale.config.run import run_from_dict
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama

SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


@pytest.mark.parametrize(("sizes"), [(24, 40, 4, 2), (24, 40, 2, 20), (40, 24, 1, 1), (24, 40, 24, 40)])
def test_krona_folds_the_input_in_either_order(sizes):
    in_features, out_features, left_in, left_out = sizes
    config = peft_config("krona", {"left_in": left_in, "left_out": left_out})
    shapes = METHODS["krona"].parameter_shapes(in_features, out_features, config)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    actual = METHODS["krona"].delta_forward(params, x)
    torch.testing.assert_close(actual, x @ METHODS["krona"].delta_weight(params).T, rtol=1e-12, atol=1e-12)


def test_krona_is_of_full_rank_and_its_splits_are_balanced_by_default():
    shapes = METHODS["krona"].parameter_shapes(576, 192, peft_config("krona", {}))
    assert shapes == {"left": (12, 24), "right": (16, 24)}
    update = METHODS["krona"].delta_weight({name: torch.randn(shape) for name, shape in shapes.items()})
    assert torch.linalg.matrix_rank(update) == 192
    assert not METHODS["krona"].is_low_rank()


def test_krona_takes_its_splits_by_module():
    values = {"target_modules": SEVEN_LINEARS, "left_out_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}
    model: Any = get_peft_model(tiny_llama(), peft_config("krona", values))
    layer = model.base_model.model.model.layers[0]
    assert layer.mlp.down_proj.factors("default")["left"].shape[0] == 2
    assert layer.mlp.up_proj.factors("default")["left"].shape[0] != 2
    assert layer.self_attn.q_proj.adapter_configs["default"].scaling == 3.0


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("krona", {"left_in": 5}, r"left_in=5 must divide in_features=24; .*\[1, 2, 3, 4"),
        ("krona", {"left_out": 0}, "left_out=0 must divide out_features=40"),
        ("kadaptation", {"phm_dim": 5}, r"phm_dim=5 must divide in_features=24; .*\[1, 2, 4, 8\]"),
        ("kadaptation", {"phm_dim": 4, "rank": 7}, "rank=7 is larger"),
    ],
)
def test_impossible_splits_name_the_possible_ones(method, values, message):
    with pytest.raises(UserError, match=message):
        METHODS[method].parameter_shapes(24, 40, peft_config(method, values))


def test_kadaptation_is_of_rank_terms_times_rank_and_all_its_factors_come_to_train():
    config: Any = peft_config("kadaptation", {})
    shapes = METHODS["kadaptation"].parameter_shapes(576, 192, config)
    params = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    METHODS["kadaptation"].init_parameters(params, config)
    assert config.scaling == 160
    assert {name: value.any().item() for name, value in params.items()}["right_up"] is False
    params["right_up"].normal_()
    factors = {name: value.requires_grad_() for name, value in params.items()}
    update = METHODS["kadaptation"].delta_weight(factors)
    assert torch.linalg.matrix_rank(update) == 32
    update.square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in factors.values())


def test_lokr_is_pefts_and_counts_as_peft_does(ids):
    config = peft_config("lokr", {"rank": 2, "target_modules": SEVEN_LINEARS, "decompose_factor": 4}, "CAUSAL_LM")
    assert isinstance(config, LoKrConfig)
    assert (config.r, config.alpha, config.decompose_factor) == (2, 4, 4)
    model = get_peft_model(tiny_llama(torch.float64), config)
    base = tiny_llama(torch.float64)(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, base)
    assert not torch.allclose(randomize(model)(input_ids=ids).logits, base)
    assert {"rank", "alpha", "decompose_factor"} <= {field for field in options("lokr").__dataclass_fields__}


@pytest.mark.parametrize("factor", [0, -2, 2.0, True])
def test_a_split_that_lokr_cannot_have_is_refused(factor):
    with pytest.raises(UserError, match="decompose_factor: expected -1 or an integer >= 1"):
        peft_config("lokr", {"decompose_factor": factor})


def test_lokr_on_a_4_bit_base_is_refused_before_anything_is_loaded():
    run = {
        "model": {"name": "builtin:smollm2-135m-instruct", "quantization": "nf4"},
        "adapter": {"method": "lokr"},
        "data": {"train": ["builtin:commonsense"]},
    }
    with pytest.raises(UserError, match=r"adapter\.method.*kron_lora"):
        run_from_dict(run)
    run["model"]["quantization"] = "none"
    assert run_from_dict(run).adapter.options["alpha"] == 16
