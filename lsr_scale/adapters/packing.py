"""An adapter's factors quantized to 8 or 4 bits, packed in stacks of one shape: codes, and a scale per group.

The file stays an `adapter_model.safetensors` that PEFT loads: the tuners of this package unpack it on the way in. Its
tensors are `packed.N.codes` (int8, or two 4-bit codes a byte, the even element in the low half), `packed.N.scales`
(float16) and `packed.index` (JSON as bytes: module names, and the factor, shape and members of each stack). A value is
`code * scale`, over `2 ** exponent` where the index gives a stack one: its scales would be too small for float16's full
precision. Codes are symmetric, -127..127 or -7..7, and a group has 64 or 32 of them. Groups continue over the members
of a stack; factors of fewer than 16 elements are stored in float16.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lsr_scale.errors import UserError

INDEX = "packed.index"
GROUP_SIZE = {8: 64, 4: 32}
_MAX_CODE = {8: 127, 4: 7}
# the clipping thresholds that are tried, relative to a group's absmax: clipping rounds the other values less
_CLIP_RATIOS = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79, 0.72)}
_MIN_ELEMENTS = 16  # smaller factors cost few bytes, and matter much
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_EXPONENT = 126  # its power of two, and one over it, are normal numbers in float32


def quantize_groups(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a tensor, its elements in order; of a few scales the one of least squared error.

    Args:
        values: Any shape, finite.
        bits: 8 or 4.

    Returns:
        codes int8 `[n]` or uint8 `[ceil(n / 2)]`, scales float16 `[ceil(n / group)]`.
    """
    size, max_code = GROUP_SIZE[bits], _MAX_CODE[bits]
    flat = values.detach().float().reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    absmax = groups.abs().amax(1, keepdim=True)
    best_error = torch.full_like(absmax, math.inf)
    codes, scales = torch.zeros_like(groups), torch.zeros_like(absmax)
    for ratio in _CLIP_RATIOS[bits]:
        scale = (absmax * ratio / max_code).half().float()
        rounded = (groups / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-max_code, max_code)
        rounded = rounded.where(scale > 0, torch.zeros_like(rounded))
        error = (rounded * scale - groups).square().sum(1, keepdim=True)
        better = error < best_error
        best_error = error.where(better, best_error)
        codes, scales = rounded.where(better, codes), scale.where(better, scales)
    codes = codes.to(torch.int8).view(-1)[: len(flat)]
    if bits == 4:
        low_high = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2).to(torch.uint8) & 15
        codes = low_high[:, 0] | (low_high[:, 1] << 4)
    return codes.contiguous(), scales.view(-1).half()


def dequantize_groups(codes: Tensor, scales: Tensor, bits: int, count: int) -> Tensor:
    """Return the float32 values `[count]` of `quantize_groups`."""
    if bits == 4:
        halves = torch.stack([codes & 15, codes >> 4], 1).view(-1).to(torch.int8)
        codes = torch.where(halves > 7, halves - 16, halves)[:count]
    return codes.float() * scales.float().repeat_interleave(GROUP_SIZE[bits])[:count]


