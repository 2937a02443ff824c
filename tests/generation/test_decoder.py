"""`Decoder`: the tokens of transformers' own `generate`, from steps with a cache of fixed size."""

import copy
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

import lsr_scale
from lsr_scale import AdapterBank, Decoder, UserError
from lsr_scale.adapters import peft_config
from lsr_scale.adapters.peft import METHODS, per_sample
from lsr_scale.generation import Sampling, attention, fused_step
from lsr_scale.generation.decoder import NotFiniteError
from lsr_scale.generation.fallback import decoder_fallback_reason
from lsr_scale.kernels import decode_attention as decode_attention_kernels
from lsr_scale.kernels import rms_norm, rotary
from lsr_scale.kernels.decode_attention import decode_attention
from lsr_scale.kernels.row_pairs import add_row_pairs_triton
from lsr_scale.layers.frozen_linear import freeze_quantized
from tests.helpers import interpreter, recorded_graphs
from tests.helpers.recorded_graphs import RecordedGraph
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, quantize, randomize, tiny_llama

OPTIONS: dict[str, dict[str, Any]] = {
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 2, "dropout": 0.0},
    "lora": {"rank": 4},
    "kadaptation": {"phm_dim": 2},
}
NAMES = ["anna", "ben", "cleo"]
SIZES: dict[str, Any] = TINY_SIZES


def prompts(rows=3, length=7, padded=(0, 3, 5), seed=0) -> Any:
    """Return prompts of different lengths, padded at the left."""
    ids = torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, number in enumerate(padded[:rows]):
        mask[row, :number] = ids[row, :number] = 0
    return {"input_ids": ids, "attention_mask": mask}


def adapted(base, method="lsr", seed=1, **options) -> Any:
    values = {"target_modules": SEVEN_LINEARS, **OPTIONS.get(method, {}), **options}
    return randomize(get_peft_model(base, peft_config(method, values, "CAUSAL_LM")), seed=seed).eval()


def reference(model: Any, batch: Any, new=9, ends=None, **options: Any) -> Any:
    options = {"do_sample": False, **options}
    return model.generate(**batch, max_new_tokens=new, eos_token_id=ends, pad_token_id=0, **options)


def check(model: Any, batch: Any, names=None, new=9):
    """Fail unless a decoder gives the tokens of `generate`, also where rows end at different steps."""
    decoder = Decoder(model)
    own: Any = {} if names is None else {"adapter_names": names}
    expected = reference(model, batch, new, **own)
    actual = decoder.generate(**batch, max_new_tokens=new, eos_token_id=[], pad_token_id=0, **own)
    assert torch.equal(actual, expected)
    prompt = batch["input_ids"].shape[1]
    ends = sorted({int(expected[row, prompt + 1 + 2 * row]) for row in range(min(3, len(expected)))})
    for some in (ends, ends[:1]):
        expected = reference(model, batch, new, some, **own)
        actual = decoder.generate(**batch, max_new_tokens=new, eos_token_id=some, pad_token_id=0, **own)
        assert torch.equal(actual, expected)
    assert len(decoder.steps) == 1  # one cache for all of them, each batch in it as if it were new


