"""The fused head's loss in a trainer: TRL's losses, gradients and counts, without TRL's head."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from trl import SFTTrainer

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.errors import UserError
from lsr_scale.fused.loss import causal_lm_loss
from lsr_scale.training import assembly
from lsr_scale.training.steps.head_loss import HeadCollator, HeadLoss, head_loss_fallback_reason
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama
from tests.helpers.tiny_runs import completions, do, factors, metrics, save_llama, tiny_run, write_rows

LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_ends_where_it_does_with_trls_head(tmp_path, monkeypatch, layout, accumulation):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", completions(15))
    write_rows(tmp_path / "held_out.jsonl", completions(5))
    losses = []
    compute = SFTTrainer.compute_loss
    monkeypatch.setattr(
        SFTTrainer, "compute_loss", lambda self, *args, **kw: losses.append(self) or compute(self, *args, **kw)
    )
    found = {}
    for head in ("ours", "trl"):
        if head == "trl":
            monkeypatch.setattr(assembly, "_use_own_head", lambda run, trainer: None)
        training = {
            **{"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "num_train_epochs": 2},
            **{"output_dir": str(tmp_path / head), "learning_rate": 1e-3, "fused": "on", "eval_strategy": "epoch"},
            **{"cuda_graphs": "off", **LAYOUTS[layout]},  # they are for our own head alone
        }
        data = {"train": [str(tmp_path / "rows.jsonl")], "validation": [str(tmp_path / "held_out.jsonl")]}
        sections = {"model": {"dtype": "float32"}, "data": data, "eval": {"tasks": []}}
        ended = do(tiny_run(tmp_path, training=training, **sections))
        found[head] = factors(ended), metrics(ended), len(losses)
    ours, trl = found["ours"], found["trl"]
    assert trl[2] - ours[2] > ours[2] > 0, "TRL's is used for evaluation, and for training where ours is off"
    for one, other in zip(ours[1], trl[1], strict=True):
        shared = {name for row in (one, other) for name in row} & {"loss", "eval_loss", "num_tokens", "grad_norm"}
        assert {name: one[name] for name in shared} == pytest.approx({name: other[name] for name in shared}, rel=1e-4)
        assert ("entropy" in one, "entropy" in other) == (False, "loss" in one)
    for name, factor in ours[0].items():
        torch.testing.assert_close(factor, trl[0][name], rtol=1e-3, atol=1e-6)


def fused_model():
    model = randomize(get_peft_model(tiny_llama(), peft_config("lsr", {"target_modules": SEVEN_LINEARS}, "CAUSAL_LM")))
    lsr_scale.fuse(model.double().train())
    return model


@pytest.mark.parametrize("learned", [0.5, 0.0])
def test_what_the_collator_knows_gives_the_same_loss(learned):
    model, generator = fused_model(), torch.Generator().manual_seed(0)
    head = model.get_base_model()
    ids = torch.randint(5, 60, (3, 17), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < learned, ids, -100)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    collated = HeadCollator(lambda examples: examples)(batch)
    known = collated["head"]["known"]
    assert collated["head"]["tokens"] == 17 + 9 + 17
    assert len(known["supervised"]) == len(known["targets"]) == int((labels[:, 1:] != -100).sum())
    found = []
    for more in ({}, known):
        model.zero_grad()
        loss = head(num_items_in_batch=7, **batch, **more).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert math.isfinite(found[0][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", [[9, 1, 7], [17]])
def test_the_collator_knows_where_packed_documents_begin(monkeypatch, lengths):
    model = fused_model()
    ids = torch.randint(5, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    known = HeadCollator(lambda examples: examples)(batch)["head"]["known"]
    expected = causal_lm_loss(model.get_base_model(), **batch).loss
    assert known["cu_seq_lens_q"].diff().tolist() == lengths
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "nonzero", None)  # which would wait for a GPU
        torch.testing.assert_close(causal_lm_loss(model.get_base_model(), **batch, **known).loss, expected)


def test_other_losses_are_left_to_trl():
    head = fused_model().get_base_model()
    assert head_loss_fallback_reason(head, {"loss_type": "nll", "label_smoothing_factor": 0.0}) is None
    assert head_loss_fallback_reason(head, {"loss_type": "dft", "label_smoothing_factor": 0.0})
    assert head_loss_fallback_reason(head, {"loss_type": "nll", "label_smoothing_factor": 0.1})
    head.lm_head.bias = torch.nn.Parameter(torch.zeros(3))
    assert head_loss_fallback_reason(head, {"loss_type": "nll", "label_smoothing_factor": 0.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_a_loss_that_is_not_finite_is_told_of_its_own_step(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    compute, calls = HeadLoss.compute_loss, []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        return compute(self, *args, **kwargs) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(HeadLoss, "compute_loss", poisoned)
    training = {"fused": "on", "cuda_graphs": "off", "logging_steps": 50, "save_steps": 50}
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        do(tiny_run(tmp_path, training=training))
    assert len(calls) == 4
    (line,) = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
