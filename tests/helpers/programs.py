"""Short programs in fresh processes, which are forked off one that has imported the libraries: imports take seconds.

This module imports nothing but the standard library, or a program would find more imported than it asked for.
"""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

LIBRARIES = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed", "trl"]
OF_A_COMMAND = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY")
OF_A_COMMAND += ("TRANSFORMERS_VERBOSITY",)
_of_method = multiprocessing.get_context  # which tests of benchmarks replace


def with_libraries() -> Any:
    """Return multiprocessing's context for processes that find `LIBRARIES` imported.

    With a GPU they import them anew: bitsandbytes and DeepSpeed set CUDA up when they are imported, and then it does
    not work in a forked process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return _of_method("spawn")
    context = _of_method("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    # a command that a test has run in this process leaves these, which libraries read when they are imported
    left = {name: os.environ.pop(name) for name in OF_A_COMMAND if name in os.environ}
    forkserver.ensure_running()
    os.environ.update(left)
    return context


class Ended(NamedTuple):
    """How a program ended, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


def start_program(
    code: str, cwd: Path, out: Path, err: Path, *arguments: object
) -> multiprocessing.process.BaseProcess:
    """Start a program that finds nothing of the package imported (see `with_libraries`); it writes to two files."""
    process = with_libraries().Process(target=_run, args=(code, str(cwd), str(out), str(err), *map(str, arguments)))
    out.touch()
    process.start()
    return process


def run_program(code: str, cwd: Path, *arguments: object) -> Ended:
    """Run a program as `start_program` does, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = start_program(code, cwd, *files, *arguments)
        process.join()
        return Ended(process.exitcode, *(file.read_text() for file in files))


def one_thread() -> None:
    """Have tiny tensors computed by one thread: in a forked process OMP_NUM_THREADS would come too late."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _run(code: str, cwd: str, out: str, err: str, *arguments: str) -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] == "lsr_scale"]
    one_thread()
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
