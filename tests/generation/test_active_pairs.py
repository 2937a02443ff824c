"""Plain LoRA of PEFT is decoded by pairs, as this library's own methods are; whatever else PEFT has is PEFT's own."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch.nn.utils import parametrize
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import lsr_scale
from lsr_scale import Decoder
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.generation.active_pairs import PairedLora, active_pairs
from lsr_scale.layers.frozen_linear import freeze_quantized
from tests.generation.test_decoder import SIZES, prompts, reference
from tests.helpers import recorded_graphs
from tests.helpers.recorded_graphs import RecordedGraph
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama


def with_lora(base: Any, seed: int = 1, **options: Any) -> Any:
    config = LoraConfig(**{"target_modules": SEVEN_LINEARS, "r": 4, "task_type": "CAUSAL_LM", **options})
    return randomize(get_peft_model(base, config), seed=seed).eval()


def with_two(base: Any) -> Any:
    """Return a model with two active adapters, one of which only some layers have."""
    model = with_lora(base)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "up_proj"], r=3, use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    return randomize(model, seed=3).eval()


def tiny_qwen2() -> Any:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2))


@pytest.fixture
def own_calls(monkeypatch) -> list[Any]:
    """Return the layers whose PEFT forward is called, as long as the test runs."""
    calls: list[Any] = []
    for kind in (lora.Linear, Linear4bit, Linear8bitLt):

        def counted(self: Any, *args: Any, forward: Any = kind.forward, **kwargs: Any) -> Any:
            calls.append(self)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    return calls


def generated(decoder: Decoder, batch: Any, new: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Return greedy tokens and their log-probabilities `[B, new]`."""
    found: list[torch.Tensor] = []
    tokens = decoder.generate(**batch, max_new_tokens=new, eos_token_id=[], pad_token_id=0, log_probs=found)
    return tokens, torch.stack(found, 1)


def log_probs_of(model: Any, batch: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of answers by the model's own forward pass, without a cache."""
    new = tokens.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(tokens), new)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    return logits[:, -new - 1 : -1].log_softmax(-1).gather(2, tokens[:, -new:, None])[..., 0]


def check(model: Any, own_calls: list[Any], decoder: Decoder | None = None) -> torch.Tensor:
    """Fail unless tokens and log-probabilities are PEFT's; return the tokens.

    `own_calls` is left with the calls that the decoder made of PEFT's own forward.
    """
    batch = prompts()
    classes = [type(module) for module in model.modules()]
    expected = reference(model, batch)
    expected_log_probs = log_probs_of(model, batch, expected)
    own_calls.clear()
    tokens, log_probs = generated(decoder or Decoder(model), batch)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=0, atol=2e-5)
    assert [type(module) for module in model.modules()] == classes
    assert not any("active_pairs" in vars(module) for module in model.modules())
    return tokens


