"""What PEFT's users do with LoRA, done with our methods: the behaviours of its own tests, and the right values."""

import copy
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import lsr_scale
from lsr_scale import AdapterBank, UserError, hotswap_adapter
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.adapters.peft import AdapterLinear
from lsr_scale.adapters.peft.per_sample import ModelAdapters
from tests.helpers.tiny_models import randomize, tiny_llama

LOW_RANK = [name for name, method in sorted(METHODS.items()) if method.is_low_rank()]
OPTIONS = {
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 2, "dropout": 0.0},
    "krona": {},
    "kadaptation": {"rank": 2, "phm_dim": 4},
    "lora_xs": {"rank": 4, "alpha": 160.0},
    "slora": {"rank": 4, "init": "nystrom"},
}


def config_of(method="lsr", targets=("q_proj", "down_proj"), **more):
    options = {"target_modules": list(targets) if isinstance(targets, tuple) else targets, **OPTIONS[method], **more}
    return peft_config(method, options, "CAUSAL_LM")


def two(base, method="lsr", one=None, other=None):
    """Return a model with the random adapters `anna` and `ben`."""
    model = adapt(base, one or config_of(method), adapter_name="anna")
    model.add_adapter("ben", other or config_of(method))
    return randomize(model, seed=3, scale=0.3).eval()


