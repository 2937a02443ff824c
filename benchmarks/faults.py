"""Kill a run with SIGKILL at many moments, go on with --resume auto, and compare the adapter with an undisturbed run's.

    python benchmarks/faults.py --out benchmarks/results/faults/cpu.json                      # one process
    python benchmarks/faults.py --processes 2 --kills 6 --out benchmarks/results/faults/cpu-2.json

Moments: `--in-saves` of them within a save (the folder written aside is there, and a delay drawn uniformly from the
time that a save was measured to take has passed), the rest uniform over the undisturbed run's time from the start of
its process to its end, so over start-up, steps and saves in proportion. Where each kill fell is told by what it left:
a folder aside is a save, a line in the metrics is a step, nothing is start-up. A kill that met no running process is
drawn again. Each kill has a run of its own: killed, resumed to the end, its adapter's SHA-256 compared. The model is a
random two-layer LLaMA on an NF4 base with dropout on the adapter, so that random states count.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from lsr_scale import record
from lsr_scale.checkpoints import damage
from lsr_scale.config import dump_yaml
from lsr_scale.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


class Runs:
    """Starts runs of one configuration, each in a folder of its own."""

    def __init__(self, place: Path, processes: int, steps: int, save_steps: int) -> None:
        from tiny_runs import save_llama

        self.place, self.processes, self.steps, self.save_steps = place, processes, steps, save_steps
        save_llama(place / "model")

    def start(self, name: str, *options: str) -> subprocess.Popen:
        """Start a run."""
        from tiny_runs import tiny_run

        training = {
            "output_dir": str(self.place / name),
            "max_steps": self.steps,
            "save_steps": self.save_steps,
            "save_total_limit": 2,
        }
        adapter = {"method": "kron_lora", "rank": 4, "left_out": 4, "dropout": 0.2}
        run = tiny_run(self.place, training=training, adapter=adapter, eval={"tasks": []})
        file = self.place / f"{name}.yaml"
        file.write_text(dump_yaml(run))
        launcher = []
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        command = [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), "--config", str(file), *options]
        log = (self.place / f"{name}.log").open("a")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, name: str, *options: str) -> int:
        """Run to the end and return the status."""
        return self.start(name, *options).wait(timeout=300)

    def folder(self, name: str) -> RunFolder:
        """Return a run's folder."""
        return RunFolder(self.place / name)

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of the saved adapter's weights."""
        file = self.folder(name).adapter / "adapter_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def kill(process: subprocess.Popen) -> None:
    """End a run's processes, the launcher with them, as a power cut would."""
    parent = psutil.Process(process.pid)
    for one in (*parent.children(recursive=True), parent):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


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


def kill_in_save(runs: Runs, name: str, which: int, delay: float) -> bool:
    """Kill a run a moment after a save began; return whether it was still saving."""
    process, folder = runs.start(name), runs.folder(name)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {path.name for path in folder.path.glob(".checkpoint-*.part")}
        if len(seen) == which:
            time.sleep(delay)
            break
        time.sleep(0.0002)
    if process.poll() is not None:
        return False
    kill(process)
    return is_aside(folder)


def kill_after(runs: Runs, name: str, seconds: float) -> bool:
    """Kill a run that many seconds after its start; return whether it was still running."""
    process = runs.start(name)
    time.sleep(seconds)
    if process.poll() is not None:
        return False
    kill(process)
    return True


def phase_of(folder: RunFolder, steps: int) -> str:
    """Return where a kill fell, by what it left."""
    if is_aside(folder):
        return "save"
    if not folder.metrics.is_file() or not folder.metrics.read_text():
        return "start-up"
    lines = folder.metrics.read_text().count("\n")
    return "after the last step" if lines >= steps and folder.checkpoints()[-1:] else "steps"


def measure(kills: int, in_saves: int, processes: int, steps: int, save_steps: int, seed: int) -> dict[str, Any]:
    """Kill, resume and compare; return what is written."""
    draw = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    runs = Runs(place, processes, steps, save_steps)
    try:
        total, saving, expected = undisturbed(runs)
        # strata, so that the moments spread evenly
        others = kills - in_saves
        moments = [total * (index + draw.random()) / others for index in range(others)]
        rows = []
        for index in track(range(kills), description="kills"):
            for attempt in range(20):
                name = f"kill-{index}-{attempt}"
                if index < in_saves:
                    which = 1 + index % (steps // save_steps)
                    hit = kill_in_save(runs, name, which, draw.random() * saving)
                else:
                    # a later attempt comes earlier: this run was quicker than the one measured
                    hit = kill_after(runs, name, moments[index - in_saves] * 0.97**attempt)
                if hit:
                    break
            else:
                raise SystemExit(f"no kill number {index} hit a run that was going on")
            folder = runs.folder(name)
            row: dict[str, Any] = {"phase": phase_of(folder, steps), "attempts": attempt + 1}
            row["whole_checkpoints"] = sum(damage(path) is None for path in folder.checkpoints())
            row["damaged_checkpoints"] = len(folder.checkpoints()) - row["whole_checkpoints"]
            row["resumed"] = runs.finish(name, "--resume", "auto") == 0
            row["same_adapter"] = runs.digest(name) == expected
            rows.append(row)
            if row["resumed"] and row["same_adapter"]:
                shutil.rmtree(folder.path)
        return {
            "command": "python " + " ".join([str(Path(sys.argv[0])), *sys.argv[1:]]),
            "environment": record.environment(),
            "processes": processes,
            "steps": steps,
            "save_steps": save_steps,
            "undisturbed_seconds": round(total, 2),
            "save_seconds": round(saving, 4),
            "kills": kills,
            "phases": dict(Counter(row["phase"] for row in rows)),
            "resumed": sum(row["resumed"] for row in rows),
            "same_adapter": sum(row["same_adapter"] for row in rows),
            "adapter_sha256": expected,
            "rows": rows,
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """Print the counts, write the file, and return 1 if a run did not go on to the same adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-saves", type=int, default=None, help="a third of the kills, by default")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--save-steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    in_saves = args.kills // 3 if args.in_saves is None else args.in_saves
    found = measure(args.kills, in_saves, args.processes, args.steps, args.save_steps, args.seed)
    phases = ", ".join(f"{count} in {phase}" for phase, count in sorted(found["phases"].items()))
    print(f"{found['kills']} kills: {phases}")
    print(f"{found['resumed']} went on to the end, {found['same_adapter']} to the undisturbed run's adapter")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["resumed"] == found["same_adapter"] == found["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
