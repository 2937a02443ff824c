"""Sweeps of tiny runs, which take a second a trial."""

from pathlib import Path
from typing import Any

import yaml

from lsr_scale.config.trials import Sweep, sweep_from_dict
from tests.helpers.tiny_runs import completions, save_llama, tiny_run, write_rows


def sweep_place(folder: Path) -> Path:
    """Save a model and rows for training and validation; return the folder."""
    save_llama(folder / "model")
    write_rows(folder / "held-out.jsonl", completions(14)[12:])
    tiny_run(folder)
    return folder


def sections(place: Path, output: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a sweep's sections: runs of six steps on an unquantized base, validated after the fourth and the last."""
    training = {"output_dir": str(output), "eval_strategy": "steps", "eval_steps": 4, "report_to": "none"}
    run = tiny_run(
        place,
        model={"quantization": "none", "dtype": "float32"},
        data={"train": [str(place / "rows.jsonl")], "validation": [str(place / "held-out.jsonl")]},
        training={**training, **changes},
        eval={"tasks": []},
    )
    return {**run.model_dump(), "sweep": section}


def tiny_sweep(place: Path, output: Path, section: dict[str, Any], **changes: Any) -> Sweep:
    """Return the sweep of `sections`."""
    return sweep_from_dict(sections(place, output, section, **changes))


def write_sweep(file: Path, place: Path, output: Path, section: dict[str, Any], **changes: Any) -> Path:
    """Write the file of `sections`."""
    file.write_text(yaml.safe_dump(sections(place, output, section, **changes), sort_keys=False))
    return file