@torch.no_grad()
def alone(model, name, **inputs):
    """Return the logits under one adapter, or the base's."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


def adapt(base, config, **options) -> Any:
    return get_peft_model(base, config, **options)


def load(base, folder, **options) -> Any:
    return PeftModel.from_pretrained(base, folder, **options)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- dtypes


@pytest.mark.parametrize("method", sorted(METHODS))
def test_factors_are_held_as_autocast_adapter_dtype_says(method, tmp_path, ids):
    def dtypes(model):
        layers = [layer for layer in model.modules() if isinstance(layer, AdapterLinear)]
        named = [pair for layer in layers for pair in layer.factors("default").items()]
        return {factor.dtype for name, factor in named if name not in METHODS[method].frozen_names}

    base = tiny_llama().bfloat16()
    wide = adapt(copy.deepcopy(base), config_of(method))
    narrow = adapt(copy.deepcopy(base), config_of(method), autocast_adapter_dtype=False)
    assert dtypes(wide) == {torch.float32}
    assert dtypes(narrow) == {torch.bfloat16}
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    trainable = [name for name, p in narrow.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in wide.named_parameters() if p.requires_grad]
    randomize(narrow, seed=1).eval()
    narrow.save_pretrained(tmp_path)
    again = load(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
    assert dtypes(again) == {torch.bfloat16}
    as_float32 = load(copy.deepcopy(base), tmp_path).eval()
    assert dtypes(as_float32) == {torch.float32}
    with torch.no_grad():  # materialized in float32 in any case, so that the same values give the same bits
        assert torch.equal(again(input_ids=ids).logits, as_float32(input_ids=ids).logits)
    narrow.train()(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in narrow.parameters())


# ---- an adapter for each sample


@torch.no_grad()
@pytest.mark.parametrize("method", LOW_RANK)
def test_samples_differ_in_modules_to_save(method, ids):
    inputs = torch.cat([ids, ids])
    one, other = config_of(method, modules_to_save=["lm_head", "embed_tokens"]), config_of(method)
    model = two(tiny_llama(), method, one, other)
    names = ["anna", "ben", "__base__", "anna"]
    for active in ("anna", "ben"):
        model.set_adapter(active)
        actual = model(input_ids=inputs, adapter_names=names).logits
        assert not any("forward" in vars(module) for module in model.modules())
        model.set_adapter("anna")
        for index, name in enumerate(names):
            sample = inputs[index : index + 1]
            expected = alone(model, "anna", input_ids=sample) if name == "anna" else None
            if name == "__base__":
                expected = alone(model, name, input_ids=sample)
            if expected is not None:
                close(actual[index : index + 1], expected)


@torch.no_grad()
def test_samples_do_not_differ_in_a_norm_of_modules_to_save(ids):
    model = two(tiny_llama(), "lsr", config_of(modules_to_save=["norm"]))
    with pytest.raises(UserError, match=r"modules_to_save has a LlamaRMSNorm, but samples can differ in Linear, "):
        model(input_ids=ids, adapter_names=["anna", "ben"])


def encoder_decoder(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            dropout_rate=0.0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).eval(), ("q", "v", "wo")
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval(), ("q_proj", "v_proj", "fc1")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    ("options", "default"),
    [({"num_beams": 3}, {}), ({}, {"num_beams": 2}), ({"num_beams": 4, "num_return_sequences": 2}, {}), ({}, {})],
)
def test_an_encoder_runs_each_sample_once_and_the_decoder_each_beam(kind, options, default):
    base, targets = encoder_decoder(kind)
    for name, value in default.items():
        setattr(base.generation_config, name, value)
    model = two(base, "lsr", config_of(targets=targets), config_of(targets=targets))
    inputs = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    names = ["anna", "__base__", "ben", "anna"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    actual = model.generate(input_ids=inputs, adapter_names=names, **options).view(4, -1, 6)
    for index, name in enumerate(names):
        sample = inputs[index : index + 1]
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=sample, **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=sample, **options)
        assert torch.equal(actual[index], expected)


@torch.no_grad()
def test_samples_without_adapter_make_no_tensor_anywhere(ids):
    model = two(tiny_llama(), "lsr", config_of(targets=("q_proj",)), config_of(targets=("v_proj",)))
    close(
        model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits,
        alone(model, "__base__", input_ids=ids),
    )
    actual = model(input_ids=ids, adapter_names=["anna", "anna"]).logits  # v_proj has no adapter of theirs
    close(actual, alone(model, "anna", input_ids=ids))
    elsewhere = model.to("meta")  # another device: a tensor made on the CPU would not go with it
    layers = [layer for layer in elsewhere.modules() if isinstance(layer, AdapterLinear)]
    for layer in layers:
        names = ["__base__", "ben" if layer.factors("anna") else "anna"]
        for per_sample in (ModelAdapters(["__base__"] * 2), ModelAdapters(names)):
            assert per_sample.pair(layer, torch.float32, 2) is None


@torch.no_grad()
@pytest.mark.parametrize("names", ["anna", ["anna"], ["anna", 3], [], ["anna", "nobody"]])
def test_names_that_fit_no_batch_are_refused(names, ids):
    model = two(tiny_llama())
    with pytest.raises(UserError, match="adapter_names: "):
        model(input_ids=ids, adapter_names=names)
    assert all(layer.per_sample is None for layer in model.modules() if isinstance(layer, AdapterLinear))


@torch.no_grad()
@pytest.mark.parametrize("banked", [False, True])
def test_threads_on_one_model_get_their_own_adapters(banked, ids, tmp_path):
    base = tiny_llama()
    model = two(base)
    model.save_pretrained(tmp_path)
    if banked:
        AdapterBank(model, tmp_path, 1e-9 + _bytes_of_one(model) / 2**30)  # one at a time: each batch evicts
    model.set_adapter("anna")
    expected = {name: alone(model, name, input_ids=ids) for name in ("anna", "ben", "__base__")}
    model.set_adapter("anna")
    wrong: list = []

    def work(name, rounds=12):
        for _ in range(rounds):
            named = {} if name is None else {"adapter_names": [name] * len(ids)}
            with torch.no_grad():
                actual = model(input_ids=ids, **named).logits
            if not torch.allclose(actual, expected[name or "anna"], rtol=1e-4, atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "ben", None, "__base__")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _bytes_of_one(model):
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLinear)]
    return 4 * sum(factor.numel() for layer in layers for factor in layer.factors("anna").values())


def test_a_model_has_one_bank_at_a_time(tmp_path, ids):
    model = two(tiny_llama())
    model.save_pretrained(tmp_path)
    bank = AdapterBank(model, tmp_path, 0.01)
    with pytest.raises(UserError, match=r"has one already, of .*; close\(\) that one first"):
        AdapterBank(model, tmp_path, 0.01)
    bank.close()
    AdapterBank(model, tmp_path, 0.01)
    with torch.no_grad():
        close(model(input_ids=ids, adapter_names=["ben"] * 2).logits, alone(model, "ben", input_ids=ids))


@pytest.mark.parametrize("memory", [0, -1, float("nan"), float("inf"), "4", 1e15])
def test_memory_that_is_none_is_refused(memory, tmp_path):
    model = two(tiny_llama())
    with pytest.raises(UserError, match="memory_gib"):
        AdapterBank(model, tmp_path, memory)
    with pytest.raises(UserError, match="dtype: expected a floating-point one for factors"):
        AdapterBank(model, tmp_path, 1, dtype=torch.int8)
    with pytest.raises(UserError, match="no such folder"):
        AdapterBank(model, tmp_path / "none", 1)


# ---- sums


@torch.no_grad()
@pytest.mark.parametrize("method", LOW_RANK)
def test_a_weighted_sum_is_exact_and_saved_as_lora(method, ids, tmp_path):
    base = tiny_llama()
    other = config_of(method, targets=("q_proj", "v_proj"), alpha=3.0)
    model = two(copy.deepcopy(base), method, other=other)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLinear)}
    model.add_weighted_adapter(["anna", "ben"], [0.5, -2.0], "sum")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    for layer in layers.values():
        parts = [w * layer.get_delta_weight(n) for n, w in (("anna", 0.5), ("ben", -2.0)) if layer.factors(n)]
        close(layer.get_delta_weight("sum"), sum(parts))
    model.set_adapter("sum")
    summed = model(input_ids=ids).logits
    assert (summed - alone(model, "anna", input_ids=ids)).abs().max() > 1e-3
    inputs = model(input_ids=ids, adapter_names=["sum", "ben"]).logits
    close(inputs[:1], summed[:1])
    close(inputs[1:], alone(model, "ben", input_ids=ids)[1:])
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = load(copy.deepcopy(base), tmp_path / "sum").eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    close(loaded(input_ids=ids).logits, summed)
    model.delete_adapter("anna")
    close(alone(model, "sum", input_ids=ids), summed)
    lsr_scale.fuse(model)
    close(model(input_ids=ids).logits, summed)
    lsr_scale.unfuse(model)
    merged = model.merge_and_unload()
    close(merged(input_ids=ids).logits, summed)


@torch.no_grad()
def test_the_best_sum_of_a_smaller_rank(ids):
    model = two(tiny_llama())
    model.add_weighted_adapter(["anna", "ben"], [1.0, 1.0], "whole", combination_type="svd", svd_rank=64)
    model.add_weighted_adapter(["anna", "ben"], [1.0, 1.0], "small", combination_type="svd", svd_rank=3)
    for layer in model.modules():
        if isinstance(layer, AdapterLinear):
            expected = layer.get_delta_weight("anna") + layer.get_delta_weight("ben")
            close(layer.get_delta_weight("whole"), expected)
            values = torch.linalg.svdvals(expected)
            error = (layer.get_delta_weight("small") - expected).norm()
            torch.testing.assert_close(error, values[3:].norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["anna", "ben"], [1.0, 1.0], "c", "linear"), r"'linear' combines factors, .*valid: cat \(exact\), svd"),
        ((["anna", "bob"], [1.0, 1.0], "c"), "no adapter 'bob'; valid: anna, ben"),
        ((["anna", "ben"], [1.0], "c"), "a finite weight for each adapter"),
        ((["anna", "ben"], [1.0, float("nan")], "c"), "a finite weight for each adapter"),
        ((["anna", "ben"], [1.0, 1.0], "anna"), "there is an adapter 'anna' already"),
        (([], [], "c"), "a finite weight for each adapter"),
    ],
)
def test_impossible_sums_are_refused(arguments, message):
    model = two(tiny_llama())
    with pytest.raises(UserError, match=f"add_weighted_adapter: .*{message}"):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"anna", "ben"}


# ---- swapping


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_swapped_adapter_is_the_one_that_was_saved(method, ids, tmp_path):
    base = tiny_llama()
    other = randomize(adapt(copy.deepcopy(base), config_of(method, alpha=3.0)), seed=8).eval()
    other.save_pretrained(tmp_path)
    expected = other(input_ids=ids).logits
    model = randomize(adapt(copy.deepcopy(base), config_of(method)), seed=1).eval()
    before = model(input_ids=ids).logits
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hotswap_adapter(model, tmp_path)
    assert (before - expected).abs().max() > 1e-3
    close(model(input_ids=ids).logits, expected)
    assert all(p is parameters[name] for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "again")
    close(load(copy.deepcopy(base), tmp_path / "again").eval()(input_ids=ids).logits, expected)


@torch.no_grad()
def test_a_swapped_adapter_may_have_another_rank_and_fewer_linears(ids, tmp_path):
    base = tiny_llama()
    other = randomize(adapt(copy.deepcopy(base), config_of(targets=("q_proj",), rank=8)), seed=8).eval()
    other.save_pretrained(tmp_path / "fewer")
    expected = other(input_ids=ids).logits
    model = randomize(adapt(copy.deepcopy(base), config_of()), seed=1).eval()
    hotswap_adapter(model, tmp_path / "fewer")
    close(model(input_ids=ids).logits, expected)
    with pytest.raises(UserError, match="no adapter 'ben'"):
        hotswap_adapter(model, tmp_path / "fewer", "ben")
    more = adapt(copy.deepcopy(base), config_of(targets=("q_proj", "v_proj")))
    more.save_pretrained(tmp_path / "more")
    with pytest.raises(UserError, match=r"v_proj\.lsr_.* is of no linear that 'default' adapts"):
        hotswap_adapter(model, tmp_path / "more")
    close(model(input_ids=ids).logits, expected)
    adapt(copy.deepcopy(base), config_of("kron_lora")).save_pretrained(tmp_path / "kron")
    with pytest.raises(UserError, match="a kron_lora adapter cannot replace one of lsr"):
        hotswap_adapter(model, tmp_path / "kron")
    model.merge_adapter()
    with pytest.raises(UserError, match="is merged into the base"):
        hotswap_adapter(model, tmp_path / "fewer")


@torch.no_grad()
def test_lora_is_swapped_by_peft_in_the_same_call(ids, tmp_path):
    base = tiny_llama()

    def lora(**options):
        values = {"target_modules": ["q_proj", "down_proj"], "rank": 4, **options}
        return adapt(copy.deepcopy(base), peft_config("lora", values, "CAUSAL_LM"))

    other = randomize(lora(alpha=3.0), seed=8).eval()
    other.save_pretrained(tmp_path / "other")
    model = randomize(lora(), seed=1).eval()
    hotswap_adapter(model, tmp_path / "other")
    close(model(input_ids=ids).logits, other(input_ids=ids).logits)
    lora(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "more")
    with pytest.raises(UserError, match="unexpected keys"):
        hotswap_adapter(model, tmp_path / "more")
