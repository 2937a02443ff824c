"""Training throughput and memory of this library's fused path, beside its peers, in one interleaved run.

    python benchmarks/throughput.py --model mistral-7b --base nf4 --tokens 8192 --seq-len 2048 \
        --checkpointing none,full,offload --rounds 2 --steps 4 --out benchmarks/results/throughput/NAME.json
    python benchmarks/throughput.py --smoke --out NAME.json        # two layers, seconds: does every provider run?

Random weights on a model's shapes, random tokens, every label supervised. A step is forward, loss, backward, fused
AdamW on the adapters, gradients dropped. Every provider lives in a process of its own, because some patch libraries
globally. All processes are started side by side, then measured strictly one at a time, in rounds; a row's figures are
taken over the timed steps of all rounds. The file is written anew after every turn; an existing one is never touched.

**The floor** is the time that a step with a frozen base and free adapters would take at ceilings measured in the same
run (`floor_ms`): grouped GEMMs (qkv, o, gate+up, down; forward and dX), lm_head's GEMMs, cuDNN attention, and, at the
bandwidth of a device copy, the bytes of two dequantizations of every linear layer and of norms, RoPE and SwiGLU (per
token and layer 12 D + 3 F forward and 12 D + 6 F backward, where D = 2 hidden and F = 2 intermediate bytes). With
checkpointing each layer is computed again up to SwiGLU's output: all forward GEMMs but down's, forward attention, and
the forward traffic. `floor_fraction` is the floor over the median step.

**mfu** counts what a frozen base needs at least, 4 FLOP per linear weight and token (forward and dX; lm_head included)
and 6 tokens x seq_len x heads x head_dim per layer for causal attention, against the device's nominal dense bf16 rate.
Neither adapters nor anything computed twice counts.

`loss_initial` is the loss of a turn's very first step, where every adapter's update is zero: providers on the same base
and seed must agree on it, which `loss_spread` tells. Adapters are put back to their start before every turn.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# This file imports nothing heavy: every worker imports it first, and Unsloth wants to come before Transformers.

PROVIDERS = (
    *("lsr", "kron_lora", "lora", "frozen", "lsr_unfused"),
    *("peft_lora", "peft_lora_liger", "peft_kbit_liger", "peft_frozen_liger", "peft_lokr", "unsloth_lora"),
)
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name != "lsr_unfused")
MODELS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
TINY = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512},
}
BASES = ("nf4", "int8", "bf16")
CHECKPOINTING = ("none", "mlp", "full", "offload")
# who can do what beside "none" and "full", and whose mode is fixed when it is built
ABLE = {"offload": {"unsloth_lora"}, "mlp": {"lsr", "kron_lora", "lora", "frozen"}}
ONE_PROCESS_A_MODE = {"unsloth_lora"}
# dense bf16, TFLOP/s, from the data sheets
NOMINAL_TFLOPS = {"H200": 989.4, "H100": 989.4, "A100": 312.0}
# bytes read and written per weight by one dequantization to bf16; NF4 with double quantization has a byte of scale per
# 64 weights and a float32 per 256 of those
DEQUANTIZATION_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64 + 2, "int8": 1 + 2, "bf16": 0.0}
STORED_BYTES = {"nf4": 0.516, "int8": 1.0, "bf16": 2.0}


class MissingError(Exception):
    """A provider's package, or the part of this library that it measures, is not there."""


# ---------------------------------------------------------------------------------------------------- arithmetic


def model_values(model: str, layers: int | None = None) -> dict[str, Any]:
    """Return the values of a model's Transformers configuration, from the table in this library.

    Mistral's sliding window is left out (as in v0.2 and later), so that attention is causal at any length.
    """
    if model == "tiny":
        values = dict(TINY)
    else:
        table = Path(__file__).resolve().parent.parent / "lsr_scale" / "model" / "shapes.json"
        entries = json.loads(table.read_text(encoding="utf-8"))
        values = dict(next(entry["config"] for entry in entries if MODELS[model] in entry["names"]))
    if "sliding_window" in values:
        values["sliding_window"] = None
    if layers is not None:
        values["num_hidden_layers"] = layers
    return values


