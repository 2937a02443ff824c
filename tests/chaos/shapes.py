"""The shapes of hostile inputs, by area; each makes a `Case` in a furnished folder."""

from tests.chaos import folders, rows, runs, texts  # noqa: F401 - they register their shapes
from tests.chaos.place import SHAPES, SHARES, furnish

__all__ = ["SHAPES", "SHARES", "furnish"]
