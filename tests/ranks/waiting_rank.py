"""Train as launch/train.py does, but the first process waits for ever in the third step, as in NCCL.

Beside the run's folder it leaves a file `waits` then, and a file `told` once a signal has come to it.
"""

import sys
import time
from pathlib import Path

from lsr_scale import cli, distributed


def main() -> int:
    cli.quiet_libraries(debug=False)
    from trl import SFTTrainer

    from lsr_scale.training.callbacks.signals import StopOnSignal

    compute = SFTTrainer.compute_loss

    def waiting(self, *args, **kwargs):
        if distributed.rank() == 0 and self.state.global_step == 2:
            (stop,) = (each for each in self.callback_handler.callbacks if isinstance(each, StopOnSignal))
            beside = Path(self.args.output_dir).parent
            (beside / "waits").touch()
            while True:
                time.sleep(0.1)
                if stop.signals.received:
                    (beside / "told").touch()
        return compute(self, *args, **kwargs)

    SFTTrainer.compute_loss = waiting
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
