"""What every kernel test needs: poisoned memory, one measure of error, compilation without a GPU."""

import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def poisoned(shape, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return a tensor full of NaN: what a kernel forgets to write is seen."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def strided(x: Tensor, extra: int) -> Tensor:
    """Return a copy of a matrix as a view whose row stride is larger by `extra` poisoned columns."""
    wide = poisoned((x.shape[0], x.shape[1] + extra), x.dtype, str(x.device))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def error(actual: Tensor, reference: Tensor) -> float:
    """Return `|actual - reference| / |reference|` (Frobenius norms, float64)."""
    reference = reference.double().cpu()
    return float((actual.double().cpu() - reference).norm() / reference.norm().clamp_min(1e-300))


def assert_close_to_float64(actual: Tensor, reference: Tensor, eager: Tensor, floor: float = 1e-3) -> None:
    """Fail unless the error against a float64 reference is at most twice that of the eager computation plus a floor.

    Args:
        actual: What the kernel gave.
        reference: The float64 reference on the same inputs.
        eager: The plain torch computation in the kernel's own dtype.
        floor: What one rounding of the dtype may cost: 1e-3 for bf16, less for wider types.
    """
    assert actual.shape == reference.shape
    assert torch.isfinite(actual).all(), "unwritten or non-finite elements"
    allowed = 2 * error(eager, reference) + floor
    assert error(actual, reference) <= allowed, f"error {error(actual, reference):.2e}, allowed {allowed:.2e}"


def compile_for(kernel, signature: dict[str, str], constexprs: dict, num_warps: int = 4, num_stages: int = 3) -> dict:
    """Compile a kernel for sm_80 and sm_90 without a GPU, in a process of its own that does not interpret kernels.

    For sm_80 to the end, for sm_90 down to what says how much shared memory it needs, as GPU tests assemble it.

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
    metadata_of = _compiler().submit(_compile, name, signature, constexprs, options).result()
    return {capability: SimpleNamespace(**metadata) for capability, metadata in metadata_of.items()}


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
    from triton.compiler import ASTSource, make_backend

    function = getattr(importlib.import_module(name[0]), name[1])
    full = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    full = {name: full[name] for name in function.arg_names}
    fixed = {(function.arg_names.index(name),): value for name, value in constexprs.items()}
    metadata_of = {}
    for capability in (80, 90):
        source = ASTSource(fn=function, signature=full, constexprs=fixed)
        target = GPUTarget("cuda", capability, 32)
        if capability == 80:
            shared = compile_source(source, target=target, options=options).metadata.shared
        else:
            backend = make_backend(target)
            shared = _shared_memory_of(source, backend, target, backend.parse_options(options))
        metadata_of[capability] = {"shared": shared}
    return metadata_of


class OnGpu(torch.Tensor):
    """A tensor in the CPU's memory whose `is_cuda` is True, for a launcher whose kernels are not run."""

    is_cuda = property(lambda _: True)  # pyright: ignore

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return an uninitialized one."""
        return torch.empty(shape, dtype=dtype).as_subclass(OnGpu)


def launched(
    scenario: Callable[..., None], *arguments: Any, shared_bytes: int, capabilities: Sequence[int]
) -> list[tuple[str, int, int]]:
    """Compile kernels as a function launches them, down to what says how much shared memory each needs.

    As it launches them: with its choice of tiles, and with all that Triton makes of the arguments of a launch, such as
    that an address or a stride is a multiple of 16.

    Args:
        scenario: A module's function that calls operations on tensors of `OnGpu.empty`; in a process of its own.
        arguments: What it is given.
        shared_bytes: Shared memory of the GPU that it sees, in bytes.
        capabilities: What is compiled for.

    Returns:
        (kernel's name, capability, bytes of shared memory) of each different launch.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    return _compiler().submit(_compile_launches, scenario, arguments, shared_bytes, tuple(capabilities)).result()


def _compile_launches(
    scenario: Callable[..., None], arguments: tuple, shared_bytes: int, capabilities: tuple[int, ...]
) -> list[tuple[str, int, int]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    from lsr_scale.kernels import backend as kernels_backend

    launches: list[Any] = []
    run, before = jit.JITFunction.run, (kernels_backend._shared_memory, kernels_backend._multiprocessors)
    jit.JITFunction.run = lambda kernel, *args, grid, warmup, **options: launches.append((kernel, args, options))
    kernels_backend._shared_memory, kernels_backend._multiprocessors = lambda _: shared_bytes, lambda _: 132
    try:
        scenario(*arguments)
    finally:
        jit.JITFunction.run = run
        kernels_backend._shared_memory, kernels_backend._multiprocessors = before
    compiled, seen = [], set()
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        for kernel, args, given in launches:
            # as JITFunction.run does it
            binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialization, _ = binder(*args, **given)
            options, signature, constexprs, attrs = kernel._pack_args(backend, given, bound, specialization, None)
            key = kernel.__name__, capability, str((signature, constexprs, attrs, options))
            if key not in seen:
                seen.add(key)
                source = ASTSource(kernel, signature, constexprs, attrs)
                compiled.append((kernel.__name__, capability, _shared_memory_of(source, backend, target, options)))
    return compiled


def _shared_memory_of(source: Any, backend: Any, target: Any, options: Any) -> int:
    """Compile as `triton.compile` does, but without LLVM's optimizer and the assembler, which take long.

    Shared memory is allocated before either.
    """
    from triton._C.libtriton import ir, llvm

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, codegen, modules, context)
    optimize, llvm.optimize_module = llvm.optimize_module, lambda *_: None
    try:
        for name, stage in stages.items():
            module = stage(module, metadata)
            if name == "llir":
                return metadata["shared"]
    finally:
        llvm.optimize_module = optimize
    raise AssertionError(f"no llir among {list(stages)}")