def shape_of(values: dict[str, Any]) -> dict[str, int]:
    """Return the dimensions that cost time: hidden, intermediate, layers, heads, kv_heads, head_dim, vocab."""
    heads = values["num_attention_heads"]
    return {
        "hidden": values["hidden_size"],
        "intermediate": values["intermediate_size"],
        "layers": values["num_hidden_layers"],
        "heads": heads,
        "kv_heads": values.get("num_key_value_heads", heads),
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "vocab": values["vocab_size"],
    }


def layer_weights(shape: dict[str, int]) -> int:
    """Return the number of weights in one layer's seven linears."""
    queries, keys = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    return shape["hidden"] * (2 * queries + 2 * keys + 3 * shape["intermediate"])


def floor_ms(
    shape: dict[str, int], tokens: int, base: str, checkpointing: str, ceilings: dict[str, float]
) -> dict[str, float]:
    """Return the parts of a step's floor in ms, and their sum as `total`; the module's docstring has the formula.

    Args:
        shape: See `shape_of`.
        tokens: Tokens a step.
        base: "nf4", "int8" or "bf16".
        checkpointing: "full" and "offload" recompute each layer up to SwiGLU's output; the others have one floor.
        ceilings: `copy_bytes_per_s` and, for this number of tokens, `layer_gemm_ms`, `layer_gemm_recompute_ms`,
            `lm_head_ms`, `attention_ms` and `attention_forward_ms`.
    """
    layers, bandwidth = shape["layers"], ceilings["copy_bytes_per_s"]
    d, f = 2 * shape["hidden"], 2 * shape["intermediate"]
    forward, backward = 12 * d + 3 * f, 12 * d + 6 * f
    parts = {
        "gemm": layers * ceilings["layer_gemm_ms"],
        "lm_head": ceilings["lm_head_ms"],
        "attention": layers * ceilings["attention_ms"],
        "dequantization": 1e3 * layers * layer_weights(shape) * 2 * DEQUANTIZATION_BYTES[base] / bandwidth,
        "traffic": 1e3 * layers * tokens * (forward + backward) / bandwidth,
        "recomputation": 0.0,
    }
    if checkpointing in ("full", "offload"):
        a_layer = ceilings["layer_gemm_recompute_ms"] + ceilings["attention_forward_ms"]
        parts["recomputation"] = layers * (a_layer + 1e3 * tokens * forward / bandwidth)
    return {**parts, "total": sum(parts.values())}


def step_flop(shape: dict[str, int], tokens: int, seq_len: int) -> float:
    """Return the floating-point operations that a step on a frozen base needs; see `mfu` in the module's docstring."""
    linear = 4 * tokens * (shape["layers"] * layer_weights(shape) + shape["hidden"] * shape["vocab"])
    return linear + 6 * tokens * seq_len * shape["heads"] * shape["head_dim"] * shape["layers"]


