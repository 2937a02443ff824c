"""Which fast paths are on; the fused layers and the quantized ones are tried on every device that a run would use."""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import has_avx512bf16

from lsr_scale.config import RunConfig
from lsr_scale.doctor.fused_trial import layer_of, small_layer, try_eight_bits, try_fused
from lsr_scale.doctor.quantized_trial import try_quantized
from lsr_scale.doctor.report import Finding
from lsr_scale.doctor.versions import installed_version


def check_fast_paths(run: RunConfig | None = None) -> Iterator[Finding]:
    """Tell which fast paths are on, and try the quantized layers on every device that a run would use."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    # kernels take other tiles for more columns than 64, of which q, k and v have three times their rank
    small = [small_layer(4), small_layer(64)]
    trials = [layer_of(run)] if run is not None and run.model.task == "causal_lm" else small
    for trial in trials if gpu else trials[:1]:
        yield try_fused(device, trial)
    yield try_eight_bits(device, trials[0], "bf16" if run is None else run.training["compute"])
    triton = installed_version("triton")
    if gpu and triton is None:
        remedy = "pip install triton; without it the fused layers' kernels, and TRL's head, run as plain torch, slowly"
        yield Finding("fast paths", "triton", "not installed", "note", remedy)
    else:
        yield Finding("fast paths", "triton", f"{triton or 'not installed'}{'' if gpu else ' (only GPUs use it)'}")
    flash = installed_version("flash-attn")
    yield Finding("fast paths", "attention", f"PyTorch's SDPA; flash-attn {flash or 'not installed (not needed)'}")
    for device_type in ("cpu", "cuda") if gpu else ("cpu",):
        for kind in ("nf4", "int8"):
            yield try_quantized(kind, torch.device(device_type))
    if has_avx512bf16():
        off = "bitsandbytes' eval-mode repacking, which stops gradients, is switched off"
        yield Finding("fast paths", "AVX512-BF16", off)
