"""Processor, memory and GPUs, and whether this build of torch can use them."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from lsr_scale import distributed
from lsr_scale.doctor.report import Finding
from lsr_scale.model.dtype import chosen_dtype, without_bfloat16
from lsr_scale.units import amount, byte_size

GIB = 2**30


def check_hardware() -> Iterator[Finding]:
    """Tell processor, memory and GPUs, and whether torch can use them."""
    cores = distributed.num_cores()
    memory = psutil.virtual_memory()
    yield Finding(
        "hardware",
        "CPU",
        f"{platform.machine()}, {amount(cores, 'core')} usable, {amount(torch.get_num_threads(), 'thread')}",
    )
    if not torch.cuda.is_available():
        yield _dtype()
    yield Finding("hardware", "memory", f"{byte_size(memory.available)} of {byte_size(memory.total)} free")
    driver = _driver()
    yield check_torch_build(torch.version.cuda, driver, torch.cuda.is_available())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found = f"{properties.name}, compute capability {capability}, {byte_size(free)} of {byte_size(total)} free"
        if without_bfloat16(torch.device("cuda", index)):
            remedy = "it has no bfloat16, so model.dtype: auto is float32; float16 is faster, and may overflow"
            yield Finding("hardware", f"GPU {index}", found, "note", remedy)
        else:
            yield Finding("hardware", f"GPU {index}", f"{found}, bfloat16")


def _dtype() -> Finding:
    """Return what runs compute in by default, where they compute on the CPU."""
    device = torch.device("cpu")
    slow, found = without_bfloat16(device), f"model.dtype: auto is {chosen_dtype('auto', device)}"
    return Finding("hardware", "dtype", f"{found}, as {slow}" if slow else found)


def _driver() -> str | None:
    """Return the NVIDIA driver's version, "?" for a driver that does not tell, None without one."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return output.split("\n")[0].strip() or "?"
        except (OSError, subprocess.SubprocessError):
            pass
    return "?" if Path("/dev/nvidiactl").exists() else None


def check_torch_build(cuda: str | None, driver: str | None, usable: bool) -> Finding:
    """Judge whether torch's build goes with the machine.

    Args:
        cuda: The CUDA version that torch was built for, None for a CPU build.
        driver: The NVIDIA driver's version, None if there is no GPU.
        usable: Whether torch can use a GPU.
    """
    build = f"built for CUDA {cuda}" if cuda else "a build for CPUs"
    if driver and not cuda:
        remedy = "install a build of torch for CUDA (see pytorch.org); the GPU is not used"
        return Finding("hardware", "torch", f"{build}, with an NVIDIA driver {driver}", "bad", remedy)
    if driver and not usable:
        remedy = "torch cannot use the GPU: update the driver, or install a torch built for an older CUDA"
        return Finding("hardware", "torch", f"{build}, driver {driver}", "bad", remedy)
    if cuda and not driver:
        remedy = "no GPU here: pip install torch --index-url https://download.pytorch.org/whl/cpu is 4 GB smaller"
        return Finding("hardware", "torch", f"{build}, no GPU", "note", remedy)
    return Finding("hardware", "torch", f"{build}, driver {driver}" if driver else f"{build}, no GPU")
