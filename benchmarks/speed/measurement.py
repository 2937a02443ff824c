"""A run of `throughput.py`: the gate, the ceilings, rounds over the providers' processes, and the file written."""

import datetime
import importlib.metadata
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.floors import (
    NOMINAL_TFLOPS,
    STORED_BYTES,
    floor_ms,
    layer_weights,
)
from benchmarks.speed.providers import EIGHT_BIT, compute_of
from benchmarks.speed.throughput_rows import Case, add_ratios, row_of, slopes, table
from benchmarks.speed.workers import Worker, last_line, say, start_all

ENDINGS = ("", *(f"_{compute}" for compute in EIGHT_BIT))
OWN = {name + ending for name in ("lsr", "kron_lora", "lora", "frozen") for ending in ENDINGS}
# who can do what beside "none" and "full", and whose mode is fixed when it is built
ABLE = {"offload": {"unsloth_lora"}, "mlp": OWN, "auto": OWN}
ONE_PROCESS_A_MODE = {"unsloth_lora"}


class ParityError(Exception):
    """The fused layers are not as exact as they should be."""


class Measurement:
    """One run of the benchmark: its cases, what was measured, and the file of it."""

    def __init__(self, config: dict[str, Any], out: Path, limits: dict[str, float]) -> None:
        """Take the configuration as it stands in the result, the JSON to write, and seconds: build, turn, all."""
        self.config, self.out, self.limits = config, out, limits
        self.began = time.monotonic()
        self.turns: dict[Case, list[dict]] = {
            Case(provider, mode, tokens, seq_len): []
            for provider in config["providers"]
            for mode in modes_of(provider, config)
            for tokens, seq_len in config["points"]
        }
        self.result: dict[str, Any] = {"env": {}, "config": config, "parity": None, "ceilings": {}, "rows": []}
        self.nominal_tflops: float | None = None
        self.workers: list[Worker] = []

    def left(self) -> float:
        """Return the seconds that are left of the limit for everything."""
        return self.limits["all"] - (time.monotonic() - self.began)

    def log(self, name: str) -> Path:
        """Return where a worker's output goes, beside the result."""
        return self.out.with_name(f"{self.out.stem}.{name.replace(':', '.')}.log")

    def save(self) -> None:
        """Write what is known so far."""
        from lsr_scale import files

        machine = {"ceilings": self.result["ceilings"], "nominal_tflops": self.nominal_tflops}
        rows = [row_of(case, self.config, replies, machine) for case, replies in self.turns.items()]
        add_ratios(rows)
        self.result |= {"rows": rows, "slopes": slopes(rows, self.config["shape"]["layers"])}
        files.write_json(self.out, self.result)

    def run(self, resident: bool) -> list[dict]:
        """Measure every case and write the result; the rows are returned.

        Args:
            resident: Whether all models stay in memory between the rounds; otherwise each is built again every round.

        Raises:
            ParityError: if the gate is red; then nothing is written.
        """
        from lsr_scale import files

        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.workers = plan_workers(self.config, self.log)
        try:
            if self.config["parity"]:
                self._pass_gate()
            if resident:
                start_all(self.workers, min(self.limits["build"], self.left()))
            self.result["env"] = environment(files.environment())
            gpus = self.result["env"]["gpus"]
            self.nominal_tflops = next(
                (rate for name, rate in NOMINAL_TFLOPS.items() if any(name in gpu for gpu in gpus)), None
            )
            if self.config["ceilings"]:
                self._measure_ceilings()
            self.save()
            for number in range(self.config["rounds"]):
                for worker in self.workers:
                    self._round(worker, f"round {number + 1}", resident)
            if resident and len(self.workers) > 1:
                self._measure_the_starved_alone()
        finally:
            for worker in self.workers:
                worker.stop()
        self._finish()
        return self.result["rows"]

    def _ask_once(self, name: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers of a worker that is started for these requests."""
        worker = Worker(name, ["none"], self.config, self.log(name))
        try:
            start_all([worker], min(self.limits["build"], self.left()))
            return [worker.ask(request, min(self.limits["turn"], self.left())) for request in requests]
        finally:
            worker.stop()

    def _pass_gate(self) -> None:
        (reply,) = self._ask_once("benchmarks.speed.parity:Parity", [{}])
        if reply["status"] != "ok":
            raise ParityError(reply["detail"])
        self.result["parity"] = reply["parity"]
        problems = [problem for row in reply["parity"] for problem in row["problems"]]
        if problems:
            raise ParityError("\n".join(problems))
        worst: dict[str, float] = {}
        for row in reply["parity"]:
            name = f"{row['method']} {row['compute']} {row['recompute']}"
            worst[name] = max(worst.get(name, 0.0), round(row["worst_ratio"], 2))
        say(f"parity: green; largest error over that of the same unfused: {json.dumps(worst)}")

    def _measure_ceilings(self) -> None:
        points = self.config["points"]
        requests = [{"tokens": tokens, "seq_len": seq_len} for tokens, seq_len in points]
        for (tokens, seq_len), reply in zip(
            points, self._ask_once("benchmarks.speed.ceilings:Ceilings", requests), strict=True
        ):
            point = f"{tokens}x{seq_len}"
            if reply["status"] != "ok":
                say(f"ceilings {point}: {reply['status']} {last_line(reply)}; its rows will have no floor_fraction")
                continue
            measured = self.result["ceilings"][point] = reply["ceilings"]
            say(f"ceilings {point}: {json.dumps(measured)}")
            for compute in sorted({compute_of(provider) for provider in self.config["providers"]}):
                if compute != "bf16" and "layer_gemm_fp8_ms" not in measured:
                    continue
                floors = {
                    mode: floor_ms(self.config["shape"], tokens, self.config["base"], mode, measured, compute)
                    for mode in self.config["checkpointing"]
                    if mode in ("none", "full")
                }
                key = "floors_ms" if compute == "bf16" else f"floors_{compute}_ms"
                self.result.setdefault(key, {})[point] = floors
                say(f"floors in {compute}: {json.dumps(floors)}")

    def _round(self, worker: Worker, name: str, resident: bool) -> None:
        """Have a worker measure each of its cases once, but those that failed before."""
        cases = [case for case in self.turns if case.provider == worker.provider and case.mode in worker.modes]
        cases = [case for case in cases if all(turn["status"] == "ok" for turn in self.turns[case])]
        if not cases or self.left() <= 0:
            return
        if not resident:
            start_all([worker], min(self.limits["build"], self.left()))
        for case in cases:
            if self.left() > 0:
                self._turn(worker, case, name)
        if not resident:
            worker.stop()

    def _turn(self, worker: Worker, case: Case, name: str) -> None:
        request = {"mode": case.mode, "tokens": case.tokens, "seq_len": case.seq_len, "profile": None}
        if self.config["profile"] and not self.turns[case]:
            stem = f"{self.out.stem}.{case.provider.replace(':', '.')}.{case.mode}.{case.point}"
            request["profile"] = str(self.out.with_name(f"{stem}.profile.txt"))
        reply = worker.ask(request, min(self.limits["turn"], self.left()))
        if name == "alone" and reply["status"] == "ok":
            reply.setdefault("notes", []).append("measured alone, after the rounds: it did not fit beside the others")
            self.turns[case] = []
        self.turns[case].append(reply)
        speed = ""
        if reply["status"] == "ok":
            median = statistics.median(reply["step_ms"])
            peak = "" if reply["peak_memory_gib"] is None else f", {reply['peak_memory_gib']:.2f} GiB"
            speed = f" {1e3 * case.tokens / median:,.0f} tokens/s, {median:.1f} ms{peak}"
            speed += f", loss {reply['loss_first']:.3f} -> {reply['loss_last']:.3f}"
        say(f"{name}: {case.provider} {case.mode} {case.point}: {reply['status']}{speed} {last_line(reply)}")
        self.save()

    def _measure_the_starved_alone(self) -> None:
        """Measure again, with nobody else in memory, what ran out of it."""
        starved = [case for case, replies in self.turns.items() if replies and replies[-1]["status"] == "oom"]
        if starved:
            for worker in self.workers:
                worker.stop()
        for provider, mode in dict.fromkeys((case.provider, case.mode) for case in starved):
            if self.left() <= 0:
                return
            alone = Worker(provider, [mode], self.config, self.log(f"{provider}.alone"))
            start_all([alone], min(self.limits["build"], self.left()))
            for case in starved:
                if (case.provider, case.mode) == (provider, mode) and self.left() > 0:
                    self._turn(alone, case, "alone")
            alone.stop()

    def _finish(self) -> None:
        initial: dict[tuple[int, int], list[float]] = {}
        for row in self.result["rows"]:
            if row["status"] == "ok":
                initial.setdefault((row["tokens"], row["seq_len"]), []).append(row["loss_initial"])
        spread = max((max(of_a_point) - min(of_a_point) for of_a_point in initial.values()), default=None)
        self.result["loss_spread"] = spread
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        self.save()
        say("\n" + table(self.result["rows"]))
        if spread is not None:
            say(f"the first losses lie within {spread:.2g} of each other; {self.result['seconds']} s in all")


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
    values = query_gpu("memory.total")
    if values:
        return float(values[0]) / 1024
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def environment(recorded: dict[str, Any]) -> dict[str, Any]:
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
    return {**recorded, **versions, "gpu_state": gpu, "date": date}


def stays_resident(config: dict[str, Any], workers: int, memory_gib: float) -> bool:
    """Whether all models together leave half of the GPU's memory to the one that is measured."""
    if config["device"] == "cpu":
        return True
    shape = config["shape"]
    weights = STORED_BYTES[config["base"]] * shape["layers"] * layer_weights(shape)
    weights += 4 * shape["hidden"] * shape["vocab"]
    return workers * (weights / 2**30 + 1.0) <= 0.5 * memory_gib
