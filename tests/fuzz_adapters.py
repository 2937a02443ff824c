"""Damage adapters at random, open, export and inspect them: each is refused in words or whole; no third way is allowed.

    python -m tests.fuzz_adapters --cases 2000 --seed 0

One JSON line at the end: cases by kind of damage, refused and still whole. An exception that is no UserError, a case
of more than five seconds of a processor, or a damaged adapter that exports in part ends it with the case's seed.
"""

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.errors import UserError
from lsr_scale.exporting import export, open_adapter
from lsr_scale.exporting.inspect import inspect_adapter

SIZES = {"q_proj": (48, 48), "k_proj": (48, 24), "down_proj": (80, 48)}
OPTIONS: dict[str, dict[str, Any]] = {
    "lsr": {"rank": 4, "separation_rank": 3},
    "kron_lora": {"rank": 4, "left_out": 4},
    "lora": {"rank": 4},
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SECONDS = 5
NASTY: list[Any] = [
    *(None, True, -1, 0, 3, 2**31, 2**70, 1e308, float("nan"), float("inf"), "", "x", "\0", "../../etc/passwd"),
    *([], {}, [[]], {"": 0}, {"(a+)+$": 4}, {"q_proj": -1}, {".*": 1e300}, ["../x"], "(a|a)*b", "[", "a" * 10_000),
]


def write_adapter(folder: Path, method: str, bits: int) -> None:
    """Write a small whole adapter of two layers, in 8 or 4 bits at choice."""
    folder.mkdir()
    config: Any = peft_config(method, {"target_modules": list(SIZES), **OPTIONS[method]}, "CAUSAL_LM")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in SIZES.items():
            if method == "lora":
                shapes = {"lora_A.weight": (4, inputs), "lora_B.weight": (outputs, 4)}
            else:
                shapes = METHODS[method].parameter_shapes(inputs, outputs, config)
                shapes = {METHODS[method].prefix + factor: shape for factor, shape in shapes.items()}
            for factor, shape in shapes.items():
                tensors[f"base_model.model.layers.{layer}.{name}.{factor}"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    linear = {f"layers.*.{name}": [outputs, inputs] for name, (inputs, outputs) in SIZES.items()}
    described = {"name": "x", "architecture": "X", "quantization": "none", "config_sha256": "", "linear_shapes": linear}
    (folder / "base.json").write_text(json.dumps(described))
    if bits < 16:
        packed = folder.with_name(folder.name + ".packed")
        export(folder, "adapter", packed, bits=bits, verify=False, say=lambda text: None)
        shutil.rmtree(folder)
        packed.rename(folder)


def truncated(folder: Path, chance: random.Random) -> None:
    """Cut a file short."""
    file = folder / chance.choice([WEIGHTS, CONFIG, "base.json"])
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def flipped(folder: Path, chance: random.Random) -> None:
    """Flip some bits of a file, in the header as likely as behind it."""
    file = folder / chance.choice([WEIGHTS, WEIGHTS, CONFIG, "base.json"])
    content = bytearray(file.read_bytes())
    end = chance.choice([len(content), min(len(content), 2000), 16])
    for _ in range(chance.choice([1, 1, 2, 8, 64])):
        content[chance.randrange(min(end, len(content)))] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(content))


def lying_header(folder: Path, chance: random.Random) -> None:
    """Give a header another length, or its tensors other shapes, types and places."""
    file = folder / WEIGHTS
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if chance.random() < 0.3:
        claimed = chance.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_000, 99_999_999])
        file.write_bytes(struct.pack("<Q", claimed) + content[8:])
        return
    header = json.loads(content[8 : 8 + size])
    entry = header[chance.choice([name for name in header if name != "__metadata__"])]
    field = chance.choice(["shape", "dtype", "data_offsets", "shape"])
    values = {
        "shape": [[2**40, 2**40], [-1], [0], [1] * 64, [2**31, 4], [], [1.5], "x", None, [3, 2]],
        "dtype": ["F64", "I64", "BOOL", "F8_E4M3", "Q4", "", None, 7, "BF16"],
        "data_offsets": [[0, 2**62], [5, 1], [-4, 4], [0], [], "x", [0, 4]],
    }
    entry[field] = chance.choice(values[field])
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])


