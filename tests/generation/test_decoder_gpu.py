"""Decoding steps as CUDA graphs: the tokens of the same steps launched one kernel at a time, and of `generate`."""

import copy
from typing import Any

import pytest
import torch

from lsr_scale import AdapterBank, Decoder
from lsr_scale.generation import attention, fused_step
from tests.generation.test_decoder import NAMES, adapted, prompts
from tests.helpers.tiny_models import quantize, randomize, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
BIG: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
)


def on_gpu(model: Any) -> Any:
    return model.cuda()


def batch_of(*arguments, **options):
    return {name: tensor.cuda() for name, tensor in prompts(*arguments, **options).items()}


def check(model: Any, decoder: Decoder, batch: Any, exact=True, **options: Any) -> torch.Tensor:
    """Fail unless the graph's tokens are those of eager steps, and with `exact` of `generate`."""
    options = {"max_new_tokens": 40, "eos_token_id": [], "pad_token_id": 0, **options}
    expected = Decoder(model, graphs=False).generate(**batch, **options)
    actual = decoder.generate(**batch, **options)
    assert all(step._graph is not None for step in decoder.steps.values())
    assert torch.equal(actual, expected)
    if exact:
        names = {key: value for key, value in options.items() if key == "adapter_names"}
        ends = options["eos_token_id"] or None
        same = model.generate(**batch, max_new_tokens=40, do_sample=False, eos_token_id=ends, pad_token_id=0, **names)
        assert torch.equal(actual, same)
    return actual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_and_rows_that_end(dtype):
    model = on_gpu(tiny_llama(dtype, **BIG)).eval()
    decoder, exact = Decoder(model), dtype == torch.float32
    for length in (8, 7, 9):
        batch = batch_of(length=length)
        free = check(model, decoder, batch, exact)
        check(model, decoder, batch, exact, eos_token_id=sorted({int(free[row, length + 3 * row]) for row in range(3)}))
    assert len(decoder.steps) == 1
    check(model, decoder, batch_of(), False, temperature=0.9, top_p=0.9, seed=3)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["lsr", "kron_lora", "lora"])
def test_an_adapter_that_changes(kind, method):
    base: Any = on_gpu(tiny_llama(**BIG))
    if kind != "none":
        quantize(base, kind, torch.float32)
    model = adapted(base, method)
    decoder, batch = Decoder(model), batch_of()
    first = check(model, decoder, batch)
    randomize(model, seed=7)  # in place: the graph stays, and reads the new values
    graph = next(iter(decoder.steps.values()))._graph
    assert not torch.equal(check(model, decoder, batch), first)
    assert next(iter(decoder.steps.values()))._graph is graph
    with model.disable_adapter():
        check(model, decoder, batch)
    check(model, decoder, batch)


@pytest.mark.parametrize("place", [attention, fused_step])
def test_attention_is_the_kernels(place, monkeypatch):
    calls = []
    one = place.decode_attention
    monkeypatch.setattr(place, "decode_attention", lambda *given: calls.append(1) or one(*given))
    model: Any = on_gpu(tiny_llama(torch.bfloat16, **BIG)).eval()
    if place is attention:  # hooks, which the fused step would pass by
        model.model.layers[0].register_forward_hook(lambda *_: None)
    Decoder(model).generate(**batch_of(rows=2), max_new_tokens=5, eos_token_id=[])
    assert len(calls) == 2 * BIG["num_hidden_layers"]  # in the warm-up and the capture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lsr", "kron_lora"])
def test_a_bank_whose_adapters_come_and_go(method, dtype, tmp_path):
    base = tiny_llama(**BIG)
    for seed, name in enumerate(NAMES):
        adapted(copy.deepcopy(base), method, seed, alpha=3.0 + seed).save_pretrained(tmp_path / name)
    model = adapted(on_gpu(base.to(dtype)), method)
    bank = AdapterBank(model, tmp_path, 0.1)
    bank.close()
    bank = AdapterBank(model, tmp_path, 2.5 * bank.adapter_bytes / 2**30)
    decoder, batch, graphs = Decoder(model), batch_of(), set()
    for names in (["anna", "ben", "__base__"], ["cleo", "cleo", "anna"], ["__base__"] * 3, ["ben", "cleo", "ben"]):
        check(model, decoder, batch, dtype == torch.float32, adapter_names=names)
        graphs.add(id(next(iter(decoder.steps.values()))._graph))
    assert len(graphs) == 1  # which adapter a row has is not in it
    assert bank.evictions > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_that_is_not_on_the_current_gpu():
    model: Any = tiny_llama(**BIG).eval()
    model.to("cuda:1")
    batch = {name: tensor.to("cuda:1") for name, tensor in prompts().items()}
    assert torch.cuda.current_device() == 0
    check(model, Decoder(model), batch)