def checked_cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor cast to a dtype of fewer bits.

    Raises:
        UserError: if finite values overflow, with their number.
    """
    cast = value.to(dtype)
    overflows = int((torch.isfinite(value) & ~torch.isfinite(cast)).sum())
    if overflows:
        dtype_name, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise UserError(
            f"{name}: {overflows:,} of {value.numel():,} values are beyond {dtype_name}: its largest is {limit:.5g}, "
            f"theirs {float(value.abs().max()):.3g}; --to lora --dtype float32 holds them, or train it again"
        )
    return cast


def pack(modules: Mapping[str, Mapping[str, Tensor]], bits: int) -> dict[str, Tensor]:
    """Return the tensors of a packed file.

    Args:
        modules: Factors by module, then by the name they have in the file (the method's prefix included).
        bits: 8 or 4.

    Raises:
        UserError: for values whose scale is beyond float16.
    """
    names = list(modules)
    stacks: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for number, name in enumerate(names):
        for factor, value in modules[name].items():
            stacks.setdefault((factor, tuple(value.shape)), []).append(number)
    tensors: dict[str, Tensor] = {}
    entries = []
    for key, ((factor, shape), members) in enumerate(stacks.items()):
        stack = torch.stack([modules[names[number]][factor].detach().float() for number in members])
        width = bits if math.prod(shape) >= _MIN_ELEMENTS else 16
        name = f"{names[members[0]]}.{factor}"
        exponent = _exponent(float(stack.abs().max()) / _MAX_CODE.get(width, 1))
        stack = stack * 2.0**exponent
        if width == 16:
            tensors[f"packed.{key}.codes"] = checked_cast(stack, torch.float16, name)
        else:
            checked_cast(stack / _MAX_CODE[bits], torch.float16, name)
            tensors[f"packed.{key}.codes"], tensors[f"packed.{key}.scales"] = quantize_groups(stack, bits)
        entry = {"factor": factor, "shape": list(shape), "members": members, "bits": width}
        entries.append(entry | ({"exponent": exponent} if exponent else {}))
    index = json.dumps({"modules": names, "stacks": entries}, separators=(",", ":")).encode()
    return tensors | {INDEX: torch.frombuffer(bytearray(index), dtype=torch.uint8)}


def _exponent(largest: float) -> int:
    """Return the power of two that brings a stack's largest scale to 1 or above, 0 where float16 has it in full."""
    if largest == 0 or largest >= torch.finfo(torch.float16).tiny:
        return 0
    return min(1 - math.frexp(largest)[1], _MAX_EXPONENT)


def is_packed(names: Iterable[str]) -> bool:
    """Tell whether a file's tensor names are those of a packed adapter."""
    return INDEX in names


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a packed file in float32, by the names of an unpacked one; other tensors as they are.

    Raises:
        UserError: if codes, scales and index do not fit each other; sizes are checked before anything is allocated.
    """
    index = _read_index(tensors[INDEX])
    names, stacks = index["modules"], index["stacks"]
    unpacked = {name: value for name, value in tensors.items() if not name.startswith("packed.")}
    for number, stack in enumerate(stacks):
        factor, shape, members, bits = (stack[key] for key in ("factor", "shape", "members", "bits"))
        stack_shape = [len(members), *shape]
        if bits == 16:
            values = _tensor(tensors, f"packed.{number}.codes", factor, stack_shape, torch.float16).float()
        else:
            count = math.prod(stack_shape)
            shape_and_dtype = ([-(-count // 2)], torch.uint8) if bits == 4 else ([count], torch.int8)
            codes = _tensor(tensors, f"packed.{number}.codes", factor, *shape_and_dtype)
            num_groups = -(-count // GROUP_SIZE[bits])
            scales = _tensor(tensors, f"packed.{number}.scales", factor, [num_groups], torch.float16)
            values = dequantize_groups(codes, scales, bits, count).view(stack_shape)
        values = values * 2.0 ** -stack.get("exponent", 0)
        for member, value in zip(members, values, strict=True):
            name = f"base_model.model.{names[member]}.{factor}"  # PEFT's prefix, as in an unpacked file
            if name in unpacked:
                raise UserError(f"packed.index: {name} is there twice; export the adapter again")
            unpacked[name] = value.clone()
    return unpacked


def _tensor(tensors: Mapping[str, Tensor], name: str, factor: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of a packed file, of exactly the shape and dtype that the index implies."""
    value = tensors.get(name)
    if value is None or list(value.shape) != shape or value.dtype != dtype:
        found = "nothing" if value is None else f"{list(value.shape)} of {value.dtype}"
        raise UserError(f"{name} ({factor}): expected {shape} of {dtype}, got {found}; export the adapter again")
    return value


def _read_index(raw: Tensor) -> Any:
    """Return the index, with every field of the type and range that `unpack` relies on."""

    def is_int(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value < high

    try:
        if raw.dtype != torch.uint8 or raw.dim() != 1 or raw.numel() > _MAX_INDEX_BYTES:
            raise ValueError("not bytes")
        index = json.loads(bytes(raw.tolist()))
        names, stacks = index["modules"], index["stacks"]
        if not (isinstance(names, list) and isinstance(stacks, list) and all(isinstance(n, str) for n in names)):
            raise ValueError("modules and stacks have to be lists")
        for stack in stacks:
            shape, members = stack["shape"], stack["members"]
            if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and all(is_int(n, 1, 2**31) for n in shape)):
                raise ValueError(f"a shape {shape!r}")
            if not (isinstance(members, list) and members and all(is_int(n, 0, len(names)) for n in members)):
                raise ValueError("members that are no modules")
            if not isinstance(stack["factor"], str) or stack["bits"] not in (4, 8, 16):
                raise ValueError("a stack without factor or bits")
            if not is_int(stack.get("exponent", 0), 0, _MAX_EXPONENT + 1):
                raise ValueError(f"an exponent {stack['exponent']!r:.40}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"packed.index: cannot be read ({error}); export the adapter again") from error
    return index
