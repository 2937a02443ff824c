"""The committed measurements of speed: what a file has, where it was made, which one is the headline."""

import itertools
import json
from pathlib import Path
from typing import Any

Run = dict[str, Any]
# how the providers of a throughput measurement are called, in the order of tables; "in int8" is what they compute in
LABELS = {
    "lsr_fp8": "**LSR-Adapt** r=16 s=16 in FP8, fused",
    "kron_lora_fp8": "**Kron-LoRA** r=8 in FP8, fused",
    "lora_fp8": "LoRA r=16 in FP8, fused by us",
    "lsr_int8": "**LSR-Adapt** r=16 s=16 in int8, fused",
    "kron_lora_int8": "**Kron-LoRA** r=8 in int8, fused",
    "lora_int8": "LoRA r=16 in int8, fused by us",
    "lsr": "**LSR-Adapt** r=16 s=16, fused",
    "lsr_held": "the same, weights cached in bfloat16",
    "kron_lora": "**Kron-LoRA** r=8, fused",
    "lora": "LoRA r=16, fused by us",
    "unsloth_lora": "LoRA r=16, Unsloth",
    "peft_lora_liger": "LoRA r=16, PEFT + Liger",
    "peft_kbit_liger": "the same after `prepare_model_for_kbit_training`",
    "peft_lora": "LoRA r=16, PEFT",
    "frozen_fp8": "no adapter, in FP8, fused",
    "frozen_int8": "no adapter, in int8, fused",
    "frozen": "no adapter, fused",
    "peft_frozen_liger": "no adapter, Liger",
    "lsr_unfused": "**LSR-Adapt** r=16 s=16, unfused",
    "peft_lora_float32": "LoRA r=16, PEFT, without autocast",
    "peft_lokr": "LoKr, PEFT",
    "lsr_graphs": "**LSR-Adapt** r=16 s=16, its steps as CUDA graphs",
    "kron_lora_graphs": "**Kron-LoRA** r=8, its steps as CUDA graphs",
    "lora_graphs": "LoRA r=16 by us, its steps as CUDA graphs",
    "lsr_graphs_fp8": "**LSR-Adapt** r=16 s=16 in FP8, its steps as CUDA graphs",
    "kron_lora_graphs_fp8": "**Kron-LoRA** r=8 in FP8, its steps as CUDA graphs",
    "lsr_graphs_int8": "**LSR-Adapt** r=16 s=16 in int8, its steps as CUDA graphs",
    "kron_lora_graphs_int8": "**Kron-LoRA** r=8 in int8, its steps as CUDA graphs",
    "lora_graphs_fp8": "LoRA r=16 in FP8 by us, its steps as CUDA graphs",
    "lora_graphs_int8": "LoRA r=16 in int8 by us, its steps as CUDA graphs",
}
# by checkpointing: what becomes of activations
MODES = {"none": "saved", "full": "recomputed"}
# of the headline: a step, and a sequence
TOKENS, LENGTH = 8192, 2048


def read(folder: Path) -> list[tuple[Path, Run]]:
    """Return the measurements in a folder by file, the oldest first.

    The peaks of CUDA graphs in files whose config has no `graphs_in_peak` are left out: they were taken while the
    graphs' memory stood by and did not count.
    """
    runs = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    for _, run in runs:
        if not run.get("config", {}).get("graphs_in_peak"):
            run["slopes"] = [line for line in run.get("slopes", ()) if line["provider"] != "lsr_graphs"]
            for row in run.get("rows", ()):
                if isinstance(row, dict) and row.get("provider") == "lsr_graphs":
                    row["peak_memory_gib"] = None
    return sorted(runs, key=lambda pair: str(pair[1].get("env", {}).get("date", "")))


def where(run: Run, path: Path) -> str:
    """Return the machine, versions and file of a run."""
    env = run["env"]
    machine = ", ".join(env.get("gpus") or [env["cpu"]]).replace("NVIDIA ", "")
    names = ("torch", "transformers", "peft", "unsloth", "liger-kernel")
    versions = ", ".join(f"{name} {env[name]}" for name in names if env.get(name))
    return f"`{path.parent.name}/{path.name}`: {machine}; {versions}."


def by_provider(run: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows by provider and way of checkpointing, in the order of `LABELS`."""
    rows = {name: {row["checkpointing"]: row for row in run["rows"] if row["provider"] == name} for name in LABELS}
    return {name: modes for name, modes in rows.items() if modes}


def sweeps(run: dict[str, Any]) -> dict[str, tuple[int, list[int]]]:
    """Return what a measurement varies alone: `tokens` or `seq_len`, the value of the other, the values of this one."""
    swept = {}
    for across, fixed in (("tokens", "seq_len"), ("seq_len", "tokens")):
        values: dict[int, set[int]] = {}
        for row in run["rows"]:
            values.setdefault(row[fixed], set()).add(row[across])
        most = max(values, key=lambda value: (len(values[value]), value))
        if len(values[most]) > 1:
            swept[across] = most, sorted(values[most])
    return swept


def has_scaling(run: Run) -> bool:
    """Tell whether more than one number of GPUs was measured, so that there is something to draw."""
    return run["config"]["device"] == "cuda" and len({row["num_gpus"] for row in run["rows"]}) > 1


def is_sweep(run: dict[str, Any]) -> bool:
    """Tell whether a measurement has several numbers of tokens or lengths."""
    return len(run["config"].get("points", ())) > 1


def has_headline(run: dict[str, Any]) -> bool:
    """Tell whether a run came as far as LSR-Adapt's and Unsloth's steps, activations saved and recomputed."""
    done = {(row["provider"], row["checkpointing"]) for row in run["rows"] if row["status"] == "ok"}
    return done >= set(itertools.product(("lsr", "unsloth_lora"), MODES))


def newest_headline(folder: Path, model: str = "mistral-7b", base: str = "nf4") -> dict[str, Any]:
    """Return a model's and base's newest throughput measurement beside both peers, Unsloth and PEFT + Liger.

    Its rows are those of 4 x 2,048 tokens alone.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{model}-{base}-*.json"))]
    for run in runs:
        run["rows"] = [row for row in run["rows"] if (row["tokens"], row["seq_len"]) == (TOKENS, LENGTH)]
    runs = [run for run in runs if has_headline(run) and not is_sweep(run) and not run["config"].get("memory_gib")]
    if not runs:
        raise SystemExit(f"no {model}-{base}-*.json in {folder}; run python -m benchmarks.speed.throughput")
    return max(runs, key=lambda run: ("peft_lora_liger" in run["config"]["providers"], run["env"]["date"]))
