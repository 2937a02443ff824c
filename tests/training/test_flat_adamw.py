"""FlatAdamW is torch's AdamW, bit for bit: its steps, its state, what is skipped, and what is no vector.

But for torch's fused kernel on the CPU: the last elements of a tensor, which fill no vector register, it rounds in
another way than the others, and in one long vector other elements are the last.
"""

import copy
import functools

import pytest
import torch
from torch import nn

from lsr_scale.training.steps.finite_check import SkippingOptimizer
from lsr_scale.training.steps.flat_adamw import FlatAdamW, clip

SHAPES = [(4, 3), (16,), (2, 5, 3), (1,), (8, 8), (7,)]
KINDS = [{"fused": True}, {"foreach": True}, {"foreach": False}, {"fused": True, "amsgrad": True}]


def parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def gradients(step, like):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.device) for p in like]


def pair(device="cpu", groups=1, **options):
    """Return parameters and their FlatAdamW, and the same with torch's AdamW."""
    made = []
    for kind in (FlatAdamW, torch.optim.AdamW):
        of = parameters(device)
        parts = [{"params": of, "weight_decay": 0.1}]
        if groups == 2:
            parts = [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0}]
        made += [of, kind(parts, lr=1e-2, **options)]
    return made


def step(optimizer, of, number, given=False):
    found = gradients(number, of)
    if given:
        optimizer.give(torch.cat([gradient.reshape(-1) for gradient in found]), of)
    else:
        for parameter, gradient in zip(of, found, strict=True):
            parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def assert_equal(of, other, optimizer, reference):
    """Check that two optimizers' parameters and states are equal."""
    rounds = optimizer.param_groups[0]["fused"] and not of[0].is_cuda
    close = functools.partial(torch.testing.assert_close, rtol=2e-6 if rounds else 0, atol=1e-8 if rounds else 0)
    for mine, theirs in zip(of, other, strict=True):
        close(mine, theirs)
        one, two = optimizer.state[mine], reference.state[theirs]
        assert one.keys() == two.keys()
        for name in one:
            close(one[name], two[name])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", KINDS)
def test_steps_are_those_of_adamw(options, groups, given):
    of, flat, other, reference = pair(groups=groups, **options)
    for number in range(4):
        for one in (flat, reference):
            for group in one.param_groups:
                group["lr"] = 1e-2 / (number + 1)
        step(flat, of, number, given)
        step(reference, other, number)
        assert flat.is_flat
    assert_equal(of, other, flat, reference)


def test_a_vector_may_have_the_parameters_in_another_order():
    of, flat, other, reference = pair()
    for number in range(2):
        found = gradients(number, of)
        flat.give(torch.cat([gradient.reshape(-1) for gradient in reversed(found)]), of[::-1])
        flat.step()
        flat.zero_grad()
        step(reference, other, number)
    assert_equal(of, other, flat, reference)


