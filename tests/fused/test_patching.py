"""The fused path against the unfused one: outputs, every gradient, and when it must fall back."""

import copy
import itertools
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import lsr_scale
from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.errors import UserError
from lsr_scale.fused import attention_block, linear, mlp_block, modules, subclass
from lsr_scale.fused.fallback import layer_fallback_reason
from lsr_scale.fused.linear_groups import LinearGroup
from lsr_scale.fused.subclass import original_classes
from lsr_scale.layers.frozen_linear import freeze_quantized
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, quantize, randomize, tiny_llama

RANKS = {
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 2, "dropout": 0.0},
    "kadaptation": {"phm_dim": 4, "alpha": 1.0},
    "lora_xs": {"rank": 4, "alpha": 160.0},
    "slora": {"rank": 3, "init": "nystrom"},
    "lora": {"rank": 3},
}
# transformers' norms compute in float32 on a float64 model too: what is compared with is no more exact than that
SAME = 2e-5


def adapted(base: nn.Module, method: str = "lsr", **options) -> nn.Module:
    """Return the base with an adapter that changes it, in training mode."""
    values = {"target_modules": SEVEN_LINEARS, **RANKS[method], **options}
    return randomize(get_peft_model(base, peft_config(method, values, "CAUSAL_LM"))).train()


