"""The losses of small runs are those that the last release had (`tests/golden/`)."""

import json

import pytest
import torch

from tests.golden_losses import CASES, FOLDER, losses

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="python -m tests.golden_losses compares a GPU's"),
]
GOLDEN = json.loads((FOLDER / "cpu.json").read_text(encoding="utf-8"))["losses"]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_last_release(name, tmp_path):
    # another CPU adds in another order; a changed seed, row or rate shows in the second digit
    assert losses(name, tmp_path) == pytest.approx(GOLDEN[name], rel=1e-4)
