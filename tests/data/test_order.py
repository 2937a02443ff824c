"""The order of a run's rows: a step has the same ones whatever number of processes share it."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.utils import RepeatSampler

from lsr_scale.data.order import PromptOrder, WholeSteps

ROWS = 13
KINDS = {
    "random": lambda: RandomSampler(range(ROWS)),
    "sequential": lambda: SequentialSampler(range(ROWS)),
    "by length": lambda: LengthGroupedSampler(2, lengths=[(7 * i) % 5 + 1 for i in range(ROWS)]),
}


def steps(kind, processes, batch, accumulation, epoch, seed=3):
    """Return the rows of each step of an epoch, as a set over all processes."""
    rows_per_step = processes * batch * accumulation
    order = WholeSteps(KINDS[kind](), rows_per_step, seed)
    order.set_epoch(epoch)
    batches = BatchSampler(order, batch, drop_last=False)
    shards = [
        list(BatchSamplerShard(batches, processes, rank) if processes > 1 else batches) for rank in range(processes)
    ]
    count = {len(shard) for shard in shards}
    assert len(count) == 1
    return [
        sorted(row for shard in shards for micro in shard[first : first + accumulation] for row in micro)
        for first in range(0, count.pop(), accumulation)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_rows_on_any_number_of_processes(kind):
    for epoch in (0, 1):
        expected = steps(kind, 1, 4, 1, epoch)
        assert [len(rows) for rows in expected] == [4] * 4
        assert {row for rows in expected for row in rows} == set(range(ROWS))
        for processes, batch, accumulation in ((1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)):
            assert steps(kind, processes, batch, accumulation, epoch) == expected
    if kind != "sequential":
        assert steps(kind, 1, 4, 1, 0) != steps(kind, 1, 4, 1, 1)
        assert steps(kind, 1, 4, 1, 0, seed=4) != steps(kind, 1, 4, 1, 0)


def test_the_order_is_that_of_accelerate_then_the_beginning_again():
    order = WholeSteps(RandomSampler(range(ROWS)), 4, seed=5)
    order.set_epoch(2)
    plain = SeedableRandomSampler(range(ROWS), data_seed=5)
    plain.set_epoch(2)
    expected = list(plain)
    torch.manual_seed(99)  # of no account
    assert list(order) == expected + expected[:3]
    assert len(order) == 16


@pytest.mark.parametrize(("drop", "per_step", "rows"), [(False, 4, 16), (True, 4, 12), (True, 20, 20), (False, 30, 30)])
def test_an_incomplete_step_is_filled_or_left_out(drop, per_step, rows):
    order = list(WholeSteps(SequentialSampler(range(ROWS)), per_step, 0, drop_last=drop))
    assert order == [i % ROWS for i in range(rows)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_prompts_have_trls_order_in_every_epoch_also_in_one_that_a_run_begins_with(shuffle):
    def trls() -> RepeatSampler:
        return RepeatSampler(range(ROWS), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=shuffle, seed=7)

    running = trls()
    epochs = [list(running) for _ in range(4)]
    assert len({tuple(rows) for rows in epochs}) == (4 if shuffle else 1)
    order = PromptOrder(trls())
    for epoch in (2, 0, 3, 3, 1):
        order.set_epoch(epoch)
        assert list(order) == epochs[epoch]
    assert len(order) == len(epochs[0])
