"""A model cut up in one process, its parts held aside as `offload_param` does: what two do is in test_sharding.py."""

import pytest
import torch
from conftest import quantize, randomize, tiny_llama
from peft import get_peft_model
from test_adapters_models import ARCHITECTURES, OPTIONS, build, inputs
from torch import nn
from transformers import modeling_utils

from lsr_scale.adapters import peft_config
from lsr_scale.model.sharded import Sharding, gather_as_used, is_sharded, make_whole, whole_numel, whole_shape
from lsr_scale.quantized import freeze_quantized

pytestmark = pytest.mark.filterwarnings("ignore")


def cut(model: nn.Module, **options) -> nn.Module:
    """Cut up a model that is there already, and have it gathered as it is used."""
    sharding = Sharding(offload=True, **options)
    with sharding.loading() as rest:
        rest(model)
    gather_as_used(model, offload=True)  # pyright: ignore
    return model


def adapted(model, targets, method="lsr"):
    model = get_peft_model(model, peft_config(method, {"target_modules": targets, **OPTIONS.get(method, {})}))
    return randomize(model).train()


def loss_and_gradients(model, given):
    torch.manual_seed(1)  # for dropout
    output = model(**given)
    loss = output.loss if getattr(output, "loss", None) is not None else output[0].float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole_bytes(model):
    """Return the bytes of the matrices that were cut, as they stand."""
    return sum(p.data.untyped_storage().nbytes() for p in model.parameters() if hasattr(p, "part"))


def same(one, other):
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys() > set()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_what_it_does_whole(architecture):
    base, targets, _ = build(architecture)
    expected = loss_and_gradients(adapted(base, targets), inputs(base))
    model = adapted(cut(build(architecture)[0]), targets)
    assert is_sharded(model)
    for _ in range(2):
        model.zero_grad()
        same(loss_and_gradients(model, inputs(base)), expected)
        assert whole_bytes(model) == 0, "all is let go of at the end of a backward pass"
    with torch.no_grad():
        base.eval(), model.eval()
        assert torch.equal(model(**inputs(base))[0], base(**inputs(base))[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_layers_that_are_computed_again_are_whole_then(ids, kind, reentrant):
    def model():
        base = tiny_llama(torch.bfloat16, num_hidden_layers=4)
        if kind != "none":
            freeze_quantized(quantize(base, kind))
        return base

    def run(base):
        peft_model = adapted(base, ["q_proj", "down_proj"])
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        return loss_and_gradients(peft_model, {"input_ids": ids, "labels": ids})

    sharded = cut(model())
    same(run(sharded), run(model()))
    assert whole_bytes(sharded) == 0


def test_a_tied_matrix_is_whole_for_the_embedding_and_for_the_head(ids):
    model = cut(tiny_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = tiny_llama(tie_word_embeddings=True)(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    model(input_ids=ids)  # once more, without a backward pass between
    assert model.lm_head.weight.users == 1, "held by the head alone"


def test_matrices_are_cut_and_vectors_are_not(ids):
    model = cut(tiny_llama())
    norm, linear = model.model.norm.weight, model.model.layers[1].mlp.up_proj.weight
    assert not hasattr(norm, "part")
    assert norm.shape == whole_shape(norm) == (48,)
    assert linear.shape == (0,)
    assert whole_shape(linear) == (80, 48)
    assert whole_numel(linear) == 80 * 48
    assert linear.part.nbytes == 4 * 80 * 48
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied"):
        torch.ones(1, 48) @ linear.t()


@pytest.mark.parametrize(
    ("rank", "processes", "expected"),
    [(0, 2, [1, 2, 3, 4, 5]), (1, 2, [6, 7, 8, 9, 0]), (2, 4, [7, 8, 9]), (3, 4, [0, 0, 0])],
)
def test_parts_are_alike_in_size_and_the_last_ones_are_filled_up(monkeypatch, rank, processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", str(rank))
    layer = nn.Linear(3, 3, bias=False)
    layer.weight = nn.Parameter(torch.arange(1, 10, dtype=torch.int8).view(3, 3), requires_grad=False)
    with Sharding().loading() as rest:
        rest(layer)
    assert layer.weight.part.tolist() == expected


def test_what_will_be_trained_is_made_whole_again():
    model, expected = tiny_llama(), tiny_llama()
    with Sharding(offload=True).loading() as rest:
        rest(model)
    make_whole(model.lm_head)
    make_whole(model.model.norm)  # which was never cut
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert not hasattr(model.lm_head.weight, "part")
    assert is_sharded(model)


def test_one_process_that_holds_everything_cuts_nothing():
    warm_up = modeling_utils.caching_allocator_warmup
    with Sharding().loading() as rest:
        layer = nn.Linear(2, 2)
        rest(layer)
        assert modeling_utils.caching_allocator_warmup is warm_up
    assert not is_sharded(layer)
