"""LSR-Adapt: the paper's counts and start, the splits and their overrides, the warning on oversized sides."""

import math
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, RobertaConfig, RobertaModel

from lsr_scale import LsrConfig, UserError
from lsr_scale.adapters.methods.lsr import Lsr
from tests.helpers.tiny_models import SEVEN_LINEARS, tiny_llama


def shapes(in_features, out_features, **options):
    return Lsr.parameter_shapes(in_features, out_features, LsrConfig(**options))


def count(in_features, out_features, **options):
    return sum(math.prod(shape) for shape in shapes(in_features, out_features, **options).values())


def factors(in_features, out_features, **options):
    config = LsrConfig(**options)
    params = {n: torch.empty(s, dtype=torch.float64) for n, s in shapes(in_features, out_features, **options).items()}
    torch.manual_seed(0)
    Lsr.init_parameters(params, config)
    return params, config


def count_on_meta(model_class, config, **options):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model_class(config), LsrConfig(**options))
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_the_papers_module_has_3584_parameters():
    assert shapes(768, 768, rank=4, separation_rank=16) == {
        "down_left": (16, 2, 32),
        "down_right": (16, 2, 24),
        "up_left": (16, 32, 2),
        "up_right": (16, 24, 2),
    }
    assert count(768, 768, rank=4, separation_rank=16) == 3_584


@pytest.mark.parametrize(
    ("model_class", "config", "options", "expected"),
    [
        (RobertaModel, RobertaConfig(), {"rank": 4, "target_modules": ["query", "value"]}, 86_016),
        (MistralForCausalLM, MistralConfig(), {"rank": 16, "target_modules": SEVEN_LINEARS}, 4_096_000),
        (
            LlamaForCausalLM,
            LlamaConfig(intermediate_size=11008),
            {"rank": 16, "target_modules": SEVEN_LINEARS},
            4_198_400,
        ),
        (
            LlamaForCausalLM,
            LlamaConfig(
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                vocab_size=49152,
            ),
            {"rank": 4, "target_modules": SEVEN_LINEARS},
            698_880,
        ),
    ],
    ids=["roberta-base", "mistral-7b", "llama2-7b", "smollm2-135m"],
)
def test_published_shapes_give_these_counts_with_nothing_allocated(model_class, config, options, expected):
    assert count_on_meta(model_class, config, separation_rank=16, **options) == expected


def test_zero_start_has_the_variance_of_loras_down_for_any_rank_and_separation_rank():
    for rank, terms, size in [(4, 4, 768), (16, 16, 4096), (8, 48, 1024), (16, 64, 576)]:
        params, _ = factors(size, size, rank=rank, separation_rank=terms)
        down, up = Lsr.materialize(params)
        assert down.std().item() * math.sqrt(size) == pytest.approx(1.0, abs=0.3)
        assert up.abs().max() == 0


def test_paper_start_is_small_noise_in_every_factor_and_scales_by_4096():
    params, config = factors(768, 768, rank=4, separation_rank=16, init="paper")
    assert all(value.std().item() == pytest.approx(0.01, rel=0.2) for value in params.values())
    assert config.alpha == 16384
    assert config.scaling == 4096
    # the authors' start: dW has a standard deviation of about 1.36e-3
    assert (Lsr.delta_weight(params) * config.scaling).std().item() == pytest.approx(1.36e-3, rel=0.25)


def test_the_larger_dimension_factor_takes_the_smaller_rank_factor():
    # 768 = 32 * 24 and 8 = 4 * 2
    assert shapes(768, 768, rank=8)["down_left"] == (16, 2, 32)
    assert shapes(768, 768, rank=8)["down_right"] == (16, 4, 24)
    assert shapes(768, 768, rank=8, left_in=16)["down_left"] == (16, 4, 16)


def test_splits_can_be_set_for_all_modules_and_for_single_ones():
    assert shapes(96, 96, rank=8, left_in=12, left_out=6, left_rank=8)["down_left"] == (16, 8, 12)
    model = get_peft_model(
        tiny_llama(),
        LsrConfig(
            rank=4,
            separation_rank=2,
            target_modules=["q_proj", "down_proj"],
            left_in_pattern={"down_proj": 20},
            separation_rank_pattern={"q_proj": 3},
            left_rank_pattern={"layers.1.mlp.down_proj": 4},
        ),
    )
    layers = model.base_model.model.model.layers
    assert layers[0].mlp.down_proj.lsr_down_left["default"].shape == (2, 2, 20)
    assert layers[1].mlp.down_proj.lsr_down_left["default"].shape == (2, 4, 20)
    assert layers[0].self_attn.q_proj.lsr_down_left["default"].shape[0] == 3


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((577, 768), {}, "in_features=577 has no useful split.*left_in_pattern"),
        ((768, 769), {}, "out_features=769 has no useful split.*left_out_pattern"),
        ((768, 768), {"left_in": 5}, "left_in=5 must divide in_features=768"),
        ((768, 768), {"left_rank": 3}, "left_rank=3 must divide rank=16"),
        ((768, 8), {}, "rank=16 is larger"),
    ],
)
def test_impossible_splits_say_what_to_set(sizes, options, message):
    with pytest.raises(UserError, match=message):
        shapes(*sizes, **options)


def test_a_trivial_split_is_taken_when_it_is_asked_for():
    assert shapes(577, 768, left_in=1)["down_left"] == (16, 4, 1)


def test_oversized_sides_are_named_from_the_right_separation_rank_on():
    for size, first in ((192, 14), (768, 28)):
        for terms in (first - 1, first):
            lines = Lsr.oversized_sides(size, size, LsrConfig(rank=4, separation_rank=terms))
            assert bool(lines) == (terms == first)
    with pytest.warns(UserWarning, match=r"layers\.0\.self_attn\.q_proj and 1 more of that shape.*down side"):
        get_peft_model(tiny_llama(), LsrConfig(rank=4, separation_rank=40, target_modules=["q_proj"]))


def test_term_weights_scale_the_terms_and_train():
    params, _ = factors(24, 40, rank=4, separation_rank=3, term_weights=True)
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(v.shape, dtype=torch.float64, generator=generator) for k, v in params.items()}
    down, up = Lsr.materialize(params)
    torch.testing.assert_close(up @ down, Lsr.delta_weight(params))
    unweighted = {k: v for k, v in params.items() if not k.endswith("weight")}
    assert not torch.allclose(Lsr.delta_weight(unweighted), Lsr.delta_weight(params))
    model = get_peft_model(
        tiny_llama(), LsrConfig(rank=4, separation_rank=2, term_weights=True, target_modules=["q_proj"])
    )
    assert sum("down_weight" in name and p.requires_grad for name, p in model.named_parameters()) == 2


def test_scaling_by_rank_or_by_its_root():
    assert LsrConfig(rank=16, alpha=8).scaling == 0.5
    assert LsrConfig(rank=16, alpha=8, use_rslora=True).scaling == 2.0
