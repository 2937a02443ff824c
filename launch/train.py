"""Train a run: `deepspeed launch/train.py --config configs/mistral_lsr.yaml`, or under torchrun, or alone.

Without a checkout: `deepspeed --module lsr_scale.launch --config mistral_lsr`, which is the same.
"""

import sys

if __name__ == "__main__":
    sys.argv[0] = "lsr-scale"  # as which the package parses first and imports torch later
    from lsr_scale.launch import main

    sys.exit(main())
