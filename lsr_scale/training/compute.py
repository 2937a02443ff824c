"""`training.compute: fp8 | int8`: whether a run can, which groups of linears stay in bfloat16, the record of that.

A group is named by its layer and its linears, such as `12.down` (`config.training.LINEAR_GROUPS`). By default
(`training.keep_in_bf16: auto`) a run measures the errors of every group's output and input gradient in its first step,
keeps those groups in bfloat16 where either exceeds `training.compute_tolerance`, and writes `compute.json` into its
folder:

    {"compute": "fp8", "tolerance": 0.1, "errors": {"0.qkv.output": 0.036, "0.qkv.gradient": 0.038, ...},
     "kept": ["1.down"]}

A run that resumes decides by the errors in that file, so it computes as before; one whose `training.compute` was
changed measures its own.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lsr_scale import files
from lsr_scale.adapters.inject import inject
from lsr_scale.config import RunConfig
from lsr_scale.config.training import LINEAR_GROUPS
from lsr_scale.errors import UserError
from lsr_scale.fused import fuse
from lsr_scale.fused.eight_bit_group import PRODUCTS
from lsr_scale.kernels.fp8 import fp8_fallback_reason
from lsr_scale.model import DTYPES, load_config, meta_model
from lsr_scale.run.folder import RunFolder

_OTHERWISE = "set training.compute: bf16"


def check_compute(run: RunConfig) -> None:
    """Refuse a run with `training.compute: fp8` or `int8` where that cannot be; its weights are not needed for it.

    Raises:
        UserError: if this machine has no FP8 (with int8, too, input gradients are in e4m3), or as `check_layers` does.
    """
    check_machine(run)
    if run.training["compute"] != "bf16":
        check_layers(run)


def check_machine(run: RunConfig) -> None:
    """Refuse a run with `training.compute: fp8` or `int8` on a machine that has no FP8; nothing is read for it.

    Raises:
        UserError: if it has none.
    """
    compute = run.training["compute"]
    if compute == "bf16":
        return
    reason = fp8_fallback_reason("cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        needs = ", as input gradients are in e4m3 with int8 too" if compute == "int8" else ""
        raise UserError(f"training.compute: {compute} cannot be here: {reason}{needs}; {_OTHERWISE}")


def check_layers(run: RunConfig) -> None:
    """Refuse a run with `training.compute: fp8` or `int8` that its model cannot do on any machine.

    Raises:
        UserError: if no decoder layer of the model can run fused with the run's adapter, no linear has sizes that 8
            bits take, or `training.keep_in_bf16` names a layer that the model does not have.
    """
    section, compute = run.model, run.training["compute"]
    config: Any = load_config(section.name, section.revision)
    labels = section.num_labels or len(section.labels or ()) or None
    base = meta_model(config, section.task, labels, DTYPES[section.dtype])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are the run's own model's, and are said of that
        model = inject(base, run.adapter.method, run.adapter.options, section.task).train()
    report = fuse(model)
    num_layers = len(report.fused) + len(report.unfused)
    if not report.fused:
        reasons = "; ".join(sorted(set(report.unfused.values()))) or f"{type(base).__name__} has no layers that fuse"
        raise UserError(
            f"training.compute: {compute} is for fused layers, and none can run fused: {reasons}; {_OTHERWISE}"
        )
    report = fuse(model, compute=compute)
    if not report.eight_bit:
        reasons = "; ".join(sorted(set(report.not_eight_bit.values())))
        raise UserError(f"training.compute: {compute} is for no linear of {section.name}: {reasons}; {_OTHERWISE}")
    for name in () if run.training["keep_in_bf16"] == "auto" else run.training["keep_in_bf16"]:
        layer, _, group = name.rpartition(".")
        if layer and int(layer) >= num_layers:
            raise UserError(
                f"training.keep_in_bf16: {name}: {section.name} has layers 0 to {num_layers - 1}; name one of them, or "
                f"{group} for all"
            )


def _place(name: str) -> tuple[int, int, int]:
    layer, group, product = name.split(".")
    return int(layer), LINEAR_GROUPS.index(group), PRODUCTS.index(product)


def above(errors: Mapping[str, float], tolerance: float) -> list[str]:
    """Return the groups with an error that exceeds the tolerance, or is not finite, in the order of the layers.

    Args:
        errors: Of outputs and input gradients, by names such as "12.down.output": what `fused.compute_errors` returns.
        tolerance: The largest that is tolerated.
    """
    exceeding = sorted((name for name, error in errors.items() if not error <= tolerance), key=_place)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in exceeding))


def write_errors(folder: RunFolder, compute: str, errors: Mapping[str, float], tolerance: float) -> None:
    """Write what a run measured, and what it keeps in bfloat16 for it.

    Raises:
        UserError: if the file cannot be written.
    """
    rounded = {name: errors[name] if math.isfinite(errors[name]) else None for name in sorted(errors, key=_place)}
    kept = above(errors, tolerance)
    content = {"compute": compute, "tolerance": tolerance, "errors": rounded, "kept": kept}
    files.write_json(folder.compute_errors, content)


def read_errors(file: Path, compute: str) -> dict[str, float] | None:
    """Return the errors that a run measured in "fp8" or "int8"; None where there is no such file, or another's."""
    if not file.is_file():
        return None
    try:
        content = files.read_json(file, "record of errors in 8 bits")
        if content["compute"] != compute:
            return None
        errors = content["errors"]
        found = {name: math.nan if error is None else float(error) for name, error in errors.items()}
        return dict(sorted(found.items(), key=lambda item: _place(item[0])))
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None
