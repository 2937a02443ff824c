"""Rows padded on the right take no mask to attention, and cuDNN never gets one: its gradients are not finite then."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, MistralConfig, MistralForCausalLM

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.fused import attention_block
from lsr_scale.fused.attention_mask import needs_mask
from lsr_scale.kernels.attention import Sequences, attention_reference, disable_cudnn_in_sdpa
from lsr_scale.model import load_base
from lsr_scale.training.steps.head_loss import HeadCollator
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, randomize, tiny_llama

OPTIONS = {"target_modules": SEVEN_LINEARS, "rank": 4, "separation_rank": 2}
TOLERANCE = 2e-5  # transformers' norms compute in float32


def adapted(base=None, task="CAUSAL_LM"):
    base = tiny_llama(torch.float64) if base is None else base
    return randomize(get_peft_model(base, peft_config("lsr", OPTIONS, task))).train()


@pytest.fixture
def padded(ids):
    """Return a batch whose rows are padded on the right, and learn nothing there."""
    mask = torch.ones_like(ids)
    mask[0, -4:] = mask[1, 6:] = 0
    ids = torch.where(mask == 1, ids, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def step(model, batch):
    """Return loss and gradients of a training step."""
    model.train().zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert len(found) > 8
    for name, value in expected.items():
        assert (found[name] - value).norm() <= TOLERANCE * value.norm(), name


@pytest.fixture
def masks(monkeypatch):
    """Return whether each call of a fused layer's attention had a mask."""
    seen, original = [], attention_block.attention
    monkeypatch.setattr(
        attention_block, "attention", lambda *args: (seen.append(args[3].mask is not None), original(*args))[1]
    )
    return seen


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_padding_on_the_right_takes_no_mask_to_attention(recompute, window, padded, masks):
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**TINY_SIZES, head_dim=12, sliding_window=window)).double()
    model = adapted(base)
    expected = step(model, padded)
    assert len(lsr_scale.fuse(model, recompute=recompute).fused) == 2
    assert_same(step(model, padded), expected)
    assert masks == [False] * (4 if recompute == "full" else 2)


def test_an_evaluation_computes_what_is_at_padding_too(padded, masks):
    model = adapted().eval()
    with torch.no_grad():
        expected = model(**padded, use_cache=False).logits
        lsr_scale.fuse(model)
        found = model(**padded, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert masks == [True, True]


def test_supervised_padding_is_masked(padded, masks):
    batch, model = {**padded, "labels": padded["input_ids"]}, adapted()
    expected = step(model, batch)
    lsr_scale.fuse(model)
    assert_same(step(model, batch), expected)
    assert masks == [True, True]


@pytest.mark.parametrize("of_the_head", [False, True])
def test_what_falls_back_computes_the_same_without_a_mask(of_the_head, padded):
    model = adapted()
    expected = step(model, padded)
    lsr_scale.fuse(model)
    head = model.get_base_model()
    (head.lm_head if of_the_head else head.model.layers[0].mlp).register_forward_hook(lambda *_: None)
    assert_same(step(model, padded), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_a_loss_function_of_the_users_is_given_what_transformers_gives_it(learned, padded, masks):
    batch, model = {**padded, **({"labels": padded["input_ids"]} if learned else {})}, adapted()

    seen = []

    def loss(logits, labels, vocab_size, **others):
        seen.append(sorted(others))
        wanted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted)

    model.get_base_model().loss_function = loss
    expected = step(model, batch)
    lsr_scale.fuse(model)
    assert_same(step(model, batch), expected)
    assert masks == [learned, learned]
    assert seen[0] == seen[1]
    assert model.get_base_model().model.mask_is_needed is None


def test_a_classifier_that_is_padded_on_the_right(padded, masks):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**TINY_SIZES, num_labels=3)).double()
    model, batch = adapted(base, "SEQ_CLS"), {**padded, "labels": torch.tensor([2, 1])}
    expected = step(model, batch)
    assert len(lsr_scale.fuse(model).fused) == 2
    assert_same(step(model, batch), expected)
    assert masks == [False, False]


@pytest.mark.parametrize("collated", [False, True])
@pytest.mark.parametrize("side", ["left", "both", "hole", "right"])
def test_any_padding_gives_the_loss_of_transformers(side, collated, ids, masks):
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :3] = 0
    if side in ("both", "right"):
        mask[1, -2:] = 0
    if side == "hole":
        mask[0, :3], mask[1, 4:6] = 1, 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # what padding says of the next token
    batch, model = {"input_ids": ids, "attention_mask": mask, "labels": labels}, adapted()
    expected = step(model, batch)
    lsr_scale.fuse(model)
    if collated:
        batch |= HeadCollator(lambda examples: examples)(batch)["head"]["known"]
    assert_same(step(model, batch), expected)
    assert masks == [side != "right"] * 2


def test_a_mask_beside_positions_or_a_cache_is_used(padded):
    positions = torch.arange(padded["input_ids"].shape[1])[None]
    assert not needs_mask(padded, padded["labels"])
    assert not needs_mask({"input_ids": padded["input_ids"]})
    assert not needs_mask({**padded, "attention_mask": padded["attention_mask"].bool()})
    for more in ({"position_ids": positions}, {"past_key_values": object()}, {"cu_seq_lens_q": positions[0]}):
        assert needs_mask({**padded, **more}, padded["labels"])
    assert needs_mask({**padded, "attention_mask": torch.ones(2, 1, 11, 11)})


def test_positions_beside_a_mask_do_not_become_documents(ids):
    """With a mask Transformers does not look for documents, so two of them see each other."""
    positions = torch.tensor([[*range(6), *range(5)]])
    batch = {"input_ids": ids[:1], "labels": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
    batch["position_ids"] = positions
    model = adapted()
    expected = step(model, batch)
    lsr_scale.fuse(model)
    assert_same(step(model, batch), expected)


def test_cudnn_is_never_chosen_under_a_mask(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    q, mask = torch.randn(1, 8, 2, 16), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    begins = {
        "a base is loaded": lambda: load_base(str(tmp_path), quantization="none"),
        "a loop of the user's own": lambda: lsr_scale.fuse(tiny_llama()),
        "a mask": lambda: attention_reference(q, q, q, Sequences(1.0, mask=mask)),
        "that function": disable_cudnn_in_sdpa,
    }
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for name, begin in begins.items():
            torch.backends.cuda.enable_cudnn_sdp(True)
            begin()
            assert not torch.backends.cuda.cudnn_sdp_enabled(), name
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
