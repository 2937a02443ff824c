"""Training with the base's products in 8 bits: its error beside a plain simulation of it, and everything around it."""

import copy
import gc
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.errors import UserError
from lsr_scale.fused import (
    attention_block,
    clear_weight_cache,
    compute_errors,
    eight_bit,
    eight_bit_groups,
    keep_in_bf16,
    reset_underflow_counts,
    underflow_counts,
)
from lsr_scale.fused.cuda_graphs import StepGraphs, static_batch, static_loss
from lsr_scale.fused.layer_state import GROUPS
from lsr_scale.fused.linear_groups import base_layer
from lsr_scale.kernels.fp8 import encode_reference, power_of_two_scale
from lsr_scale.kernels.hadamard import encode_int8_reference, int8_scale, rotate_reference
from lsr_scale.layers.frozen_linear import dequantize
from tests.helpers import recorded_graphs
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, quantize, randomize, tiny_llama

METHODS = {
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 2, "dropout": 0.0},
    "lora": {"rank": 3},
}
# wide enough that the error of a product is an average
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
COMPUTES = ("fp8", "int8")
ALL_GROUPS = [f"{layer}.{name}" for layer in range(2) for name in GROUPS]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Let FP8 run on the CPU, by the kernels' references."""
    monkeypatch.setattr(eight_bit, "fp8_fallback_reason", lambda device: None)


@pytest.fixture
def ids():
    return torch.randint(1, 96, (3, 19), generator=torch.Generator().manual_seed(1))


def adapted(method="lsr", kind=None, rank=None, targets=SEVEN_LINEARS, **sizes):
    base = tiny_llama(torch.bfloat16, **{**SIZES, **sizes})
    base = quantize(base, kind) if kind else base
    values = {"target_modules": targets, **METHODS[method]} | ({"rank": rank} if rank else {})
    return randomize(get_peft_model(base, peft_config(method, values, "CAUSAL_LM")), scale=0.1).train()


def step(model, ids, **inputs):
    """Return loss and gradients of a training step, in float64."""
    model.train().zero_grad()
    loss = model(**{"input_ids": ids, "labels": ids, "use_cache": False, **inputs}).loss
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **gradients}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Simulated(torch.autograd.Function):
    """`x W^T` in 8 bits in both directions, in float64 but for the codes."""

    @staticmethod
    def forward(ctx, x, weight, compute):
        scale = power_of_two_scale(weight.abs().max().view(1))
        in_e4m3 = encode_reference(weight, scale).double() * scale.double()
        ctx.save_for_backward(in_e4m3)
        return in_fp8(x) @ in_e4m3.t() if compute == "fp8" else in_int8(x) @ in_int8(weight).t()

    @staticmethod
    def backward(ctx, grad):
        return in_fp8(grad) @ ctx.saved_tensors[0], None, None


def in_fp8(x):
    """Return values rounded to e4m3, with a scale for each row."""
    rows = x.reshape(-1, x.shape[-1])
    scales = power_of_two_scale(rows.abs().amax(1))
    return (encode_reference(rows, scales).double() * scales.double()[:, None]).view(x.shape)


def in_int8(x):
    """Return rotated values rounded to int8, with a scale for each row."""
    rotated = rotate_reference(x.reshape(-1, x.shape[-1]))
    scales = int8_scale(rotated.abs().amax(1))
    return (encode_int8_reference(rotated, scales).double() * scales.double()[:, None]).view(x.shape)