def wrong_tensors(folder: Path, chance: random.Random) -> None:
    """Reshape, drop, double, rename or retype tensors, or make some values infinite or no number."""
    tensors = load_file(folder / WEIGHTS)
    name = chance.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = chance.choice(["drop", "reshape", "grow", "nan", "inf", "rename", "retype", "add", "one"])
    if kind == "reshape":
        tensors[name] = value.reshape(-1, *([1] * chance.randrange(4)))
    elif kind == "grow":
        tensors[name] = torch.cat([value, value]).contiguous()
    elif kind in ("nan", "inf") and value.is_floating_point():
        value.view(-1)[chance.randrange(value.numel())] = float(kind)
        tensors[name] = value
    elif kind == "rename":
        other = ["../../x", "/etc/passwd", "a\0b", "a" * 5000, "", ".", "base_model.model..lsr_", name + ".x", "__x__"]
        tensors[chance.choice(other)] = value
    elif kind == "retype":
        tensors[name] = value.to(chance.choice([torch.int64, torch.bool, torch.float64, torch.float16]))
    elif kind == "add":
        tensors |= {name: value, f"base_model.model.../../{name}": value.clone()}
    elif kind == "one":
        tensors[name] = value.reshape(-1)[:1].clone()
    save_file(tensors, folder / WEIGHTS)


def nasty_values(folder: Path, chance: random.Random) -> None:
    """Put values into the configuration or the base's description that nobody would."""
    file = folder / chance.choice([CONFIG, CONFIG, CONFIG, "base.json"])
    content = json.loads(file.read_text())
    if chance.random() < 0.05:
        file.write_text(chance.choice(["[" * 100_000, '{"a":' * 50_000, "null", "[]", '"x"', "9" * 5000, "\ufeff{}"]))
        return
    for _ in range(chance.choice([1, 1, 2, 4])):
        content[chance.choice([*content, "auto_mapping", "no_such_key"])] = chance.choice(NASTY)
    file.write_text(json.dumps(content))


def nasty_index(folder: Path, chance: random.Random) -> None:
    """Rewrite the index of a packed adapter; one that is not packed gets an index of its own."""
    tensors = load_file(folder / WEIGHTS)
    index = {"modules": ["a"], "stacks": [{"factor": "x", "shape": [2**20, 2**20], "members": [0], "bits": 4}]}
    if "packed.index" in tensors:
        index = json.loads(bytes(tensors["packed.index"].tolist()))
        stack = chance.choice(index["stacks"])
        stack[chance.choice(list(stack))] = chance.choice([*NASTY, [0] * 10, [2**30] * 4, [1, 1], 8, 4, 16])
        if chance.random() < 0.2:
            index["modules"] = chance.choice([*NASTY, ["../x"] * len(index["modules"])])
    content = json.dumps(index).encode()
    tensors["packed.index"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS)


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    *(truncated, flipped, lying_header, wrong_tensors, nasty_values, nasty_index),
]


def fuzz(cases: int, seed: int, place: Path) -> dict[str, dict[str, int]]:
    """Return how many cases of each damage were refused, and how many adapters were still whole.

    Raises:
        AssertionError: for a case that did anything else, with its number.
    """
    whole = {}
    for method in OPTIONS:
        for bits in (16,) if method == "lora" else (16, 8, 4):
            whole[f"{method}-{bits}"] = place / f"{method}-{bits}"
            write_adapter(whole[f"{method}-{bits}"], method, bits)
    counts: Counter[tuple[str, str]] = Counter()
    handler = signal.signal(signal.SIGPROF, _too_long)
    try:
        for case in range(cases):
            chance = random.Random(f"{seed}-{case}")
            damage = DAMAGES[case % len(DAMAGES)]
            folder, out = place / "case", place / "out"
            shutil.copytree(whole[chance.choice(sorted(whole))], folder)
            damage(folder, chance)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # on a busy machine they take longer
            try:
                source = open_adapter(folder)
                export(folder, "lora", out, verify=False, say=lambda text: None)
                assert len(open_adapter(out).modules) == len(source.modules), "exported in part"
                json.dumps(inspect_adapter(folder), allow_nan=False)
                end = "whole"
            except UserError:
                end = "refused"
                assert not out.exists(), "refused, and left a folder"
            except BaseException as error:
                raise AssertionError(f"seed {seed}, case {case} ({damage.__name__}): {error!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            left = {path.name for path in place.iterdir()} - set(whole) - {"case", "out"}
            assert not left, f"seed {seed}, case {case}: left {left}"
            counts[damage.__name__, end] += 1
            shutil.rmtree(folder)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        signal.signal(signal.SIGPROF, handler)
    return {damage.__name__: {end: counts[damage.__name__, end] for end in ("refused", "whole")} for damage in DAMAGES}


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(fuzz(arguments.cases, arguments.seed, Path(folder))))
    sys.exit(0)
