"""What test_distributed.py has processes do: all wait for the first, until it has seen a collective give up.

    torchrun --nproc_per_node 3 tests/ranks/patient_ranks.py FILE

Each appends a line to the file when it has done its part.
"""

import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from lsr_scale import cli, distributed


def main() -> None:
    cli.quiet_libraries(debug=False)
    distributed.start(use_deepspeed=False, timeout_s=1.0)
    state, line = PartialState(cpu=True), f"rank {distributed.rank()} came"
    with distributed.patient_barriers(), state.main_process_first(), state.local_main_process_first():
        if distributed.is_main():
            try:
                torch.distributed.recv(torch.zeros(1), src=1)  # of what is never sent
            except RuntimeError as error:
                line = f"rank 0 had {error}"
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{line}\n")
    while distributed.is_main() and Path(sys.argv[1]).read_text().count("\n") < distributed.world_size():
        time.sleep(0.1)  # the store ends with this process, and others may still look there
    os._exit(0)  # the group is of no use after a collective that gave up


if __name__ == "__main__":
    main()
