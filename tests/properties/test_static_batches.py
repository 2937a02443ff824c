"""Batches in repeating shapes, packed or padded: no token is lost, moved or added to what is learned, at any length."""

import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lsr_scale.fused.attention_mask import needs_mask
from lsr_scale.fused.cuda_graphs import rounded, static_batch, static_loss
from lsr_scale.fused.forward_context import document_boundaries
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.training.steps.head_loss import HeadCollator, joined_rows
from tests.fused.test_cuda_graphs import adapted
from tests.helpers.hypothesis_settings import bounded

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
READ_AS = st.sampled_from([None, "numpy", "torch"])  # what a row's values are


def rows_of(lengths, seed):
    """Return rows of token ids, and of labels: some tokens are not supervised, and the first of a row never is."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 300, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.4, IGNORE_INDEX, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def packed(lengths, seed):
    """Return the rows one after another, as TRL's collator makes a packed batch."""
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows_of(lengths, seed))


def predictions(batch):
    """Return what is learned: pairs of the tokens so far in a document and the token that comes next."""
    ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    return [
        (tuple(ids[place - positions[place] : place]), label)
        for place, label in enumerate(labels)
        if label != IGNORE_INDEX and positions[place]
    ]


@bounded(150)
@given(lengths=LENGTHS, longest=st.integers(1, 50), seed=st.integers(0, 99))
@example(lengths=[1], longest=1, seed=0)
@example(lengths=[64], longest=64, seed=0)
@example(lengths=[8] * 8, longest=40, seed=0)
def test_a_static_batch_learns_each_supervised_token_once_from_its_own_document(lengths, longest, seed):
    batch = packed(lengths, seed)
    assert batch["input_ids"].shape == (1, sum(lengths))
    names = ("input_ids", "labels", "position_ids")
    static = static_batch(*(batch[name] for name in names), longest=longest)
    size = static["input_ids"].shape[1]
    assert size == max(64, rounded(sum(lengths), 8))
    bounds = static["cu_seq_lens"].tolist()
    assert bounds[: len(lengths) + 1] == torch.tensor([0, *lengths]).cumsum(0).tolist(), "documents stay what they were"
    assert bounds == sorted(bounds)
    assert bounds[-1] == size
    assert int(static["cu_seq_lens"].diff().max()) <= static["longest"]
    expected_positions = [place - max(b for b in bounds if b <= place) for place in range(size)]
    assert static["position_ids"][0].tolist() == expected_positions, "positions begin anew where documents do"
    ids = static["input_ids"][0].tolist()
    learned = [
        (tuple(ids[place - expected_positions[place] : place + 1]), target)
        for place, target, weight in zip(
            *(static[name].tolist() for name in ("supervised", "targets", "weights")), strict=True
        )
        if weight
    ]
    assert learned == predictions(batch)
    assert set(static["weights"].tolist()) <= {0.0, 1.0}
    assert 0 <= int(static["supervised"].min()) <= int(static["supervised"].max()) < size


@bounded(100)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_shapes_of_like_batches_are_few(lengths, seed):
    names = ("input_ids", "labels", "position_ids")
    shapes = set()
    for more in range(8):  # a few tokens more or less
        batch = packed([length + (more if place == 0 else 0) for place, length in enumerate(lengths)], seed)
        static = static_batch(*(batch[name] for name in names), longest=64)
        shapes.add((static["input_ids"].shape, static["cu_seq_lens"].shape))
    assert len(shapes) <= 3


@bounded(100)
@given(lengths=LENGTHS, seed=st.integers(0, 99), multiple=st.sampled_from([None, 8, 64]), free=st.booleans())
def test_the_collator_tells_boundaries_and_targets_as_the_rows_have_them(lengths, seed, multiple, free):
    rows = rows_of(lengths, seed)
    options = {"padding_free": True} if free else {"pad_to_multiple_of": multiple}
    batch = HeadCollator(DataCollatorForLanguageModeling(pad_token_id=0, **options))(copy.deepcopy(rows))
    known, tokens = batch["head"]["known"], batch["head"]["tokens"]
    assert tokens == sum(lengths), "padding is not trained on"
    width = batch["input_ids"].shape[-1]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    offsets = starts[:-1] if free else [place * width for place in range(len(rows))]
    expected = [
        (offset + place - 1, label)
        for offset, row in zip(offsets, rows, strict=True)
        for place, label in enumerate(row["labels"])
        if label != IGNORE_INDEX and place
    ]
    assert list(zip(known["supervised"].tolist(), known["targets"].tolist(), strict=True)) == expected
    if free:
        found, longest = document_boundaries({**batch, **known}, width)
        assert (found.tolist(), longest) == (starts, max(lengths))
        told, longest = document_boundaries({"position_ids": batch["position_ids"]}, width)
        assert told is None if len(lengths) == 1 else (told.tolist(), longest) == (starts, max(lengths))
    else:
        assert not known["mask_is_needed"], "rows are padded on the right, where nothing is learned"
        assert needs_mask({**batch, "attention_mask": batch["attention_mask"].flip(1)}) == any(
            length < width for length in lengths
        )


@pytest.fixture(scope="module")
def model():
    return adapted()


@bounded(12)
@given(lengths=LENGTHS, longest=st.sampled_from([1, 40, 70]), seed=st.integers(0, 9))
def test_loss_and_gradients_are_those_of_the_rows_without_padding(model, lengths, longest, seed):
    names = ("input_ids", "labels", "position_ids")
    batch = packed(lengths, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    static = static_batch(*(batch[name] for name in names), longest=longest)
    loss = static_loss(model.get_base_model(), static)
    found = torch.autograd.grad(loss, trained)
    rows = rows_of(lengths, seed)
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    if expected.requires_grad and len(ids[0]) > 1:
        torch.testing.assert_close(found, torch.autograd.grad(expected, trained), rtol=1e-8, atol=1e-11)


@bounded(100)
@given(lengths=LENGTHS, more=LENGTHS, seed=st.integers(0, 99), packs=st.booleans(), labelled=st.booleans(), of=READ_AS)
def test_rows_that_are_joined_make_the_batch_that_they_make_one_by_one(lengths, more, seed, packs, labelled, of):
    rows = rows_of(lengths, seed)
    if packs:  # of several documents each, some of one
        parts = [rows, rows_of(more, seed + 1), rows_of(lengths[:1], seed + 2)]
        rows = [
            {
                **{name: [token for row in part for token in row[name]] for name in ("input_ids", "labels")},
                "seq_lengths": [len(row["input_ids"]) for row in part],
            }
            for part in parts
        ]
    elif seed % 2:
        rows.insert(1, {"input_ids": [], "labels": []})
    if not labelled:
        rows = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    # of an empty row TRL makes a float tensor
    expected = collator(copy.deepcopy([row for row in rows if row["input_ids"]]))
    read = Dataset.from_list(rows).with_format(of)
    found = collator(joined_rows(read.__getitems__(list(range(len(rows))))))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value
