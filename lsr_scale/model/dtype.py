"""Which dtype `model.dtype: auto` is: bfloat16 where the device computes in it, float32 where it does not."""

import platform

import torch


def without_bfloat16(device: torch.device) -> str | None:
    """Return why a device is slower in bfloat16 than in float32, for people; None where it has instructions for it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU has no bfloat16"
    return None if cpu_has_bfloat16() else "this CPU has no instructions for bfloat16"


def chosen_dtype(dtype: str, device: torch.device) -> str:
    """Return what a `model.dtype` is on a device: for "auto" bfloat16 or float32, any other as it is.

    float16 is never chosen: without a scaled loss its small gradients are zeros and its large numbers infinite.
    """
    if dtype != "auto":
        return dtype
    return "float32" if without_bfloat16(device) else "bfloat16"


def cpu_has_bfloat16() -> bool:
    """Tell whether this CPU multiplies in bfloat16, and torch has it do so."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN takes bfloat16 on any AVX-512, also where it only emulates it
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
