"""Checkpoints and the order of rows: the same steps on any number of processes, every state whole and by its name."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from transformers import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from lsr_scale import UserError
from lsr_scale.config import run_from_dict
from lsr_scale.data.order import WholeSteps
from lsr_scale.run.folder import STATE, TENSORS, RunFolder
from lsr_scale.training.checkpoint import manifest, select, trained_state
from lsr_scale.training.checkpoint.rotate import rotate
from lsr_scale.units import amount
from tests.helpers.hypothesis_settings import bounded


def order_of(kind, rows):
    """Return an order as transformers makes it, by a kind's name."""
    if kind == "random":
        return RandomSampler(range(rows))
    if kind == "sequential":
        return SequentialSampler(range(rows))
    return LengthGroupedSampler(2, lengths=[(7 * row) % 11 + 1 for row in range(rows)])


def steps_of(kind, rows, epoch, batch, accumulation, processes, drop_last):
    """Return the rows of each step of an epoch, over all processes and micro-batches."""
    order = WholeSteps(order_of(kind, rows), batch * accumulation * processes, seed=3, drop_last=drop_last)
    order.set_epoch(epoch)
    batches = BatchSampler(order, batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1, "every process has as many micro-batches"
    steps = [
        [row for shard in shards for micro in shard[first : first + accumulation] for row in micro]
        for first in range(0, len(shards[0]), accumulation)
    ]
    assert {len(step) for step in steps} == {batch * accumulation * processes}
    return [sorted(step) for step in steps]


@st.composite
def divisions(draw):
    """Draw the rows of a step, and two ways to share them among processes and micro-batches."""
    rows_per_step = draw(st.integers(1, 24))
    ways = []
    for _ in range(2):
        processes = draw(st.sampled_from([n for n in range(1, 25) if rows_per_step % n == 0]))
        rest = rows_per_step // processes
        batch = draw(st.sampled_from([n for n in range(1, 25) if rest % n == 0]))
        ways.append({"batch": batch, "accumulation": rest // batch, "processes": processes})
    return ways


@bounded(120)
@given(
    ways=divisions(),
    kind=st.sampled_from(["random", "sequential", "by length"]),
    rows=st.integers(1, 60),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_each_step_has_the_same_rows_however_processes_and_micro_batches_share_it(ways, kind, rows, epoch, drop_last):
    one, other = (steps_of(kind, rows, epoch, drop_last=drop_last, **way) for way in ways)
    assert one == other
    seen = [row for step in one for row in step]
    assert max(map(seen.count, range(rows))) - min(map(seen.count, range(rows))) <= 1
    if not drop_last:
        assert set(seen) == set(range(rows)), "no row is left out"
    elif rows >= len(one[0]):
        assert len(set(seen)) == len(seen), "no row comes twice"


def checkpoint_of(folder, step, state):
    """Write a checkpoint that is whole, of a run that has no more than its numbers."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json", TENSORS):
        (checkpoint / name).write_text("{}")
    (checkpoint / STATE).write_text(json.dumps({"step": step, **state}))
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    manifest.write_manifest(checkpoint)
    return checkpoint


def run_with(batch, accumulation):
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return run_from_dict(
        {
            "model": {"name": "x"},
            "adapter": {"method": "lsr", "target_modules": ["q_proj"]},
            "data": {"train": ["arc_easy"]},
            "training": training,
        }
    )


@bounded(40)
@given(
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 6),
    first=st.integers(1, 6),
    saved_on=st.integers(1, 6),
    now=st.integers(1, 8),
)
@example(batch=1, accumulation=1, first=2, saved_on=1, now=2)
@example(batch=3, accumulation=2, first=2, saved_on=4, now=1)
def test_a_run_resumes_with_its_rows_a_step_or_is_told_how(tmp_path_factory, batch, accumulation, first, saved_on, now):
    rows = batch * accumulation * first
    if rows % (batch * saved_on):
        saved_on = first
    state = {"num_processes": saved_on, "first_num_processes": first, "rows_per_step": rows}
    state |= {"optimizer": "AdamW", "scalars": {}, "groups": [], "scheduler": {}, "random": []}
    checkpoint = checkpoint_of(tmp_path_factory.mktemp("run"), 3, state)
    assert manifest.damage(checkpoint) is None
    run = run_with(batch, accumulation)  # as the run's own config.yaml has it
    if rows % (batch * now) == 0:
        fitted, _ = select.fit(checkpoint, run, now)
        assert batch * fitted.training["gradient_accumulation_steps"] * now == rows
        begun = select.as_begun(checkpoint, fitted)
        assert begun.training["gradient_accumulation_steps"] == accumulation, "the file says what it said"
        if (elsewhere := rows // batch // saved_on) and rows % (batch * saved_on) == 0:
            meant, _ = select.fit(checkpoint, run_with(batch, elsewhere), now)  # for those that saved it
            assert meant.training["gradient_accumulation_steps"] * batch * now == rows
    else:
        with pytest.raises(UserError, match=rf"its steps had {amount(rows, 'row')} \({saved_on} process") as refused:
            select.fit(checkpoint, run, now)
        resumes_on = f"resume with {amount(saved_on, 'process')}"
        if rows % now:
            assert f"{resumes_on}, or another number of them that divides {rows}" in str(refused.value)
        else:
            assert f"whose product is {rows // now}, or {resumes_on}" in str(refused.value)
            select.fit(checkpoint, run_with(1, rows // now), now)
        select.fit(checkpoint, run, saved_on)


@bounded(30)
@given(st.sets(st.integers(1, 12), min_size=1, max_size=8), st.none() | st.integers(1, 9), st.data())
def test_of_a_runs_checkpoints_the_newest_stay_and_the_best(tmp_path_factory, steps, limit, data):
    keep = {max(steps), data.draw(st.sampled_from(sorted(steps)))}
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / STATE).write_text("{}")
    rotate(RunFolder(folder), limit, keep)
    left = {int(path.name.rpartition("-")[2]) for path in folder.iterdir()}
    others = sorted(steps - keep, reverse=True)
    assert left == (steps if limit is None else keep | set(others[: max(0, limit - len(keep))]))


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AMSGrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
}


def trainer_of(shapes, name, order, seed):
    """Return what is asked of a trainer without an engine; its optimizer has the parameters in `order`."""
    torch.manual_seed(seed)
    model = nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"factor{number}", nn.Parameter(torch.randn(shape)))
    model.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    parameters = [getattr(model, f"factor{number}") for number in order]
    half = len(parameters) // 2
    groups = [{"params": part} for part in (parameters[:half], parameters[half:]) if part]
    return SimpleNamespace(model=model, optimizer=OPTIMIZERS[name](groups), is_deepspeed_enabled=False)


def take_step(trainer, number, without=()):
    generator = torch.Generator().manual_seed(number)
    for place, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if place in without else gradient
    trainer.optimizer.step()


@bounded(60)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=5),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    data=st.data(),
    steps=st.integers(0, 3),
)
def test_a_state_goes_back_by_name_into_parameters_of_any_order(shapes, name, data, steps):
    numbers = range(len(shapes))
    orders = [data.draw(st.permutations(numbers)) for _ in range(2)]
    without = data.draw(st.sets(st.sampled_from(numbers)))  # never had a gradient, so no state
    first = trainer_of(shapes, name, orders[0], seed=0)
    for step in range(steps):
        take_step(first, step, without)
    tensors, scalars = trained_state.collect(first)
    names = {f"factor{number}" for number in numbers}
    assert {path for path in tensors if path.startswith("parameter/")} == {f"parameter/{one}" for one in names}
    second = trainer_of(shapes, name, orders[1], seed=1)
    trained_state.restore(second, {path: value.clone() for path, value in tensors.items()}, scalars)
    again, again_scalars = trained_state.collect(second)
    assert again_scalars == scalars
    assert again.keys() == tensors.keys()
    for path, value in tensors.items():
        assert torch.equal(again[path], value), path
    for trainer in (first, second):
        take_step(trainer, 9)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for path, value in tensors.items():
        assert torch.equal(again[path], value), "what was saved is a copy"