def simulate(model, compute):
    """Return a copy in float64 whose frozen linears multiply in 8 bits, and one that is exact."""
    copies = []
    for quantized in (True, False):
        wide = copy.deepcopy(model).double()
        for name, module in list(wide.named_modules()):
            if not name.endswith("_proj"):
                continue
            base = base_layer(module)
            weight = dequantize(base_layer(model.get_submodule(name)), torch.bfloat16).double()
            plain = nn.Linear(base.in_features, base.out_features, bias=False, dtype=torch.float64)
            if quantized:
                plain.forward = lambda x, weight=weight: Simulated.apply(x, weight, compute)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if base is module:
                wide.set_submodule(name, plain)
            else:
                module.base_layer = plain
        copies.append(wide)
    return copies


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()])


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute", COMPUTES)
def test_errors_beside_a_simulation(compute, method, kind, ids):
    model = adapted(method, kind)
    simulated, exact = simulate(model, compute)
    expected, allowed = step(exact, ids), step(simulated, ids)
    lsr_scale.fuse(model)
    plain = step(model, ids)
    report = lsr_scale.fuse(model, compute=compute)
    assert report.eight_bit == eight_bit_groups(model) == ALL_GROUPS
    assert "8 of 8 groups of linears compute in 8 bits" in str(report)
    found = step(model, ids)
    assert abs(float(found["loss"] - expected["loss"])) < 0.02
    del found["loss"], allowed["loss"], expected["loss"], plain["loss"]
    errors = [relative(flat(one), flat(expected)) for one in (found, allowed, plain)]
    assert 0.005 < errors[0] < 1.5 * (errors[1] + errors[2]), errors


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "up_proj"], ["gate_proj", "o_proj"], ["down_proj"]])
@pytest.mark.parametrize("compute", COMPUTES)
def test_linears_without_adapters(compute, targets, ids):
    model = adapted("lora", "nf4", targets=targets)
    simulated, exact = simulate(model, compute)
    expected, allowed = step(exact, ids), step(simulated, ids)
    lsr_scale.fuse(model)
    plain = step(model, ids)
    lsr_scale.fuse(model, compute=compute)
    found = step(model, ids)
    errors = [relative(flat(one), flat(expected)) for one in (found, allowed, plain)]
    assert errors[0] < 1.5 * (errors[1] + errors[2]), errors


def test_adapters_of_many_columns(ids):
    model = adapted("lora", "nf4", rank=48)
    lsr_scale.fuse(model)
    plain = step(model, ids)
    lsr_scale.fuse(model, compute="int8", calibrate=True)
    assert relative(step(model, ids)["loss"], plain["loss"]) < 0.01
    assert max(compute_errors(model).values()) < 0.06


