"""Train as launch/train.py does, but the first process waits for ever in the third step, as in NCCL."""

import sys
import time

from lsr_scale import cli, distributed


def main() -> int:
    cli._quiet_libraries(debug=False)
    from trl import SFTTrainer

    compute = SFTTrainer.compute_loss

    def waiting(self, *args, **kwargs):
        if distributed.rank() == 0 and self.state.global_step == 2:
            while True:
                time.sleep(1)
        return compute(self, *args, **kwargs)

    SFTTrainer.compute_loss = waiting
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