def results(model: nn.Module, ids: torch.Tensor, **inputs) -> dict[str, torch.Tensor]:
    """Return logits of an evaluation, and loss and gradients of a training step."""
    found = {}
    model.eval()
    with torch.no_grad():
        found["logits"] = model(input_ids=ids, use_cache=False, **inputs).logits
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    found["loss"] = loss.detach()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    """Compare by norm, name by name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_logits_loss_and_every_gradient_equal_the_unfused_path(method, recompute, ids):
    model = adapted(tiny_llama(torch.float64), method)
    expected = results(model, ids)
    assert len(expected) == 2 + sum(p.requires_grad for p in model.parameters())
    report = lsr_scale.fuse(model, recompute=recompute)
    assert len(report.fused) == 2
    assert not report.unfused
    assert_same(results(model, ids), expected, SAME)


@pytest.mark.parametrize(
    ("config", "cls", "options"),
    [
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
        (MistralConfig, MistralForCausalLM, {"head_dim": 12, "sliding_window": 4}),
        (Qwen2Config, Qwen2ForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_family(config, cls, options, recompute, ids):
    torch.manual_seed(0)
    base = cls(config(**{**TINY_SIZES, **options})).double()
    for name, parameter in base.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.normal_(parameter, 0.5)
    model = adapted(base)
    expected = results(model, ids)
    assert len(lsr_scale.fuse(model, recompute=recompute).fused) == 2
    assert_same(results(model, ids), expected, SAME)


def double_in_place(gradient):
    gradient.mul_(2)


@pytest.mark.parametrize(("between", "copies"), [(None, 1), (lambda gradient: 2 * gradient, 2), (double_in_place, 1)])
def test_a_layer_takes_the_gradient_buffer_of_the_layer_above(between, copies, ids, monkeypatch):
    def observe(out):
        if out.requires_grad:
            out.register_hook(between)

    model = adapted(tiny_llama(torch.float64))
    lower = model.get_base_model().model.layers[0]
    if between is not None:
        lower.register_forward_hook(lambda _, args, out: observe(out))
    expected = results(model, ids)
    made, original = [], LinearGroup.extended
    monkeypatch.setattr(LinearGroup, "extended", lambda *args: (made.append(1), original(*args))[1])
    lsr_scale.fuse(model)
    assert_same(results(model, ids), expected, SAME)
    assert len(made) == copies  # the last layer's gradient comes from the head


def test_a_gradient_that_the_loss_adds_to_between_two_layers(ids):
    def gradients(model):
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids, output_hidden_states=True)
        (out.loss + out.hidden_states[1].square().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = adapted(tiny_llama(torch.float64))
    expected = gradients(model)
    lsr_scale.fuse(model)
    assert_same(gradients(model), expected, SAME)


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8"])
def test_quantized_bases(kind, ids):
    model = adapted(quantize(tiny_llama(), kind, torch.float32))
    expected = results(model, ids)
    lsr_scale.fuse(model)
    assert_same(results(model, ids), expected, 1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "o_proj"]])
def test_any_subset_of_targets(targets, ids):
    model = adapted(tiny_llama(torch.float64), target_modules=targets)
    expected = results(model, ids)
    lsr_scale.fuse(model)
    assert_same(results(model, ids), expected, SAME)


def test_ranks_by_module_and_layers_without_adapter(ids):
    model = adapted(tiny_llama(torch.float64), rank_pattern={"v_proj": 6, "down_proj": 1}, layers_to_transform=[1])
    expected = results(model, ids)
    assert len(lsr_scale.fuse(model).fused) == 2
    assert_same(results(model, ids), expected, SAME)


def test_several_active_adapters_stand_side_by_side(ids):
    model = adapted(tiny_llama(torch.float64))
    model.add_adapter("other", peft_config("lsr", {"target_modules": ["q_proj", "up_proj"], "rank": 2}, "CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    randomize(model, seed=3)
    expected = results(model, ids)
    assert any("other" in name for name in expected)
    lsr_scale.fuse(model)
    assert_same(results(model, ids), expected, SAME)


def test_padding_on_either_side(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    model = adapted(tiny_llama(torch.float64))
    expected = results(model, ids, attention_mask=mask)
    lsr_scale.fuse(model)
    assert_same(results(model, ids, attention_mask=mask), expected, SAME)


@pytest.mark.parametrize("lengths", [(5, 11, 6), (11, 11), (2,) * 11])
def test_packed_documents_do_not_see_each_other(lengths, ids):
    packed = ids.reshape(1, -1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model = adapted(tiny_llama(torch.float64))
    expected = results(model, packed, position_ids=positions)
    lsr_scale.fuse(model)
    assert_same(results(model, packed, position_ids=positions), expected, SAME)
    boundaries = dict(
        cu_seq_lens_q=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    )
    assert_same(results(model, packed, position_ids=positions, **boundaries), expected, SAME)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers_checkpointing_around_fused_layers(use_reentrant, ids, monkeypatch):
    model = adapted(tiny_llama(torch.float64))
    expected = results(model, ids)
    lsr_scale.fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    original = attention_block.forward
    monkeypatch.setattr(attention_block, "forward", lambda *args: (calls.append(1), original(*args))[1])
    assert_same(results(model, ids), expected, SAME)
    # two layers: evaluation, forward, and forward again in the backward pass
    assert len(calls) == 6


@pytest.mark.parametrize(("recompute", "counts"), [("none", (2, 2, 2)), ("mlp", (2, 4, 2)), ("full", (4, 4, 2))])
def test_what_is_recomputed_is_what_was_asked_for(recompute, counts, ids, monkeypatch):
    model = adapted(tiny_llama())
    lsr_scale.fuse(model, recompute=recompute)
    parts = {"forward": attention_block, "gate_up_forward": mlp_block, "down_forward": mlp_block}
    calls = dict.fromkeys(parts, 0)
    for name, block in parts.items():
        original = getattr(block, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(block, name, counted)
    model(input_ids=ids, labels=ids).loss.backward()
    assert tuple(calls.values()) == counts


@pytest.mark.parametrize(
    ("recompute", "per_token"), [("none", 240 + 160 + 4 * 64), ("mlp", 240 + 3 * 64), ("full", 48 + 64)]
)
def test_what_is_saved_for_the_backward_pass(recompute, per_token, ids):
    """Values per token: x, m, q k v, attended (48 + 48 + 96 + 48), gate and up (160), 64 per group's `x down^T`."""
    model = adapted(tiny_llama())
    lsr_scale.fuse(model, recompute=recompute)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / tensor.element_size()
        return tensor

    layer = model.base_model.model.model.layers[1]
    tokens = torch.randn(64, 16, 48).requires_grad_()
    stack = model.base_model.model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack.layers = nn.ModuleList([layer])
        stack.config.num_hidden_layers = 1
        stack(inputs_embeds=tokens)
    big = sum(size for size in sizes.values() if size >= 1024 * 40) / 1024
    assert per_token + 48 <= big <= per_token + 48  # the final norm of transformers keeps its input


def test_disabled_adapters_leave_a_fused_frozen_model(ids):
    model = adapted(tiny_llama(torch.float64))
    with model.disable_adapter():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    lsr_scale.fuse(model)
    with model.disable_adapter():
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-6)
    assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-3)


