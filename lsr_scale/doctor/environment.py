"""What a run finds around it: DeepSpeed, the built-in model, disks and caches, and variables that lead astray."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes.functional import has_avx512bf16
from packaging.specifiers import SpecifierSet

from lsr_scale.doctor.hardware import GIB
from lsr_scale.doctor.report import Finding
from lsr_scale.doctor.versions import installed_version
from lsr_scale.errors import UserError
from lsr_scale.model import builtin
from lsr_scale.units import byte_size


def check_helpers() -> Iterator[Finding]:
    """Tell what several processes need, and where the built-in model is."""
    where = "GPUs: NCCL" if torch.cuda.is_available() else "CPUs: gloo"
    yield Finding("helpers", "DeepSpeed", f"several processes talk over {where}; nothing is compiled")
    name = next(iter(builtin.MODELS))
    if builtin.folder_of(name).is_dir():
        yield Finding("helpers", f"model {name}", "converted")
    elif builtin.local_gguf(name) is not None:
        yield Finding("helpers", f"model {name}", "here; converted on first use")
    else:
        size = byte_size(builtin.MODELS[name].num_bytes)
        command = "python -m lsr_scale.model"
        yield Finding("helpers", f"model {name}", f"fetched on first use, {size}", "note", f"beforehand: {command}")


def check_environment() -> Iterator[Finding]:
    """Check disks, caches and environment variables."""
    try:
        yield check_folder("model cache", builtin.cache_folder())
    except UserError as error:
        yield Finding("surroundings", "model cache", str(error), "note", "set LSR_SCALE_CACHE")
    yield check_folder("working folder", Path.cwd())
    hub = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    yield check_folder("hub cache", hub)
    yield Finding("surroundings", "hub", "offline (HF_HUB_OFFLINE)" if offline else "models are fetched when needed")
    if importlib.util.find_spec("kernels") is not None and not torch.cuda.is_available() and has_avx512bf16():
        yield check_kernels(offline)
    torchao = installed_version("torchao")
    if torchao is not None:
        yield check_torchao(torchao)
    if os.environ.get("WORLD_SIZE", "1") != "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        remedy = "unset WORLD_SIZE RANK LOCAL_RANK: a run started by hand would wait for other processes"
        yield Finding("surroundings", "WORLD_SIZE", f"is {os.environ['WORLD_SIZE']} in this shell", "bad", remedy)
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator and accelerator != ("cuda" if torch.cuda.is_available() else "cpu"):
        remedy = "unset DS_ACCELERATOR"
        yield Finding("surroundings", "DS_ACCELERATOR", f"is {accelerator}, not this machine's", "bad", remedy)


def check_kernels(offline: bool) -> Finding:
    """Judge the package `kernels` on a CPU with AVX512-BF16, where importing bitsandbytes makes it ask the hub."""
    if offline:
        return Finding("surroundings", "kernels", "installed; the hub is not asked while offline")
    found = "installed: on this CPU importing bitsandbytes asks the hub for a kernel that training never uses"
    remedy = "pip uninstall kernels, or set HF_HUB_OFFLINE=1: without a network every start waits for it"
    return Finding("surroundings", "kernels", found, "bad", remedy)


def check_torchao(version: str) -> Finding:
    """Judge torchao, of which PEFT refuses old versions with an error as soon as an adapter is made."""
    if version in SpecifierSet("<0.16"):
        remedy = "pip uninstall torchao (nothing here uses it), or pip install 'torchao>=0.16'"
        return Finding("surroundings", "torchao", f"{version}: PEFT raises an error over it", "bad", remedy)
    return Finding("surroundings", "torchao", version)


def check_folder(name: str, folder: Path) -> Finding:
    """Tell the free space of a folder that a run writes to, and whether it can."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = {"model cache": "set LSR_SCALE_CACHE", "hub cache": "set HF_HOME"}.get(
            name, "change to another folder"
        )
        found = f"{folder}: cannot be written ({error.strerror})"
        return Finding("surroundings", name, found, "bad" if name == "working folder" else "note", remedy)
    free = shutil.disk_usage(place).free
    found = f"{folder}, {byte_size(free)} free"
    if free < GIB:
        return Finding("surroundings", name, found, "bad", "free at least 1 GiB")
    return Finding("surroundings", name, found)