def quantile(values: list[float], share: float) -> float:
    """Return a quantile by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def row_of(provider: str, mode: str, config: dict[str, Any], turns: list[dict], machine: dict[str, Any]) -> dict:
    """Return a row of the result from the turns of one provider under one kind of checkpointing.

    Args:
        provider: Its name.
        mode: The checkpointing.
        config: The run's configuration.
        turns: Replies of its worker, in order; none if it was not reached.
        machine: `ceilings` (or None) and `nominal_tflops` (or None).
    """
    row: dict[str, Any] = {
        **{"provider": provider, "model": config["model"], "base": config["base"], "tokens": config["tokens"]},
        **{"seq_len": config["seq_len"], "checkpointing": mode, "num_gpus": 1, "zero_stage": 0},
        **{"status": "error", "tokens_per_s": None, "step_ms": None, "peak_memory_gib": None, "mfu": None},
        **{"floor_fraction": None, "ratio_to": {}, "trainable_parameters": None},
    }
    good = [turn for turn in turns if turn["status"] == "ok"]
    bad = [turn for turn in turns if turn["status"] != "ok"]
    if bad or not good:
        last = bad[-1] if bad else {"status": "error", "detail": "not reached before the time limit"}
        if not good:
            return {**row, "status": last["status"], "detail": last["detail"]}
        row["detail"] = f"a later turn failed ({last['status']}): {last['detail']}"
    steps = [ms for turn in good for ms in turn["step_ms"]]
    median = statistics.median(steps)
    peaks = [turn["peak_memory_gib"] for turn in good if turn["peak_memory_gib"] is not None]
    row.update(
        status="ok",
        tokens_per_s=1e3 * config["tokens"] / median,
        step_ms={"p20": quantile(steps, 0.2), "p50": median, "p80": quantile(steps, 0.8)},
        peak_memory_gib=max(peaks) if peaks else None,
        trainable_parameters=good[0]["trainable_parameters"],
        loss_initial=good[0]["loss_initial"],
        loss_first=good[0]["loss_first"],
        loss_last=good[-1]["loss_last"],
        steps_ms=[round(ms, 3) for ms in steps],
        notes=list(dict.fromkeys(note for turn in good for note in turn.get("notes", []))),
    )
    if machine.get("nominal_tflops"):
        flop = step_flop(config["shape"], config["tokens"], config["seq_len"])
        row["mfu"] = flop / (median * 1e-3) / (machine["nominal_tflops"] * 1e12)
    if machine.get("ceilings"):
        floor = floor_ms(config["shape"], config["tokens"], config["base"], mode, machine["ceilings"])
        row["floor_fraction"] = floor["total"] / median
    return row


def add_ratios(rows: list[dict]) -> None:
    """Fill `ratio_to`: a row's tokens/s over those of every other row measured under the same checkpointing.

    Rows that recompute are compared with an offloading peer too, under the name `provider/offload`.
    """
    done = [row for row in rows if row["status"] == "ok"]
    for row in done:
        row["ratio_to"] = {
            other["provider"]: row["tokens_per_s"] / other["tokens_per_s"]
            for other in done
            if other is not row and other["checkpointing"] == row["checkpointing"]
        }
        if row["checkpointing"] == "full":
            for other in done:
                if other["checkpointing"] == "offload":
                    row["ratio_to"][f"{other['provider']}/offload"] = row["tokens_per_s"] / other["tokens_per_s"]


def table(rows: list[dict]) -> str:
    """Return the rows as text, with the ratio to the strongest peers that were measured."""
    strongest = ("unsloth_lora", "peft_lora_liger", "peft_kbit_liger")
    peers = [peer for peer in strongest if any(peer in row["ratio_to"] for row in rows)]
    head = ["provider", "checkpointing", "status", "tokens/s", "step ms", "GiB", "mfu", "of floor", "loss"]
    lines = [head + [f"x {peer}" for peer in peers]]
    show = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        step = row["step_ms"]
        spread = "-" if step is None else f"{step['p50']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})"
        line = [row["provider"], row["checkpointing"], row["status"], show(row["tokens_per_s"], ",.0f"), spread]
        line += [show(row["peak_memory_gib"], ".1f"), show(row["mfu"], ".3f"), show(row["floor_fraction"], ".3f")]
        line += [show(row.get("loss_first"), ".3f")]
        lines.append(line + [show(row["ratio_to"].get(peer), ".3f") for peer in peers])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


# -------------------------------------------------------------------------------------------------------- workers


def find_provider(name: str) -> type:
    """Return a provider's class: one of `providers.py`, or `module:Class` for one from elsewhere."""
    module, _, attribute = name.partition(":")
    if attribute:
        return getattr(importlib.import_module(module), attribute)
    return importlib.import_module("providers").CLASSES[name]


