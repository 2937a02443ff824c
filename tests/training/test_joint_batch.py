"""One batch of several trials' batches: what a model and the loss are given."""

from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lsr_scale.errors import UserError
from lsr_scale.training.steps.graphs import PackedCollator
from lsr_scale.training.steps.head_loss import HeadCollator
from lsr_scale.training.steps.joint_batch import joint_batch

ROWS = [[[5, 6, 7, 8, 9], [10, 11, 12]], [[13, 14, 15], [16, 17, 18, 19], [20, 21]]]


def batches(packed: bool = False, own_head: bool = False) -> list[dict[str, Any]]:
    """Return a batch of each trial, the first token of each row unsupervised."""
    collator: Any = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    if own_head:
        collator = HeadCollator(collator)
    if own_head and packed:
        collator = PackedCollator(collator, longest=8)
    return [collator([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]) for rows in ROWS]


@pytest.mark.parametrize("own_head", [False, True])
def test_padded_rows_are_padded_to_the_longest_and_the_most(own_head):
    batch = joint_batch(batches(own_head=own_head))
    assert batch.inputs.keys() == {"input_ids", "attention_mask"}
    assert batch.inputs["input_ids"].tolist() == [
        *([5, 6, 7, 8, 9], [10, 11, 12, 0, 0], [0] * 5),
        *([13, 14, 15, 0, 0], [16, 17, 18, 19, 0], [20, 21, 0, 0, 0]),
    ]
    # a row that is missing attends to itself
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 3, 5, 3, 4, 2]
    assert batch.counts == [6, 6]
    assert batch.tokens == 15
    following = batch.inputs["input_ids"].flatten()[batch.supervised + 1]
    assert torch.equal(following, batch.targets)
    assert batch.targets.tolist() == [6, 7, 8, 9, 11, 12, 14, 15, 17, 18, 19, 21]
    assert batch.mask_is_needed is (False if own_head else None)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_packed_rows_are_filled_up_with_documents_of_their_own(own_head, flat):
    given = batches(packed=True, own_head=own_head)
    given[0], given[1] = given[1], given[0]  # of 9 and 8 tokens
    batch = joint_batch(given, flat)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert ids.shape == positions.shape == ((1, 18) if flat else (2, 9))
    assert positions.flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert torch.equal(ids.flatten()[batch.supervised + 1], batch.targets)
    assert (batch.counts, batch.tokens) == ([6, 6], 9)
    if flat:
        assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 7, 9, 14, 17, 18]
        assert batch.inputs["cu_seq_lens_q"].dtype == torch.int32
        assert batch.inputs["max_length_q"] == batch.inputs["max_length_k"] == 5
    else:
        assert batch.inputs.keys() == {"input_ids", "position_ids"}


def test_one_document_a_row_without_boundaries_is_packed_too():
    ids = torch.arange(1, 7)[None]
    one = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(6)[None]}
    short = {name: value[:, :2] for name, value in one.items()}
    batch = joint_batch([one, short], flat=True)
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 6, 8, 12]
    assert batch.inputs["max_length_q"] == 6


def test_rows_without_a_mask_get_one_where_lengths_differ():
    ids = torch.ones(2, 3, dtype=torch.long)
    same = joint_batch([{"input_ids": ids, "labels": ids}] * 2)
    assert same.inputs.keys() == {"input_ids"}
    longer = torch.ones(2, 4, dtype=torch.long)
    mixed = joint_batch([{"input_ids": ids, "labels": ids}, {"input_ids": longer, "labels": longer}])
    assert mixed.inputs["attention_mask"].sum(1).tolist() == [3, 3, 4, 4]


def test_what_has_no_joint_form_is_refused():
    padded, packed = batches()[0], batches(packed=True)[0]
    with pytest.raises(UserError, match=r"training\.packing alike"):
        joint_batch([padded, packed])
    with pytest.raises(UserError, match="pixel_values"):
        joint_batch([padded, {**padded, "pixel_values": torch.ones(1)}])
    with pytest.raises(UserError, match="token_type_ids"):
        joint_batch([padded, {**padded, "token_type_ids": torch.zeros(2, 5, dtype=torch.long)}])
