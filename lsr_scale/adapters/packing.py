"""An adapter's factors in 8 or 4 bits: stacks of one shape, codes and a scale per group of 32 or 64, and their names.

The file stays an `adapter_model.safetensors` that PEFT loads: the tuners of this package unpack it on the way in. Its
tensors are `packed.N.codes` (int8, or two 4-bit codes a byte, the even element in the low half), `packed.N.scales`
(float16) and `packed.index` (JSON as bytes: module names, and the factor, shape and members of each stack).
A value is `code * scale`, over `2 ** exponent` where the index gives a stack one: its scales would be too small for
float16's full precision. Codes are symmetric, -127..127 or -7..7. Groups run on over the members of a stack; factors of
fewer than 16 elements stay in float16.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lsr_scale.errors import UserError

INDEX = "packed.index"
GROUP = {8: 64, 4: 32}
_LARGEST = {8: 127, 4: 7}
# of the largest absolute value of a group; a smaller scale clips a few values and rounds the others less
_CLIPPED = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79, 0.72)}
_SMALLEST = 16  # elements; fewer cost nothing and weigh much
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_EXPONENT = 126  # its power of two, and one over it, are normal numbers in float32


def quantize_groups(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a tensor, its elements in order; the scale of least squared error of a few is taken.

    Args:
        values: Any shape, finite.
        bits: 8 or 4.

    Returns:
        codes int8 `[n]` or uint8 `[ceil(n / 2)]`, scales float16 `[ceil(n / group)]`.
    """
    size, largest = GROUP[bits], _LARGEST[bits]
    flat = values.detach().float().reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    peak = groups.abs().amax(1, keepdim=True)
    best_error = torch.full_like(peak, math.inf)
    codes, scales = torch.zeros_like(groups), torch.zeros_like(peak)
    for share in _CLIPPED[bits]:
        scale = (peak * share / largest).half().float()
        tried = (groups / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-largest, largest)
        tried = tried.where(scale > 0, torch.zeros_like(tried))
        error = (tried * scale - groups).square().sum(1, keepdim=True)
        better = error < best_error
        best_error = error.where(better, best_error)
        codes, scales = tried.where(better, codes), scale.where(better, scales)
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
    return codes.float() * scales.float().repeat_interleave(GROUP[bits])[:count]


def in_range(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in a dtype that has fewer bits.

    Raises:
        UserError: if finite values are not finite there, with their number.
    """
    found = value.to(dtype)
    lost = int((torch.isfinite(value) & ~torch.isfinite(found)).sum())
    if lost:
        kind, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise UserError(
            f"{name}: {lost:,} of {value.numel():,} values are beyond {kind}: its largest is {largest:.5g}, theirs "
            f"{float(value.abs().max()):.3g}; --to lora --dtype float32 holds them, or train it again"
        )
    return found


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
    described = []
    for key, ((factor, shape), members) in enumerate(stacks.items()):
        stack = torch.stack([modules[names[number]][factor].detach().float() for number in members])
        width = bits if math.prod(shape) >= _SMALLEST else 16
        name = f"{names[members[0]]}.{factor}"
        exponent = _exponent(float(stack.abs().max()) / _LARGEST.get(width, 1))
        stack = stack * 2.0**exponent
        if width == 16:
            tensors[f"packed.{key}.codes"] = in_range(stack, torch.float16, name)
        else:
            in_range(stack / _LARGEST[bits], torch.float16, name)
            tensors[f"packed.{key}.codes"], tensors[f"packed.{key}.scales"] = quantize_groups(stack, bits)
        described.append({"factor": factor, "shape": list(shape), "members": members, "bits": width})
        if exponent:
            described[-1]["exponent"] = exponent
    index = json.dumps({"modules": names, "stacks": described}, separators=(",", ":")).encode()
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
    """Return the factors of a packed file in float32, under the names an unpacked one has; other tensors pass through.

    Raises:
        UserError: if codes, scales and index do not fit each other; sizes are checked before anything is allocated.
    """
    index = _read_index(tensors[INDEX])
    names, stacks = index["modules"], index["stacks"]
    found = {name: value for name, value in tensors.items() if not name.startswith("packed.")}
    for key, stack in enumerate(stacks):
        factor, shape, members, bits = (stack[word] for word in ("factor", "shape", "members", "bits"))
        each = math.prod(shape)
        count = each * len(members)
        codes, scales = (tensors.get(f"packed.{key}.{part}") for part in ("codes", "scales"))
        expected = {4: (-(-count // 2), torch.uint8), 8: (count, torch.int8), 16: (count, torch.float16)}[bits]
        if codes is None or (codes.numel(), codes.dtype) != expected:
            got = "nothing" if codes is None else f"{codes.numel()} of {codes.dtype}"
            raise UserError(
                f"packed.{key}.codes ({factor}): expected {expected[0]} of {expected[1]}, got {got}; export again"
            )
        if bits == 16:
            values = codes.reshape(-1).float()
        else:
            groups = -(-count // GROUP[bits])
            if scales is None or scales.numel() != groups or scales.dtype != torch.float16:
                raise UserError(f"packed.{key}.scales ({factor}): expected {groups} float16 scales; export again")
            values = dequantize_groups(codes.reshape(-1), scales.reshape(-1), bits, count)
        values = values * 2.0 ** -stack.get("exponent", 0)
        for number, value in zip(members, values.view(len(members), *shape), strict=True):
            name = f"base_model.model.{names[number]}.{factor}"  # PEFT's prefix, as in an unpacked file
            if name in found:
                raise UserError(f"packed.index: {name} is there twice; export the adapter again")
            found[name] = value.clone()
    return found


def _read_index(raw: Tensor) -> Any:
    """Return the index, every field of it of the type and range that `unpack` relies on."""

    def whole(value: Any, low: int, high: int) -> bool:
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
            if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and all(whole(n, 1, 2**31) for n in shape)):
                raise ValueError(f"a shape {shape!r}")
            if not (isinstance(members, list) and members and all(whole(n, 0, len(names)) for n in members)):
                raise ValueError("members that are no modules")
            if not isinstance(stack["factor"], str) or stack["bits"] not in (4, 8, 16):
                raise ValueError("a stack without factor or bits")
            if not whole(stack.get("exponent", 0), 0, _MAX_EXPONENT + 1):
                raise ValueError(f"an exponent {stack['exponent']!r:.40}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"packed.index: cannot be read ({error}); export the adapter again") from error
    return index