def failure(error: BaseException) -> dict[str, str]:
    """Return an exception as a reply: `oom`, `missing` or `error`, with the last lines of its traceback."""
    print(f"--- {type(error).__name__}", flush=True)
    traceback.print_exception(error)
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return {"status": "oom", "detail": str(error).split("\n")[0][:300]}
    if isinstance(error, MissingError):
        return {"status": "missing", "detail": str(error)}
    lines = "".join(traceback.format_exception(error)).strip().split("\n")
    return {"status": "error", "detail": "\n".join(lines[-6:])[-1500:]}


def end_with_parent() -> None:
    """End this process when the benchmark is gone, whatever it is busy with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def work(connection: Any, name: str, settings: dict[str, Any], log: str, path: list[str]) -> None:
    """Build a provider in this process, then answer requests to measure until told to stop.

    Args:
        connection: This end of the pipe.
        name: The provider, see `find_provider`.
        settings: The run's configuration, and `mode`, the checkpointing that the worker starts with.
        log: File that takes everything printed.
        path: Folders to import from.
    """
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # so that compilers that it starts can be ended with it
    threading.Thread(target=end_with_parent, daemon=True).start()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.path[:0] = [folder for folder in path if folder not in sys.path]
    try:
        began = time.perf_counter()
        provider = find_provider(name)(settings)
        provider.build()
        connection.send({"status": "ready", "detail": "", "seconds": time.perf_counter() - began})
    except BaseException as error:
        connection.send(failure(error))
        return
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        try:
            reply = {"status": "ok", **provider.turn(request)}
        except BaseException as error:
            reply = failure(error)
            # the traceback's frames hold the step's activations
            traceback.clear_frames(error.__traceback__)
            del error
        with contextlib.suppress(Exception):
            provider.rest()
        connection.send(reply)


class Worker:
    """A provider in a process of its own, as the benchmark sees it."""

    def __init__(self, provider: str, modes: list[str], config: dict[str, Any], log: Path) -> None:
        self.provider, self.modes, self.config, self.log = provider, modes, config, log
        self.process: Any = None
        self.connection: Any = None
        self.broken: dict[str, Any] | None = None

    def start(self) -> None:
        """Start building; `await_ready` tells how it went."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        settings = {**self.config, "mode": self.modes[0]}
        path = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
        arguments = (theirs, self.provider, settings, str(self.log), path)
        self.process = context.Process(target=work, args=arguments, daemon=False)
        self.process.start()
        theirs.close()

    def receive(self, limit_s: float, doing: str) -> dict[str, Any]:
        """Return the worker's next reply; if it died or took too long, one that says so, and it is ended."""
        try:
            if self.connection.poll(max(0.0, limit_s)):
                return self.connection.recv()
            reply = {"status": "error", "detail": f"{doing} took more than {limit_s:.0f} s; it was stopped"}
        except (EOFError, OSError):
            self.process.join(5)
            reply = {"status": "error", "detail": f"its process died while {doing}, exit code {self.process.exitcode}"}
        self.broken = reply
        self.stop()
        return reply

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Have the worker measure once."""
        if self.broken:
            return self.broken
        with contextlib.suppress(OSError):  # dead; receive says so
            self.connection.send(request)
        return self.receive(limit_s, "measuring")

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process is None:
            return
        if self.process.is_alive() and not self.broken:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(10)
        # its own process group, once it has made one; never this process's
        with contextlib.suppress(OSError):
            if os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self.connection.close()
        self.process = None


def start_all(workers: list[Worker], limit_s: float) -> None:
    """Start workers side by side and wait until each is ready, has failed or has run out of time."""
    began = time.monotonic()
    for worker in workers:
        worker.start()
    waiting = list(workers)
    while waiting:
        left = limit_s - (time.monotonic() - began)
        ready = wait([worker.connection for worker in waiting], timeout=max(0.0, left))
        for worker in [w for w in waiting if w.connection in ready] or waiting:
            waiting.remove(worker)
            reply = worker.receive(max(0.0, left), "building")
            if reply["status"] != "ready":
                worker.broken = reply
                worker.stop()
            say(f"{worker.provider}: {reply['status']} after {time.monotonic() - began:.0f} s {last_line(reply)}")


def last_line(reply: dict[str, Any]) -> str:
    """Return the last line of a reply's detail."""
    return reply.get("detail", "").strip().split("\n")[-1]


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ benchmark