def test_a_frozen_model_gives_its_input_a_gradient(ids):
    base = tiny_llama(torch.float64).requires_grad_(False).train()
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    (expected,) = torch.autograd.grad(base(inputs_embeds=embedded, labels=ids).loss, embedded)
    lsr_scale.fuse(base, recompute="full")
    (found,) = torch.autograd.grad(base(inputs_embeds=embedded, labels=ids).loss, embedded)
    assert torch.allclose(found, expected, atol=1e-6)


def test_generation_is_the_same(ids):
    model = adapted(tiny_llama(torch.float64)).eval()
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    lsr_scale.fuse(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)


def test_pairs_are_cached_in_evaluation_until_a_factor_changes(ids, monkeypatch):
    model = adapted(tiny_llama()).eval()
    lsr_scale.fuse(model)
    calls = []
    original = METHODS["lsr"].materialize
    monkeypatch.setattr(METHODS["lsr"], "materialize", staticmethod(lambda p: (calls.append(1), original(p))[1]))
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=False).logits
        made = len(calls)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, first)
        assert len(calls) == made > 0
        next(p for p in model.parameters() if p.requires_grad).add_(0.5)
        assert not torch.equal(model(input_ids=ids, use_cache=False).logits, first)
        assert len(calls) > made


@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_other_architectures_fuse_linear_by_linear(method, kind, ids):
    torch.manual_seed(0)
    base = GemmaForCausalLM(GemmaConfig(**{**TINY_SIZES, "head_dim": 12, "hidden_activation": "gelu"}))
    base = quantize(base, kind, torch.float32) if kind else base.double()
    freeze_quantized(base)
    model = adapted(base, method)
    expected = results(model, ids)
    report = lsr_scale.fuse(model)
    assert str(report).startswith("14 adapted linears fused one by one")
    assert_same(results(model, ids), expected, 1e-4 if kind else SAME)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert_same(results(model, ids), expected, 1e-4 if kind else SAME)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: pytest.fail("kept") if x.numel() == 48 * 80 else x, lambda x: x
    ):
        gate = model.base_model.model.model.layers[0].mlp.gate_proj
        gate(torch.randn(1, 2, 48, dtype=next(model.parameters()).dtype))  # no weight among what is kept


def test_the_linears_of_an_unfused_layer_stay_fused(ids, monkeypatch):
    model = adapted(tiny_llama(torch.float64))
    model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    expected = results(model, ids)
    lsr_scale.fuse(model)
    calls = []
    original = linear.LinearFunction.forward
    monkeypatch.setattr(linear.LinearFunction, "forward", lambda *args: (calls.append(1), original(*args))[1])
    assert_same(results(model, ids), expected, SAME)
    assert len(calls) == 7


def test_unfuse_gives_the_classes_back_and_fuse_may_be_repeated(ids):
    model = adapted(tiny_llama())
    classes = [type(module) for module in model.modules()]
    lsr_scale.fuse(model)
    assert [type(module) for module in model.modules()] != classes
    assert len(lsr_scale.fuse(model, recompute="full").fused) == 2
    lsr_scale.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert all("recompute" not in module.__dict__ for module in model.modules())


def test_original_classes_set_a_models_own_forward_aside(ids):
    """TRL's calls the forward that it found, the fused class's, which has no place on the original one."""
    model = adapted(tiny_llama())
    unfused = model(input_ids=ids, labels=ids).loss
    lsr_scale.fuse(model)
    base = model.get_base_model()
    found = base.forward
    base.forward = lambda *args, **kwargs: found(*args, **kwargs)
    own = base.forward
    handle = base.lm_head.register_forward_hook(lambda *_: None)  # so that the fused class would fall back
    with original_classes(model):
        assert torch.equal(model(input_ids=ids, labels=ids).loss, unfused)
    handle.remove()
    assert base.forward is own
    assert type(base).__name__ == "FusedLlamaForCausalLM"


