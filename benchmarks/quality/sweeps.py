"""Runs of a comparison as the trials of one sweep: the base is loaded once, equal rows are read once, steps are shared.

Each trial is the run that it would be by itself, in an ordinary run folder. A sweep that was killed goes on where it
was: what finished is kept.
"""

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsr_scale.run.folder import RunFolder

Together = int | str  # how many trials share a step, or "auto"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--together` to a program's options."""
    parser.add_argument(
        "--together",
        type=lambda text: text if text == "auto" else int(text),
        metavar="auto|N",
        help="train runs as trials of sweeps, in one process, N sharing each step; by themselves where it is left out",
    )


def sweep_sections(configs: Mapping[str, Mapping[str, Any]], output: Path, together: Together) -> dict[str, Any]:
    """Return the sections of a sweep whose trials are these runs.

    Args:
        configs: The sections of each run, by its name; one model, and settings as trials must have them.
        output: The sweep's folder.
        together: How many share a step.
    """
    runs = list(configs.values())
    trained = [run["training"] for run in runs]
    alike = {key: value for key, value in trained[0].items() if all(one.get(key) == value for one in trained)}
    entries = []
    for name, run in configs.items():
        own = {key: value for key, value in run["training"].items() if key not in alike and key != "output_dir"}
        sections = {section: run[section] for section in ("adapter", "data", "eval") if section in run}
        entries.append({"name": name, **sections, **{f"training.{key}": value for key, value in own.items()}})
    common = {section: runs[0][section] for section in ("model", "deepspeed") if section in runs[0]}
    training = {**alike, "output_dir": str(output)}
    return {**common, "training": training, "sweep": {"list": entries, "together": together}}


def train_together(
    configs: Mapping[str, Mapping[str, Any]], work: Path, together: Together
) -> dict[str, tuple[RunFolder, str | None]]:
    """Train runs as one sweep; return each one's folder, and why it ended before its end, None where it did not.

    Args:
        configs: See `sweep_sections`.
        work: The sweep's folder is made in it, by the runs' names: the same ones go on with it.
        together: How many share a step.
    """
    from lsr_scale.config.trials import sweep_from_dict
    from lsr_scale.sweeping.sweep import run_sweep

    name = hashlib.sha256("\n".join(configs).encode()).hexdigest()[:12]
    sweep = sweep_from_dict(sweep_sections(configs, work / "sweeps" / name, together), name)
    folder = run_sweep(sweep, resume="auto")
    state = folder.read()
    return {name: (folder.trial(name), state.trials[name].error) for name in configs}
