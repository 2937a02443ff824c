"""What the scripts of this folder that train run after run, three steps each, begin alike with."""

import gc
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lsr_scale import cli, distributed

EXACT = {"dtype": "float32"}  # the model's, for runs that are compared with others


def trainers(runs: Mapping[str, Mapping[str, Any]], base: str = "nf4") -> Iterator[tuple[str, Any]]:
    """Yield each run's name, and its trainer after the first three steps, on all processes of the launch.

    Args:
        runs: What is special about each, as `first_trainer` takes it, in the folder that the command names.
        base: How the model is quantized.
    """
    cli.quiet_libraries(debug=False)  # as the command does, before what reads these settings is imported

    from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer

    distributed.start(use_deepspeed=True)
    for name, changes in runs.items():
        gc.freeze()  # what the run before imported
        yield name, first_trainer(Path(sys.argv[-1]), base, "lsr", DEFAULT, **{"model": EXACT, **changes})


def result_file(name: str) -> Path:
    """Return the file for what this process saw: "engine-{}.json", its rank filled in, in that folder."""
    return Path(sys.argv[-1]) / name.format(distributed.rank())


def logged(trainer: Any) -> list[list[float]]:
    """Return the losses and norms of a trainer's steps, as logged."""
    return [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]
