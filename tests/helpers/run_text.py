"""Runs written as text, for the tests of everything that reads them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lsr_scale import config
from lsr_scale.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = """\
model:
  name: some/model
adapter:
  method: lsr
data:
  train: [arc_easy]
"""


def load(text: str, *overrides: str, folder: Path | None = None) -> config.RunConfig:
    """Load a run from a file run.yaml in `folder`, or in one of its own."""
    with TemporaryDirectory() as own:
        path = (folder or Path(own)) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return config.load_run(path, overrides)


def problem(text: str, *overrides: str, folder: Path | None = None) -> str:
    """Load a run that must fail, and return the message, in which the file is called run.yaml."""
    with TemporaryDirectory() as own:
        folder = folder or Path(own)
        with pytest.raises(UserError) as caught:
            load(text, *overrides, folder=folder)
    return str(caught.value).replace(f"{folder}/", "")
