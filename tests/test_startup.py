"""What a question or a mistake does not wait for: the modules that take seconds to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import run_program
from tests.helpers.run_folders import choice_rows, write_run

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "numpy", "pandas")
RUN = """
model: {name: mistralai/Mistral-7B-v0.1}
adapter: {method: lsr, target_modules: [q_proj]}
data: {train: [builtin:commonsense]}
"""
# as the command is started, saying at its end what of HEAVY it has imported
START = f"""
import atexit, sys
sys.argv[0] = "lsr-scale"
atexit.register(lambda: print("imported:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
from lsr_scale.cli import main
sys.exit(main())
"""


def start(*arguments, cwd):
    """Return the exit status of a command, its output, and which heavy modules it imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", START, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    output, _, imported = result.stderr.rpartition("imported:")
    return result.returncode, result.stdout + output, imported.split()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "usage"),
        (["--version"], 0, "lsr-scale"),
        (["train", "--help"], 0, "usage"),
        (["config", "run.yaml"], 0, "method: lsr"),
        (["config", "--json-schema"], 0, "json-schema.org"),
        (["trian"], 2, "invalid choice"),
        (["config", "missing.yaml"], 2, "missing.yaml"),
        (["train", "missing.yaml"], 2, "missing.yaml"),
        (["train", "run.yaml", "--set", "training.lerning_rate=1"], 2, "learning_rate"),
        (["plan", "run.yaml", "--set", "adapter.rnak=1"], 2, "'rank'"),
        (["plan", "run.yaml", "--budget", "4Q"], 2, "such as 4M"),
        (["preview", "run.yaml", "--set", "model.task=causal"], 2, "causal_lm"),
        (["doctor", "missing.yaml"], 2, "missing.yaml"),
        (["eval", "missing"], 2, "not a run folder"),
        (["compare", "missing", "other"], 2, "not a run folder"),
        (["report", "missing"], 2, "not a run folder"),
        (["inspect", "missing"], 2, "there is no adapter"),
        (["export", "missing", "--to", "lora", "--out", "x"], 2, "there is no adapter"),
        (["merge", "missing", "other", "--out", "x"], 2, "there is no adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_question_or_a_mistake_is_answered_without_torch(tmp_path, arguments, status, words):
    (tmp_path / "run.yaml").write_text(RUN)

    exit_status, output, imported = start(*arguments, cwd=tmp_path)

    assert (exit_status, imported) == (status, [])
    assert words in output


def test_a_plan_imports_no_trainer_no_data_library_and_no_compiler(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    unneeded = ("trl", "datasets", "pandas", "transformers.trainer", "torch._inductor.compile_fx", "matplotlib")
    code = START.replace(repr(HEAVY), repr(unneeded))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, "plan", "run.yaml", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "imported:"


def test_runs_are_compared_without_torch(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, answers={"arc-after": choice_rows([True, False])})

    status, output, imported = start("compare", "a", "b", cwd=tmp_path)

    assert (status, imported) == (0, [])
    assert "arc" in output


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_a_commands_threads_sleep_while_they_wait_unless_told_otherwise(given, policy):
    program = "import os, sys; from lsr_scale.cli import main; main(['config', 'smollm2_lsr']); "
    program += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    program = "import sys; sys.argv[0] = 'lsr-scale'; " + program
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{policy} False"


def test_a_plan_made_within_a_program_leaves_its_compiler_on(tmp_path, monkeypatch):
    program = "import os, torch; from lsr_scale.cli import main; main(['plan', 'smollm2_lsr']); "
    program += "import torch._dynamo; print('off' if torch._dynamo.config.disable else 'on')"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    done = run_program(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "on"