def test_a_fused_model_is_copied_pickled_and_saved(ids, tmp_path):
    model = adapted(tiny_llama()).eval()
    lsr_scale.fuse(model, recompute="full")
    expected = model(input_ids=ids, use_cache=False).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.base_model.model.model.layers[0]))):
        if hasattr(other, "generate"):
            assert torch.equal(other(input_ids=ids, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1000


class OtherMLP(nn.Module):
    """A feed-forward part that is not the family's."""

    def __init__(self, model):
        super().__init__()
        mlp = model.base_model.model.model.layers[0].mlp
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return -self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.merge_adapter(), "merged"),
        (lambda m: m.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None), "mlp has hooks"),
        (lambda m: m.base_model.model.model.layers[0].input_layernorm.requires_grad_(), "is trained itself"),
        (lambda m: m.set_attn_implementation("eager"), "attn_implementation"),
        (lambda m: setattr(m.base_model.model.model.layers[0].self_attn, "attention_dropout", 0.1), "dropout"),
        (lambda m: setattr(m.base_model.model.model.layers[0].self_attn, "is_causal", False), "not causal"),
        (lambda m: setattr(m.base_model.model.model.layers[0], "mlp", OtherMLP(m)), "mlp is a OtherMLP"),
    ],
)
def test_falling_back_is_logged_once_and_gives_the_same(change, reason, ids, caplog):
    model = adapted(tiny_llama(torch.float64))
    change(model)
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits
    lsr_scale.fuse(model)
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-6)
    model.train()
    for _ in range(2):
        model(input_ids=ids, labels=ids)
    lines = [record.message for record in caplog.records if "layer" in record.message.lower()]
    assert any(reason in line for line in lines)
    assert len(lines) == len(set(lines))


def first(model):
    return model.base_model.model.model.layers[0]


