"""Log-probabilities and gradients of padded rows are those of their tokens in one row, without the padding."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from lsr_scale.fused import fuse
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.training.steps import log_probs, unpadded
from lsr_scale.training.steps.log_probs import completion_log_probs, use_fused_head
from lsr_scale.training.steps.unpadded import MULTIPLE, KnownRows, rows_of
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, randomize, tiny_llama
from tests.kernels.checks import error

LENGTHS = [7, 3, 11, 5]
PROMPTS = [3, 1, 4, 2]


def batch(side):
    """Return ids, mask and labels of rows of odd lengths, padded on a side or, as GRPO's, on both."""
    torch.manual_seed(0)
    size = max(LENGTHS) + 2
    ids, mask = torch.randint(5, 60, (4, size)), torch.zeros(4, size, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        start = {"right": 0, "left": size - length, "both": max(PROMPTS) - prompt}[side]
        mask[row, start : start + length] = 1
        labels[row, start + prompt : start + length] = ids[row, start + prompt : start + length]
    return ids, mask, labels


def model(window=None, **sizes):
    base = tiny_llama(**sizes)
    if window is not None:
        base = MistralForCausalLM(MistralConfig(**{**TINY_SIZES, **sizes}, sliding_window=window))
    found = randomize(get_peft_model(base, LoraConfig(r=4, target_modules=SEVEN_LINEARS)))
    fuse(found)
    return found.train()


def outcome(found, ids, mask, labels, unpads):
    found.zero_grad()
    rows = rows_of(ids, mask, labels, unpads)
    base = found.get_base_model()
    log_probs, described = completion_log_probs(base, rows, True, input_ids=ids, attention_mask=mask)
    (log_probs * torch.linspace(1, 2, len(log_probs), device=log_probs.device)).sum().backward()
    gradients = [p.grad.clone() for p in found.parameters() if p.requires_grad]
    return rows, log_probs.detach(), described, gradients


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_rows_without_padding_are_the_padded_ones(side, monkeypatch):
    found, given = model(), batch(side)
    computed = []
    hook = lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel())  # noqa: E731
    found.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)
    padded, expected, described, gradients = outcome(found, *given, unpads=False)
    rows, actual, alike, again = outcome(found, *given, unpads=True)
    assert computed == [given[0].numel(), MULTIPLE]
    assert int(given[1].sum()) == sum(LENGTHS) < MULTIPLE
    assert torch.equal(rows.mask, padded.mask)
    assert torch.equal(rows.targets, padded.targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(alike.entropy, described.entropy, rtol=0, atol=2e-6)
    assert torch.equal(alike.is_top1, described.is_top1)
    for one, other in zip(again, gradients, strict=True):
        assert error(one, other) < 2e-5


def completions(side, full=False):
    """Return rows of which several begin alike: three completions of a prompt, two of another, one row by itself."""
    torch.manual_seed(1)
    prompts = [torch.randint(5, 60, (size,)) for size in (9, 6, 4)]
    own = [[4, 6, 5] if not full else [6, 6, 6], [5, 3] if not full else [9, 9], [2] if not full else [11]]
    texts = [(one, torch.randint(5, 60, (n,))) for one, sizes in zip(prompts, own, strict=True) for n in sizes]
    texts = [texts[place] for place in (0, 3, 1, 5, 4, 2)]  # not beside each other
    size = max(len(a) + len(b) for a, b in texts) + (0 if full else 2)
    ids, mask = torch.randint(60, 90, (len(texts), size)), torch.zeros(len(texts), size, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(texts):
        length = len(prompt) + len(answer)
        start = {"right": 0, "left": size - length, "both": max(map(len, prompts)) - len(prompt)}[side]
        ids[row, start : start + length] = torch.cat((prompt, answer))
        mask[row, start : start + length] = 1
        labels[row, start + len(prompt) : start + length] = answer
    return ids, mask, labels


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["right", "left", "both", "full"])
def test_what_rows_begin_with_is_computed_once(side, window):
    found = model(window)
    given = completions("right" if side == "full" else side, full=side == "full")
    padded, expected, described, gradients = outcome(found, *given, unpads=False)
    rows, actual, alike, again = outcome(found, *given, unpads=True)
    tokens = int(given[1].sum()) - 2 * 9 - 6
    assert len(rows.tokens) == -(-tokens // MULTIPLE) * MULTIPLE
    assert rows.documents["shared_prefixes"].max_seqlen >= int(given[1].sum(1).max())
    assert torch.equal(rows.targets, padded.targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(alike.entropy, described.entropy, rtol=0, atol=2e-6)
    for one, other in zip(again, gradients, strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["right", "left", "both", "full"])
def test_flash_attends_to_what_rows_begin_with(side, window):
    found = model(window, hidden_size=256, intermediate_size=512).cuda()
    given = [one.cuda() for one in completions("right" if side == "full" else side, full=side == "full")]
    _, expected, _, gradients = outcome(found, *given, unpads=False)
    found.to(torch.bfloat16)
    padded, near, _, of_padded = outcome(found, *given, unpads=False)
    rows, actual, _, again = outcome(found, *given, unpads=True)
    assert padded.tokens is None
    assert "shared_prefixes" in rows.documents
    assert error(actual, expected) < 2 * error(near, expected) + 2e-3
    for one, other, exact in zip(again, of_padded, gradients, strict=True):
        assert error(one, exact) < 2 * error(other, exact) + 2e-2


def test_rows_that_are_the_same_and_rows_of_padding_alone():
    ids, mask, labels = completions("right")
    ids[1], mask[1], labels[1] = ids[0], mask[0], labels[0]
    mask[3], labels[3] = 0, IGNORE_INDEX
    found = model()
    kept = [0, 1, 2, 4, 5]
    _, expected, _, gradients = outcome(found, ids[kept], mask[kept], labels[kept], unpads=False)
    _, actual, _, again = outcome(found, ids, mask, labels, unpads=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    for one, other in zip(again, gradients, strict=True):
        assert error(one, other) < 2e-5


def test_few_tokens_in_common_are_computed_again():
    ids, mask, labels = batch("right")
    ids[:2, 0] = 3
    rows = rows_of(ids, mask, labels, unpads=True)
    assert "shared_prefixes" not in rows.documents
    assert rows.tokens[:7].tolist() == list(range(7))


def test_full_rows_stay_and_need_no_mask():
    ids, _, labels = batch("right")
    for mask in (torch.ones_like(ids), None):
        rows = rows_of(ids, mask, labels, unpads=True)
        assert rows.tokens is None
        assert not rows.mask_is_needed


def test_a_label_behind_padding_is_predicted_by_it():
    ids, mask, labels = batch("left")
    labels[1, -3] = ids[1, -3]  # its row's first token
    rows = rows_of(ids, mask, labels, unpads=True)
    assert rows.tokens is None
    assert rows.mask_is_needed
    assert rows.mask[1, -3]


def test_right_padding_needs_no_mask():
    assert not rows_of(*batch("right"), unpads=False).mask_is_needed
    assert rows_of(*batch("left"), unpads=False).mask_is_needed


def test_the_reference_asks_for_what_is_known(monkeypatch):
    ids, mask, labels = batch("right")
    asked = []
    monkeypatch.setattr(unpadded, "rows_of", lambda *given: asked.append(1) or rows_of(*given))
    known = KnownRows()
    first, of_kl = known.of(ids, mask, labels, True), known.of(ids, mask.clone(), labels, True)
    assert known.of(ids, mask, labels, True) is first
    assert len(asked) == 2
    labels[0, 5] = IGNORE_INDEX  # in place: others now
    assert known.of(ids, mask, labels, True) is not first
    assert of_kl is not first
    assert known.of(ids, mask, labels, False).tokens is None


def test_tensors_of_inference_mode_are_asked_for_each_time():
    known = KnownRows()
    with torch.inference_mode():
        ids, mask, labels = batch("right")
        before = known.of(ids, mask, labels, True)
        labels[0, 5] = IGNORE_INDEX
        assert len(known.of(ids, mask, labels, True).targets) == len(before.targets) - 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_run_unfused_attend_to_what_rows_begin_with(attention, monkeypatch):
    found = model(attn_implementation=attention)
    base: Any = found.get_base_model()
    base.model.layers[1].mlp.register_forward_hook(lambda *_: None)  # which a fused layer would pass by
    ids, mask, labels = completions("both")
    use_fused_head(base)
    answers = []
    for unpads in (False, True):
        monkeypatch.setattr(log_probs, "reads_documents", lambda _, unpads=unpads: unpads)
        answers.append(base(input_ids=ids, attention_mask=mask, labels=labels.clone(), fused_lm_head=True).log_probs)
    torch.testing.assert_close(*answers, rtol=0, atol=2e-6)


def test_a_batch_of_padding_alone_stays_as_it_is():
    ids, mask, labels = batch("right")
    rows = rows_of(ids, mask.zero_(), labels.fill_(IGNORE_INDEX), unpads=True)
    assert rows.tokens is None
    assert not len(rows.targets)
