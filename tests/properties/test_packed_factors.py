"""Factors in 8 and 4 bits, and a batch whose samples use different adapters: nothing is lost, swapped or repeated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lsr_scale.adapters import METHODS, AdapterLinear, peft_config
from lsr_scale.adapters.packing import GROUP_SIZE, dequantize_groups, pack, quantize_groups, unpack
from lsr_scale.adapters.peft.per_sample import BASE_MODEL, ModelAdapters
from tests.helpers.hypothesis_settings import bounded

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
MAGNITUDES = st.sampled_from([1e-30, 1e-8, 1e-4, 1.0, 1e4])  # float16 has 1e-7 to 65504


def random_values(shape, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    return magnitude * torch.randn(shape, generator=generator)


@bounded(100)
@given(
    count=st.integers(1, 300), bits=st.sampled_from([8, 4]), magnitude=st.sampled_from([1.0, 1e4]), zero=st.booleans()
)
def test_a_value_is_within_half_a_step_of_its_groups_scale(count, bits, magnitude, zero):
    values = random_values((count,), magnitude, count)
    if zero:
        values[: GROUP_SIZE[bits]] = 0
    codes, scales = quantize_groups(values, bits)
    assert codes.numel() == (count if bits == 8 else -(-count // 2))
    assert scales.numel() == -(-count // GROUP_SIZE[bits])
    actual = dequantize_groups(codes, scales, bits, count)
    largest = 127 if bits == 8 else 7
    for group, (before, after) in enumerate(
        zip(values.split(GROUP_SIZE[bits]), actual.split(GROUP_SIZE[bits]), strict=True)
    ):
        step = float(before.abs().max()) / largest
        most = step / 2 + largest * max(step / 2**11, 2**-25)  # the scale is rounded to float16
        error = before - after
        if bits == 8:
            assert float(error.abs().max()) <= 1.001 * most, group
        # clipping is chosen only where it lessens the sum of squares, and unclipped every error is half a step at most
        assert float(error.square().sum()) <= len(before) * 1.001 * most**2, group
    if float(scales.float().where(scales > 0, 1.0).min()) >= 2**-14:
        again = quantize_groups(actual, bits)
        assert torch.equal(dequantize_groups(*again, bits, count), actual), "what was rounded once stays"


@bounded(60)
@given(data=st.data(), bits=st.sampled_from([8, 4]), magnitude=MAGNITUDES)
def test_packing_keeps_every_factor_of_every_module_by_its_name(data, bits, magnitude):
    number = data.draw(st.integers(1, 5))
    names = [f"model.layers.{place}.proj" for place in range(number)]
    kinds = data.draw(st.dictionaries(st.sampled_from(["x_left", "x_right", "x_weight"]), SHAPES, min_size=1))
    modules = {}
    for place, name in enumerate(names):
        factors = data.draw(st.sets(st.sampled_from(sorted(kinds)), min_size=1))
        taller = data.draw(st.booleans())  # one factor has several shapes in one model
        shapes = {kind: (kinds[kind][0] + taller, *kinds[kind][1:]) for kind in sorted(factors)}
        modules[name] = {
            kind: random_values(shape, magnitude, 7 * place + index)
            for index, (kind, shape) in enumerate(shapes.items())
        }
    peaks: dict[tuple, float] = {}
    for factors in modules.values():
        for kind, value in factors.items():
            key = kind, value.shape
            peaks[key] = max(peaks.get(key, 0.0), float(value.abs().max()))
    actual = unpack(pack(modules, bits))
    assert actual.keys() == {f"base_model.model.{name}.{kind}" for name, factors in modules.items() for kind in factors}
    for name, factors in modules.items():
        for kind, value in factors.items():
            got = actual[f"base_model.model.{name}.{kind}"]
            assert (got.shape, got.dtype) == (value.shape, torch.float32)
            # half a step of the largest in a stack; in 4 bits what is clipped loses a quarter and a bit
            share = 2**-11 if math.prod(value.shape) < 16 else 0.57 / 127 if bits == 8 else 0.3
            assert float((got - value).abs().max()) <= share * peaks[kind, value.shape]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.is_low_rank()])
@bounded(40)
@given(data=st.data())
def test_each_sample_of_a_batch_uses_its_adapter_and_no_other(name, data):
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))
    layer = AdapterLinear(nn.Linear(16, 12), METHODS[name])
    for number, rank in enumerate(ranks):
        values = {"lsr": {"separation_rank": 2}, "kron_lora": {"left_out": 2}, "kadaptation": {"phm_dim": 2}}
        layer.update_layer(f"adapter{number}", peft_config(name, {"rank": rank, **values.get(name, {})}))
    layer.eval()  # without dropout
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    known = [BASE_MODEL, *(f"adapter{number}" for number in range(len(ranks)))]
    names = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=5))
    expand_size = data.draw(st.integers(1, 3))
    repeated = [adapter_name for adapter_name in names for _ in range(data.draw(st.sampled_from([1, expand_size])))]
    if len(repeated) not in (len(names), expand_size * len(names)):
        repeated = names
    x = torch.randn(len(repeated), 3, 16, generator=generator)
    with torch.no_grad():
        expected = []
        for adapter_name, given_x in zip(repeated, x, strict=True):
            layer.per_sample = None
            layer.set_adapter([] if adapter_name == BASE_MODEL else [adapter_name])
            expected.append(layer(given_x) if adapter_name != BASE_MODEL else layer.base_layer(given_x))
        layer.per_sample = ModelAdapters(names, expand_size)
        actual = layer(x)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-4)