@pytest.mark.parametrize(
    ("change", "undo", "reason"),
    [
        (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(), "merged"),
        (
            lambda m: setattr(first(m), "handle", first(m).mlp.gate_proj.register_forward_hook(lambda *_: None)),
            lambda m: first(m).handle.remove(),
            "has hooks",
        ),
        (
            lambda m: setattr(first(m), "handle", first(m).mlp.up_proj.base_layer.register_full_backward_hook(print)),
            lambda m: first(m).handle.remove(),
            "has hooks",
        ),
        (
            lambda m: first(m).input_layernorm.requires_grad_(),
            lambda m: first(m).input_layernorm.requires_grad_(False),
            "is trained itself",
        ),
        (
            lambda m: first(m).self_attn.v_proj.base_layer.weight.requires_grad_(),
            lambda m: first(m).self_attn.v_proj.base_layer.weight.requires_grad_(False),
            "is trained itself",
        ),
        (
            lambda m: m.set_attn_implementation("eager"),
            lambda m: m.set_attn_implementation("sdpa"),
            "attn_implementation",
        ),
        (
            lambda m: setattr(first(m).self_attn, "attention_dropout", 0.1),
            lambda m: setattr(first(m).self_attn, "attention_dropout", 0.0),
            "attention_dropout",
        ),
        (
            lambda m: setattr(first(m).self_attn.q_proj, "forward", first(m).self_attn.q_proj.forward),
            lambda m: first(m).self_attn.q_proj.__dict__.pop("forward"),
            "forward of its own",
        ),
        (
            lambda m: first(m).self_attn.k_proj.adapter_dropout.update({"default": nn.Dropout(0.5)}),
            lambda m: first(m).self_attn.k_proj.adapter_dropout.update({"default": nn.Identity()}),
            "dropout",
        ),
        (
            lambda m: setattr(first(m).mlp, "act_fn", nn.GELU()),
            lambda m: setattr(first(m).mlp, "act_fn", nn.SiLU()),
            "the activation is GELU",
        ),
        (
            lambda m: setattr(first(m).self_attn.o_proj, "per_sample", object()),
            lambda m: setattr(first(m).self_attn.o_proj, "per_sample", None),
            "different adapters",
        ),
    ],
)
def test_a_change_between_steps_changes_whether_a_layer_falls_back(change, undo, reason, ids):
    model = adapted(tiny_llama())
    lsr_scale.fuse(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert first(model).fallback_check.reason is None
    remembered = first(model).fallback_check
    assert layer_fallback_reason(first(model)) is None
    assert first(model).fallback_check is remembered, "looked again for nothing"
    for _ in range(2):
        change(model)
        assert reason in (layer_fallback_reason(first(model)) or "")
        undo(model)
        assert layer_fallback_reason(first(model)) is None


def test_dropout_counts_in_training_alone_and_adapters_come_and_go(ids):
    model = adapted(tiny_llama(), dropout=0.5)
    lsr_scale.fuse(model)
    assert "dropout" in (layer_fallback_reason(first(model)) or "")
    assert layer_fallback_reason(first(model.eval())) is None
    assert "dropout" in (layer_fallback_reason(first(model.train())) or "")
    model.add_adapter("other", peft_config("lsr", {"target_modules": ["q_proj"], "rank": 2}, "CAUSAL_LM"))
    model.set_adapter("other")
    assert layer_fallback_reason(first(model)) is None
    model.set_adapter("default")
    assert "dropout" in (layer_fallback_reason(first(model)) or "")
    with model.disable_adapter():
        assert layer_fallback_reason(first(model)) is None


def test_adapter_dropout_falls_back_only_in_training(ids):
    model = adapted(tiny_llama(torch.float64), dropout=0.5)
    report = lsr_scale.fuse(model)
    assert "dropout" in next(iter(report.unfused.values()))
    assert not lsr_scale.fuse(model.eval()).unfused


def test_what_fuse_refuses():
    with pytest.raises(UserError, match=r"no adapters, and no decoder layers that can fuse \(Llama"):
        lsr_scale.fuse(nn.Linear(2, 2))
    with pytest.raises(UserError, match="recompute: expected one of none, mlp, full; got 'all'"):
        lsr_scale.fuse(tiny_llama(), recompute="all")  # pyright: ignore[reportArgumentType]


def test_the_head_computes_the_same_loss_in_chunks(ids, monkeypatch):
    model = adapted(tiny_llama(torch.float64))
    labels = ids.clone()
    labels[0, :6] = -100
    expected = model(input_ids=ids, labels=labels).loss.double()  # transformers computes it in float32
    lsr_scale.fuse(model)
    monkeypatch.setattr("lsr_scale.fused.loss.CHUNK_ELEMENTS", 96 * 4)
    output = model(input_ids=ids, labels=labels)
    assert output.logits is None
    assert torch.allclose(output.loss, expected, atol=1e-6)
    again = model(input_ids=ids, labels=labels, num_items_in_batch=7)
    assert torch.allclose(again.loss, expected * int((labels[:, 1:] != -100).sum()) / 7, atol=1e-5)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0


def test_packed_evaluation_with_a_cache_stays_causal(ids):
    packed, positions = ids.reshape(1, -1), torch.tensor([[*range(5), *range(11), *range(6)]])
    other = packed.clone()
    other[0, -1] += 1
    model = adapted(tiny_llama(torch.float64)).eval()
    expected = model(input_ids=packed, position_ids=positions, use_cache=True).logits
    lsr_scale.fuse(model)
    found = [model(input_ids=x, position_ids=positions, use_cache=True).logits for x in (packed, other)]
    assert torch.allclose(found[0], expected, atol=1e-6)
    assert torch.equal(found[0][:, :-1], found[1][:, :-1])


def test_packed_positions_of_one_row_for_two_are_masks(ids):
    positions = torch.tensor([[*range(5), *range(6)]])
    model = adapted(tiny_llama(torch.float64))
    expected = results(model, ids, position_ids=positions)
    lsr_scale.fuse(model)
    assert_same(results(model, ids, position_ids=positions), expected, SAME)
    with pytest.raises(UserError, match="cu_seq_lens_q ends at 5, but the packed rows have 22 tokens"):
        model(input_ids=ids.reshape(1, -1), cu_seq_lens_q=torch.tensor([0, 5]), max_length_q=5)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_unfused_layer_is_checkpointed_if_fused_ones_recompute(recompute, ids, monkeypatch):
    model = adapted(tiny_llama(torch.float64), dropout=0.1)
    lsr_scale.fuse(model, recompute=recompute)
    calls = []
    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: (calls.append(1), original(*args))[1])
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == {"none": 2, "full": 4}[recompute]


def test_factors_that_an_optimizer_writes_unseen_are_seen_after_training(ids):
    model = adapted(tiny_llama(), dropout=0.1).eval()
    lsr_scale.fuse(model)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        model.train()
        next(p for p in model.parameters() if p.requires_grad).data.add_(0.5)  # no version is counted
        assert not torch.equal(model.eval()(input_ids=ids, use_cache=False).logits, before)