def test_parameters_and_moments_are_views_of_one_vector():
    of, flat, *_ = pair(fused=True)
    step(flat, of, 0)
    total = sum(p.numel() for p in of)
    for tensors in (of, [flat.state[p]["exp_avg"] for p in of], [flat.state[p]["exp_avg_sq"] for p in of]):
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
        assert tensors[0].untyped_storage().nbytes() == 4 * total


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("from_flat", [False, True])
def test_states_are_exchangeable(options, from_flat):
    of, flat, other, reference = pair(**options)
    saved, resumed = (flat, reference) if from_flat else (reference, flat)
    saving, resuming = (of, other) if from_flat else (other, of)
    for number in range(2):
        step(saved, saving, number)
    state = copy.deepcopy(saved.state_dict())  # as a file would be
    with torch.no_grad():
        for mine, theirs in zip(resuming, saving, strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(state)
    step(saved, saving, 2)
    step(resumed, resuming, 2)
    assert flat.is_flat
    assert_equal(of, other, flat, reference)


def test_loading_no_state_begins_anew():
    of, flat, other, reference = pair()
    empty = flat.state_dict()
    step(flat, of, 0)
    flat.load_state_dict(empty)
    with torch.no_grad():
        for mine, theirs in zip(of, other, strict=True):
            mine.copy_(theirs)
    step(flat, of, 1)
    step(reference, other, 1)
    assert_equal(of, other, flat, reference)


@pytest.mark.parametrize("given", [False, True])
def test_a_state_that_is_dropped_begins_anew_alone(given):
    """As `condition_guard: rescale` drops those of the factors that it writes."""
    of, flat, other, reference = pair(fused=True)
    for number in range(4):
        step(flat, of, number, given and flat.is_flat)
        step(reference, other, number)
        if number == 1:
            flat.state.pop(of[2])
            reference.state.pop(other[2])
    assert not flat.is_flat
    assert_equal(of, other, flat, reference)
    resumed = FlatAdamW(parameters(), fused=True)
    resumed.load_state_dict(flat.state_dict())
    assert not resumed.is_flat, "its steps differ"


def test_a_parameter_without_a_gradient_is_left():
    of, flat, other, reference = pair(fused=True)
    for number in range(3):
        for tensors, optimizer in ((of, flat), (other, reference)):
            for parameter, gradient in zip(tensors, gradients(number, tensors), strict=True):
                parameter.grad = gradient
            tensors[0].grad = None if number == 1 else tensors[0].grad
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(of, other, flat, reference)


def test_groups_of_two_dtypes_are_torchs_own():
    of = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = FlatAdamW(of, lr=0.1)
    assert not optimizer.is_flat
    for parameter in of:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(bool((parameter < 1).all()) for parameter in of)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_gradients_accumulate(given, groups):
    of, flat, other, reference = pair(groups=groups)
    for number in range(3):
        found = gradients(number, of)
        static = torch.cat([gradient.reshape(-1) for gradient in found])
        if given:
            flat.give(static, of, accumulate=True)
            static.fill_(torch.nan)  # as the next replay of a graph writes over it
        else:
            for parameter, gradient in zip(of, found, strict=True):
                parameter.grad = gradient
            flat.gather()
            assert all(parameter.grad is None for parameter in of)
        for parameter, gradient in zip(other, found, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    flat.step()
    reference.step()
    assert_equal(of, other, flat, reference)


WHICH = {"first": (0, 2), "second": (1, 3), "none": (), "all": range(len(SHAPES))}


@pytest.mark.parametrize(
    "batches", [("all", "first"), ("first", "all"), ("first", "second"), ("first", "first"), ("none", "first")]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_batches_that_have_no_gradient_of_some_parameters_accumulate(batches, groups):
    """As of experts that no token of a batch took: what the other batches gave is not lost."""
    of, flat, other, reference = pair(groups=groups)
    for round_ in range(2):
        for number, which in enumerate(batches):
            found = gradients(10 * round_ + number, of)
            for place in WHICH[which]:
                for parameter in (of[place], other[place]):
                    gradient = found[place].clone()
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            flat.gather()
        flat.step()
        reference.step()
        flat.zero_grad()
        reference.zero_grad()
    assert_equal(of, other, flat, reference)


def test_gradients_are_those_that_the_parameters_have_at_a_step():
    """Also where they are dropped, or kept, without the optimizer's `zero_grad`, as `model.zero_grad()` does."""
    of, flat, other, reference = pair()
    for number, keeps in enumerate((False, True, False)):
        for tensors, optimizer in ((of, flat), (other, reference)):
            for parameter, gradient in zip(tensors, gradients(number, tensors), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            optimizer.step()
            for parameter in tensors:
                parameter.grad = parameter.grad if keeps else None
    assert_equal(of, other, flat, reference)


@pytest.mark.parametrize("max_norm", [0.5, 100.0, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_norm_is_of_the_whole_gradient(max_norm, groups):
    of, flat, other, _ = pair(groups=groups)
    for parameter, twin, gradient in zip(of, other, gradients(0, of), strict=True):
        parameter.grad, twin.grad = gradient, gradient.clone()
    flat.gather()
    norm = clip(flat.gradients(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(other, max_norm or torch.inf)
    torch.testing.assert_close(norm, expected)
    clipped = torch.cat([gradient.reshape(-1) for gradient in flat.gradients()])
    groups = [other] if groups == 1 else [other[::2], other[1::2]]
    torch.testing.assert_close(clipped, torch.cat([p.grad.reshape(-1) for group in groups for p in group]))


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": False}])
def test_a_step_that_is_skipped_changes_nothing(kind):
    of, flat, other, reference = pair(**kind)
    skipping = SkippingOptimizer(flat), SkippingOptimizer(reference)
    for number, norm in enumerate((1.0, torch.nan, 0.0, 2.0)):
        for one in skipping:
            one.decide(torch.tensor(norm))
        step(flat, of, number, given=True)
        step(reference, other, number)
    assert float(flat.state[of[0]]["step"]) == 2
    assert_equal(of, other, flat, reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"fused": True}, {}])
def test_steps_are_those_of_adamw_on_a_gpu(options):
    of, flat, other, reference = pair("cuda", **options)
    for number in range(4):
        step(flat, of, number, given=True)
        step(reference, other, number)
    assert_equal(of, other, flat, reference)
