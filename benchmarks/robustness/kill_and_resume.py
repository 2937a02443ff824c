"""Does a run killed at any moment resume to the same adapter? SIGKILL at many moments, then --resume auto.

    python -m benchmarks.robustness.kill_and_resume --out cpu.json                                    # one process
    python -m benchmarks.robustness.kill_and_resume --processes 2 --out cpu-2.json                    # two, by torchrun
    python -m benchmarks.robustness.kill_and_resume --processes 2 --stage zero3 --out cpu-2-zero3.json
    python -m benchmarks.robustness.kill_and_resume --processes 2 --at-once 4 --out gpu-2.json        # on two GPUs

Results are in benchmarks/results/faults.

Moments: `--in-saves` of them within a save (the folder written aside is there, and a delay drawn uniformly from the
time that a save was measured to take has passed), the rest uniform over the undisturbed run's time from the start of
its process to its end, so over start-up, steps and saves in proportion. Where each kill fell is told by what it left:
a folder aside is a save, a line in the metrics is a step, nothing is start-up. A kill that met no running process is
drawn again. Each kill has a run of its own: killed, resumed to the end, its adapter's SHA-256 compared. The model is a
random two-layer LLaMA on an NF4 base with dropout on the adapter, so that random states count. Runs add in a fixed
order (`training.full_determinism`), which on GPUs attention's backward pass otherwise does not.

With several processes the kills take turns: the whole group, then each rank alone. Where one rank was killed, the rest
must end by itself, with a status that is not 0: within `PROMPT_S` seconds, or the kill does not count as survived.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import track

from benchmarks import ROOT
from benchmarks.command_line import recorded, script_parser
from lsr_scale import files
from lsr_scale.config import dump_yaml
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.checkpoint.manifest import damage

PROMPT_S = 20
GROUP = "group"


class Runs:
    """Starts runs of one configuration, each in a folder of its own, and in turns on GPUs of its own."""

    def __init__(self, place: Path, processes: int, stage: str, steps: int, save_steps: int) -> None:
        from tests.helpers.tiny_runs import save_llama

        self.place, self.processes, self.steps, self.save_steps = place, processes, steps, save_steps
        self.stage = stage
        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",") if gpu]
        # those that runs take in turns, or all there are for each
        self.gpus = [gpus[at : at + processes] for at in range(0, len(gpus) - processes + 1, processes)] or [gpus]
        save_llama(place / "model", num_hidden_layers=2)

    def start(self, name: str, *options: str, turn: int = 0) -> subprocess.Popen:
        """Start a run."""
        from tests.helpers.tiny_runs import tiny_run

        training = {
            "output_dir": str(self.place / name),
            "max_steps": self.steps,
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "full_determinism": True,
        }
        adapter = {"method": "kron_lora", "rank": 4, "left_out": 4, "dropout": 0.2}
        engine = {"config": self.stage}
        run = tiny_run(self.place, training=training, adapter=adapter, deepspeed=engine, eval={"tasks": []})
        file = self.place / f"{name}.yaml"
        file.write_text(dump_yaml(run))
        launcher = []
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        command = [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), "--config", str(file), *options]
        log = (self.place / f"{name}.log").open("a")
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[turn % len(self.gpus)])
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, name: str, *options: str, turn: int = 0) -> int:
        """Run to the end and return the status."""
        return self.start(name, *options, turn=turn).wait()

    def folder(self, name: str) -> RunFolder:
        """Return a run's folder."""
        return RunFolder(self.place / name)

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of the saved adapter's weights."""
        file = self.folder(name).adapter / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def find(process: subprocess.Popen, victim: str) -> list[psutil.Process]:
    """Return the processes to kill: all with the launcher, or the one that is the rank named; none if it is not there.

    The launcher alone is not a rank, and a rank is one from the moment that it is started.
    """
    parent = psutil.Process(process.pid)
    children = parent.children(recursive=True)
    if victim == GROUP:
        return [*children, parent]
    ranks = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == victim.removeprefix("rank "):
                ranks.append(child)
    return ranks


def kill(processes: list[psutil.Process]) -> bool:
    """End processes as a power cut would; return whether any was still there."""
    hit = False
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
            hit = True
    return hit