def measured_rows(config: dict[str, Any], turns: dict[tuple[str, str], list[dict]], machine: dict) -> list[dict]:
    """Return all rows, with their ratios."""
    rows = [row_of(provider, mode, config, found, machine) for (provider, mode), found in turns.items()]
    add_ratios(rows)
    return rows


def benchmark(config: dict[str, Any], out: Path, limits: dict[str, float], resident: bool) -> list[dict]:
    """Measure every provider and write the result; the rows are returned.

    Args:
        config: The run's configuration, as it stands in the result.
        out: The JSON to write; logs and profiles lie beside it under the same name.
        limits: Seconds: `build`, `turn` and `all`.
        resident: Whether all models stay in memory between the rounds; otherwise each is built again every round.
    """
    from lsr_scale import record

    began = time.monotonic()
    left = lambda: limits["all"] - (time.monotonic() - began)  # noqa: E731
    log = lambda name: out.with_name(f"{out.stem}.{name.replace(':', '.')}.log")  # noqa: E731
    out.parent.mkdir(parents=True, exist_ok=True)
    workers = plan_workers(config, log)
    ceiling = Worker("ceilings", ["none"], config, log("ceilings")) if config["ceilings"] else None
    pairs = [(provider, mode) for provider in config["providers"] for mode in modes_of(provider, config)]
    turns: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs}
    result: dict[str, Any] = {"env": {}, "config": config, "ceilings": None, "rows": []}
    machine: dict[str, Any] = {"ceilings": None, "nominal_tflops": None}

    def turn(worker: Worker, mode: str, name: str) -> None:
        request = {"mode": mode, "profile": None}
        if config["profile"] and not turns[worker.provider, mode]:
            request["profile"] = str(
                out.with_name(f"{out.stem}.{worker.provider.replace(':', '.')}.{mode}.profile.txt")
            )
        reply = worker.ask(request, min(limits["turn"], left()))
        if name == "alone" and reply["status"] == "ok":
            reply.setdefault("notes", []).append("measured alone, after the rounds: it did not fit beside the others")
            turns[worker.provider, mode] = []
        turns[worker.provider, mode].append(reply)
        speed = ""
        if reply["status"] == "ok":
            median = statistics.median(reply["step_ms"])
            peak = "" if reply["peak_memory_gib"] is None else f", {reply['peak_memory_gib']:.2f} GiB"
            speed = f" {1e3 * config['tokens'] / median:,.0f} tokens/s, {median:.1f} ms{peak}"
            speed += f", loss {reply['loss_first']:.3f} -> {reply['loss_last']:.3f}"
        say(f"{name}: {worker.provider} {mode}: {reply['status']}{speed} {last_line(reply)}")
        save()

    def save() -> None:
        result["rows"] = measured_rows(config, turns, machine)
        record.write_json(out, result)

    everyone = workers + ([ceiling] if ceiling else [])
    try:
        if resident:
            start_all(everyone, min(limits["build"], left()))
        elif ceiling:
            start_all([ceiling], min(limits["build"], left()))
        result["env"] = environment(record.environment())
        machine["nominal_tflops"] = next(
            (rate for name, rate in NOMINAL_TFLOPS.items() if any(name in gpu for gpu in result["env"]["gpus"])), None
        )
        if ceiling:
            reply = ceiling.ask({}, min(limits["turn"], left()))
            if reply["status"] == "ok":
                machine["ceilings"] = result["ceilings"] = reply["ceilings"]
                result["floors_ms"] = {
                    mode: floor_ms(config["shape"], config["tokens"], config["base"], mode, reply["ceilings"])
                    for mode in config["checkpointing"]
                    if mode in ("none", "full")
                }
                say(f"ceilings: {json.dumps(reply['ceilings'])}\nfloors: {json.dumps(result['floors_ms'])}")
            else:
                say(f"ceilings: {reply['status']} {last_line(reply)}; rows will have no floor_fraction")
            ceiling.stop()
        save()
        for number in range(config["rounds"]):
            for worker in workers:
                todo = [m for m in worker.modes if all(t["status"] == "ok" for t in turns[worker.provider, m])]
                if not todo or left() <= 0:
                    continue
                if not resident:
                    start_all([worker], min(limits["build"], left()))
                for mode in todo:
                    if left() > 0:
                        turn(worker, mode, f"round {number + 1}")
                if not resident:
                    worker.stop()
        starved = [pair for pair, found in turns.items() if found and found[-1]["status"] == "oom"]
        if resident and len(workers) > 1 and starved:
            for worker in workers:
                worker.stop()
            for provider, mode in starved:
                if left() > 0:
                    alone = Worker(provider, [mode], config, log(f"{provider}.alone"))
                    start_all([alone], min(limits["build"], left()))
                    turn(alone, mode, "alone")
                    alone.stop()
    finally:
        for worker in everyone:
            worker.stop()
    initial = [row["loss_initial"] for row in result["rows"] if row["status"] == "ok"]
    result["loss_spread"] = max(initial) - min(initial) if initial else None
    result["seconds"] = round(time.monotonic() - began, 1)
    save()
    say("\n" + table(result["rows"]))
    if initial:
        say(f"the first losses lie within {result['loss_spread']:.2g} of each other; {result['seconds']} s in all")
    return result["rows"]