@pytest.mark.parametrize(
    "made",
    [
        lambda: with_lora(tiny_llama()),
        lambda: with_lora(tiny_qwen2()),
        lambda: with_lora(tiny_gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        lambda: with_lora(tiny_llama(), lora_dropout=0.5, use_rslora=True),
        lambda: with_lora(tiny_llama(), target_modules=["lm_head", "o_proj"]),
        lambda: with_two(tiny_llama()),
    ],
    ids=["llama", "qwen2", "conv1d", "dropout", "lm_head", "two"],
)
def test_plain_lora_has_the_tokens_of_pefts_own_forward_without_it(made, own_calls):
    check(made(), own_calls)
    assert not own_calls


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_quantized_and_fused(kind, is_fused, own_calls):
    base: Any = tiny_llama()
    if kind is not None:
        base = quantize(base, kind, torch.float32)
        freeze_quantized(base)
        setattr(base, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    model = with_lora(base)
    expected = {None: lora.Linear, "nf4": Linear4bit, "int8": Linear8bitLt}[kind]
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is expected
    if is_fused:
        lsr_scale.fuse(model)
    check(model, own_calls)
    assert not own_calls


def test_factors_and_scaling_change_between_replays_of_one_graph(own_calls, monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    model = with_two(tiny_llama())
    decoder = Decoder(model, graphs=True)
    seen = [check(model, own_calls, decoder)]
    randomize(model, seed=7)  # in place, as an optimizer does
    seen.append(check(model, own_calls, decoder))
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    for layer in layers:
        layer.set_scale("other", -3.0)
    seen.append(check(model, own_calls, decoder))
    for layer in layers:
        layer.scale_layer(0.5)
    seen.append(check(model, own_calls, decoder))
    with rescale_adapter_scale(model, 0.0):
        seen.append(check(model, own_calls, decoder))
    assert RecordedGraph.made == 1
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == len(seen)
    # what a graph depends on is found out: which adapters act, and which layers have pairs
    model.base_model.set_adapter(["other"])
    check(model, own_calls, decoder)
    assert RecordedGraph.made == 2
    with model.disable_adapter():
        check(model, own_calls, decoder)
    assert RecordedGraph.made == 3
    layers[0].lora_A["other"].register_forward_hook(lambda *given: given[-1] * 0)
    check(model, own_calls, decoder)
    assert RecordedGraph.made == 4
    assert {*own_calls} >= {layers[0]}
    layers[0].lora_A["other"]._forward_hooks.clear()
    check(model, own_calls, decoder)
    assert RecordedGraph.made == 5


class OwnLinear(lora.Linear):
    """A subclass of PEFT's layer, which may compute something else."""


class Negated(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return -weight


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def only_elsewhere(model: Any) -> Any:
    """Have an adapter be active that none but the last layer has."""
    model.add_adapter("other", LoraConfig(target_modules=r".*layers\.1\.mlp\.down_proj"))
    model.set_adapter("other")
    return randomize(model, seed=3).eval()


def with_a_saved_copy(model: Any) -> Any:
    """Have an adapter that is not active have a copy of each MLP, whose linears have LoRA in both."""
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    return model.eval()


def each(model: Any, change: Any) -> Any:
    for layer in [module for module in model.modules() if isinstance(module, lora.Linear)]:
        change(layer)
    return model


def with_own_forward(layer: Any) -> None:
    layer.forward = layer.forward


def with_hook(layer: Any) -> None:
    layer.lora_B["default"].register_forward_hook(lambda *given: given[-1] * 2)


def with_parametrization(layer: Any) -> None:
    parametrize.register_parametrization(layer.lora_B["default"], "weight", Negated())


def in_subclass(layer: Any) -> None:
    layer.__class__ = OwnLinear


LAYERS = 2 * len(SEVEN_LINEARS)
BIASES = ["q_proj", "k_proj", "v_proj"]  # of Qwen2


@pytest.mark.parametrize(
    ("made", "layers"),
    [
        (lambda: with_lora(tiny_llama(), use_dora=True), LAYERS),
        (lambda: with_lora(tiny_qwen2(), lora_bias=True, target_modules=BIASES), 2 * len(BIASES)),
        (lambda: disabled(with_lora(tiny_llama())), LAYERS),
        (lambda: merged(with_lora(tiny_llama())), LAYERS),
        (lambda: only_elsewhere(with_lora(tiny_llama())), LAYERS - 1),
        (lambda: each(with_lora(tiny_llama()), with_own_forward), LAYERS),
        (lambda: each(with_lora(tiny_llama()), with_hook), LAYERS),
        (lambda: each(with_lora(tiny_llama()), with_parametrization), LAYERS),
        (lambda: each(with_lora(tiny_llama()), in_subclass), LAYERS),
        (lambda: with_a_saved_copy(with_lora(tiny_llama())), 2 * 3),
    ],
    ids=[
        *("dora", "bias", "disabled", "merged", "elsewhere"),
        *("own forward", "hook", "parametrization", "subclass", "modules_to_save"),
    ],
)
def test_what_is_not_plain_lora_keeps_pefts_own_forward(made, layers, own_calls):
    model = made()
    check(model, own_calls)
    assert len({*own_calls}) == layers
    assert len(own_calls) == 9 * layers  # the prompts and eight steps
    with active_pairs(model, {}) as pairs:
        assert not pairs.layers & {*own_calls}


def test_dropout_that_acts_is_pefts_own():
    model = with_lora(tiny_llama(), lora_dropout=0.5)
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_dropout").train()
    with active_pairs(model, {}) as pairs:
        assert len(pairs.layers) == LAYERS - 1


def test_adapters_switched_off_meanwhile_do_not_act(own_calls):
    model, batch = with_lora(tiny_llama()), prompts()
    with active_pairs(model, {}), torch.no_grad(), model.disable_adapter():
        actual = model(**batch).logits
    assert len(own_calls) == LAYERS
    assert torch.equal(actual, tiny_llama().eval()(**batch).logits)


def test_lora_on_other_layers_than_linears_is_pefts_own():
    model = with_lora(tiny_llama(), target_modules=["embed_tokens"])
    with active_pairs(model, {}) as pairs:
        assert not pairs.layers
    batch = prompts()
    assert torch.equal(generated(Decoder(model), batch)[0], reference(model, batch))


def test_an_x_lora_is_pefts_own(tmp_path):
    with_lora(tiny_llama()).save_pretrained(tmp_path)
    base: Any = tiny_llama()
    base.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, adapters={"0": str(tmp_path)})
    model = get_peft_model(base, config).eval()
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    assert all(active_adapters(layer) for layer in layers)
    assert layers
    with active_pairs(model, {}) as pairs:
        assert not pairs.layers


def test_adapters_by_sample_are_pefts_own_meanwhile(own_calls):
    model, batch = with_lora(tiny_llama()), prompts()
    names = ["default", "__base__", "default"]
    expected = model(**batch, adapter_names=names).logits
    own_calls.clear()
    with active_pairs(model, {}), torch.no_grad():
        assert torch.equal(model(**batch, adapter_names=names).logits, expected)
        assert len(own_calls) == LAYERS
        model(**batch)
    assert len(own_calls) == LAYERS


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
def test_another_thread_meanwhile_gets_pefts_own_result(is_fused, own_calls):
    model, batch = with_lora(tiny_llama()), prompts()
    if is_fused:
        lsr_scale.fuse(model)
    with torch.no_grad():
        expected, meanwhile = model(**batch, use_cache=False).logits, []

    def call() -> Any:
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    def hook(*_: Any) -> None:
        if not meanwhile:
            meanwhile.append(None)  # its own call comes here, too
            own_calls.clear()
            with ThreadPoolExecutor(1) as pool:
                meanwhile[0] = pool.submit(call).result()
            assert len(own_calls) == (0 if is_fused else LAYERS)  # a fused layer calls no linear

    handle = model.get_submodule("base_model.model.model.embed_tokens").register_forward_hook(hook)
    tokens = generated(Decoder(model), batch)[0]
    handle.remove()
    assert torch.equal(meanwhile[0], expected)
    assert torch.equal(tokens, reference(model, batch))


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
def test_layers_are_of_their_own_class_after_an_error(is_fused):
    model = with_lora(tiny_llama())
    if is_fused:
        lsr_scale.fuse(model)
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    classes, meanwhile = [type(layer) for layer in layers], []

    def fail(*_: Any) -> None:
        meanwhile.extend(type(layer) for layer in layers)
        raise RuntimeError("stop")

    model.get_submodule("base_model.model.lm_head").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        Decoder(model).generate(**prompts(), max_new_tokens=3)
    assert all(issubclass(kind, PairedLora) for kind in meanwhile)
    assert len(meanwhile) == LAYERS
    assert [type(layer) for layer in layers] == classes


def test_unfused_meanwhile_layers_stay_so():
    model = with_lora(tiny_llama())
    lsr_scale.fuse(model)
    with active_pairs(model, {}):
        lsr_scale.unfuse(model)
    assert {type(module) for module in model.modules() if isinstance(module, lora.Linear)} == {lora.Linear}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pairs_of_factors_of_any_dtype_are_made_in_float32(dtype, own_calls):
    model = with_lora(tiny_llama(), lora_alpha=7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    same = copy.deepcopy(model).float()  # bfloat16 and float16 are in float32 without loss
    tokens, log_probs = generated(Decoder(model), prompts())
    assert not own_calls
    assert torch.equal(tokens, reference(same, prompts()))
    torch.testing.assert_close(log_probs, log_probs_of(same, prompts(), tokens), rtol=0, atol=2e-5)


def test_in_bfloat16_the_pair_is_that_of_float32_cast_once():
    model = with_lora(tiny_llama(torch.bfloat16), lora_alpha=7)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.dtype == torch.float32
    x = torch.randn(3, 1, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        base = layer.base_layer(x)
        with active_pairs(model, {}):
            actual = layer(x)
        own = layer(x)
        xa = x @ down.bfloat16().T
        expected = torch.addmm(base[:, 0], xa[:, 0], (up * layer.scaling["default"]).bfloat16().T)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual[:, 0], expected)
    torch.testing.assert_close(actual, own, rtol=0.05, atol=0.05)