def test_it_is_not_bf16(ids):
    model = adapted()
    lsr_scale.fuse(model)
    plain = step(model, ids)
    lsr_scale.fuse(model, compute="fp8")
    found = step(model, ids)
    differences = {name: relative(found[name], value) for name, value in plain.items()}
    assert min(differences[name] for name in differences if name != "loss") > 1e-3
    lsr_scale.fuse(model)
    assert_equal(step(model, ids), plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-single", "int8", None])
@pytest.mark.parametrize("compute", COMPUTES)
def test_recomputed_and_cached_steps_are_the_same(compute, kind, ids):
    model = adapted("lora", kind)
    lsr_scale.fuse(model, compute=compute)
    expected = step(model, ids)
    for recompute in ("mlp", "full"):
        lsr_scale.fuse(model, recompute=recompute, compute=compute)
        assert_equal(step(model, ids), expected)
    lsr_scale.fuse(model, cache_weights=True, compute=compute)
    for _ in range(2):
        assert_equal(step(model, ids), expected)
    layer = next(module for module in model.modules() if getattr(module, "eight_bit", None))
    assert {transposed for state in layer.eight_bit.values() for transposed in state.codes} == {False, True}


def test_an_evaluation_is_in_bfloat16_and_caches_nothing(ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    lsr_scale.fuse(model, compute="fp8", cache_weights=True)
    step(model, ids)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    layers = [module for module in model.modules() if getattr(module, "eight_bit", None)]
    assert all(cache.matrix is None for layer in layers for cache in layer.weight_cache.values())


def test_what_is_cached_is_freed(ids):
    model = adapted(kind="nf4")
    layers = model.get_base_model().model.layers
    lsr_scale.fuse(model, cache_weights=True)
    step(model, ids)
    assert all(cache.matrix is not None for layer in layers for cache in layer.weight_cache.values())
    lsr_scale.fuse(model, compute="fp8", cache_weights=True)
    step(model, ids)
    assert all(cache.matrix is None for layer in layers for cache in layer.weight_cache.values())
    assert all(state.codes for layer in layers for state in layer.eight_bit.values())
    clear_weight_cache(model)
    assert not any(state.codes for layer in layers for state in layer.eight_bit.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_codes_are_freed_before_the_gradient_of_attention(recompute, ids, monkeypatch):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model, recompute=recompute, compute="fp8")
    right, alive = attention_block.attention_backward, []

    def count():
        gc.collect()
        return sum(type(x) is torch.Tensor and x.dtype == torch.float8_e4m3fn for x in gc.get_objects())

    def counted(*arguments):
        alive.append(count())
        return right(*arguments)

    before = count()
    monkeypatch.setattr(attention_block, "attention_backward", counted)
    step(model, ids)
    assert alive == [before, before]


@pytest.mark.parametrize("compute", COMPUTES)
def test_trains_after_a_forward_in_inference_mode(compute, ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model, compute=compute, cache_weights=True)
    expected = step(model, ids)
    lsr_scale.fuse(model, compute=compute, cache_weights=True)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    reset_underflow_counts(model)
    assert_equal(step(model, ids), expected)


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_changed_weight_is_quantized_anew(compute, ids):
    model = adapted("lora")
    lsr_scale.fuse(model, compute=compute, cache_weights=True)
    step(model, ids)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "base_layer"):
                base_layer(module).weight.mul_(3)
    found = step(model, ids)
    lsr_scale.fuse(model, compute=compute)
    assert_equal(found, step(model, ids))


@pytest.mark.parametrize("compute", COMPUTES)
def test_packed_rows(compute, ids):
    model = adapted("lora", "nf4")
    positions = torch.cat([torch.arange(11), torch.arange(26), torch.arange(20)])[None]
    losses = []
    for name in ("bf16", compute):
        lsr_scale.fuse(model, compute=name)
        losses.append(float(step(model, ids.view(1, -1), position_ids=positions)["loss"]))
    assert abs(losses[0] - losses[1]) < 0.02


def check_padded(compute, side, model, longest):
    """Rows of every length up to the longest: errors as large as the recipe's, whatever stands in the padding."""
    device = next(model.parameters()).device
    ids = torch.randint(1, 96, (longest, longest), generator=torch.Generator().manual_seed(2)).to(device)
    places, lengths = torch.arange(longest, device=device), torch.arange(1, longest + 1, device=device)[:, None]
    mask = (places < lengths if side == "right" else places >= longest - lengths).long()
    # a row's first token is predicted by none of its own
    given = {"attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)}
    simulated, exact = simulate(model, compute)
    steps = {"exact": step(exact, ids, **given), "simulated": step(simulated, ids, **given)}
    for name in ("bf16", compute):
        lsr_scale.fuse(model, compute=name)
        steps[name] = step(model, ids, **given)
    again = step(model, torch.where(mask == 0, 1 + ids % 94, ids), **given)
    assert abs(float(again["loss"] - steps[compute]["loss"])) < 1e-3
    losses = {name: float(values.pop("loss")) for name, values in steps.items()}
    assert abs(losses[compute] - losses["bf16"]) < 0.02, losses
    errors = {name: relative(flat(values), flat(steps["exact"])) for name, values in steps.items()}
    assert 0.005 < errors[compute] < 1.5 * (errors["simulated"] + errors["bf16"]), errors
    assert relative(flat({name: again[name] for name in steps[compute]}), flat(steps[compute])) < 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_padded_rows(compute, side):
    check_padded(compute, side, adapted("lora", "nf4"), longest=13)


def test_int8_errs_less(ids):
    model = adapted("lora", "nf4")
    errors = {}
    for compute in COMPUTES:
        lsr_scale.fuse(model, compute=compute, calibrate=True)
        step(model, ids)
        errors[compute] = compute_errors(model)
    for name, error in errors["fp8"].items():  # forward; input gradients are in e4m3 either way
        halved = errors["int8"][name] < error / 2
        assert halved == name.endswith(".output"), (name, errors)


def test_groups_kept_in_bf16(ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model)
    expected = step(model, ids)
    lsr_scale.fuse(model, compute="fp8")
    keep_in_bf16(model, ["1.down", "qkv"])
    some = ["0.o", "0.gate_up", "0.down", "1.o", "1.gate_up"]
    assert eight_bit_groups(model) == some
    with pytest.raises(UserError, match="no group of linears"):
        keep_in_bf16(model, ["o", "none"])
    assert eight_bit_groups(model) == some, "all or none"
    assert relative(step(model, ids)["loss"], expected["loss"]) > 0
    keep_in_bf16(model, ["o", "gate_up", "down"])
    assert not eight_bit_groups(model)
    assert_equal(step(model, ids), expected)
    for name in ("2.down", "down_proj", "x.qkv", ""):
        with pytest.raises(UserError, match="no group of linears"):
            keep_in_bf16(model, [name])


def test_groups_go_to_bf16_between_forward_and_backward(ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model, compute="int8", recompute="full")
    expected = step(model, ids)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    keep_in_bf16(model, GROUPS)
    loss.backward()
    del expected["loss"]
    assert_equal({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_graphs_are_captured_again_for_another_format(ids, monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    model = adapted("lora", "nf4")
    graphs = StepGraphs(model.get_base_model())
    positions = torch.arange(19).repeat(3)[None]
    labels = ids.view(1, -1).masked_fill(positions == 0, -100)
    batch = static_batch(ids.view(1, -1), labels, positions, longest=19)
    # fused a second time, too: what the graph reads is freed then
    for compute, captures in (("fp8", 1), (None, 1), ("int8", 2), (None, 2), ("int8", 3)):
        if compute:
            lsr_scale.fuse(model, compute=compute)
        loss, gradients = graphs.replay(batch, 7.0)
        expected = static_loss(model.get_base_model(), batch) / 7
        assert torch.equal(loss, expected.detach())
        for found, gradient in zip(gradients, torch.autograd.grad(expected, graphs.parameters), strict=True):
            assert torch.equal(found, gradient)
        assert recorded_graphs.RecordedGraph.made == captures


def test_copies_and_pickles_compute_the_same(ids):
    model = adapted()
    lsr_scale.fuse(model, compute="int8", cache_weights=True)
    expected = step(model, ids)
    assert_equal(step(copy.deepcopy(model), ids), expected)
    assert_equal(step(pickle.loads(pickle.dumps(model)), ids), expected)


def test_underflow_is_counted(ids):
    model = adapted()
    lsr_scale.fuse(model, compute="fp8")
    step(model, ids)
    counts = underflow_counts(model)
    # nothing before the first layer is trained
    ways = {f"{name}.{way}" for name in ALL_GROUPS for way in ("input", "gradient")} - {"0.qkv.gradient"}
    assert counts.keys() == ways
    tokens = ids.numel()
    assert counts["0.down.input"][1] == tokens * SIZES["intermediate_size"]
    assert counts["0.down.gradient"][1] == tokens * SIZES["hidden_size"]
    before = int(counts["1.qkv.input"][0])
    reset_underflow_counts(model)
    assert not any(count.any() for count in underflow_counts(model).values())
    with torch.no_grad():
        layer = model.get_base_model().model.layers[1]
        layer.input_layernorm.weight[5] = 1e5  # a massive channel: the others' values are below 2^-14 of it
    step(model, ids)
    after = underflow_counts(model)["1.qkv.input"]
    assert after[1] == tokens * SIZES["hidden_size"]
    assert after[0] > before + 0.5 * after[1]


def test_calibration(ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model, compute="fp8")
    step(model, ids)
    assert compute_errors(model) == {}
    lsr_scale.fuse(model, recompute="full", compute="fp8", calibrate=True)
    step(model, ids)
    errors = compute_errors(model)
    # nothing before the first layer is trained
    names = [f"{name}.{product}" for name in ALL_GROUPS for product in ("output", "gradient")]
    assert list(errors) == [name for name in names if name != "0.qkv.gradient"]
    assert all(0.01 < error < 0.08 for error in errors.values()), errors
    step(model, ids)
    assert compute_errors(model) == {}, "compared once"


def test_calibration_finds_the_group_that_e4m3_does_not_suit(ids):
    model = adapted()
    with torch.no_grad():
        # a massive channel that the weight ignores: what matters underflows
        layer = model.get_base_model().model.layers[1]
        layer.post_attention_layernorm.weight[5] = 3e6
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            base_layer(linear).weight[:, 5] = 0
            for factor in linear.parameters():
                if factor.requires_grad:
                    factor.zero_()
    lsr_scale.fuse(model, compute="fp8", calibrate=True)
    step(model, ids)
    errors = compute_errors(model)
    assert {name for name, error in errors.items() if error > 0.1} == {"1.gate_up.output"}


@pytest.mark.parametrize("compute", COMPUTES)
def test_what_is_not_finite_stays_so(compute, ids):
    model = adapted(kind="nf4")
    lsr_scale.fuse(model, compute=compute)
    model.get_base_model().model.embed_tokens.weight.data[int(ids[0, 3])] = float("inf")
    assert not step(model, ids)["loss"].isfinite()


def test_shapes_that_stay_in_bfloat16(ids):
    for compute, size, unit in (("fp8", 200, 16), ("int8", 208, 64)):
        model = adapted(intermediate_size=size)
        report = lsr_scale.fuse(model, compute=compute)
        assert report.eight_bit == ["0.qkv", "0.o", "0.gate_up", "1.qkv", "1.o", "1.gate_up"]
        assert report.not_eight_bit == {f"{layer}.down": f"{size} inputs, no multiple of {unit}" for layer in range(2)}
        assert f"{size} inputs, no multiple of {unit}" in str(report)
        step(model, ids)


def test_biases(ids):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**{**TINY_SIZES, **SIZES})).to(torch.bfloat16)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    values = {"target_modules": SEVEN_LINEARS, **METHODS["lora"]}
    model = randomize(get_peft_model(base, peft_config("lora", values, "CAUSAL_LM")), scale=0.1)
    lsr_scale.fuse(model)
    expected = step(model, ids)
    lsr_scale.fuse(model, compute="fp8", calibrate=True)
    found = step(model, ids)
    assert abs(float(found["loss"] - expected["loss"])) < 0.02
    assert max(compute_errors(model).values()) < 0.08


def test_unfuse_leaves_nothing(ids):
    model = adapted()
    lsr_scale.fuse(model, compute="fp8")
    lsr_scale.unfuse(model)
    assert not any("eight_bit" in vars(module) for module in model.modules())


def test_refused(monkeypatch):
    with pytest.raises(UserError, match="expected one of bf16, fp8, int8; got 'int4'"):
        lsr_scale.fuse(adapted(), compute="int4")  # pyright: ignore
    with pytest.raises(UserError, match="in float32: load it in bfloat16"):
        lsr_scale.fuse(adapted().float(), compute="fp8")
    plain = get_peft_model(nn.Sequential(nn.Linear(16, 16)), peft_config("lora", {"target_modules": ["0"]}, None))
    with pytest.raises(UserError, match="needs decoder layers that can fuse"):
        lsr_scale.fuse(plain, compute="fp8")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cannot run here: the device is cpu"):
            lsr_scale.fuse(adapted(), compute="fp8")
