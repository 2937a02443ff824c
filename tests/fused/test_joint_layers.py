"""Fused layers of several trials: each trial's outputs and gradients are those of its own model, fused or not."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.adapters.joint import JointLinear
from lsr_scale.errors import UserError
from lsr_scale.fused.joint_group import JointGroup
from lsr_scale.fused.linear_groups import CachedMatrix, LinearGroup
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.model.share import share_base
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, quantize, randomize, tiny_llama

LSR = {"method": "lsr", "rank": 4, "separation_rank": 2}
# methods, ranks, scalings and targets differ; the fourth trains like the first
TRIALS = [
    LSR,
    {"method": "lora", "rank": 3},
    {"method": "kron_lora", "rank": 2, "dropout": 0.0, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    {**LSR, "alpha": 3.0},
    {"method": "lora", "rank": 9, "target_modules": ["v_proj", "o_proj"]},
]
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 12, "sliding_window": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def base_of(family, dtype=torch.float64):
    """Return a frozen tiny model whose biases and norms are not those of a start."""
    config, cls, options = FAMILIES[family]
    torch.manual_seed(0)
    base = cls(config(**{**TINY_SIZES, **options})).to(dtype)
    for name, parameter in base.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(parameter, 0.5)
    return base.requires_grad_(False)


def member(base, options, seed=1):
    """Return a trial's model on a shared base."""
    options = {"target_modules": SEVEN_LINEARS, **options}
    config = peft_config(options.pop("method"), options, "CAUSAL_LM")
    return randomize(get_peft_model(share_base(base), config), seed, scale=0.2).to(base.dtype).train()


def joint_of(base, members):
    """Return a model on the shared base whose linears are the members'."""
    model = share_base(base)
    for name, module in list(model.named_modules()):
        layers = [trial.get_base_model().get_submodule(name) for trial in members]
        if any(hasattr(layer, "base_layer") for layer in layers):
            parent, _, child = name.rpartition(".")
            adapted = [layer if hasattr(layer, "base_layer") else None for layer in layers]
            setattr(model.get_submodule(parent), child, JointLinear(module, adapted))
    return model.train()


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance, name=""):
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= tolerance, f"{name}: {float(difference):.1e}"


def compare(base, members, ids, tolerance, recompute="none", fused_alone=True, **inputs):
    """Fail where a trial's logits or gradients beside others are not those of its own model.

    `ids` are `[n, rows, length]`, and so are the inputs.
    """
    model = joint_of(base, members)
    report = lsr_scale.fuse(model, recompute=recompute)
    assert len(report.fused) == base.config.num_hidden_layers
    given = {name: value.flatten(0, 1) for name, value in inputs.items()}
    embedded = model.get_input_embeddings()(ids.flatten(0, 1)).requires_grad_()
    together = model(inputs_embeds=embedded, use_cache=False, **given).logits
    direction = torch.randn(together.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = direction.to(together.dtype)
    (together * direction).sum().backward()
    found = [gradients_of(trial) for trial in members]
    for index, (trial, rows, wanted) in enumerate(zip(members, ids, direction.chunk(len(members)), strict=True)):
        trial.zero_grad(set_to_none=True)
        if fused_alone:
            lsr_scale.fuse(trial)
        own = {name: value[index] for name, value in inputs.items()}
        x = trial.get_input_embeddings()(rows).requires_grad_()
        alone = trial(inputs_embeds=x, use_cache=False, **own).logits
        (alone * wanted).sum().backward()
        expected = gradients_of(trial)
        assert len(expected) == sum(p.requires_grad for p in trial.parameters())
        assert_same(together.chunk(len(members))[index], alone, tolerance, f"trial {index}")
        assert_same(embedded.grad.chunk(len(members))[index], x.grad, tolerance, f"trial {index}: dX")
        assert found[index].keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[index][name], value, tolerance, f"trial {index}: {name}")


def tokens(trials, rows=2, length=11):
    return torch.randint(1, 96, (trials, rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("trials", [1, 2, 5])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trial_is_as_alone(family, recompute, trials):
    base = base_of(family)
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS[:trials])]
    compare(base, members, tokens(trials), 1e-9, recompute)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_trial_is_as_alone_and_unfused(family):
    base = base_of(family)
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS)]
    # transformers' norms compute in float32 on a float64 model too
    compare(base, members, tokens(5), 1e-4, fused_alone=False)


def test_single_precision_is_as_exact_as_alone():
    ids, found = tokens(5, 3, 7), {}
    for dtype in (torch.float64, torch.float32):
        base = base_of("llama", dtype)
        members = [member(base, options, seed) for seed, options in enumerate(TRIALS)]
        for trial in members:
            lsr_scale.fuse(trial)
        model = joint_of(base, members)
        lsr_scale.fuse(model)
        ways = {"together": lambda: model(input_ids=ids.flatten(0, 1), use_cache=False).logits}  # noqa: B023
        ways["alone"] = lambda: torch.cat([m(input_ids=own).logits for m, own in zip(members, ids, strict=True)])  # noqa: B023
        for way, run in ways.items():
            for trial in members:
                trial.zero_grad(set_to_none=True)
            logits = run()
            logits.square().sum().backward()
            gradients = [p.grad for trial in members for p in trial.parameters() if p.requires_grad]
            found[way, dtype] = [logits.detach(), *gradients]
    for exact, together, alone in zip(
        *(found[key] for key in (("alone", torch.float64), ("together", torch.float32), ("alone", torch.float32))),
        strict=True,
    ):
        errors = [float((value.double() - exact).norm() / exact.norm()) for value in (together, alone)]
        assert errors[0] <= 3 * errors[1] + 1e-6