def wait_for_rest(process: subprocess.Popen) -> dict[str, Any]:
    """Wait for all of a run's processes to end; return the launcher's status and the seconds that it took.

    What is still there after three times `PROMPT_S` is killed.
    """
    begun = time.monotonic()
    everyone = find(process, GROUP)
    try:
        status = process.wait(timeout=3 * PROMPT_S)
    except subprocess.TimeoutExpired:
        status = None
    _, left = psutil.wait_procs(everyone, timeout=max(0.0, begun + 3 * PROMPT_S - time.monotonic()))
    seconds = time.monotonic() - begun
    kill(left)
    process.kill()
    process.wait()
    return {"status": status, "seconds_to_end": round(seconds, 2), "left": len(left)}


def is_aside(folder: RunFolder) -> bool:
    """Tell whether a checkpoint lies half written."""
    return any(folder.path.glob(".checkpoint-*.part"))


def undisturbed(runs: Runs) -> tuple[float, float, str]:
    """Do a run to its end; return its seconds, those of a save (the folder aside is there), the adapter's SHA-256."""
    started, times, begun = time.monotonic(), [], None
    process, folder = runs.start("undisturbed"), runs.folder("undisturbed")
    while process.poll() is None:
        now, aside = time.monotonic(), is_aside(folder)
        if aside and begun is None:
            begun = now
        if not aside and begun is not None:
            times.append(now - begun)
            begun = None
        time.sleep(0.0005)
    digest = runs.digest("undisturbed")
    if process.returncode or digest is None:
        raise SystemExit((runs.place / "undisturbed.log").read_text()[-2000:])
    return time.monotonic() - started, sorted(times)[len(times) // 2], digest


def moment_in_save(process: subprocess.Popen, folder: RunFolder, victim: str, which: int, delay: float) -> list:
    """Return what to kill, a moment after a run's save number `which` began."""
    seen: set[str] = set()
    victims: list[psutil.Process] = []
    while process.poll() is None:
        if not victims and folder.metrics.is_file():
            victims = find(process, victim)  # looking takes longer than a save, so it is done before
        seen |= {path.name for path in folder.path.glob(".checkpoint-*.part")}
        if len(seen) == which:
            time.sleep(delay)
            break
        time.sleep(0.0002)
    return victims


def strike(process: subprocess.Popen, folder: RunFolder, victims: list, steps: int) -> dict[str, Any] | None:
    """Kill these at this moment; return where that was and how the rest ended, None if none was there any more."""
    if process.poll() is not None or not kill(victims):
        return None
    phase = phase_of(folder, steps)
    return {"phase": phase, **wait_for_rest(process)}


def phase_of(folder: RunFolder, steps: int) -> str:
    """Return where a kill fell, by what it left."""
    if is_aside(folder):
        return "save"
    if not folder.metrics.is_file() or not folder.metrics.read_text():
        return "start-up"
    lines = folder.metrics.read_text().count("\n")
    return "after the last step" if lines >= steps and folder.checkpoints()[-1:] else "steps"


class Kills:
    """Kills runs and resumes them; which, when and whom is drawn beforehand.

    Args:
        runs: Starts them.
        kills: How many.
        in_saves: So many of them, the first, within a save.
        seed: Of what is drawn.
    """

    def __init__(self, runs: Runs, kills: int, in_saves: int, seed: int) -> None:
        draw = random.Random(seed)
        self.runs = runs
        self.total, self.saving, self.expected = undisturbed(runs)
        self.victims = [GROUP, *(f"rank {rank}" for rank in range(runs.processes))] if runs.processes > 1 else [GROUP]
        self.draws = [random.Random(draw.random()) for _ in range(kills)]
        others = kills - in_saves
        # strata, so that the moments spread evenly; none is within a save on purpose
        spread = [self.total * (index + draw.random()) / others for index in range(others)]
        self.moments = [None] * in_saves + spread

    def one(self, index: int) -> dict[str, Any]:
        """Kill a run, resume it to its end and return what was seen."""
        runs = self.runs
        for attempt in range(20):
            name = f"kill-{index}-{attempt}"
            victim, seen = self._hit(name, index, attempt)
            if seen and (seen["phase"] == "save" or self.moments[index] is not None):
                break
        else:
            raise SystemExit(f"no kill number {index} hit a running run")
        folder = runs.folder(name)
        row: dict[str, Any] = {"killed": victim, **seen, "attempts": attempt + 1}
        row["ended"] = row["status"] not in (0, None) and row["seconds_to_end"] <= PROMPT_S and not row["left"]
        row["whole_checkpoints"] = sum(damage(path) is None for path in folder.checkpoints())
        row["damaged_checkpoints"] = len(folder.checkpoints()) - row["whole_checkpoints"]
        row["resumed"] = runs.finish(name, "--resume", "auto", turn=index) == 0
        row["same_adapter"] = runs.digest(name) == self.expected
        if row["resumed"] and row["same_adapter"]:
            shutil.rmtree(folder.path)
        else:
            row["said"] = (runs.place / f"{name}.log").read_text()[-4000:]
        return row

    def _hit(self, name: str, index: int, attempt: int) -> tuple[str, dict[str, Any] | None]:
        """Start a run and kill it; return whom, and where that was and how the rest ended, if it was running."""
        runs, victim, moment = self.runs, self.victims[index % len(self.victims)], self.moments[index]
        folder, process = runs.folder(name), runs.start(name, turn=index)
        if moment is None:
            which = 1 + index % (runs.steps // runs.save_steps)
            targets = moment_in_save(process, folder, victim, which, self.draws[index].random() * self.saving)
        else:
            # a later attempt comes earlier: this run was quicker than the one measured
            time.sleep(moment * 0.97**attempt)
            targets = find(process, victim) if process.poll() is None else []
            if not targets and victim != GROUP and process.poll() is None:
                victim, targets = GROUP, find(process, GROUP)  # that rank is not started yet
        seen = strike(process, folder, targets, runs.steps)
        process.wait()
        return victim, seen


def measure(args: argparse.Namespace, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Kill, resume and compare; return what is written, and tell it after each kill."""
    place = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    runs = Runs(place, args.processes, args.stage, args.steps, args.save_steps)
    rows, result = [], {}
    try:
        plan = Kills(runs, args.kills, args.kills // 3 if args.in_saves is None else args.in_saves, args.seed)
        known = {
            "command": recorded("robustness.kill_and_resume", sys.argv[1:], args.out),
            "environment": files.environment(),
            "processes": args.processes,
            "stage": args.stage if args.processes > 1 else None,
            "steps": args.steps,
            "save_steps": args.save_steps,
            "at_once": args.at_once,
            "undisturbed_seconds": round(plan.total, 2),
            "save_seconds": round(plan.saving, 4),
            "adapter_sha256": plan.expected,
        }
        with ThreadPoolExecutor(args.at_once) as pool:
            for row in track(pool.map(plan.one, range(args.kills)), total=args.kills, description="kills"):
                rows.append(row)
                result = {
                    **known,
                    "kills": len(rows),
                    "phases": dict(Counter(row["phase"] for row in rows)),
                    "killed": dict(Counter(row["killed"] for row in rows)),
                    "ended": sum(row["ended"] for row in rows),
                    "slowest_end_seconds": max(row["seconds_to_end"] for row in rows),
                    "resumed": sum(row["resumed"] for row in rows),
                    "same_adapter": sum(row["same_adapter"] for row in rows),
                    "rows": rows,
                }
                done(result)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return result


def main() -> int:
    """Print the counts, write the file, and return 1 if a run did not resume to the same adapter."""
    parser = script_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-saves", type=int, default=None, help="a third of the kills, by default")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stage", default="zero2", help="deepspeed.config of several processes")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--save-steps", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=1, help="kills at a time, where there are cores for it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    def write(result: dict[str, Any]) -> None:
        if args.out:
            files.write_json(args.out, result)

    result = measure(args, write)
    phases = ", ".join(f"{count} in {phase}" for phase, count in sorted(result["phases"].items()))
    print(f"{result['kills']} kills: {phases}")
    slowest = result["slowest_end_seconds"]
    print(f"{result['ended']} ended every process with a status that is not 0, the slowest in {slowest} s")
    print(f"{result['resumed']} resumed to the end, {result['same_adapter']} to the undisturbed run's adapter")
    return 0 if result["ended"] == result["resumed"] == result["same_adapter"] == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