def test_hooks_and_trained_biases_inside_a_linear_are_heeded(ids):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**TINY_SIZES)).double()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all", task_type="CAUSAL_LM")
    model = randomize(get_peft_model(base, config)).train()
    gate = model.base_model.model.model.layers[1].self_attn.v_proj
    gate.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected = results(model, ids)
    lsr_scale.fuse(model)
    assert_same(results(model, ids), expected, SAME)
    assert any("bias" in name for name in expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ignore_index": 7},
        {"return_dict": False},
        {"logits_to_keep": torch.arange(11)},
        {"shift_labels": None},
        {"num_items_in_batch": torch.tensor(9)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_head_heeds_its_arguments(arguments, ids):
    model = adapted(tiny_llama(torch.float64))

    def loss():
        output = model(input_ids=ids, labels=ids, **arguments)
        return (output[0] if isinstance(output, tuple) else output.loss).double()

    expected = loss()
    lsr_scale.fuse(model)
    assert torch.allclose(loss(), expected, atol=1e-6)


def test_a_model_with_another_head_computes_its_own_loss(ids):
    for change in ("adapter", "loss", "hook"):
        targets = [*SEVEN_LINEARS, "lm_head"] if change == "adapter" else SEVEN_LINEARS
        model = adapted(tiny_llama(torch.float64), target_modules=targets)
        inner = model.base_model.model
        if change == "loss":
            inner.loss_function = lambda logits, labels, **_: logits.square().mean()
        if change == "hook":
            inner.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
        expected = results(model, ids)
        lsr_scale.fuse(model)
        assert_same(results(model, ids), expected, SAME)


def test_backward_twice_and_gradients_of_gradients(ids):
    model = adapted(tiny_llama(torch.float64))
    lsr_scale.fuse(model)
    factor = next(p for p in model.parameters() if p.requires_grad)
    loss = model(input_ids=ids, labels=ids).loss
    (first,) = torch.autograd.grad(loss, factor, retain_graph=True)
    (second,) = torch.autograd.grad(loss, factor)
    assert torch.equal(first, second)
    assert first.any()
    (gradient,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_factors_changed_before_the_backward_pass_are_an_error(ids):
    model = adapted(tiny_llama())
    lsr_scale.fuse(model)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="changed between the forward and the backward pass"):
        loss.backward()


def test_hidden_states_are_recorded_and_recorders_do_not_count_as_hooks(ids):
    model = adapted(tiny_llama(torch.float64)).eval()
    expected = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    lsr_scale.fuse(model)
    found = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(found) == len(expected) == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert len(lsr_scale.fuse(model).fused) == 2


def test_pickles_load_where_nothing_was_fused_yet(ids, monkeypatch):
    model = adapted(tiny_llama()).eval()
    lsr_scale.fuse(model)
    expected, written = model(input_ids=ids, use_cache=False).logits, pickle.dumps(model)
    monkeypatch.setattr(subclass, "_SUBCLASSES", {})
    other = pickle.loads(written)
    assert torch.equal(other(input_ids=ids, use_cache=False).logits, expected)
    lsr_scale.unfuse(other)
    assert type(other.base_model.model) is LlamaForCausalLM


def test_a_linear_without_rows(ids):
    model = adapted(GemmaForCausalLM(GemmaConfig(**{**TINY_SIZES, "head_dim": 12})).double())
    lsr_scale.fuse(model)
    x = torch.zeros(0, 48, dtype=torch.float64, requires_grad=True)
    model.base_model.model.model.layers[0].mlp.gate_proj(x).sum().backward()
    assert x.grad.shape == (0, 48)


@pytest.mark.parametrize(("config", "cls"), [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)])
def test_packed_documents_where_a_layer_falls_back(config, cls, ids, monkeypatch):
    packed, positions = ids.reshape(1, -1), torch.tensor([[*range(5), *range(11), *range(6)]])
    windows = (
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1} if cls is Qwen2ForCausalLM else {}
    )
    torch.manual_seed(0)
    model = adapted(cls(config(**{**TINY_SIZES, **windows})).double())
    model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    expected = results(model, packed, position_ids=positions)
    lsr_scale.fuse(model)
    seen = []
    original = modules.packed_mask
    monkeypatch.setattr(modules, "packed_mask", lambda *args: (seen.append(1), original(*args))[1])
    assert_same(results(model, packed, position_ids=positions), expected, SAME)
    assert len(seen) == 2  # one layer, in evaluation and in training: no other made a mask
