"""Scripts run on two processes, by the launchers that users take."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.ports import held_port

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# for processes that compile nothing: bitsandbytes would spend a second of each start on preparing for it
QUICK_START = {"TORCHDYNAMO_DISABLE": "1"}

LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def launch(launcher, *command):
    """Run a script on two processes; return the status, stdout without the launcher's own lines, and stderr.

    However long it takes: what hangs is ended by pytest's own limit.
    """
    environment = {**os.environ, **QUICK_START, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    with held_port() as port:
        words = [sys.executable, *LAUNCHERS[launcher], port, *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    own = [line for line in lines if not re.match(r"\[20\d\d-.*(launch|runner|real_accelerator)\.py", line)]
    return done.returncode, "\n".join(own), done.stderr
