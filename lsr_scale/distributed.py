"""The process group: ranks as launchers give them, joining it on GPUs or CPUs, and the few collectives in use."""

import datetime
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lsr_scale.errors import UserError
from lsr_scale.units import amount

TIMEOUT_S = 600.0
# what deepspeed and torchrun set, for this package and for accelerate
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Tell whether a launcher (deepspeed, torchrun, SLURM) started this process as a rank of a group."""
    return bool(os.environ.get("WORLD_SIZE") and os.environ.get("RANK"))


def world_size() -> int:
    """Return how many processes train together."""
    return _launcher_number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """Return this process's rank."""
    return _launcher_number("RANK", 0)


def local_rank() -> int:
    """Return this process's rank among those of its host."""
    return _launcher_number("LOCAL_RANK", 0)


def _launcher_number(name: str, default: int, least: int = 0, most: int = 2**20) -> int:
    """Return a number that a launcher gave by the environment; an empty one is none.

    Raises:
        UserError: if it is no whole number, or out of bounds.
    """
    text = (os.environ.get(name) or "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(
            f"the environment's {name}: expected a whole number from {least} to {most}, got {text!r:.40}; deepspeed "
            f"and torchrun set it, and to train in one process: unset {' '.join(_VARIABLES)}"
        )
    return int(text)


def check_launcher() -> None:
    """Check that what a launcher set is consistent, for the libraries read it too; drop what is empty.

    Raises:
        UserError: for a number that is none, or a variable that lacks the others.
    """
    for name in _VARIABLES:
        if os.environ.get(name, "-").strip() == "":
            del os.environ[name]
    number, size = rank(), world_size()
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_SIZE", 1)):
        _launcher_number(name, least, least)
    _launcher_number("MASTER_PORT", 1, least=1, most=65535)
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if given and not is_launched():
        lacking = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
        raise UserError(
            f"the environment has {' and '.join(given)}, but not {' and '.join(lacking)}: start with deepspeed or "
            f"torchrun, which set them all, and to train in one process: unset {' '.join(given)}"
        )
    if number >= size:
        raise UserError(
            f"the environment's RANK is {number}, but WORLD_SIZE is {size}: ranks go from 0 to {size - 1}; deepspeed "
            f"and torchrun set them, and to train in one process: unset {' '.join(_VARIABLES)}"
        )
    if is_launched():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"the environment has RANK and WORLD_SIZE, but not {name}, where the processes meet: start with "
                    f"deepspeed or torchrun, which set it, and to train in one process: unset {' '.join(_VARIABLES)}"
                )


def _has_joined() -> bool:
    """Tell whether this process is in a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def group_rank_and_size() -> tuple[int, int]:
    """Return this process's rank in the group that it joined, and the group's size; (0, 1) if it joined none."""
    if not _has_joined():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_main() -> bool:
    """Tell whether this process is rank 0, which prints and writes."""
    return rank() == 0


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(use_deepspeed: bool, timeout_s: float = TIMEOUT_S) -> None:
    """Join the process group, if there is one, and share the CPU cores among the processes of this machine.

    Processes wait for each other at most `timeout_s` seconds, here and in every collective.

    On CPUs DeepSpeed would compile a shared-memory helper first, a minute on two cores and in need of a C++ compiler;
    an adapter's gradients are a few MB, for which gloo does, so the helper is left out.

    Processes talk by NCCL on GPUs and gloo on CPUs, or by what LSR_SCALE_BACKEND names. Several may share a GPU
    (`may_share_gpus`), to try out what otherwise takes several GPUs.

    Raises:
        UserError: if the others did not come, this process has no GPU for itself, NCCL does not start, or what the
            launcher set is no place in a group.
    """
    check_launcher()
    if not is_launched():
        return
    has_gpu = torch.cuda.is_available()
    backend = os.environ.get("LSR_SCALE_BACKEND") or ("nccl" if has_gpu else "gloo")
    device = _own_gpu(backend) if has_gpu else None
    if not torch.distributed.is_backend_available(backend):
        raise UserError(
            f"the environment's LSR_SCALE_BACKEND: {backend!r:.40} is not in this torch; set gloo, or unset it"
        )
    if device is not None:
        torch.cuda.set_device(device)
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // max(1, local)))
        os.environ["OMP_NUM_THREADS"] = threads
        if threads.isdecimal():  # or OpenMP reads it: 4,2 is by depth
            torch.set_num_threads(max(1, int(threads)))
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        if use_deepspeed:
            import deepspeed
            import deepspeed.ops

            if not has_gpu:
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
        elif not torch.distributed.is_initialized():
            torch.distributed.init_process_group(backend, timeout=timeout)
    except torch.distributed.DistBackendError as error:
        raise UserError(
            f"process {rank()} of {world_size()}: {backend} does not start among the processes: "
            f"{str(error).strip()[-300:]}" + ("; NCCL_DEBUG=WARN tells more" if backend == "nccl" else "")
        ) from error
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "address already in use" in str(error):
            raise UserError(
                f"process {rank()} of {world_size()}: {where} is taken, most likely by another run on this host; give "
                "the launcher another port, such as --master_port 29501"
            ) from error
        raise UserError(
            f"process {rank()} of {world_size()} did not meet the others at {where} within {timeout_s:g} s: see that "
            f"all were started, with one MASTER_ADDR and MASTER_PORT that every host reaches ({str(error)[:200]})"
        ) from error


def _own_gpu(backend: str) -> int:
    """Return the number of this process's GPU; LOCAL_RANK, which accelerate reads too, is made to name it."""
    given, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if not given and count > 1 and backend == "nccl":
        raise UserError(
            f"process {rank()} of {world_size()}: LOCAL_RANK is not set, and this host has {count} GPUs; set it to the "
            f"process's number on its host, 0 to {count - 1}, which deepspeed and torchrun do"
        )
    local = int(given or 0)
    if local >= count and not may_share_gpus(backend):
        raise UserError(
            f"process {rank()} is number {local + 1} of this host, which has {amount(count, 'GPU')}: start one "
            f"process a GPU (--num_gpus {count}, --nproc_per_node {count}), or to try several on one, slowly: "
            f"{HOW_TO_SHARE_GPUS}"
        )
    os.environ["LOCAL_RANK"] = str(local % count)
    return local % count


