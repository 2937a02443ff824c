"""Optimizers of pairs step many modules as they would each alone, by operations that do not grow with their number."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lsr_scale import KronLoraConfig, LsrConfig
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.training.optimizers import lora_pro, stacks
from lsr_scale.training.optimizers.lora_pro import LoraPro
from lsr_scale.training.optimizers.lora_rite import LoraRite
from lsr_scale.training.optimizers.sides import _runs
from tests.helpers.tiny_models import randomize

KINDS = [LoraRite, LoraPro]
LINEARS = {"square": (12, 12), "other": (12, 12), "wide": (12, 16), "narrow": (16, 12)}
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=list(LINEARS)),
    "ranks": LoraConfig(r=4, target_modules=list(LINEARS), rank_pattern={"wide": 1, "square": 2}),
    "scalings": LoraConfig(r=2, target_modules=list(LINEARS), alpha_pattern={"wide": 1, "square": 9}),
    "lsr": LsrConfig(rank=4, separation_rank=2, target_modules=list(LINEARS), separation_rank_pattern={"wide": 3}),
    "kron_lora": KronLoraConfig(rank=2, left_in=2, left_out=4, dropout=0.0, target_modules=list(LINEARS)),
}


class Layers(nn.Module):
    """Some layers that are alike, and a first one that is not."""

    def __init__(self, number):
        super().__init__()
        self.first = nn.ModuleDict({"square": nn.Linear(*LINEARS["square"])})
        linears = ({name: nn.Linear(*size) for name, size in LINEARS.items()} for _ in range(number))
        self.layers = nn.ModuleList(nn.ModuleDict(of_layer) for of_layer in linears)


class Model:
    """An adapted model's adapters, whose gradients are functions of their factors."""

    def __init__(self, method, number=3, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = get_peft_model(Layers(number), copy.deepcopy(CONFIGS[method])).to(dtype)
        randomize(self.model)
        self.adapters = [one for module in self.model.modules() for one in active_adapters(module)]
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def backward(self, without=()):
        """Make the gradients of a loss, but for some adapters."""
        self.model.zero_grad()
        for number, adapter in enumerate(self.adapters):
            if number not in without:
                down, up = adapter.method.materialize(adapter.factors())
                target = torch.randn(len(up), down.shape[1], generator=torch.Generator().manual_seed(number))
                (adapter.scaling * up @ down - target.to(up)).square().log1p().sum().backward()


class Alone:
    """An optimizer for each adapter."""

    def __init__(self, kind, adapters, **options):
        self.each = [kind([adapter], **options) for adapter in adapters]

    def step(self):
        for optimizer in self.each:
            optimizer.step()


def both(kind, method, dtype=torch.float64):
    """Return a model and its optimizer, and a second one with an optimizer for each adapter."""
    made = Model(method, dtype=dtype), Model(method, dtype=dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    return made[0], kind(made[0].adapters, **options), made[1], Alone(kind, made[1].adapters, **options)


def step(model, optimizer, without=()):
    model.backward(without)
    optimizer.step()


def assert_close(model, other):
    for mine, theirs in zip(model.trained, other.trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(CONFIGS))
def test_modules_are_stepped_as_each_alone(kind, method):
    model, optimizer, other, alone = both(kind, method)
    for _ in range(4):
        step(model, optimizer)
        step(other, alone)
    assert_close(model, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "lsr"])
def test_so_they_are_in_parts_that_are_not_too_large(kind, method, monkeypatch):
    monkeypatch.setattr(stacks, "MOST_ELEMENTS", 500)
    monkeypatch.setattr(lora_pro, "MOST_ELEMENTS_ON_CPU", 400)
    model, optimizer, other, alone = both(kind, method)
    for without in ((), (3,), ()):
        step(model, optimizer, without)
        step(other, alone, without)
    assert_close(model, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ranks", "lsr"])
def test_modules_without_a_gradient_are_passed_over(kind, method):
    model, optimizer, other, alone = both(kind, method)
    for without in ((0, 5), (), (1, 2, 3), (1, 2, 3), range(len(model.adapters)), (7,)):
        step(model, optimizer, without)
        step(other, alone, without)
    assert_close(model, other)
    # 4 is the first of its kind without a gradient in no step, 1 of one that had some
    steps = [float(optimizer.state[next(iter(model.adapters[number].factors().values()))]["step"]) for number in (4, 1)]
    assert steps == [5, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_never_has_a_gradient_has_no_state(kind):
    model, optimizer, *_ = both(kind, "lora")
    step(model, optimizer, without=(2,))
    assert not optimizer.state[model.adapters[2].factors()["down"]]
    assert len(optimizer.state_dict()["state"]) >= len(model.adapters) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_dropped_begins_anew_alone(kind):
    """As `condition_guard: rescale` drops those of the factors that it writes."""
    model, optimizer, other, alone = both(kind, "lsr")
    for number in range(4):
        step(model, optimizer)
        step(other, alone)
        if number == 1:
            optimizer.state.pop(next(iter(model.adapters[2].factors().values())))
            alone.each[2].state.clear()
    assert_close(model, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_that_of_each_pair_and_loads_into_another(kind):
    """In a checkpoint as ever: by the name of a pair's first factor, of its own shape, in memory of its own."""
    model, optimizer, other, alone = both(kind, "lora")
    for _ in range(2):
        step(model, optimizer)
        step(other, alone)
    names = {"moment", "basis", "second", "escaped"}
    for adapter, of_one in zip(model.adapters, alone.each, strict=True):
        (out, rank), (_, into) = adapter.factors()["up"].shape, adapter.factors()["down"].shape
        state = optimizer.state[adapter.factors()["down"]]
        if kind is LoraPro:
            assert {name: tuple(value.shape) for name, value in state.items()} == {
                "step": (),
                "weight_moment": (out, into),
                "weight_second": (out, into),
            }
        else:
            assert state.keys() == {"step", *(f"{side}_{name}" for side in ("down", "up") for name in names)}
            assert state["down_moment"].shape == state["up_basis"].shape == (into, rank)
            assert state["up_moment"].shape == state["down_basis"].shape == (out, rank)
        (expected,) = of_one.state.values()
        for name, value in state.items():
            # which vectors an eigenvalue's are, and their signs, are nobody's
            if not name.endswith(("basis", "moment", "second")) or kind is LoraPro:
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)
    third = Model("lora")
    with torch.no_grad():
        for mine, theirs in zip(third.trained, other.trained, strict=True):
            mine.copy_(theirs)
    again = kind(third.adapters, lr=1e-2, weight_decay=0.1)
    states = [one.state_dict()["state"][0] for one in alone.each]  # each in its own memory
    saved = again.state_dict()
    saved["state"] = {2 * number: copy.deepcopy(state) for number, state in enumerate(states)}
    again.load_state_dict(saved)
    for _ in range(2):
        step(third, again)
        step(other, alone)
    assert_close(third, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_may_be_given_as_a_vector(kind, accumulate):
    model, optimizer, other, alone = both(kind, "lsr")
    assert optimizer.is_flat
    for _ in range(3):
        model.backward()
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.trained])
        model.model.zero_grad()
        optimizer.give(gradient, model.trained, accumulate)
        if accumulate:
            optimizer.give(gradient, model.trained, accumulate)
            torch._foreach_div_(optimizer.gradients(), 2)
        optimizer.step()
        optimizer.drop()
        step(other, alone)
    assert_close(model, other)


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_that_are_gathered_know_which_modules_have_none(accumulate):
    model, optimizer, other, alone = both(LoraRite, "lora")
    for without in ((2, 3), (), (4,)):
        model.backward(without)
        optimizer.gather()
        if accumulate:  # another batch, in which others have none
            model.backward((2, 3, 4, 5))
            optimizer.gather()
        assert all(parameter.grad is None for parameter in model.trained)
        optimizer.step()
        optimizer.drop()
        other.backward(without)
        if accumulate:
            grads = [parameter.grad for parameter in other.trained]
            other.backward((2, 3, 4, 5))
            for parameter, grad in zip(other.trained, grads, strict=True):
                present = [one for one in (parameter.grad, grad) if one is not None]
                parameter.grad = sum(present) if present else None
        alone.step()
    assert_close(model, other)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_that_are_given_other_memory_are_stepped_there(kind):
    """As by an engine that moves a model; and of several dtypes, which are no one vector."""
    model, optimizer, other, alone = both(kind, "lora")
    for number in range(4):
        step(model, optimizer)
        step(other, alone)
        if number == 0:
            for parameter in model.trained:
                parameter.data = parameter.data.clone()
    assert_close(model, other)
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.trained}) == 1
    model, optimizer, other, alone = both(kind, "lora", torch.float32)
    for made in (model, other):
        for factor in made.adapters[3].factors().values():
            factor.data = factor.data.double()
    for _ in range(3):
        step(model, optimizer)
        step(other, alone)
    assert optimizer.factors_vector() is None
    for mine, theirs in zip(model.trained, other.trained, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


class Counted(TorchDispatchMode):
    """Counts the operations of a step by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "lsr", "kron_lora"])
def test_a_step_is_as_many_operations_for_any_number_of_layers_and_waits_for_none(kind, method):
    numbers = []
    for layers in (3, 7):
        model = Model(method, layers)
        optimizer = kind(model.adapters, lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            model.backward()
            gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.trained])
            model.model.zero_grad()
            optimizer.give(gradient, model.trained)
            with Counted() as counted:
                optimizer.step()
        numbers.append(len(counted.names))
        assert not any("_local_scalar_dense" in name for name in counted.names)
    assert numbers[0] == numbers[1]


def test_what_is_at_equal_distances_is_a_run():
    layers = [(100 * layer + at, 100 * layer + at + 7) for layer in range(5) for at in (0, 20, 57)]
    runs = [[layers[index] for index in run] for run in _runs(layers)]
    assert runs == [[(100 * layer + at, 100 * layer + at + 7) for layer in range(5)] for at in (0, 20, 57)]
    # the first one is nearer to the second than others are
    assert _runs([(0,), (5,), (17,), (29,), (41,)]) == [[0, 1], [2, 3, 4]]
    assert _runs([]) == []
    assert _runs([(3, 9)]) == [[0]]
