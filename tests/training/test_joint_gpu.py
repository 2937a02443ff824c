"""Several trials in one step on a GPU: fused layers, CUDA graphs, what the first step leaves free."""

import math
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import lsr_scale
from lsr_scale.training.steps.graphs import PackedCollator
from lsr_scale.training.steps.head_loss import HeadCollator
from lsr_scale.training.steps.joint import JointStep, Member
from tests.helpers.tiny_models import tiny_llama
from tests.training.test_joint import OPTIONS, joint_run, trial

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
STEPS = 6
SPECS = [("lsr", 0), ("lora", 0), ("lsr", 1), ("lora", 1)]


def base_on_gpu() -> Any:
    base: Any = tiny_llama(torch.bfloat16, hidden_size=64, intermediate_size=128).to("cuda")  # pyright: ignore
    base.config.use_cache = False
    return base.requires_grad_(False)


def trials(base: Any) -> list[Any]:
    return [trial(base, name, OPTIONS[name][size], seed) for seed, (name, size) in enumerate(SPECS)]


def packed(seed: int) -> list[dict[str, Any]]:
    """Return a trial's packed batches, in one order of lengths."""
    collator = PackedCollator(HeadCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)), 32)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(STEPS):
        rows = [torch.randint(1, 96, (length,), generator=generator).tolist() for length in (9, 32, 20)]
        made.append(collator([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]))
    return made


def train(base: Any, models: list[Any], said: list[str], **training: Any) -> tuple[JointStep, list[list[float]]]:
    """Train together by plain gradient descent, and return the step and each trial's losses."""
    step = JointStep(base, joint_run(**training), said.append)
    data = [packed(seed) for seed in range(len(models))]
    losses: list[list[float]] = [[] for _ in models]
    for number in range(STEPS):
        members = [
            Member(model, of_trial[number], 50.0, most_tokens=3 * 32)
            for model, of_trial in zip(models, data, strict=True)
        ]
        for own, loss in zip(losses, step.run(members), strict=True):
            own.append(float(loss))
        for member in members:
            trained = [value for value in member.model.parameters() if value.requires_grad]
            vector = member.gradient
            if vector is None:
                vector = torch.cat([value.grad.flatten() for value in trained if value.grad is not None])
            with torch.no_grad():
                for value, part in zip(trained, vector.split([value.numel() for value in trained]), strict=True):
                    value.sub_(part.view_as(value), alpha=0.1)
                    value.grad = None
    return step, losses


@pytest.mark.parametrize("memory", ["auto", "save", "speed"])
def test_replayed_steps_are_the_eager_ones_and_those_of_each_alone(memory):
    base = base_on_gpu()
    said: list[str] = []
    step, losses = train(base, trials(base), said, memory=memory, cuda_graphs="on", max_length=128)
    assert step._graphs is not None
    assert step._graphs.captured
    assert not any("graphs are off" in line for line in said)
    assert any("trials in a step" in line for line in said) == (memory == "auto")
    _, eager = train(base, trials(base), [], memory=memory, fused="off", max_length=128)
    for own, expected in zip(losses, eager, strict=True):
        assert own == pytest.approx(expected, rel=1e-2)
    for place, model in enumerate(trials(base)):
        lsr_scale.fuse(model)
        batch = packed(place)[0]
        inputs = {name: value.to("cuda") for name, value in batch.items() if isinstance(value, torch.Tensor)}
        inputs.pop("seq_idx", None)
        alone = model(**inputs, use_cache=False, num_items_in_batch=50.0).loss
        assert losses[place][0] == pytest.approx(float(alone), rel=1e-2)


def test_a_trial_that_is_not_finite_changes_no_other_in_replayed_steps():
    base = base_on_gpu()
    _, expected = train(base, trials(base), [], memory="speed", cuda_graphs="on", max_length=128)
    models = trials(base)
    for value in models[1].parameters():
        if value.requires_grad:
            value.data.fill_(math.nan)
    _, losses = train(base, models, [], memory="speed", cuda_graphs="on", max_length=128)
    assert all(math.isnan(loss) for loss in losses[1])
    for place in (0, 2, 3):
        assert losses[place] == expected[place]
