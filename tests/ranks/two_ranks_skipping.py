"""What test_faults.py has two processes do, in one launch: a step under each engine, a bad batch on one.

    torchrun --nproc_per_node 2 tests/ranks/two_ranks_skipping.py FILE...

Each file is a run; of one whose name begins with "gradient", the batch's loss is finite.
"""

import gc
import math
import sys

from trl import SFTTrainer

from lsr_scale import cli, distributed
from tests.helpers.gradients import InfiniteGradient


def main() -> None:
    cli.quiet_libraries(debug=False)

    from lsr_scale.run import train

    compute = SFTTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if distributed.rank() != 1 or self.state.global_step != 0:
            return loss
        return InfiniteGradient.apply(loss) if file.rpartition("/")[2].startswith("gradient") else loss * math.nan

    SFTTrainer.compute_loss = poisoned
    train.show_at_end = lambda folder: "report: left out"  # nobody looks at it
    distributed.stop = lambda: None  # the processes stay together for the next run
    for file in sys.argv[1:]:
        gc.freeze()  # what the run before imported
        status = cli.main(["train", "--config", file])
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
