"""Log-probabilities and gradients of padded rows are those of their tokens in one row, without the padding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lsr_scale.fused import fuse
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.training.steps import unpadded
from lsr_scale.training.steps.log_probs import completion_log_probs
from lsr_scale.training.steps.unpadded import KnownRows, rows_of
from tests.conftest import SEVEN_LINEARS, randomize, tiny_llama

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


def model():
    found = randomize(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=SEVEN_LINEARS)))
    fuse(found)
    return found.train()


def outcome(found, ids, mask, labels, unpads):
    found.zero_grad()
    rows = rows_of(mask, labels, unpads)
    base = found.get_base_model()
    log_probs, described = completion_log_probs(base, rows, True, input_ids=ids, attention_mask=mask)
    (log_probs * torch.linspace(1, 2, len(log_probs))).sum().backward()
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
    assert computed == [given[0].numel(), sum(LENGTHS)]
    assert torch.equal(rows.mask, padded.mask)
    assert torch.equal(rows.targets, padded.targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(alike.entropy, described.entropy, rtol=0, atol=2e-6)
    assert torch.equal(alike.is_top1, described.is_top1)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_full_rows_stay_and_need_no_mask():
    ids, _, labels = batch("right")
    for mask in (torch.ones_like(ids), None):
        rows = rows_of(mask, labels, unpads=True)
        assert rows.tokens is None
        assert not rows.mask_is_needed


def test_a_label_behind_padding_is_predicted_by_it():
    ids, mask, labels = batch("left")
    labels[1, -3] = ids[1, -3]  # its row's first token
    rows = rows_of(mask, labels, unpads=True)
    assert rows.tokens is None
    assert rows.mask_is_needed
    assert rows.mask[1, -3]


def test_right_padding_needs_no_mask():
    _, mask, labels = batch("right")
    assert not rows_of(mask, labels, unpads=False).mask_is_needed
    _, mask, labels = batch("left")
    assert rows_of(mask, labels, unpads=False).mask_is_needed


def test_the_reference_asks_for_what_is_known(monkeypatch):
    _, mask, labels = batch("right")
    asked = []
    monkeypatch.setattr(unpadded, "rows_of", lambda *given: asked.append(1) or rows_of(*given))
    known = KnownRows()
    first, of_kl = known.of(mask, labels, True), known.of(mask.clone(), labels, True)
    assert known.of(mask, labels, True) is first
    assert len(asked) == 2
    labels[0, 5] = IGNORE_INDEX  # in place: others now
    assert known.of(mask, labels, True) is not first
    assert of_kl is not first
    assert known.of(mask, labels, False).tokens is None


def test_tensors_of_inference_mode_are_asked_for_each_time():
    known = KnownRows()
    with torch.inference_mode():
        _, mask, labels = batch("right")
        before = known.of(mask, labels, True)
        labels[0, 5] = IGNORE_INDEX
        assert len(known.of(mask, labels, True).targets) == len(before.targets) - 1
