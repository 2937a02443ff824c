"""The embedded classification set: balanced, and no message in both splits."""

from collections import Counter

import pytest

from lsr_scale import UserError
from lsr_scale.data.formats import load_source
from lsr_scale.data.intents import rows


def test_the_splits_are_balanced_and_share_no_message():
    train, heldout = rows("train"), rows("heldout")
    for split, each in ((train, 16), (heldout, 8)):
        assert set(Counter(row["label"] for row in split).values()) == {each}
        assert len({row["label"] for row in split[:5]}) == 5, "the first are one of each"
    texts = [row["text"].casefold() for row in (*train, *heldout)]
    assert len(set(texts)) == len(texts) == 120


def test_it_is_a_source_for_training_and_validation():
    assert load_source("builtin:intents").rows == rows("train")
    assert load_source("builtin:intents", "validation").rows == rows("heldout")
    with pytest.raises(UserError, match="expected the split 'train' or 'heldout', got 'test'"):
        load_source({"path": "builtin:intents", "split": "test"})
    with pytest.raises(UserError, match="did you mean 'builtin:intents'"):
        load_source("builtin:intent")
