"""The shapes of hostile inputs, by area; each makes a `chaos.Case` in a furnished folder."""

from chaos_shapes import folders, rows, runs, texts  # noqa: F401 - they register their shapes
from chaos_shapes.place import SHAPES, SHARES, furnish

__all__ = ["SHAPES", "SHARES", "furnish"]
