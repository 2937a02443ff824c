"""What every kernel test needs: poisoned memory, one measure of error, compilation without a GPU."""

import functools
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


def poisoned(shape, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return a tensor full of NaN: what a kernel forgets to write is seen."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def pitched(x: Tensor, extra: int) -> Tensor:
    """Return a copy of a matrix as a view with `extra` poisoned columns between its rows."""
    wide = poisoned((x.shape[0], x.shape[1] + extra), x.dtype, str(x.device))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def error(found: Tensor, reference: Tensor) -> float:
    """Return `|found - reference| / |reference|` (Frobenius norms, float64)."""
    reference = reference.double().cpu()
    return float((found.double().cpu() - reference).norm() / reference.norm().clamp_min(1e-300))


def assert_close_to_float64(found: Tensor, reference: Tensor, eager: Tensor, floor: float = 1e-3) -> None:
    """Fail unless the error against a float64 reference is at most twice that of the eager computation plus a floor.

    Args:
        found: What the kernel gave.
        reference: The float64 reference on the same inputs.
        eager: The plain torch computation in the kernel's own dtype.
        floor: What one rounding of the dtype may cost: 1e-3 for bf16, less for wider types.
    """
    assert found.shape == reference.shape
    assert torch.isfinite(found).all(), "unwritten or non-finite elements"
    allowed = 2 * error(eager, reference) + floor
    assert error(found, reference) <= allowed, f"error {error(found, reference):.2e}, allowed {allowed:.2e}"


def compile_for(kernel, signature: dict[str, str], constexprs: dict, num_warps: int = 4, num_stages: int = 3) -> dict:
    """Compile a kernel for sm_80 and sm_90 without a GPU, in a process of its own that does not interpret kernels.

    Args:
        kernel: The decorated function.
        signature: Triton type of each argument that is no constexpr ("*bf16", "i32", "i64", "fp32").
        constexprs: Value of each constexpr.
        num_warps: Warps per program.
        num_stages: Software-pipelining depth.

    Returns:
        Compilation metadata (with `.shared`, bytes of shared memory) by compute capability.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    name = kernel.fn.__module__, kernel.fn.__name__
    options = {"num_warps": num_warps, "num_stages": num_stages}
    found = _compiler().submit(_compile, name, signature, constexprs, options).result()
    return {capability: SimpleNamespace(**metadata) for capability, metadata in found.items()}


@functools.cache
def _compiler() -> ProcessPoolExecutor:
    """Return the one process that compiles."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def _compile(name: tuple[str, str], signature: dict[str, str], constexprs: dict, options: dict) -> dict[int, dict]:
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(name[0]), name[1])
    full = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    full = {name: full[name] for name in function.arg_names}
    fixed = {(function.arg_names.index(name),): value for name, value in constexprs.items()}
    found = {}
    for capability in (80, 90):
        source = ASTSource(fn=function, signature=full, constexprs=fixed)
        compiled = compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)
        found[capability] = {"shared": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    return found
