"""Train a run: `deepspeed launch/train.py --config configs/mistral_lsr.yaml`, or under torchrun, or alone."""

import sys

if __name__ == "__main__":
    try:
        from lsr_scale.cli import main
    except KeyboardInterrupt:  # the import takes seconds
        print("\nlsr-scale: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main(["train", *sys.argv[1:]]))
