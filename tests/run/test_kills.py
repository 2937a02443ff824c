"""What a killed process was in the middle of writing goes when the next one writes there; nobody else's files do."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from lsr_scale.exporting import export
from lsr_scale.run.folder import RunFolder
from tests.helpers.programs import start_program
from tests.helpers.tiny_runs import do, save_llama, tiny_run

# a step of a write is replaced by one that says so and waits for the end
WAIT = """
import sys, time
def wait(*args, **options):
    print("in the middle", flush=True)
    time.sleep(600)
"""
FILE = """
import os
from pathlib import Path
from lsr_scale import files
files.os.fsync = wait
files.write_text(Path({file!r}), 'x')
"""
CHECKPOINT = """
from lsr_scale.training.checkpoint import resumable
from tests.helpers.tiny_runs import do, tiny_run
from pathlib import Path
resumable.write_manifest = wait
do(tiny_run(Path({place!r})))
"""
EXPORT = """
from lsr_scale.exporting import export, folder
folder.write_card = wait
export({run!r}, "lora", {out!r}, verify=False, say=lambda text: None)
"""


def kill_in_the_middle(program, folder):
    """Run a program until it says that it is in the middle of a write, kill it, and return its temporaries' names."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        child = start_program(WAIT + program, Path(place), out, err)
        while "in the middle\n" not in out.read_text():
            assert child.is_alive(), err.read_text()
            time.sleep(0.02)
        child.kill()
        child.join()
    return temporaries(folder)


def temporaries(folder):
    return {path.name for path in folder.rglob(".*") if ".part" in path.name}


def a_users_own(folder, process):
    """Put files into a folder that only look like temporaries, or belong to a living process."""
    names = {".notes.part", ".notes.4194999.part", f".results.json.{process}.part"}
    for name in names:
        (folder / name).write_text("mine")
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    save_llama(folder / "model")
    return folder


def test_a_file_that_was_being_written_is_removed_when_the_next_run_starts(tmp_path):
    (tmp_path / "eval").mkdir()
    for file in ("results.json", "eval/task-after.jsonl"):
        assert kill_in_the_middle(FILE.format(file=str(tmp_path / file)), (tmp_path / file).parent)
    users = a_users_own(tmp_path, os.getppid())

    RunFolder(tmp_path).remove_left_over()

    assert temporaries(tmp_path) == users


def test_a_checkpoint_that_was_being_saved_is_removed_by_the_run_that_resumes(place):
    left = kill_in_the_middle(CHECKPOINT.format(place=str(place)), place / "run")
    assert [name.startswith(".checkpoint-2.") for name in left] == [True]

    do(tiny_run(place), resume="auto")

    assert temporaries(place / "run") == set()


def test_an_export_that_was_being_written_is_removed_by_the_next(place, tmp_path):
    run = do(tiny_run(place, training={"output_dir": str(tmp_path / "run"), "max_steps": 1}, eval={"tasks": []})).path
    assert kill_in_the_middle(EXPORT.format(run=str(run), out=str(tmp_path / "out")), tmp_path)

    export(run, "lora", tmp_path / "out", verify=False, say=lambda text: None)

    assert temporaries(tmp_path) == set()
