"""What Triton's interpreter lacks beside a GPU: rounding of narrow types, their products, bounds that were loaded.

And its language, which it puts in place once for a launch, not for every call of a function within.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


def as_on_a_gpu(monkeypatch: Any) -> None:
    """Have the interpreter round to bfloat16 and e4m3, multiply bfloat16, and take bounds of loops, as a GPU does.

    By itself it truncates, knows no NaN in e4m3, and multiplies the bits of bfloat16 as integers. Nor does it take a
    bound of a loop that was loaded from memory.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def exact(values, source, target, rounding):
        names = {source.name, target.name}
        if not names <= DTYPES.keys() or not names & {"bf16", "fp8e4nv"}:
            return convert(values, source, target, rounding)
        values = torch.from_numpy(np.array(values).view(f"int{source.primitive_bitwidth}")).view(DTYPES[source.name])
        if target.name == "fp8e4nv":
            # cvt.rn.satfinite; torch's conversion may give NaN
            values = values.float().clamp(-448, 448)
        integers = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[target.primitive_bitwidth]
        return values.to(DTYPES[target.name]).view(integers).numpy()

    def widened(builder, a, b, *arguments):
        a, b = (builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(builder, a, b, *arguments)

    patch_tensor = interpreter._patch_lang_tensor

    def with_bounds(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_once(monkeypatch.setattr)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_bounds)
    monkeypatch.setattr(interpreter, "_convert_float", exact)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


def patch_once(setattr: Callable[..., None]) -> None:
    """Have a launch replace what `triton.language` has once, and put it all back at its end.

    By itself every call of a function within a kernel, `tl.sum` among them, looks for something to replace among all
    members again, which takes longer than most kernels compute, and puts nothing back.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[tuple[bool, ...], Any] = {}  # of the launch that runs, by which of the language's modules they are of

    def patch(function):
        visible = list(function.__globals__.values())
        modules = tuple(any(value is module for value in visible) for module in (tl, tl.core))
        if modules in scopes:
            return interpreter._LangPatchScope()
        scope = patch_lang(function)
        outermost = next(iter(scopes.values()), scope)
        scopes[modules] = scope
        if outermost is not scope:  # what is put back at the launch's end
            outermost._changes.extend(scope._changes)
        return scope

    def launched(self, *arguments, **options):
        try:
            return launch(self, *arguments, **options)
        finally:
            scopes.clear()

    setattr(interpreter, "_patch_lang", patch)
    setattr(interpreter.GridExecutor, "__call__", launched)
