"""Trials' static batches as one, and what a graph of it computes: the losses and gradients of each trial alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lsr_scale
from lsr_scale.fused.cuda_graphs import Shapes, static_batch, static_loss, static_losses
from lsr_scale.fused.joint_graphs import JointGraphs, join_static
from tests.fused.test_cuda_graphs import packed
from tests.fused.test_joint_layers import TRIALS, joint_of, member
from tests.helpers import recorded_graphs
from tests.helpers.hypothesis_settings import bounded
from tests.helpers.recorded_graphs import RecordedGraph
from tests.helpers.tiny_models import randomize, tiny_llama

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
# of each trial
BATCHES = [
    [(5,), (17, 3, 40, 1, 22), (64, 64, 63)],
    [(16,) * 8] * 3,
    [(16,) * 8, (128,), (16,) * 4],
    [(33,) * 31],
]


def static_of(lengths, longest=70, seed=0):
    return static_batch(**packed(lengths, seed=seed), longest=longest)


def trials_of(number, dtype=torch.float64):
    base = tiny_llama(dtype, vocab_size=304).requires_grad_(False)
    members = [member(base, options, seed) for seed, options in enumerate(TRIALS[:number])]
    model = joint_of(base, members)
    lsr_scale.fuse(model)
    return model, members


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_losses_and_gradients_are_each_trial_s(lengths):
    model, members = trials_of(len(lengths))
    batches = [static_of(row, seed=seed) for seed, row in enumerate(lengths)]
    divisors = torch.arange(3.0, 3 + len(lengths))
    graphs = JointGraphs(model, [trained(trial) for trial in members])
    losses, vectors = graphs._outputs(join_static(batches), divisors)
    for trial, batch, divisor, loss, vector in zip(members, batches, divisors, losses, vectors, strict=True):
        lsr_scale.fuse(trial)
        alone = static_loss(trial.get_base_model(), batch) / divisor
        torch.testing.assert_close(loss, alone.detach(), rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(alone, trained(trial))
        expected = torch.cat([gradient.reshape(-1) for gradient in gradients])
        assert vector.shape == expected.shape
        assert (vector - expected).norm() <= 1e-9 * expected.norm()


def shapes_of(*made):
    """Return the shapes that earlier batches had: tokens of a row, documents, supervised places of a row."""
    shapes = Shapes()
    shapes.made += made
    return shapes


def test_further_documents_are_empty_and_change_nothing():
    model, members = trials_of(2)
    batches = [static_of((9, 30), seed=seed) for seed in (0, 1)]
    graphs = JointGraphs(model, [trained(trial) for trial in members])
    joined = join_static(batches)
    length, places = joined["input_ids"].shape[1], len(joined["supervised"]) // 2
    more = join_static(batches, shapes_of((length, 100, places)))
    assert len(joined["cu_seq_lens"]) < len(more["cu_seq_lens"]) == 101
    assert len(join_static(batches, shapes_of((length, 3, places)))["cu_seq_lens"]) == len(joined["cu_seq_lens"])
    (losses, vectors), (found, others) = (graphs._outputs(batch, torch.ones(2)) for batch in (joined, more))
    assert torch.equal(losses, found)
    assert all(torch.equal(*pair) for pair in zip(vectors, others, strict=True))


def test_somewhat_shorter_rows_get_the_length_of_earlier_ones_and_nothing_changes():
    model, members = trials_of(2)
    batches = [static_of((9, 30, 21), seed=seed) for seed in (0, 1)]
    length = batches[0]["input_ids"].shape[1]
    graphs = JointGraphs(model, [trained(trial) for trial in members])
    joined, more = join_static(batches), join_static(batches, shapes_of((length * 8 // 7, 100, 100)))
    assert joined["input_ids"].shape[1] == length < more["input_ids"].shape[1]
    assert len(more["supervised"]) == 200
    assert join_static(batches, shapes_of((length * 8 // 7 + 1, 100, 100)))["input_ids"].shape[1] == length
    (losses, vectors), (found, others) = (graphs._outputs(batch, torch.ones(2)) for batch in (joined, more))
    torch.testing.assert_close(losses, found, rtol=1e-12, atol=0)
    torch.testing.assert_close(vectors, others, rtol=1e-9, atol=1e-12)


def test_a_replay_reads_parameters_and_batches_as_they_are_then(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    model, members = trials_of(2)
    graphs = JointGraphs(model, [trained(trial) for trial in members])
    for seed in range(3):
        batch = join_static([static_of((9, 30), seed=seed + place) for place in (0, 5)])
        divisors = torch.tensor([3.0, 5.0 + seed])
        expected, wanted = graphs._outputs(batch, divisors)
        losses, vectors = graphs.replay(batch, divisors)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(vectors, wanted, rtol=1e-6, atol=1e-9)
        randomize(members[0], seed=7 + seed, scale=0.2)
    assert (RecordedGraph.made, RecordedGraph.replays) == (1, 3)
    trained(members[1])[0].data = trained(members[1])[0].data.clone()
    graphs.replay(batch, divisors)
    assert RecordedGraph.made == 2, "a parameter moved"


def test_a_trial_that_is_not_finite_has_its_own_loss():
    model, members = trials_of(3)
    batch = join_static([static_of((9, 30), seed=seed) for seed in range(3)])
    graphs = JointGraphs(model, [trained(trial) for trial in members])
    losses, vectors = graphs._outputs(batch, torch.ones(3))
    with torch.no_grad():
        trained(members[1])[0].fill_(float("inf"))
    broken, found = graphs._outputs(batch, torch.ones(3))
    assert broken.isnan().tolist() == [False, True, False]
    for index in (0, 2):
        assert broken[index] == losses[index]
        assert torch.equal(found[index], vectors[index])


@bounded(100)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    longest=st.integers(1, 50),
    before=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_a_joined_batch_has_each_trial_s_documents_and_supervision_in_its_row(lengths, longest, before, seed):
    batches = [static_of(row, longest, seed + place) for place, row in enumerate(lengths)]
    joined = join_static(batches, shapes_of((before, 1000, 1000)))
    rows, length = joined["input_ids"].shape
    assert rows == len(lengths)
    needed = max(batch["input_ids"].shape[1] for batch in batches)
    alone = join_static(batches)
    is_plain = bool((alone["cu_seq_lens"].diff() == alone["longest"]).all())  # documents of one length
    assert length == (before if needed < before <= needed * 8 / 7 and not is_plain else needed)
    bounds = joined["cu_seq_lens"].tolist()
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, rows * length)
    assert set(range(0, rows * length, length)) <= set(bounds), "no document crosses from one trial to the next"
    assert max(after - before for before, after in itertools.pairwise(bounds)) <= joined["longest"]
    positions = joined["position_ids"].reshape(-1).tolist()
    starts = set(bounds)
    last = 0
    for place, position in enumerate(positions):
        last = place if place in starts else last
        assert position == place - last, "positions begin anew where documents do"
    places = len(joined["supervised"]) // rows
    for row, batch in enumerate(batches):
        own = slice(row * places, (row + 1) * places)
        supervised, targets, weights = (joined[name][own] for name in ("supervised", "targets", "weights"))
        assert torch.equal(supervised[weights > 0] - row * length, batch["supervised"][batch["weights"] > 0])
        assert torch.equal(targets[weights > 0], batch["targets"][batch["weights"] > 0])
        assert bool((supervised // length == row).all()), "no trial reads another's places"
        count = batch["input_ids"].shape[1]
        assert torch.equal(joined["input_ids"][row, :count], batch["input_ids"][0])
        assert torch.equal(joined["position_ids"][row, :count], batch["position_ids"][0])


def test_batches_of_one_kind_share_their_shapes():
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for seed in range(20):
        rows = [torch.randint(20, 64, (64,), generator=generator).tolist() for _ in range(3)]
        joined = join_static([static_of(row, 64, seed) for row in rows])
        shapes.add(tuple(value.shape for value in joined.values() if isinstance(value, torch.Tensor)))
    assert len(shapes) <= 4


def test_documents_of_one_length_stay_a_plain_batch():
    joined = join_static([static_of((16,) * 8, seed=seed) for seed in range(2)])
    assert joined["longest"] == 16
    assert joined["cu_seq_lens"].tolist() == list(range(0, 257, 16))


def test_losses_of_rows_are_those_of_one_batch():
    model, _ = trials_of(2)
    batch = join_static([static_of((5, 20), seed=seed) for seed in range(2)])
    assert torch.equal(static_losses(model, batch).sum(), static_loss(model, batch))