@pytest.mark.parametrize("length", [1, 6, 7, 60, 70])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_base_without_adapters(length, attention):
    padded = (0, length // 2, length - 1)
    check(tiny_llama(attn_implementation=attention).eval(), prompts(length=length, padded=padded))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_number_of_rows(rows):
    check(tiny_llama().eval(), prompts(rows=rows))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_active_adapter_of_any_method(method):
    model = adapted(tiny_llama(), method)
    check(model, prompts())
    # off, another one, and merged: each is found out by itself
    decoder, batch = Decoder(model), prompts()
    first = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
    with model.disable_adapter():
        assert torch.equal(decoder.generate(**batch, max_new_tokens=6, eos_token_id=[]), reference(model, batch, 6))
    randomize(model, seed=7)  # in place, as an optimizer does between two generations
    changed = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(changed, reference(model, batch, 6))
    assert not torch.equal(changed, first)
    model.merge_adapter()
    assert torch.equal(decoder.generate(**batch, max_new_tokens=6, eos_token_id=[]), reference(model, batch, 6))
    model.unmerge_adapter()
    assert all(getattr(layer, "per_sample", None) is None for layer in model.modules())


def test_several_active_adapters_and_pefts_own():
    model = adapted(tiny_llama())
    model.add_adapter("other", peft_config("lsr", {"target_modules": ["q_proj"], "rank": 2}, "CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    check(randomize(model, seed=3), prompts())
    lora = LoraConfig(target_modules=SEVEN_LINEARS, r=4, task_type="CAUSAL_LM")
    check(randomize(get_peft_model(tiny_llama(), lora)).eval(), prompts())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_and_fused(kind):
    base = quantize(tiny_llama(), kind, torch.float32)
    freeze_quantized(base)
    model = adapted(base)
    lsr_scale.fuse(model)
    check(model, prompts())


@pytest.mark.parametrize("method", ["lsr", "kron_lora"])
def test_a_bank_whose_rows_have_different_adapters(method, tmp_path):
    base = tiny_llama()
    for seed, name in enumerate(NAMES):
        adapted(copy.deepcopy(base), method, seed, alpha=3.0 + seed).save_pretrained(tmp_path / name)
    model = adapted(copy.deepcopy(base), method)
    bank = AdapterBank(model, tmp_path, 0.01)
    batch = prompts(rows=4, padded=(0, 3, 5, 1))
    for names in (["cleo", "anna", "__base__", "ben"], ["ben"] * 4, ["__base__"] * 4):
        check(model, batch, names)
    # adapters come and go in one decoder, and with two places for three of them
    bank.close()
    bank = AdapterBank(model, tmp_path, 2.5 * bank.adapter_bytes / 2**30)
    decoder = Decoder(model)
    for names in (["anna", "ben"], ["cleo", "cleo"], ["__base__", "anna"]):
        pair = prompts(rows=2)
        actual = decoder.generate(**pair, adapter_names=names, max_new_tokens=5, eos_token_id=[])
        assert torch.equal(actual, reference(model, pair, 5, adapter_names=names))
    assert bank.evictions > 0
    with pytest.raises(UserError, match="2 names for a batch of 4"):
        decoder.generate(**batch, adapter_names=["anna", "ben"])
    with pytest.raises(UserError, match="no adapter 'dora'"):
        decoder.generate(**pair, adapter_names=["anna", "dora"])
    bank.close()
    check(model, pair, ["default", "__base__"])  # the model's own


def test_rows_with_adapters_of_the_model():
    model = adapted(tiny_llama())
    model.add_adapter("wide", peft_config("lsr", {"target_modules": ["q_proj", "up_proj"], "rank": 8}, "CAUSAL_LM"))
    model.set_adapter("wide")
    randomize(model, seed=3)
    check(model, prompts(), ["wide", "default", "__base__"])


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.5, "top_k": 5, "seed": 4},
        {"top_p": 0.8, "top_k": 40, "repetition_penalty": 1.4, "seed": 5},
        {"repetition_penalty": 2.0},
    ],
)
def test_draws_are_those_of_generate(options):
    model: Any = tiny_llama().eval()
    batch = prompts()
    sampling = Sampling(**options)
    with torch.random.fork_rng():
        torch.manual_seed(options.get("seed", 0))
        expected = reference(model, batch, **sampling.arguments())
    before = torch.random.get_rng_state()
    actual = Decoder(model).generate(**batch, max_new_tokens=9, eos_token_id=[], **options)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_without_a_seed_go_on_from_the_process():
    model: Any = tiny_llama().eval()
    batch = prompts()
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 6, "eos_token_id": []}
    torch.manual_seed(0)
    first, second = (Decoder(model).generate(**batch, **options) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(Decoder(model).generate(**batch, **options), first)
    assert not torch.equal(first, second)


def test_the_models_own_special_tokens_and_mode():
    model: Any = tiny_llama().train()
    batch = prompts()
    free = Decoder(model).generate(**batch, max_new_tokens=8, eos_token_id=[])
    model.generation_config.eos_token_id = int(free[0, 9])
    model.generation_config.pad_token_id = 95
    actual = Decoder(model).generate(**batch, max_new_tokens=8)
    assert model.training
    assert torch.equal(actual, model.eval().generate(**batch, max_new_tokens=8, do_sample=False))


def test_caches_of_the_last_shapes_are_kept():
    decoder = Decoder(tiny_llama().eval())
    for rows, length in ((1, 7), (2, 7), (1, 7), (1, 100)):
        batch = prompts(rows, length)
        assert torch.equal(
            decoder.generate(**batch, max_new_tokens=4, eos_token_id=[]), reference(decoder.model, batch, 4)
        )
    assert list(decoder.steps) == [(1, 64, False), (1, 104, False)]
    assert list(decoder.memories) == [(1, False)]
    decoder.clear()
    assert not decoder.steps


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("encoder-decoder", "an encoder and a decoder"),
        ("window", "sliding window of 8"),
        ("dynamic", "depend on the number of tokens"),
        ("lora names", "not this library's"),
        ("alora", "invocation tokens"),
        ("modules_to_save", "modules_to_save"),
        ("virtual tokens", "virtual tokens"),
    ],
)
def test_what_it_cannot_do_transformers_does(how, words, caplog):
    batch, names = prompts(), None
    if how == "encoder-decoder":
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        model.generation_config.decoder_start_token_id = 0
    elif how == "window":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    elif how == "dynamic":
        model = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    elif how == "virtual tokens":
        model = get_peft_model(tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    elif how == "alora":
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
        model = randomize(get_peft_model(tiny_llama(), lora))
        batch["input_ids"][:, -2] = 5
    elif how == "lora names":
        names = ["default", "__base__", "default"]
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        randomize(model)
    else:
        names = ["default", "__base__", "default"]
        model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    own: Any = {} if names is None else {"adapter_names": names}
    expected = reference(model.eval(), batch, 4, **own)
    with caplog.at_level(logging.WARNING):
        actual = Decoder(model).generate(**batch, max_new_tokens=4, eos_token_id=[], pad_token_id=0, **own)
    assert torch.equal(actual, expected)
    assert words in caplog.text


def test_models_of_other_shapes():
    check(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval(), prompts())
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)).eval()
    check(model, prompts())
    assert decoder_fallback_reason(model, 64) is None
    model.hf_device_map = {"model": 0, "lm_head": 1}  # as accelerate leaves it
    assert "several devices" in str(decoder_fallback_reason(model, 64))


