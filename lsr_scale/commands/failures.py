"""How a command fails: the words for a mistake or a failure of the machine, and which process says them when."""

import contextlib
import os
import sys
import time

from lsr_scale.errors import LOST_PEER, DoesNotFitError, UserError, one_screen

SECONDS_FOR_RANK_0 = 4.0
# what helps where the GPU's memory ran out: while training, and where one process has a run's base to itself
_GPU_REMEDY = (
    "lower training.per_device_train_batch_size or training.max_length, or set training.memory: save (lsr-scale plan "
    "tells what each takes)"
)
ON_THE_CPU = "CUDA_VISIBLE_DEVICES= before the command has it done on the CPU, slowly"
ON_ALL_GPUS = (
    f"{ON_THE_CPU}; a base that no GPU holds alone is asked by those that train it: deepspeed --module "
    "lsr_scale.launch --config RUN/config.yaml --resume auto --set"
)
# the system's words, and what torch.save makes of them
_FULL_DISK = ("No space left on device", "PytorchStreamWriter", "inline_container", "iostream error")
# CUDA's words where torch has no exception of its own
_FULL_GPU = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# torch's words, the C++ library's and the system's
_FULL_MEMORY = ("DefaultCPUAllocator: ", "std::bad_alloc", "Cannot allocate memory", "not enough memory: you tried")
# a peer's end, in gloo's words and NCCL's
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "ncclSystemError")
# gloo's words; NCCL says its own, and ends the process
_TIMED_OUT = ("Timed out waiting",)


def explain(error: Exception, gpu_remedy: str | None = None) -> tuple[str, int] | None:
    """Return the words for a user's mistake or a failure of the machine, and the exit status; None for a bug.

    Args:
        error: What ended a command.
        gpu_remedy: What helps where the GPU's memory does not do for this command; by default what does in training.
    """
    if isinstance(error, UserError):
        too_large = isinstance(error, DoesNotFitError) and error.on_gpu
        return f"{error}; {gpu_remedy}" if too_large and gpu_remedy else str(error), 2
    # whatever raised these has imported them
    from lsr_scale.training.callbacks.signals import Terminated

    if isinstance(error, Terminated):
        return str(error), error.status
    words = _machine_failure(error, gpu_remedy or _GPU_REMEDY)
    return None if words is None else (words, 2)


def say(text: str) -> None:
    """Print an error; of several processes that meet the same one, the first says it."""
    own_rank = rank()
    if text == LOST_PEER:
        time.sleep(1.0)  # the launcher is to see first the one that it lost, and to name that one
    elif own_rank != "0":
        # Most mistakes stop all processes alike: the first one says it and ends, and the launcher ends this one before
        # it has waited to the end. What only this process met, it says.
        time.sleep(SECONDS_FOR_RANK_0 * _load_per_core())
    if own_rank != "0":
        text = f"rank {own_rank}: {text}"
    text = one_screen(text)
    with contextlib.suppress(BrokenPipeError):  # its reader may be gone, as after Ctrl-C on `... |& tee`
        print(f"\nlsr-scale: {text}", file=sys.stderr, flush=True)


def rank() -> str:
    """Return the launcher's number of this process as it stands, for it may be none; "0" without a launcher."""
    return os.environ.get("RANK") or "0"


def _load_per_core() -> float:
    """Return how many processes want each core of this host, from 1 to 10: on a busy one the others come later."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 1.0
    return min(10.0, max(1.0, load / (os.cpu_count() or 1)))


def _machine_failure(error: Exception, gpu_remedy: str) -> str | None:
    """Return words for a failure of the machine rather than of the program; `gpu_remedy` is `explain`'s."""
    import torch
    from safetensors import SafetensorError

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _FULL_GPU):
        return f"the GPU's memory ran out; {gpu_remedy}"
    if _is_out_of_memory(error):
        return (
            "this machine's memory (not the GPU's) ran out; lower training.per_device_train_batch_size, "
            "training.max_length or training.dataloader_num_workers, give it more, or end what else runs on it"
        )
    if any(words in text for words in _FULL_DISK) and "Reader" not in text:
        return (
            "the disk is full; free some space, then resume with --resume auto (complete checkpoints stay, and one cut "
            "short is passed over)"
        )
    if any(words in text for words in _LOST_PEER):
        return LOST_PEER
    if any(words in text for words in _TIMED_OUT):
        return (
            "another process of the run did not come in time; where it does something slow by itself, such as writing "
            "to a slow disk, raise training.ddp_timeout (in seconds, 600 by default), and resume with --resume auto"
        )
    if isinstance(error, SafetensorError):
        return f"a weight file is damaged or cut short ({text}); restore it, or resume from the checkpoint before"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the machine's memory ran out, by the exception or one that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in _FULL_MEMORY):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
