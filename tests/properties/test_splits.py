"""Whatever sizes and options a method takes: its pair is its definition, its count the closed form, its merge exact.

And what it does not take is refused in the words that say why, with advice that holds.
"""

import dataclasses
import math
import re
import types
import typing
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, SAVED_METHODS, AdapterLinear, options, peft_config
from lsr_scale.adapters.factorize import balanced_split, divisor_for_block, divisors
from tests.helpers.hypothesis_settings import bounded

SIZES = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12, 13, 15, 16, 24, 30, 36])
WITHOUT_SIZE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
pytestmark = pytest.mark.filterwarnings("ignore:.*more than its dense form.*")


@st.composite
def layers(draw, method):
    """Draw `(in_features, out_features, options)`; most integers divide one of the sizes, some are anything."""
    sizes = draw(SIZES), draw(SIZES)
    integers = st.sampled_from(sorted({*divisors(sizes[0]), *divisors(sizes[1])})) | st.integers(0, 13)
    if method == "lsr":  # too many terms are refused too
        integers |= st.integers(50, 400)
    values = {}
    for field in dataclasses.fields(options(method)):
        if field.name in WITHOUT_SIZE or field.name.endswith("_pattern") or field.name == "dropout":
            continue
        if draw(st.booleans()):
            values[field.name] = draw(of_type(field.type, integers))
    return (*sizes, values)


def of_type(kind, integers):
    """Return what an option of a type may be."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return st.one_of([of_type(part, integers) for part in typing.get_args(kind)])
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    known = {int: integers, bool: st.booleans(), types.NoneType: st.none()}
    return known[kind] if kind is not float else st.floats(0.25, 64)


def configured(method, values):
    """Return a method's configuration and what is left of the options: those that it refuses by name are left out."""
    values = dict(values)
    while True:
        try:
            return peft_config(method, values), values
        except UserError as error:
            del values[str(error).partition(":")[0]]  # a refusal names an option that was given


def is_prime(number):
    return number > 1 and all(number % smaller for smaller in range(2, number))


def lsr_reasons(into, out, config):
    if config.rank > min(into, out):
        yield f"rank={config.rank} is larger than the smaller dimension of the layer, {into} -> {out};"
    for size, left, dimension, name in (
        (into, config.left_in, "in_features", "left_in"),
        (out, config.left_out, "out_features", "left_out"),
    ):
        if left is None and is_prime(size):
            yield f"{dimension}={size} has no useful split into two factors; "
        elif left is not None and (left < 1 or size % left):
            yield f"{name}={left} must divide {dimension}={size}; one of {divisors(size)} does"
    if config.left_rank is not None and (config.left_rank < 1 or config.rank % config.left_rank):
        yield f"left_rank={config.left_rank} must divide rank={config.rank}; one of {divisors(config.rank)} does"


