"""What test_faults.py has two processes do, in one launch: a step under each ZeRO stage, a bad batch on one.

    torchrun --nproc_per_node 2 tests/two_ranks_skipping.py FILE...

Each file is a run.
"""

import math
import sys

from trl import SFTTrainer

from lsr_scale import cli, distributed


def main() -> None:
    cli._quiet_libraries(debug=False)
    from accelerate.state import AcceleratorState

    compute = SFTTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * math.nan if distributed.rank() == 1 and self.state.global_step == 0 else loss

    SFTTrainer.compute_loss = poisoned
    distributed.stop = lambda: None  # the processes stay together for the next run
    for file in sys.argv[1:]:
        status = cli.main(["train", "--config", file])
        if status:
            sys.exit(status)
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
