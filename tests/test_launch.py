"""The SLURM script, run with stand-ins for scontrol and srun that tell the environment that tasks would have."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "train.slurm"


@pytest.mark.parametrize(
    ("job", "given", "port"), [("7", None, "20007"), ("123456", None, "23456"), ("123457", "29500", "29500")]
)
def test_each_job_has_a_port_of_its_own_unless_one_is_given(tmp_path, job, given, port):
    slow = "echo node-1; sleep 0.1; echo node-2"  # as it is on a cluster of many nodes
    programs = {"scontrol": slow, "srun": "echo $MASTER_ADDR $MASTER_PORT $WORLD_SIZE"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node-[1-2]"}
    environment |= {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}
    environment |= {} if given is None else {"MASTER_PORT": given}
    said = subprocess.run(["bash", SCRIPT, "run.yaml"], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["node-1", port, "16"]
