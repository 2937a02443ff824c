"""Train a run: `deepspeed launch/train.py --config configs/mistral_lsr.yaml`, or under torchrun, or alone."""

import sys

from lsr_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
