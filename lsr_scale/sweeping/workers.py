"""Several processes on one sweep: each has a GPU, trains by itself, and claims trials in the sweep's folder.

They are started by `lsr-scale sweep --gpus N`, or by a launcher (deepspeed, torchrun) on one host or several that share
a disk. A launched process executes the command anew without the launcher's variables, by which the libraries would join
the processes to one run, and with its own GPU as the only one that there is.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lsr_scale.errors import UserError

# what a launcher's rank was, for the process that it executes: "rank size address port agent's store or not"
_RANK = "LSR_SCALE_SWEEP_RANK"
# the folder of a sweep that another process began, and how many work on it
_FOLDER, _NUMBER = "LSR_SCALE_SWEEP_FOLDER", "LSR_SCALE_SWEEP_WORKERS"
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_LAUNCHERS += ("CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK")
_OF_LAUNCHERS += ("ROLE_WORLD_SIZE",)
_POLL_S = 0.5


def is_launched() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return bool(os.environ.get("WORLD_SIZE") and os.environ.get("RANK"))


def is_worker() -> bool:
    """Tell whether this process is one of several on a sweep, and not the one that speaks for all."""
    return bool(os.environ.get(_FOLDER)) or os.environ.get(_RANK, "0").partition(" ")[0] != "0"


def num_workers() -> int:
    """Return how many processes were started for the sweep that this one works on."""
    if os.environ.get(_FOLDER):
        return int(os.environ.get(_NUMBER, "1"))
    return int(os.environ.get(_RANK, "0 1").split()[1])


def become_worker(command: Sequence[str]) -> NoReturn:
    """Execute a sweep's command anew, as a process by itself that knows its launcher's rank; does not return.

    Raises:
        UserError: if this host has no GPU for it.
    """
    from lsr_scale import distributed

    distributed.check_launcher()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    local, agent = distributed.local_rank(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = f"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"
    environment[_RANK] = f"{distributed.rank()} {distributed.world_size()} {address} {int(agent)}"
    environment |= _own_gpu(local)
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, distributed.num_cores() // max(1, on_host))))
    sys.stdout.flush()
    sys.stderr.flush()
    words = [sys.executable, "-m", "lsr_scale", "sweep", *command]
    os.execve(sys.executable, words, environment)


def _own_gpu(number: int) -> dict[str, str]:
    """Return the variable by which a process sees one GPU: that of this number among those that are visible here.

    Raises:
        UserError: if there are fewer.
    """
    from lsr_scale import distributed  # which loads PyTorch

    num_gpus = _num_gpus()
    if num_gpus == 0:
        return {}
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = given or [str(index) for index in range(num_gpus)]
    if number >= len(names) and not distributed.may_share_gpus():
        raise UserError(
            f"process {number + 1} of this host has no GPU for itself: there {'are' if len(names) > 1 else 'is'} "
            f"{len(names)}; start one process a GPU, or to try several on one: {distributed.HOW_TO_SHARE_GPUS}"
        )
    return {"CUDA_VISIBLE_DEVICES": names[number % len(names)]}


def _num_gpus() -> int:
    """Return how many GPUs this process sees, by the driver, without starting CUDA here."""
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def meeting(begin: Callable[[], Any]) -> Iterator[Any]:
    """Yield what `begin()` returns, called by the first process alone: a folder and lines about it.

    On leaving, the first process waits until the others have left.
    """
    from lsr_scale import distributed
    from lsr_scale.sweeping.folder import SweepFolder

    if folder := os.environ.get(_FOLDER):
        yield SweepFolder(Path(folder)), []
        return
    if not (given := os.environ.get(_RANK)):
        yield begin()
        return
    from torch.distributed import TCPStore

    rank, size, address, port, agent = given.split()
    patience = datetime.timedelta(seconds=distributed.TIMEOUT_S)
    store = TCPStore(address, int(port), int(size), rank == "0" and agent == "0", patience, wait_for_workers=False)
    if rank != "0":
        found = json.loads(store.get("lsr_scale/sweep"))
        store.set(f"lsr_scale/sweep/{rank}", "began")
        if "error" in found:
            raise UserError(found["error"])
        try:
            yield SweepFolder(Path(found["folder"])), []
        finally:
            with contextlib.suppress(Exception):  # the first process may have failed
                store.set(f"lsr_scale/sweep/{rank}/left", "1")
        return
    others = [f"lsr_scale/sweep/{other}" for other in range(1, int(size))]
    try:
        folder, notes = begin()
    except UserError as error:
        store.set("lsr_scale/sweep", json.dumps({"error": str(error)}))
        store.wait(others)
        raise
    store.set("lsr_scale/sweep", json.dumps({"folder": str(folder.path.resolve())}))
    yield folder, notes
    store.wait(others)
    while not all(store.check([f"{other}/left"]) for other in others):
        time.sleep(_POLL_S)


def start(command: Sequence[str], folder: Path, number: int) -> "list[subprocess.Popen[bytes]]":
    """Start so many processes on a sweep that has begun, each with a GPU of its own.

    Raises:
        UserError: if there are fewer GPUs.
    """
    if _num_gpus() == 0:
        raise UserError(f"--gpus {number}: this machine has no GPU that torch can use; leave it out")
    words = [sys.executable, "-m", "lsr_scale", "sweep", *command]
    joining = {**os.environ, _FOLDER: str(folder), _NUMBER: str(number)}
    environments = [{**joining, **_own_gpu(index)} for index in range(number)]
    return [subprocess.Popen(words, env=environment) for environment in environments]


def wait(processes: "Sequence[subprocess.Popen[bytes]]", signals: Any, show: Callable[[], None]) -> list[int]:
    """Wait for processes to end, and return their statuses.

    Args:
        processes: The processes.
        signals: What this one received is passed on to them.
        show: Called now and then.
    """
    passed_on = False
    while any(process.poll() is None for process in processes):
        if signals.received and not passed_on:
            passed_on = True
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        show()
        time.sleep(_POLL_S)
    return [process.returncode for process in processes]
