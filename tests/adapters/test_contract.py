"""What every registered method must do, as PEFT's own methods do it; a new method is tested by being registered."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.conversion import save_as_lora
from transformers.pytorch_utils import Conv1D

from lsr_scale import KronLoraConfig, LsrConfig, UserError
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.adapters.peft import AdapterLinear, tuner
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*more than its dense form.*")
METHOD_NAMES = sorted(METHODS)
# options for tiny layers, where they are not these
DEFAULTS = {"rank": 4, "dropout": 0.0}
SMALL = {
    "lsr": {"separation_rank": 3},
    "kron_lora": {"left_out": 4},
    "kadaptation": {"phm_dim": 2, "alpha": 8.0},
    "krona": {"rank": 1},
    "lora_xs": {"alpha": 160.0},
    "slora": {"alpha": 4.0},
}
OTHER = {"krona": {"left_in": 2}}  # another size; by the rank where there is one
TINY = {"kron_lora": {"left_out": 2}, "kadaptation": {"phm_dim": 2}}  # divides 6 and 4


def config_of(name, **changes):
    values = {"target_modules": SEVEN_LINEARS, **DEFAULTS, **SMALL.get(name, {}), **changes}
    return peft_config(name, values, task_type="CAUSAL_LM")


def adapted(name, dtype=torch.float64, **changes):
    return get_peft_model(tiny_llama(dtype), config_of(name, **changes))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, AdapterLinear)]


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# fixtures, so that `test_new_method.py` runs the same tests over a method of its own
@pytest.fixture(params=METHOD_NAMES)
def name(request):
    return request.param


@pytest.fixture(params=[name for name in METHOD_NAMES if METHODS[name].is_low_rank()])
def low_rank_name(request):
    return request.param


@pytest.fixture(params=[name for name in METHOD_NAMES if name not in OTHER])
def ranked_name(request):
    return request.param


def test_method_is_registered_with_peft_under_its_own_type_and_prefix(name):
    assert PeftType(name.upper()) == name.upper()
    assert name.upper() in list(PeftType)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(name.upper())] == METHODS[name].prefix
    assert issubclass(PEFT_TYPE_TO_TUNER_MAPPING[name.upper()].tuner_layer_cls, AdapterLinear)
    assert "lora_" not in METHODS[name].prefix, "other code selects LoRA parameters by that substring"


def test_identity_at_init_but_gradient_flows(name, ids):
    base = logits(tiny_llama(torch.float64), ids)
    model = adapted(name)
    out = model(input_ids=ids, labels=ids)
    assert torch.equal(out.logits, base)
    out.loss.backward()
    grads = {key: parameter.grad for key, parameter in trainable(model).items()}
    per_layer = {key.rsplit(".", 2)[0] for key, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    assert len(per_layer) == len(layers_of(model)) == 14


def test_only_the_adapter_trains_and_its_count_is_the_closed_form(name):
    model = adapted(name)
    prefix = METHODS[name].prefix
    assert all(key.rsplit(".", 2)[1].startswith(prefix) for key in trainable(model))
    expected = 0
    for layer in layers_of(model):
        shapes = METHODS[name].parameter_shapes(layer.in_features, layer.out_features, config_of(name))
        expected += sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(parameter.numel() for parameter in trainable(model).values()) == expected


def test_forward_and_every_gradient_equal_the_dense_definition_in_float64(name, ids):
    model = randomize(adapted(name))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {key: parameter.grad.clone() for key, parameter in trainable(model).items()}
    model.zero_grad()

    def dense_forward(self, x):
        (adapter,) = self.active_adapters
        delta = self.method.delta_weight(self.factors(adapter)) * self.adapter_configs[adapter].scaling
        return self.base_layer(x) + x @ delta.T

    class DenseLinear(AdapterLinear):
        forward = dense_forward

    for layer in layers_of(model):
        layer.__class__ = DenseLinear
    dense = model(input_ids=ids, labels=ids)
    dense.loss.backward()
    torch.testing.assert_close(out.logits, dense.logits, rtol=1e-12, atol=1e-12)
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_pair_is_the_definition_also_for_a_stack_of_modules(low_rank_name):
    method = METHODS[low_rank_name]
    shapes = method.factor_shapes(24, 40, config_of(low_rank_name))
    generator = torch.Generator().manual_seed(3)
    stack = {k: torch.randn(5, *s, dtype=torch.float64, generator=generator) for k, s in shapes.items()}
    downs, ups = method.materialize(stack)
    assert downs.shape[0] == ups.shape[0] == 5
    for index in range(5):
        one = {key: value[index] for key, value in stack.items()}
        down, up = method.materialize(one)
        torch.testing.assert_close(up @ down, method.delta_weight(one), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(downs[index], down)
        torch.testing.assert_close(ups[index], up)


def test_gradcheck_of_the_materialization(low_rank_name):
    method = METHODS[low_rank_name]
    shapes = method.factor_shapes(6, 4, config_of(low_rank_name, rank=2, **TINY.get(low_rank_name, {})))
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes.values()]
    assert torch.autograd.gradcheck(lambda *v: method.materialize(dict(zip(shapes, v, strict=True))), values)


def test_save_and_load_are_bit_equal(name, ids, tmp_path):
    model = randomize(adapted(name, torch.float32))
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), expected)
    assert type(loaded.peft_config["default"]) is METHODS[name].config_class

    through_transformers = tiny_llama()
    through_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(through_transformers.eval(), ids), expected)
    through_transformers.delete_adapter("default")
    assert not [key for key, _ in through_transformers.named_parameters() if METHODS[name].prefix in key]


def test_loading_without_allocating_twice_and_training_further(name, ids, tmp_path):
    model = randomize(adapted(name, torch.float32))
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(logits(loaded.eval(), ids), expected)
    loaded(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(loaded).values())
    assert len(trainable(loaded)) == len(trainable(model))


def test_a_model_of_another_width_is_refused_with_the_shapes(name, tmp_path):
    adapted(name, torch.float32).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size mismatch|gives other ones"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=96, num_attention_heads=8), tmp_path)


def test_two_adapters_switch_add_disable_and_delete(name, ids):
    model = randomize(adapted(name))
    base = logits(tiny_llama(torch.float64), ids)
    first = logits(model, ids)
    model.add_adapter("second", config_of(name, **OTHER.get(name, {"rank": 2})))
    assert torch.equal(logits(model, ids), first), "an added adapter is not active"
    model.set_adapter("second")
    randomize(model, seed=2)
    second = logits(model, ids)
    assert not torch.allclose(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    deltas = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, AdapterLinear):
            deltas[layer_name] = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    dense = tiny_llama(torch.float64)
    with torch.no_grad():
        for layer_name, delta in deltas.items():
            dense.get_submodule(layer_name.removeprefix("base_model.model.")).weight += delta
    torch.testing.assert_close(both, logits(dense, ids), rtol=1e-10, atol=1e-10)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_merge_unmerge_and_unload(name, ids):
    model = randomize(adapted(name))
    expected = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers_of(merged)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-10, atol=1e-10)
    unloaded = randomize(adapted(name)).unload()
    assert torch.equal(logits(unloaded, ids), logits(tiny_llama(torch.float64), ids))


def test_safe_merge_refuses_weights_that_are_not_finite(name):
    model = randomize(adapted(name))
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_peft_converts_it_to_lora(low_rank_name, ids, tmp_path):
    model = randomize(adapted(low_rank_name, torch.float32), scale=0.1).eval()
    expected = logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_as_lora(tmp_path, model, rank=8)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-3, atol=1e-3)


def test_the_cached_pair_follows_every_change_of_the_factors(name, ids):
    model = randomize(adapted(name)).eval()
    before = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    randomize(model, seed=9)
    after = logits(model, ids)
    assert not torch.allclose(before, after)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    randomize(model, seed=10)
    model.load_state_dict(state)
    assert torch.equal(logits(model, ids), after)


def test_dropout_acts_in_training_only(name, ids):
    model = randomize(adapted(name, dropout=0.5))
    plain = randomize(adapted(name, dropout=0.0))
    assert torch.equal(logits(model.eval(), ids), logits(plain.eval(), ids))
    assert not torch.allclose(logits(model.train(), ids), logits(plain.train(), ids))


def test_factors_are_float32_on_a_bf16_base_and_the_output_is_bf16(name, ids):
    model = randomize(adapted(name, torch.bfloat16))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    narrow = get_peft_model(tiny_llama(torch.bfloat16), config_of(name), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in trainable(narrow).values()} == {torch.bfloat16}
    assert logits(model, ids).dtype == torch.bfloat16
    for layer in layers_of(model):
        if METHODS[name].is_low_rank():
            down, up = layer.materialize("default", torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                down_again, up_again = layer.materialize("default", torch.float32)
            assert torch.equal(down, down_again), "autocast must not reach the factors"
            assert torch.equal(up, up_again)


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8"])
def test_quantized_bases_train_save_reload_and_merge(name, kind, ids, tmp_path):
    def base():
        return quantize(tiny_llama(), kind)

    model = get_peft_model(base(), config_of(name)).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), expected)
    grown = loaded.train()(input_ids=ids, labels=ids)
    assert grown.loss.requires_grad is False
    model.merge_adapter()
    assert torch.isfinite(logits(model, ids)).all()
    model.unmerge_adapter()


def test_conv1d_targets_transpose(name, ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=96, n_positions=32)).double().eval()
    model = randomize(get_peft_model(gpt2, config_of(name, target_modules=["c_attn", "c_fc", "mlp.c_proj"])))
    assert {type(layer.base_layer) for layer in layers_of(model)} == {Conv1D}
    expected = logits(model.eval(), ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-10, atol=1e-10)


def test_patterns_set_the_rank_and_alpha_of_single_modules(ranked_name):
    model = adapted(ranked_name, rank_pattern={"down_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 1.0})
    down = model.base_model.model.model.layers[1].mlp.down_proj
    assert down.adapter_configs["default"].rank == 2
    query = [layer.self_attn.q_proj.adapter_configs["default"] for layer in model.base_model.model.model.layers]
    assert query[0].scaling == 0.25
    assert query[1].scaling != 0.25
    assert sum(p.numel() for p in trainable(adapted(ranked_name)).values()) > sum(
        p.numel() for p in trainable(model).values()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "v_porj"]}, "did you mean 'v_proj'"),
        ({"target_modules": ".*nothing"}, "matches no module"),
        ({"rank": 0}, "expected an integer >= 1"),
        ({"rank": 4096}, r"model\.layers\.0\..*rank=4096 is larger"),
        ({"dropout": 1.5}, "dropout"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern.*did you mean 'q_proj'"),
        ({"target_modules": ["embed_tokens"]}, "not a linear layer"),
        ({"rnak": 3}, "did you mean 'rank'"),
    ],
)
def test_mistakes_name_the_place_and_the_remedy_and_leave_the_model_untouched(name, changes, message):
    model = tiny_llama()
    if name in OTHER and changes in ({"rank": 4096}, {"rank_pattern": {"q_prj": 2}}):
        message = "rank: .* has none"
    with pytest.raises(UserError, match=message):
        get_peft_model(model, config_of(name, **changes))
    assert not layers_of(model)


def test_each_sample_of_a_batch_uses_the_adapter_it_names(name, ids):
    model = randomize(adapted(name))
    model.add_adapter("other", config_of(name, rank=1))
    randomize(model, seed=4).eval()
    names = ["other", "__base__", "default", "other"]
    ids = torch.cat([ids, ids.flip(1)])
    if not METHODS[name].is_low_rank():
        with pytest.raises(UserError, match="no low-rank form"):
            model(input_ids=ids, adapter_names=names)
        return
    with torch.no_grad():
        actual = model(input_ids=ids, adapter_names=names).logits
        for sample, adapter in enumerate(names):
            if adapter == "__base__":
                with model.disable_adapter():
                    expected = model(input_ids=ids[sample : sample + 1]).logits
            else:
                model.set_adapter(adapter)
                expected = model(input_ids=ids[sample : sample + 1]).logits
            torch.testing.assert_close(actual[sample : sample + 1], expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(actual[0], actual[3]), "samples differ, or this test checks nothing"
        assert all(layer.per_sample is None for layer in layers_of(model))
        with pytest.raises(UserError, match="no adapter 'othr'; did you mean 'other'"):
            model(input_ids=ids, adapter_names=["othr"] * 4)
        with pytest.raises(UserError, match="2 names for a batch of 4 samples"):
            model(input_ids=ids, adapter_names=["other"] * 2)
        assert all(layer.per_sample is None for layer in layers_of(model))
    model.train()
    with pytest.raises(UserError, match=r"model\.eval"):
        model(input_ids=ids, adapter_names=names)


def test_all_linear_spares_the_head(name):
    model = adapted(name, target_modules="all-linear")
    assert len(layers_of(model)) == 14
    assert not isinstance(model.base_model.model.lm_head, AdapterLinear)


def test_checkpointing_of_transformers_still_recomputes(name, ids):
    model = adapted(name)
    model.enable_input_require_grads()
    calls = []
    layers_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    reference = model(input_ids=ids, labels=ids).loss
    reference.backward()
    grads = [parameter.grad.clone() for parameter in trainable(model).values()]
    for reentrant in (True, False):
        model.zero_grad()
        calls.clear()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == 2, "one forward, one recomputation"
        for grad, parameter in zip(grads, trainable(model).values(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_torch_compile_sees_no_graph_break(name):
    layer = layers_of(randomize(adapted(name, torch.float32)))[0]
    explained = torch._dynamo.explain(layer)(torch.randn(3, 48))
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LsrConfig(rank=4, separation_rank=5000),
            r"separation_rank=5000 gives the down side .* lower separation_rank to",
        ),
        (LsrConfig(rank=16, separation_rank=48), r"more than the 2,304 of the matrix that it adapts \(48 x 48\)"),
        (KronLoraConfig(rank=48, left_in=1, left_out=1), r"has 4,609 parameters, more than the 2,304 of"),
    ],
)
def test_an_adapter_larger_than_what_it_adapts_is_refused_before_anything_is_made(config, message, monkeypatch):
    monkeypatch.setattr(tuner, "MAX_OVERSIZED_PARAMETERS", 0)
    model = tiny_llama()
    before = dict(model.named_parameters())
    config.target_modules = {"q_proj"}
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: .*" + message):
        get_peft_model(model, config)
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize(
    "config", [LsrConfig(rank=16, separation_rank=48), KronLoraConfig(rank=48, left_in=1, left_out=1)]
)
def test_a_tiny_model_is_only_warned_of_an_adapter_larger_than_its_matrices(config):
    config.target_modules = {"q_proj"}
    with pytest.warns(UserWarning, match=r"q_proj and 1 more .* more than the 2,304 of the matrix that it adapts"):
        get_peft_model(tiny_llama(), config)


def test_many_terms_on_a_7b_are_refused_and_what_the_ablations_need_is_not():
    with pytest.raises(
        UserError, match=r"2,560,000 parameters, more than 16 times its dense form's 65,536; .* at most 2048"
    ):
        METHODS["lsr"].parameter_shapes(4096, 14336, LsrConfig(rank=16, separation_rank=5000))
    METHODS["lsr"].parameter_shapes(192, 576, LsrConfig(rank=1, separation_rank=64))