def test_bad_input_is_refused():
    decoder, batch = Decoder(tiny_llama().eval()), prompts()
    with pytest.raises(UserError, match="padded at the left"):
        decoder.generate(batch["input_ids"], batch["attention_mask"].flip(1))
    with pytest.raises(UserError, match=r"attention_mask is \(3, 6\)"):
        decoder.generate(batch["input_ids"], batch["attention_mask"][:, 1:])
    with pytest.raises(UserError, match="expected prompts"):
        decoder.generate(batch["input_ids"][0])
    with pytest.raises(UserError, match="max_new_tokens"):
        decoder.generate(**batch, max_new_tokens=0)
    with pytest.raises(UserError, match="streamer: takes one row"):
        decoder.generate(**batch, streamer=BaseStreamer())


@pytest.mark.parametrize("longest", [None, 4])
def test_logits_that_are_not_finite_end_it_where_they_come(longest):
    model = tiny_llama().eval()
    decoder, batch = Decoder(model, longest=longest), prompts(rows=1)
    clean = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
    place = batch["input_ids"].shape[1]
    token = int(clean[0, place + 1])
    assert token not in clean[0, : place + 1].tolist()
    model.model.embed_tokens.weight.data[token] = float("nan")  # what follows the second token is not finite
    with pytest.raises(NotFiniteError, match="not finite in row 0") as error:
        decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
    assert error.value.tokens == place + 2


