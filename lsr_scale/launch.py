"""Train a run on each process that a launcher starts, from wherever the package is installed.

    deepspeed --module lsr_scale.launch --config mistral_lsr
    torchrun --nproc_per_node 8 -m lsr_scale.launch --config mistral_lsr
    python -m lsr_scale.launch --config mistral_lsr

`launch/train.py` of a checkout is the same as a script. The options are those of `lsr-scale train`.
"""

import sys

from lsr_scale.cli import main as command_line


def main() -> int:
    """Train as `lsr-scale train` does, with this process's own words; return the exit status."""
    return command_line(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
