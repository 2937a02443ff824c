"""The training command on GPUs that have no more memory than they are said to; notes what each process took.

    torchrun --nproc_per_node 2 -m benchmarks.robustness.limited_launch GIB --config RUN.yaml

The options are those of `lsr-scale train`; with 0 GiB nothing is limited. `peaks/RANK.json` in the run's folder has the
bytes that PyTorch's allocator had at most, in use and reserved.
"""

import os
import sys
from pathlib import Path

import torch

from benchmarks.speed.smaller_gpu import SmallerGpu
from lsr_scale import files
from lsr_scale.cli import main as command_line
from lsr_scale.config import load_run

PEAKS = "peaks"


def main() -> int:
    """Train as `lsr-scale train` does; return the exit status."""
    gib, *words = sys.argv[1:]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if float(gib):
            SmallerGpu(float(gib), torch.cuda).limit_allocator()
    status = command_line(["train", *words])
    if torch.cuda.is_available():
        folder = Path(load_run(words[words.index("--config") + 1]).training["output_dir"]) / PEAKS
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        folder.mkdir(exist_ok=True)
        files.write_json(folder / f"{rank}.json", peaks)
    return status


if __name__ == "__main__":
    sys.exit(main())
