"""Truncation and sums of exact pairs, for any sizes and ranks: what LoRA exports and merged adapters are made of."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lsr_scale.adapters.low_rank import truncate
from lsr_scale.exporting.pairs import concatenate, truncated
from tests.helpers.hypothesis_settings import bounded

SIZES = st.integers(1, 12)


def random_pair(into, out, rank, seed, true_rank=None):
    """Return `(down [R, in], up [out, R])` in float64 whose product has at most `true_rank`."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    if true_rank is not None:
        up[:, true_rank:] = 0
    return down, up


@bounded(150)
@given(into=SIZES, out=SIZES, rank=SIZES, true_rank=st.integers(0, 12), wanted=SIZES, seed=st.integers(0, 9))
@example(into=10, out=2, rank=5, true_rank=5, wanted=4, seed=0)  # wider than the matrix, as sums of adapters are
@example(into=2, out=10, rank=5, true_rank=5, wanted=4, seed=0)
@example(into=4, out=4, rank=3, true_rank=0, wanted=2, seed=0)
def test_truncation_is_the_best_of_its_rank_and_tells_its_error(into, out, rank, true_rank, wanted, seed):
    down, up = random_pair(into, out, rank, seed, true_rank)
    small_down, small_up, error = truncate(down, up, wanted)
    assert small_down.shape[0] == small_up.shape[1] <= min(wanted, rank)
    assert (small_down.shape[1], small_up.shape[0]) == (into, out)
    whole = up @ down
    values = torch.linalg.svdvals(whole)
    lost = float(values[wanted:].norm())
    size = float(values.norm())
    assert float((small_up @ small_down - whole).norm()) == pytest.approx(lost, abs=1e-9 * max(size, 1))
    assert error == pytest.approx(lost / size if size else 0.0, abs=1e-9)
    if wanted >= true_rank:
        assert error < 1e-12, "exact where the rank is that of the product"


@st.composite
def adapters(draw):
    """Draw adapters of one base: ranks by module, where a module may lack."""
    shapes = draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3))
    number = draw(st.integers(1, 4))
    ranks = [[draw(st.none() | st.integers(1, 8)) for _ in shapes] for _ in range(number)]
    weights = draw(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=number, max_size=number))
    return shapes, ranks, weights


@bounded(80)
@given(drawn=adapters(), wanted=st.none() | SIZES)
@example(drawn=([(3, 4)], [[3], [3], [3]], [1.0, 1.0, 1.0]), wanted=6)
def test_a_merged_adapter_is_the_weighted_sum_whatever_ranks_its_parts_have(drawn, wanted):
    shapes, ranks, weights = drawn
    sums = {f"layer{place}": torch.zeros(out, into, dtype=torch.float64) for place, (into, out) in enumerate(shapes)}
    sources = []
    for seed, (own, weight) in enumerate(zip(ranks, weights, strict=True)):
        pairs = {}
        for place, ((into, out), rank) in enumerate(zip(shapes, own, strict=True)):
            if rank is not None:
                name = f"layer{place}"
                pairs[name] = random_pair(into, out, rank, 10 * seed + place)
                sums[name] += weight * (pairs[name][1] @ pairs[name][0])
        sources.append(SimpleNamespace(folder=str(seed), extra={}, modules=list(pairs), pair=pairs.__getitem__))
    merged = concatenate(sources, weights)
    expected = {f"layer{place}" for own in ranks for place, rank in enumerate(own) if rank is not None}
    assert merged.keys() == expected
    for name, (down, up) in merged.items():
        torch.testing.assert_close(up @ down, sums[name], rtol=1e-10, atol=1e-10)
    kept, errors = truncated(merged, wanted)
    for name, (down, up) in kept.items():
        lost = float((up @ down - sums[name]).norm())
        assert lost == pytest.approx(errors.get(name, 0.0) * float(sums[name].norm()), abs=1e-9)
        assert wanted is None or down.shape[0] <= wanted
