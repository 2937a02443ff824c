"""Triton's interpreter computes as a GPU does."""

from importlib.util import find_spec

import pytest

from tests.helpers import interpreter


@pytest.fixture(autouse=find_spec("triton") is not None)
def narrow_types_as_on_a_gpu(monkeypatch):
    interpreter.as_on_a_gpu(monkeypatch)
