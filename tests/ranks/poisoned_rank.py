"""Train as launch/train.py does, but for an infinite loss in the second step of the second process."""

import math
import sys

from lsr_scale import cli, distributed


def main() -> int:
    cli.quiet_libraries(debug=False)
    from trl import SFTTrainer

    compute = SFTTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        result = compute(self, *args, **kwargs)
        if distributed.rank() == 1 and self.state.global_step == 1:
            return (result[0] * math.inf, *result[1:]) if isinstance(result, tuple) else result * math.inf
        return result

    SFTTrainer.compute_loss = poisoned
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