def modes_of(provider: str, config: dict[str, Any]) -> list[str]:
    """Return the kinds of checkpointing under which a provider is measured."""
    return [mode for mode in config["checkpointing"] if mode not in ABLE or provider in ABLE[mode]]


def plan_workers(config: dict[str, Any], log: Any) -> list[Worker]:
    """Return the workers of a run, in the order in which they are measured."""
    workers = []
    for provider in config["providers"]:
        modes = modes_of(provider, config)
        if provider in ONE_PROCESS_A_MODE:
            workers += [Worker(provider, [mode], config, log(f"{provider}.{mode}")) for mode in modes]
        elif modes:
            workers.append(Worker(provider, modes, config, log(provider)))
    return workers


def query_gpu(fields: str) -> list[str]:
    """Return what nvidia-smi says of the first GPU, nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.strip().split("\n")[0].split(",")]


def gpu_memory_gib() -> float:
    """Return the memory of the first GPU, 0 without one."""
    found = query_gpu("memory.total")
    if found:
        return float(found[0]) / 1024
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def environment(found: dict[str, Any]) -> dict[str, Any]:
    """Return the library's record of the machine with the peers' versions, the driver, clocks and date."""
    versions: dict[str, str | None] = {}
    for package in ("unsloth", "unsloth_zoo", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    values = query_gpu(",".join(fields))
    gpu = dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**found, **versions, "gpu_state": gpu, "date": date}


def stays_resident(config: dict[str, Any], workers: int, memory_gib: float) -> bool:
    """Whether all models together leave half of the GPU's memory to the one that is measured."""
    if config["device"] == "cpu":
        return True
    shape = config["shape"]
    weights = STORED_BYTES[config["base"]] * shape["layers"] * layer_weights(shape)
    weights += 4 * shape["hidden"] * shape["vocab"]
    return workers * (weights / 2**30 + 1.0) <= 0.5 * memory_gib


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the command line and the run's configuration; a wrong value ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add("--providers", type=listed, default=list(DEFAULT_PROVIDERS), help=f"of {', '.join(PROVIDERS)}; comma between")
    add("--model", default="mistral-7b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--base", default="nf4", choices=BASES)
    add("--tokens", type=int, default=8192, help="tokens a step")
    add("--seq-len", type=int, default=2048)
    add(
        "--checkpointing",
        type=listed,
        default=["none", "full"],
        help="of none, full, mlp (ours: gate and up), offload (Unsloth's)",
    )
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=4, help="timed steps a round")
    add("--warmup", type=int, default=2, help="steps before them, each round")
    add("--seed", type=int, default=0)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--without-autocast", type=listed, default=[], help="providers that run without bf16 autocast")
    add("--profile", action="store_true", help="also write each provider's kernels by time, one step, beside --out")
    add("--no-ceilings", action="store_true", help="measure no ceilings: no floor_fraction")
    add("--smoke", action="store_true", help="2 layers, 512 tokens of 256, one round of 2 steps: does it all run?")
    add("--resident", choices=["auto", "yes", "no"], default="auto", help="keep all models in memory between rounds")
    add("--build-limit", type=float, default=240.0, help="seconds for building, all side by side")
    add("--turn-limit", type=float, default=120.0, help="seconds for one provider's turn")
    add("--time-limit", type=float, default=1e9, help="seconds for everything; what is not reached is said")
    add("--out", type=Path, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.layers, args.tokens, args.seq_len, args.rounds, args.steps = args.layers or 2, 512, 256, 1, 2
    for name in args.providers:
        if name not in PROVIDERS and ":" not in name:
            parser.error(f"--providers: unknown provider {name!r}; there are {', '.join(PROVIDERS)}, or module:Class")
    for name in args.checkpointing:
        if name not in CHECKPOINTING:
            parser.error(f"--checkpointing: unknown kind {name!r}; there are {', '.join(CHECKPOINTING)}")
    if not args.providers or not args.checkpointing:
        parser.error("--providers and --checkpointing need at least one name each")
    for option in ("tokens", "seq_len", "rounds", "steps"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {getattr(args, option)}")
    if args.tokens % args.seq_len:
        parser.error(f"--tokens: {args.tokens} is no multiple of --seq-len {args.seq_len}")
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers: expected at least 1, got {args.layers}")
    if args.out.suffix != ".json":
        parser.error(f"--out: {args.out} should end in .json")
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; results are never overwritten, give a new name")
    values = model_values(args.model, args.layers)
    if args.seq_len > values["max_position_embeddings"]:
        parser.error(f"--seq-len: {args.model} has {values['max_position_embeddings']} positions, not {args.seq_len}")
    names = ("providers", "model", "layers", "base", "tokens", "seq_len", "checkpointing", "rounds", "steps", "warmup")
    config = {name: getattr(args, name) for name in (*names, "seed", "device", "without_autocast", "profile", "smoke")}
    config["providers"] = list(dict.fromkeys(args.providers))
    config["checkpointing"] = list(dict.fromkeys(args.checkpointing))
    config["ceilings"] = not args.no_ceilings and args.device == "cuda"
    config["values"], config["shape"] = values, shape_of(values)
    # without the folder that this machine happens to write to
    given = [Path(text).name if text == str(args.out) else text for text in arguments or sys.argv[1:]]
    config["command"] = " ".join(["python", "benchmarks/throughput.py", *given])
    return args, config


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if anything could be measured."""
    args, config = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    memory = 0.0 if args.device == "cpu" else gpu_memory_gib()
    if args.device == "cuda" and not memory:
        print("there is no GPU here; --device cpu tries the program on a CPU", file=sys.stderr)
        return 2
    count = len(plan_workers(config, lambda name: Path(name)))
    resident = stays_resident(config, count, memory) if args.resident == "auto" else args.resident == "yes"
    kept = "all models stay in memory" if resident else "one model at a time is in memory"
    say(f"{count} processes, {kept}; {config['command']}")
    limits = {"build": args.build_limit, "turn": args.turn_limit, "all": args.time_limit}
    rows = benchmark(config, args.out, limits, resident)
    say(f"\n{args.out}")
    return 0 if any(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    # under its own name, which the workers import it by
    sys.exit(importlib.import_module("throughput").main())