HOW_TO_SHARE_GPUS = "set LSR_SCALE_BACKEND=gloo, or with NCCL from 2.30 on NCCL_MULTI_RANK_GPU_ENABLE=1"


def may_share_gpus(backend: str | None = None) -> bool:
    """Tell whether several processes may have one GPU: gloo lets them, and NCCL where its own variable asks for it."""
    backend = backend or os.environ.get("LSR_SCALE_BACKEND") or "nccl"
    return backend != "nccl" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "").strip() == "1"


def gather(value: list) -> list:
    """Return the lists of all processes one after the other, on every process."""
    if not _has_joined():
        return value
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return [item for part in parts for item in part]


def broadcast(value: object) -> object:
    """Return the main process's value on every process."""
    if not _has_joined():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def sum_tensor(tensor: torch.Tensor) -> None:
    """Add the values of all processes, in place."""
    if _has_joined():
        torch.distributed.all_reduce(tensor)


def broadcast_tensor(tensor: torch.Tensor) -> None:
    """Broadcast the main process's values of a tensor to every process, in place."""
    if _has_joined():
        torch.distributed.broadcast(tensor, src=0)


_LOOK_UP_S = 0.05  # after which those that wait for the main process ask again; a signal is heard meanwhile
_numbers = itertools.count()  # of the barriers, equal on all processes


@contextmanager
def patient_barriers() -> Iterator[None]:
    """Have accelerate's barriers wait as long as it takes within.

    What is made of many rows is made by the main process first, and a base is fetched by one host before another. A
    collective would give up after its timeout, and with NCCL end the run. These wait by the store where the processes
    met. One that ends meanwhile is seen by the launcher, which ends the others.
    """
    if not _has_joined():
        yield
        return
    from accelerate import PartialState
    from torch.distributed.distributed_c10d import _get_default_store

    store, barrier = _get_default_store(), PartialState.wait_for_everyone

    def wait(self: PartialState) -> None:
        name = f"lsr_scale/barrier-{next(_numbers)}"
        if store.add(name, 1) == torch.distributed.get_world_size():
            store.set(f"{name}/all", "here")
        while not store.check([f"{name}/all"]):  # its own wait would warn on the screen at each timeout
            time.sleep(_LOOK_UP_S)

    PartialState.wait_for_everyone = wait
    try:
        yield
    finally:
        PartialState.wait_for_everyone = barrier


class DelayedMax:
    """The largest of the numbers that the processes have, equal on all of them, by all-reduce.

    On GPUs the result is that of an earlier call, which has arrived by now, so that no process waits.
    """

    def __init__(self, delay: int = 2) -> None:
        """Take by how many calls a result may be late."""
        self._delay = delay
        self._pending: deque[tuple[Any, torch.Tensor]] = deque()  # the event after the copy, and the copy

    def reduce(self, number: int, wait: bool = False) -> int:
        """Return the largest, 0 where no result has arrived yet; every process must call it as often.

        Args:
            number: This process's, from 0 on.
            wait: For the result of this very call.
        """
        if not _has_joined():
            return number
        on_gpu = torch.distributed.get_backend() == "nccl"
        own = torch.tensor(number, pin_memory=on_gpu)
        largest = own.to("cuda" if on_gpu else "cpu", non_blocking=True)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        if wait or not on_gpu:
            return int(largest)
        on_host, copied = torch.empty_like(own, pin_memory=True), torch.cuda.Event()
        on_host.copy_(largest, non_blocking=True)
        copied.record()
        self._pending.append((copied, on_host))
        if len(self._pending) <= self._delay:
            return 0
        copied, on_host = self._pending.popleft()
        copied.synchronize()
        return int(on_host)


def stop() -> None:
    """Leave the process group."""
    if _has_joined():
        torch.distributed.destroy_process_group()