def test_trials_alike_share_a_stack():
    base = base_of("llama")
    members = [member(base, {**LSR, "alpha": 2.0 + seed}, seed) for seed in range(3)]
    compare(base, members, tokens(3, 1, 13), 1e-9)


@pytest.mark.parametrize("rank", [24, 40])
def test_large_ranks(rank):
    base = base_of("llama")
    members = [member(base, {"method": "lora", "rank": rank - 3 * seed}, seed) for seed in range(2)]
    compare(base, members, tokens(2), 1e-9)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "o_proj"], ["up_proj"]])
def test_a_part_of_the_linears(targets):
    base = base_of("qwen2")
    members = [member(base, {**LSR, "target_modules": targets}, seed) for seed in range(2)]
    compare(base, members, tokens(2), 1e-9)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("cached", [False, True])
def test_quantized_bases(kind, cached):
    base = quantize(tiny_llama(), kind, torch.float32).requires_grad_(False)
    freeze_quantized(base)  # as loading it does
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS[:3])]
    model, ids = joint_of(base, members), tokens(3)
    lsr_scale.fuse(model, cache_weights=cached)
    for _ in range(2):  # what the first pass caches serves the second
        together = model(input_ids=ids.flatten(0, 1), use_cache=False).logits
    caches = [group.matrix for layer in model.model.layers for group in layer.weight_cache.values()]
    assert [matrix is not None for matrix in caches] == [True] * 8 * cached
    for trial, rows, own in zip(members, ids, together.chunk(3), strict=True):
        assert_same(own.detach(), trial(input_ids=rows, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize("lengths", [[(5, 3, 4), (12,)], [(4, 4, 4), (4, 4, 4)], [(1, 11), (7, 5)]])
def test_packed_documents_are_each_trial_s_own(lengths):
    base = base_of("mistral")
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS[:2])]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])[:, None]
    compare(base, members, tokens(2, 1, 12), 1e-9, position_ids=positions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side):
    base = base_of("llama")
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS[:2])]
    mask = torch.ones(2, 2, 11, dtype=torch.long)
    mask[0, 1, -4:] = mask[1, 0, -9:] = 0
    mask = mask if side == "right" else mask.flip(-1)
    compare(base, members, tokens(2), 2e-5, attention_mask=mask, fused_alone=side == "right")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_trial_that_is_not_finite_leaves_the_others_as_they_are(packed, broken):
    base = base_of("llama")
    members = [member(base, options, seed) for seed, options in enumerate([LSR, TRIALS[1], LSR])]
    model, ids = joint_of(base, members), tokens(3, 1, 12)
    lsr_scale.fuse(model)
    inputs = {"position_ids": torch.arange(12).remainder(5).expand(3, 12)} if packed else {}

    def gradients():
        for trial in members:
            trial.zero_grad(set_to_none=True)
        out = model(input_ids=ids.flatten(0, 1), use_cache=False, **inputs).logits
        out.sum().backward()
        return out.detach().chunk(3), [gradients_of(trial) for trial in members]

    expected, wanted = gradients()
    with torch.no_grad():
        for parameter in members[broken].parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    logits, found = gradients()
    assert logits[broken].isnan().all()
    for index in {0, 1, 2} - {broken}:
        assert torch.equal(logits[index], expected[index])
        assert all(torch.equal(found[index][name], value) for name, value in wanted[index].items())


def test_why_layers_of_trials_run_unfused():
    base = base_of("llama")
    members = [member(base, LSR), member(base, {**LSR, "target_modules": ["q_proj"]})]
    model = joint_of(base, members)
    assert not lsr_scale.fuse(model).unfused
    with members[1].disable_adapter():
        (reason,) = set(lsr_scale.fuse(model).unfused.values())
    assert reason == "trial 1: its active adapters are several, or others than at first"
    assert not lsr_scale.fuse(model).unfused
    linear = members[1].get_base_model().model.layers[0].self_attn.q_proj
    linear.adapter_dropout["default"] = nn.Dropout(0.5)
    (reason,) = lsr_scale.fuse(model).unfused.values()
    assert reason == "trial 1: dropout on the adapter's input, and training"
    linear.adapter_dropout["default"] = nn.Identity()
    dense = joint_of(base, [member(base, LSR), member(base, {"method": "krona"})])
    (reason,) = set(lsr_scale.fuse(dense).unfused.values())
    assert reason == "trial 1: krona has no low-rank pair"
    with pytest.raises(UserError, match="compute: fp8 has no form for the adapters of several trials; use bf16"):
        lsr_scale.fuse(model, compute="fp8")


def test_rows_that_are_no_trial_s_are_refused():
    group = JointGroup([nn.Linear(8, 16)], [(torch.ones(2, 3, 8), torch.ones(2, 16, 3))])
    with pytest.raises(ValueError, match="7 rows of 2 trials: every trial must have equally many"):
        group.project(torch.ones(7, 8), group.matrix(torch.float32, torch.device("cpu")))


def test_a_plain_weight_is_read_where_it_is():
    linears = [nn.Linear(8, 16, bias=False), nn.Linear(8, 8, bias=False)]
    pairs = [(torch.ones(2, 3, 8), torch.ones(2, linear.out_features, 3)) for linear in linears]
    cpu, cache = torch.device("cpu"), CachedMatrix()
    one = JointGroup(linears[:1], pairs[:1], cache)
    assert one.matrix(torch.float32, cpu).weight is linears[0].weight
    assert one.cached_bytes(4) == 0
    assert cache.matrix is None
    both = JointGroup(linears, pairs, cache)
    assert torch.equal(both.matrix(torch.float32, cpu).weight, torch.cat([linear.weight for linear in linears]))
    assert both.cached_bytes(4) == LinearGroup(linears, [None, None]).cached_bytes(4) == 24 * 8 * 4
    assert cache.matrix is not None