def test_a_row_that_diverged_is_named_and_harms_no_later_batch(tmp_path):
    base = tiny_llama()
    for seed, name in enumerate(NAMES):
        adapted(copy.deepcopy(base), "lsr", seed).save_pretrained(tmp_path / name)
    model = adapted(base)
    bank = AdapterBank(model, tmp_path, 0.01)
    bank.load("ben")
    for stack in bank._stacks:  # far beyond float32 in the product
        for stacked in stack.factors.values():
            stacked[bank.slots["ben"]].fill_(1e20)
    decoder, batch = Decoder(model), prompts(length=9)
    with pytest.raises(UserError, match=r"row 1 \(ben\)"):
        decoder.generate(**batch, adapter_names=["anna", "ben", "cleo"], max_new_tokens=5)
    names, shorter = ["anna", "cleo", "__base__"], prompts(length=5, padded=(0, 2, 1))
    actual = decoder.generate(**shorter, adapter_names=names, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(actual, reference(model, shorter, 5, adapter_names=names))


@pytest.mark.parametrize("is_fused", [False, True], ids=["transformers", "fused"])
def test_a_replayed_step_is_the_step_whatever_adapters_its_rows_have(is_fused, tmp_path, monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    monkeypatch.setattr(attention, "use_triton", lambda keys: is_fused)
    base = tiny_llama()
    for seed, name in enumerate(NAMES):
        adapted(copy.deepcopy(base), "lsr", seed, alpha=3.0 + seed).save_pretrained(tmp_path / name)
    model = adapted(base)
    decoder = Decoder(model, graphs=True)

    def check_next(batch: Any, captures: int, **names: Any) -> None:
        actual = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[], **names)
        assert torch.equal(actual, reference(model, batch, 6, **names))
        assert RecordedGraph.made == captures

    check_next(prompts(), 1)
    check_next(prompts(length=4, padded=(0, 1, 2)), 1)
    randomize(model, seed=7)  # in place, as an optimizer does
    check_next(prompts(), 1)
    with model.disable_adapter():
        check_next(prompts(), 2)
    check_next(prompts(), 3)
    bank = AdapterBank(model, tmp_path, 0.01)
    two = 2.5 * bank.adapter_bytes / 2**30
    bank.close()
    bank = AdapterBank(model, tmp_path, two)
    for names in (["anna", "ben", "__base__"], ["cleo", "cleo", "anna"], ["__base__"] * 3, ["ben", "cleo", "ben"]):
        check_next(prompts(), 4, adapter_names=names)
    assert bank.evictions > 0
    check_next(prompts(), 4)
    check_next(prompts(rows=2), 5, adapter_names=["ben", "__base__"])
    assert RecordedGraph.replays == 5 * 11


def test_a_graph_reads_nothing_that_autocast_keeps(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    model = adapted(tiny_llama(), "lora")
    # a weight that is trained, of which autocast keeps a copy until its end
    model.get_submodule("base_model.model.lm_head").requires_grad_(True)
    copies: list[bool] = []
    decoder, batch = Decoder(model, graphs=True), prompts()
    hook = lambda *_: copies.append(torch.is_autocast_cache_enabled())  # noqa: E731
    model.get_submodule("base_model.model.lm_head").register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.generate(**batch, max_new_tokens=3, eos_token_id=[])
        assert torch.is_autocast_cache_enabled()
    assert copies == [True, False, False]  # the prompts, a warm-up and a capture
    assert RecordedGraph.made == 1
    actual = decoder.generate(**batch, max_new_tokens=3, eos_token_id=[])
    assert RecordedGraph.made == 2  # in float32
    assert torch.equal(actual, reference(model, batch, 3))


def test_inference_mode_leaves_nothing_behind():
    decoder, batch = Decoder(adapted(tiny_llama())), prompts()
    with torch.inference_mode():
        inside = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
    assert torch.equal(decoder.generate(**prompts(), max_new_tokens=6, eos_token_id=[]), inside)


def test_a_capture_that_fails_leaves_steps_as_they_are(monkeypatch, caplog):
    recorded_graphs.stand_in(monkeypatch)

    def fail(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    model, batch = adapted(tiny_llama()), prompts()
    decoder = Decoder(model, graphs=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            actual = decoder.generate(**batch, max_new_tokens=6, eos_token_id=[])
            assert torch.equal(actual, reference(model, batch, 6))
    assert caplog.text.count("operation not permitted") == 1


def check_a_bank_of_one(folder, new):
    """Fail unless a row with an adapter of a bank, and one without, have the tokens of `generate`."""
    base = tiny_llama()
    adapted(copy.deepcopy(base), "lsr", 3).save_pretrained(folder / "anna")
    model, batch = adapted(base), prompts(rows=2)
    AdapterBank(model, folder, 0.01)
    names = ["anna", "__base__"]
    actual = Decoder(model).generate(**batch, adapter_names=names, max_new_tokens=new, eos_token_id=[])
    assert torch.equal(actual, reference(model, batch, new, adapter_names=names))


def test_a_steps_own_kernels(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    launches = []

    def counted(*arguments):
        launches.append(arguments)
        return add_row_pairs_triton(*arguments)

    monkeypatch.setattr(per_sample, "add_row_pairs_", counted)
    check_a_bank_of_one(tmp_path, 3)
    assert len(launches) == 2 * 2 * len(SEVEN_LINEARS)  # steps, layers


@pytest.fixture
def attended(monkeypatch):
    """Have steps be as on a GPU, by kernels whose references a CPU computes; return the calls of their attention."""
    calls = []

    def counted(*given):
        calls.append(given)
        return decode_attention(*given)

    monkeypatch.setattr(attention, "use_triton", lambda keys: True)
    monkeypatch.setattr(attention, "decode_attention", counted)
    monkeypatch.setattr(fused_step, "decode_attention", counted)
    return calls


def hooked(model):
    """Have a layer's hooks be called, which the fused step would pass by."""
    model.get_submodule("base_model.model.model.layers.1").register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("change", [lambda model: model, hooked], ids=["fused", "attention"])
def test_a_steps_own_attention(change, attended):
    model = change(adapted(tiny_llama()))
    check(model, prompts(rows=5))
    assert attended
    assert model.config._attn_implementation == "sdpa"
    attended.clear()
    batch, answers = prompts(), [2, 1, 3]
    tokens = Decoder(model).generate(**batch, answers=answers, max_new_tokens=9, eos_token_id=[], pad_token_id=0)
    assert torch.equal(tokens, reference(model, batch).repeat_interleave(torch.tensor(answers), 0))
    assert len(attended) == 8 * 2  # steps, layers


OTHER_MODELS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_fused_steps_of_other_models(kind, attended):
    torch.manual_seed(0)
    base = OTHER_MODELS[kind]()
    for name, parameter in base.named_parameters():
        if "bias" in name or "norm" in name:  # away from their start of zeros and ones
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    assert fused_step.step_fallback_reason(base) is None
    check(adapted(base.eval(), "lora"), prompts())
    assert attended


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_fused_steps_by_their_own_kernels(kind, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    torch.manual_seed(0)
    base = tiny_llama() if kind == "llama" else OTHER_MODELS[kind]()
    for name, parameter in base.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model, batch = adapted(base.eval(), "lora"), prompts()
    expected = reference(model, batch, 5)
    launches = []
    for module, names in (
        (rms_norm, ["rms_norm_triton"]),
        (rotary, ["rotate_triton"]),
        (decode_attention_kernels, ["decode_attention_triton"]),
        (attention, []),
    ):
        monkeypatch.setattr(module, "use_triton", lambda x: True)
        for name in names:
            run = getattr(module, name)
            counted = lambda *given, run=run, name=name, **options: launches.append(name) or run(*given, **options)  # noqa: E731
            monkeypatch.setattr(module, name, counted)
    interpreter.as_on_a_gpu(monkeypatch)
    actual = Decoder(model).generate(**batch, max_new_tokens=5, eos_token_id=[], pad_token_id=0)
    assert torch.equal(actual, expected)
    norms = 2 * 2 + 1 if kind == "llama" else 4 * 2 + 1  # of two layers, and the last
    counts = [launches.count(name) for name in ("rms_norm_triton", "rotate_triton", "decode_attention_triton")]
    assert counts == [4 * norms, 4 * 4, 4 * 2]  # steps


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fused_steps_of_quantized_and_fused_models(kind, attended):
    base = quantize(tiny_llama(), kind, torch.float32)
    freeze_quantized(base)
    model = adapted(base)
    lsr_scale.fuse(model)
    assert fused_step.step_fallback_reason(model.get_base_model()) is None
    check(model, prompts())
    assert attended


def test_fused_steps_of_a_bank(attended, tmp_path):
    check_a_bank_of_one(tmp_path, 6)
    assert attended


def test_steps_under_autocast_of_a_model_in_float32(attended, monkeypatch):
    model, batch = adapted(tiny_llama(), "lora"), prompts()
    found: dict[bool, list[Any]] = {}
    for is_fused in (True, False):
        monkeypatch.setattr(attention, "use_triton", lambda keys, is_fused=is_fused: is_fused)
        found[is_fused] = []
        with torch.autocast("cpu", torch.bfloat16):
            Decoder(model).generate(**batch, max_new_tokens=2, eos_token_id=[], log_probs=found[is_fused])
    assert attended
    torch.testing.assert_close(torch.stack(found[True]), torch.stack(found[False]), rtol=0, atol=0.01)


@pytest.mark.parametrize("method", ["lsr", "lora"])
def test_a_replayed_step_has_new_factors_where_its_inputs_are_of_another_dtype_than_the_prompts(
    method, attended, monkeypatch
):
    recorded_graphs.stand_in(monkeypatch)
    model, batch = adapted(tiny_llama(), method), prompts()

    def generate(decoder: Decoder) -> torch.Tensor:
        found: list[torch.Tensor] = []
        decoder.generate(**batch, max_new_tokens=5, eos_token_id=[], log_probs=found)
        return torch.stack(found)

    decoder = Decoder(model, graphs=True)
    with torch.autocast("cpu", torch.bfloat16):  # attention's output is bfloat16 in one and float32 in the other
        before = generate(decoder)
        randomize(model, seed=7)
        after = generate(decoder)
        assert RecordedGraph.made == 1
        assert torch.equal(after, generate(Decoder(model, graphs=True)))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("of_model", [False, True], ids=["bank", "model"])
def test_a_replayed_step_has_new_rows_where_its_inputs_are_of_another_dtype_than_the_prompts(
    of_model, attended, tmp_path, monkeypatch
):
    recorded_graphs.stand_in(monkeypatch)
    base = tiny_llama()
    for seed, name in enumerate(NAMES):
        adapted(copy.deepcopy(base), "lsr", seed).save_pretrained(tmp_path / name)
    model, batch = adapted(base), prompts()
    if of_model:
        for name in NAMES:
            model.load_adapter(tmp_path / name, name)
    else:
        AdapterBank(model, tmp_path, 0.01)

    def generate(decoder: Decoder, names: list[str]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        decoder.generate(**batch, adapter_names=names, max_new_tokens=5, eos_token_id=[], log_probs=found)
        return torch.stack(found)

    decoder = Decoder(model, graphs=True)
    with torch.autocast("cpu", torch.bfloat16):
        generate(decoder, ["anna", "ben", "cleo"])
        after = generate(decoder, ["cleo", "anna", "anna"])
        assert RecordedGraph.made == 1
        assert torch.equal(after, generate(Decoder(model, graphs=True), ["cleo", "anna", "anna"]))


def test_a_graph_is_kept_where_linears_of_another_dtype_have_no_adapter(attended, tmp_path, monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    base = tiny_llama()
    for seed, (name, linear) in enumerate((("anna", "q_proj"), ("ben", "o_proj"))):
        adapted(copy.deepcopy(base), "lsr", seed, target_modules=[linear]).save_pretrained(tmp_path / name)
    model, batch = adapted(base), prompts()
    for name in ("anna", "ben"):
        model.load_adapter(tmp_path / name, name)

    def generate(decoder: Decoder, name: str) -> torch.Tensor:
        found: list[torch.Tensor] = []
        decoder.generate(**batch, adapter_names=[name] * 3, max_new_tokens=5, eos_token_id=[], log_probs=found)
        return torch.stack(found)

    decoder = Decoder(model, graphs=True)
    with torch.autocast("cpu", torch.bfloat16):  # o_proj's inputs are bfloat16 in prompts and float32 in steps
        for made, name in ((1, "anna"), (1, "anna"), (2, "ben"), (2, "ben"), (3, "anna")):
            actual = generate(decoder, name)
            assert RecordedGraph.made == made
            assert torch.equal(actual, generate(Decoder(model, graphs=False), name))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_hooks_of_linears_keep_is_what_these_returned(kind, attended, monkeypatch):
    model = (tiny_llama() if kind == "llama" else OTHER_MODELS[kind]()).eval()
    kept: list[torch.Tensor] = []
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"):
        of_layer = model.get_submodule(f"model.layers.1.{'mlp' if name[0] in 'gd' else 'self_attn'}.{name}")
        of_layer.register_forward_hook(lambda *given: kept.append(given[-1]))
    batch = prompts()
    Decoder(model).generate(**batch, max_new_tokens=3, eos_token_id=[])
    assert attended
    fused, kept[:] = [*kept], []
    monkeypatch.setattr(attention, "use_triton", lambda keys: False)
    Decoder(model).generate(**batch, max_new_tokens=3, eos_token_id=[])
    assert len(fused) == len(kept) == 15
    for one, other in zip(fused, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["", "base_model", "base_model.model"])
def test_hooks_of_a_model_and_of_what_is_around_it_are_called(place, attended):
    model, calls = adapted(tiny_llama()), []
    model.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    check(model, prompts())
    calls.clear()
    Decoder(model).generate(**prompts(), max_new_tokens=5, eos_token_id=[])
    assert len(calls) == 5


def test_a_forward_that_changes_the_logits_is_called(attended):
    model: Any = tiny_llama().eval()
    forward = model.forward

    @functools.wraps(forward)
    def turned(**given: Any) -> Any:
        outputs = forward(**given)
        outputs.logits = -outputs.logits
        return outputs

    model.forward = turned
    check(model, prompts())
    assert attended


def test_hidden_states_asked_for_once_leave_steps_fused(attended):
    model = adapted(tiny_llama())
    model(**prompts(), output_hidden_states=True)  # transformers' hooks for them stay
    assert any(layer._forward_hooks for layer in model.get_base_model().model.layers)
    assert fused_step.step_fallback_reason(model) is None
    check(model, prompts())


def test_another_thread_meanwhile_makes_its_masks(attended, monkeypatch):
    model, batch = hooked(adapted(tiny_llama())), prompts()
    expected, meanwhile = model(**batch).logits, []

    def computed(*given):
        if not meanwhile:
            with ThreadPoolExecutor(1) as pool:
                meanwhile.append(pool.submit(lambda: model(**batch).logits).result())
        return decode_attention(*given)

    monkeypatch.setattr(attention, "decode_attention", computed)
    check(model, batch)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(meanwhile[0][kept], expected[kept])


def test_transformers_attention_compiles_after_a_step(attended):
    model = tiny_llama().eval()
    Decoder(hooked(adapted(model))).generate(**prompts(), max_new_tokens=2, eos_token_id=[])
    assert attended
    ids, plain = prompts()["input_ids"], tiny_llama().eval()
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, plain(ids).logits)


def test_what_a_fused_step_would_pass_by_is_found():
    reason = lambda model: fused_step.step_fallback_reason(model) or ""  # noqa: E731
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    assert "GPT2LMHeadModel is none of" in reason(gpt2)
    model: Any = tiny_llama()
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert "GELU, not SiLU" in reason(model)
    model = tiny_llama()
    model.model.layers[1].post_attention_layernorm = torch.nn.LayerNorm(48)
    assert "post_attention_layernorm is not Llama's" in reason(model)
    model = tiny_llama()
    model.model.norm = torch.nn.Identity()
    assert "the last norm is a Identity" in reason(model)
    model = OTHER_MODELS["qwen3"]()
    model.model.layers[0].self_attn.k_norm = torch.nn.Identity()
    assert "a norm of heads is not Qwen3's" in reason(model)
    model = tiny_llama()
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: None)
    assert "LlamaAttention has hooks" in reason(model)
    model = tiny_llama()
    model.model.layers[1].forward = model.model.layers[1].forward
    assert "LlamaDecoderLayer has a forward of its own" in reason(model)


def test_attention_that_a_kernel_does_not_compute_is_transformers_own(attended):
    sizes = {**SIZES, "attn_implementation": "eager"}
    check(Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, attn_logit_softcapping=2.0)).eval(), prompts())
    check(tiny_llama(attn_implementation="eager").eval(), prompts())
    assert not attended


def test_several_answers_to_a_prompt_are_those_to_the_prompt_repeated():
    model = adapted(tiny_llama().eval())
    batch, answers = prompts(), [2, 1, 3]
    repeated = {name: part.repeat_interleave(torch.tensor(answers), 0) for name, part in batch.items()}
    options: dict[str, Any] = {
        "max_new_tokens": 9,
        "temperature": 1.0,
        "seed": 3,
        "eos_token_id": [],
        "pad_token_id": 0,
    }
    decoder = Decoder(model)
    expected = decoder.generate(**repeated, **options)
    assert torch.equal(decoder.generate(**batch, answers=answers, **options), expected)
    assert torch.equal(decoder.generate(**batch, answers=answers, **options), expected)  # in the same cache
    assert len(expected.unique(dim=0)) > 3  # answers to one prompt differ
    for number in ([1, 2], [0, 1, 1], [1, 1, 1.5]):
        with pytest.raises(UserError, match="answers: expected a number from 1 on for each of 3 prompts"):
            decoder.generate(**batch, answers=number, **options)
    with pytest.raises(UserError, match="leave answers out"):
        decoder.generate(**batch, answers=answers, adapter_names=["__base__"] * 3, **options)


@pytest.mark.parametrize("method", ["lsr", "lora", "kadaptation"])
def test_log_probabilities_are_those_of_the_training_forward(method):
    model = adapted(tiny_llama().eval(), method)
    batch, found = prompts(), []
    ids = Decoder(model).generate(
        **batch, answers=[2, 2, 2], max_new_tokens=12, temperature=0.8, seed=1, eos_token_id=[], log_probs=found
    )
    mask = batch["attention_mask"].repeat_interleave(2, 0)
    mask = torch.cat([mask, torch.ones(6, 12, dtype=mask.dtype)], 1)
    model.train()  # as a step computes them: padded at the left, positions by the mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -13:-1].log_softmax(-1)
    expected = logits.gather(2, ids[:, -12:, None])[..., 0]
    assert (torch.stack(found, 1) - expected).abs().max() < 5e-6