def lsr_sides(into, out, config):
    """Yield the parameters of one term of either side, and of the dense matrix that the side stands for."""
    for size, left in ((into, config.left_in), (out, config.left_out)):
        large, small = (left, size // left) if left else balanced_split(size)
        if config.left_rank:
            ranks = config.left_rank, config.rank // config.left_rank
        else:  # the larger dimension takes the smaller share
            ranks = sorted(balanced_split(config.rank), reverse=large < small)
        yield large * ranks[0] + small * ranks[1], size * config.rank


def lsr_count(into, out, config):
    terms = config.separation_rank
    return terms * sum(term for term, _ in lsr_sides(into, out, config)) + 2 * terms * config.term_weights


def lsr_too_large(into, out, config):
    for side, (term, dense) in zip(("down", "up"), lsr_sides(into, out, config), strict=True):
        if config.separation_rank * term > 16 * dense:
            yield f"separation_rank={config.separation_rank} gives the {side} side {config.separation_rank * term:,} "


def must_divide(left, size, name, dimension):
    if left < 1 or size % left:
        yield f"{name}={left} must divide {dimension}={size}; set {name}_pattern: {{<module>: n}} with n one of "


def kron_lora_lefts(out, config):
    return config.left_in, divisor_for_block(out, 200) if config.left_out == "auto" else config.left_out


def kron_lora_reasons(into, out, config):
    left_in, left_out = kron_lora_lefts(out, config)
    yield from must_divide(left_in, into, "left_in", "in_features")
    yield from must_divide(left_out, out, "left_out", "out_features")


def kron_lora_too_large(into, out, config):
    left_in, left_out = kron_lora_lefts(out, config)
    if config.rank > min(into // left_in, out // left_out):
        yield f"rank={config.rank} is larger than the smaller dimension of the right factor, {into // left_in} -> "


def kron_lora_count(into, out, config):
    left_in, left_out = kron_lora_lefts(out, config)
    return left_in * left_out + config.rank * (into // left_in + out // left_out)


def krona_reasons(into, out, config):
    for left, size, side in ((config.left_in, into, "in"), (config.left_out, out, "out")):
        if left is not None:
            yield from must_divide(left, size, f"left_{side}", f"{side}_features")


def krona_count(into, out, config):
    pairs = ((config.left_in, into), (config.left_out, out))
    left_in, left_out = (left or balanced_split(size)[1] for left, size in pairs)
    return left_in * left_out + into // left_in * (out // left_out)


def kadaptation_reasons(into, out, config):
    for size, dimension in ((into, "in_features"), (out, "out_features")):
        yield from must_divide(config.phm_dim, size, "phm_dim", dimension)


def kadaptation_too_large(into, out, config):
    right = into // config.phm_dim, out // config.phm_dim
    if config.rank > min(right):
        yield f"rank={config.rank} is larger than the smaller dimension of the right factors, {right[0]} -> {right[1]};"


def rank_too_large(into, out, config):
    if config.rank > min(into, out):
        yield f"rank={config.rank} is larger than the smaller dimension of the layer, {into} -> {out};"


def slora_count(into, out, config):
    return config.rank**2 + (config.rank * (into + out) if config.train == "all" else 0)


def nothing(into, out, config):
    return []


# by method: what is refused before sizes are known to divide, what is refused after, and how many parameters there are
RULES = {
    "lsr": (lsr_reasons, lsr_too_large, lsr_count),
    "kron_lora": (kron_lora_reasons, kron_lora_too_large, kron_lora_count),
    "krona": (krona_reasons, nothing, krona_count),
    "kadaptation": (
        kadaptation_reasons,
        kadaptation_too_large,
        lambda into, out, config: 2 * config.phm_dim**2 + config.rank * (into + out),
    ),
    "lora_xs": (nothing, rank_too_large, lambda into, out, config: config.rank**2),
    "slora": (nothing, rank_too_large, slora_count),
}


def test_every_method_has_its_rules_here():
    assert RULES.keys() == METHODS.keys()


def random_factors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", METHODS)
@bounded(150)
@given(data=st.data())
def test_sizes_are_taken_or_refused_with_the_reason(name, data):
    into, out, drawn = data.draw(layers(name))
    config, values = configured(name, drawn)
    refuses, refuses_sizes, count = RULES[name]
    reasons = list(refuses(into, out, config)) or list(refuses_sizes(into, out, config))
    shapes, error = shapes_or_refusal(name, into, out, config)
    if reasons or error:
        assert any(reason in error for reason in reasons), f"{error!r}; expected {reasons}"
        follow(error, name, into, out, values)
        return
    assert sum(map(math.prod, shapes.values())) == count(into, out, config)
    factors = random_factors(shapes | METHODS[name].frozen_shapes(into, out, config))
    delta = METHODS[name].delta_weight(factors)
    assert delta.shape == (out, into)
    if METHODS[name].is_low_rank():
        down, up = METHODS[name].materialize(factors)
        assert (up.shape[0], down.shape[1], up.shape[1]) == (out, into, down.shape[0])
        torch.testing.assert_close(up @ down, delta, rtol=1e-10, atol=1e-10)


def shapes_or_refusal(name, into, out, config):
    """Return a layer's factors, or none and what it is refused with."""
    try:
        return METHODS[name].parameter_shapes(into, out, config), ""
    except UserError as error:
        return {}, str(error)


def follow(error, name, into, out, values):
    """Do what a refusal says, in each of its ways; after it the layer is taken, or refused for another reason."""
    option, ways = advice(error)
    for way in ways:
        _, other = shapes_or_refusal(name, into, out, configured(name, {**values, option: way})[0])
        if other:
            assert advice(other)[0] != option or other.partition(" ")[2] != error.partition(" ")[2], other


def taken(name, into, out, values):
    """Return a configuration that the layer takes: refusals are followed until there is none."""
    for _ in range(6):
        config, values = configured(name, values)
        _, error = shapes_or_refusal(name, into, out, config)
        if not error:
            return config
        option, ways = advice(error)
        values[option] = ways[-1]
    raise AssertionError(f"{name} {into} -> {out} is refused whatever is done: {values}")


def advice(error):
    """Return the option that a refusal names, and the values that it says do."""
    if found := re.match(r"(\w+)=-?\d+ must divide .* one of \[(.*)\]", error):
        return found[1], [int(number) for number in found[2].split(",")]
    if found := re.match(r"rank=\d+ is larger than the smaller dimension of [\w ]+, (\d+) -> (\d+); lower rank", error):
        return "rank", [min(int(found[1]), int(found[2]))]
    if found := re.match(r"separation_rank=.*; lower separation_rank to at most (\d+), better to (\d+) or less", error):
        return "separation_rank", [int(found[1]), int(found[2])]
    found = re.search(r"accept the trivial one with (\w+)_pattern: \{<module>: 1\}", error)
    assert found, f"{error}: gives no advice"
    return found[1], [1]


@pytest.mark.parametrize("name", METHODS)
@bounded(60)
@given(data=st.data(), transposed=st.booleans())
def test_a_layer_computes_merges_and_unmerges_the_scaled_definition(name, data, transposed):
    into, out, drawn = data.draw(layers(name))
    config = taken(name, into, out, drawn)
    torch.manual_seed(0)
    base = Conv1D(out, into) if transposed else nn.Linear(into, out)
    layer = AdapterLinear(base.double(), METHODS[name])
    layer.update_layer("default", config)
    layer.eval()  # without dropout
    factors = layer.factors("default")
    with torch.no_grad():
        for parameter, value in zip(factors.values(), random_factors(layer_shapes(factors)).values(), strict=True):
            parameter.copy_(value)
    x = torch.randn(3, into, dtype=torch.float64)
    before = base.weight.detach().clone()
    scaling = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
    update = scaling * METHODS[name].delta_weight(factors).detach()
    expected = base(x) + x @ update.T
    close = {"rtol": 1e-9, "atol": 1e-9 * float(update.abs().max())}
    torch.testing.assert_close(layer(x), expected, **close)
    layer.merge()
    torch.testing.assert_close(base.weight.detach(), before + (update.T if transposed else update), **close)
    torch.testing.assert_close(layer(x), expected, **close)
    layer.unmerge()
    torch.testing.assert_close(base.weight.detach(), before, **close)


def layer_shapes(factors):
    return {name: value.shape for name, value in factors.items()}


@bounded(60)
@given(data=st.data())
def test_pefts_lokr_is_read_as_its_definition_whatever_it_factors(data):
    into, out, drawn = data.draw(layers("lokr"))
    config, _ = configured("lokr", drawn)
    method = SAVED_METHODS["lokr"]
    factors = random_factors(method.parameter_shapes(into, out, config))
    down, up = method.materialize(factors)
    delta = method.delta_weight(factors)
    assert delta.shape == (out, into)
    torch.testing.assert_close(up @ down, delta, rtol=1e-10, atol=1e-10)
