"""What fused layers save and cache by the memory there is; cached dequantized weights."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

import lsr_scale
from lsr_scale.fused import FuseReport, clear_weight_cache
from lsr_scale.fused.decoder_layer import DecoderLayerFunction
from lsr_scale.fused.memory import _cost
from lsr_scale.training.callbacks.memory import FitMemoryCallback
from tests.fused.test_patching import SAME, adapted, assert_same, results
from tests.helpers.tiny_models import quantize, tiny_llama


def layers_of(model: Any) -> Any:
    return model.get_base_model().model.layers


def saved_bytes(model, ids, monkeypatch) -> int:
    """Return the bytes that the layers' autograd contexts keep of a forward pass, the pairs left out."""
    total, backward = [], DecoderLayerFunction.backward

    def spy(ctx, *grads):
        total.append(sum(tensor.nbytes for tensor in ctx.saved_tensors[: len(ctx.names)]))
        return backward(ctx, *grads)

    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayerFunction, "backward", staticmethod(spy))
        model(input_ids=ids, labels=ids).loss.backward()
    return sum(total)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_cached_weights_change_no_result(kind, recompute, ids):
    base = tiny_llama()
    model = adapted(base if kind == "none" else quantize(base, kind, torch.float32))
    lsr_scale.fuse(model, recompute)
    expected = results(model, ids)
    lsr_scale.fuse(model, recompute, cache_weights=True)
    for _ in range(2):  # made, then found
        assert_same(results(model, ids), expected, 1e-6)
    cached = [entry.matrix for layer in layers_of(model) for entry in layer.weight_cache.values()]
    assert len(cached) == 8
    assert sum(matrix.nbytes for matrix in cached) == sum(layer.sizes.cached_weights for layer in layers_of(model))
    clear_weight_cache(model)
    assert not any(layer.weight_cache for layer in layers_of(model))
    assert_same(results(model, ids), expected, 1e-6)


def test_cached_weights_follow_the_adapters_and_the_base(ids):
    model = adapted(tiny_llama(torch.float64))
    lsr_scale.fuse(model, cache_weights=True)
    results(model, ids)
    first = layers_of(model)[0].weight_cache["qkv"].matrix
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # an optimizer's step
                parameter.mul_(1.5)
            elif "layers.0.self_attn.q_proj" in name:  # a weight that was loaded
                parameter.add_(0.01)
    found = results(model, ids)
    assert layers_of(model)[0].weight_cache["qkv"].matrix is not first
    with model.disable_adapter():
        bare = results_of_base(model, ids)
    lsr_scale.unfuse(model)
    assert_same(found, results(model, ids), SAME)
    with model.disable_adapter():
        assert_same({"bare": bare}, {"bare": results_of_base(model, ids)}, SAME)


def results_of_base(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_size_of_saved_tensors_is_known_to_the_byte(ids, monkeypatch):
    model = adapted(tiny_llama())
    lsr_scale.fuse(model, "full")
    model(input_ids=ids, labels=ids).loss.backward()
    for recompute in ("none", "mlp", "full"):
        lsr_scale.fuse(model, recompute)
        found = saved_bytes(model, ids, monkeypatch)
        assert found == sum(ids.numel() * layer.sizes.saved_per_token[recompute] for layer in layers_of(model))


def test_layers_climb_by_the_memory_there_is(ids):
    model = adapted(tiny_llama())
    assert isinstance(lsr_scale.fuse(model, "full"), FuseReport)
    assert lsr_scale.fit_memory(model, 1e9, 10) is None  # no step was taken yet
    expected = results(model, ids)
    layer = layers_of(model)[0]
    tokens = 1000
    costs = [_cost(layer, rung, tokens) for rung in range(4)]
    assert costs == sorted(costs)
    steps = [after - before for before, after in itertools.pairwise(costs)]
    budgets = {
        0: ["full", "full"],
        steps[0] * 1.5: ["full", "mlp"],
        steps[0] * 2: ["mlp", "mlp"],
        steps[0] * 2 + steps[1]: ["mlp", "none"],
        2 * (steps[0] + steps[1]) + 0.5 * steps[2]: ["none", "none"],
    }
    for budget, wanted in budgets.items():
        lsr_scale.fuse(model, "full")
        results(model, ids)
        report = lsr_scale.fit_memory(model, budget, tokens)
        assert report
        assert [layer.recompute for layer in layers_of(model)] == wanted
        assert report.extra_bytes <= budget
        assert sum(report.layers.values()) == 2
        assert_same(results(model, ids), expected, 1e-5)
    report = lsr_scale.fit_memory(model, 1e9, tokens)
    assert report
    assert report.layers == {("none", True): 2}
    assert "of 2 decoder layers 2 recompute nothing and cache their weights in float32" in str(report)
    assert all(layer.weight_cache for layer in layers_of(model))
    assert_same(results(model, ids), expected, 1e-5)
    report = lsr_scale.fit_memory(model, 0, tokens)  # and down again
    assert report
    assert report.layers == {("full", False): 2}
    assert not any(layer.weight_cache for layer in layers_of(model))


def test_a_model_without_fused_layers_has_nothing_to_fit(ids):
    model = adapted(tiny_llama())
    results(model, ids)
    assert lsr_scale.fit_memory(model, 1e9, 10) is None


class Gpu:
    """Memory as a GPU would tell it, in bytes: at rest, at the peak of a step, and in all."""

    def __init__(self, rest: int, peak: int, total: int) -> None:
        self.rest, self.peak, self.total, self.emptied = rest, peak, total, 0

    def memory_allocated(self) -> int:
        return self.rest

    def memory_reserved(self) -> int:
        return self.peak

    def max_memory_allocated(self) -> int:
        return self.peak

    def mem_get_info(self) -> tuple[int, int]:
        return self.total - self.peak, self.total

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize(
    ("total", "largest", "levels"),
    [
        (2_000_000, 20, {("full", False): 2}),  # the first step filled it
        (3_000_000, 20, {("none", True): 2}),
        (2_400_000, 200, {("full", False): 2}),  # a larger step would need it
        (20_000_000, 200, {("none", True): 2}),
        (2_400_000, None, {("full", False): 2}),  # unknown
    ],
)
def test_memory_that_the_first_step_left_free_is_used(total, largest, levels, ids):
    model = adapted(tiny_llama())
    lsr_scale.fuse(model, "full")
    said: list[str] = []
    policy = FitMemoryCallback(largest, said.append, Gpu(1_000_000, 2_000_000, total))
    anything: Any = None
    policy.on_train_begin(anything, anything, anything)
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        policy.on_step_end(anything, anything, anything, model=model)
    found = Counter((layer.recompute, bool(layer.weight_cache)) for layer in layers_of(model))
    assert found == levels
    assert len(said) == (largest is not None)
    policy.on_train_end(anything, anything, anything, model=model)
    assert not any(layer.weight_cache for layer in layers_of(model))
