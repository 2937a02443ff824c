"""The package as others get it: an sdist that is the checkout, and its wheel, installed into an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.launch import QUICK_START
from tests.helpers.programs import run_program
from tests.helpers.tiny_runs import save_llama

ROOT = Path(__file__).parents[1]
# what a checkout has beside its files
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "shared")
)
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
# in one process, as each imports for seconds
USE = """
import sys, lsr_scale
print(lsr_scale.LsrConfig.__name__)
from lsr_scale.cli import main
assert main(["init", "chat", "--method", "lsr", "--out", "chat.yaml"]) == 0
# a step of a row, nothing evaluated: what is looked at is that all of it is there
short = ["training.max_steps=1", "training.save_strategy=no", "eval.prompts=[]", "data.validation_split=null"]
short += ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"]
short += [f"model.name={sys.argv[1]}", "training.max_length=64"]
assert main(["train", "chat.yaml", *(word for value in short for word in ("--set", value))]) == 0
print("answer:", end=" ", flush=True)
assert main(["generate", "runs/chat", "--prompt", "How do I resume a run?", "--max-new-tokens", "2"]) == 0
"""
# in a process that has the libraries; what it has of this checkout's tests, and where it would find more, is forgotten
TESTS = """
import os, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
    del sys.modules[name]
sys.path[:] = [os.getcwd(), *(folder for folder in sys.path if os.path.abspath(folder or ".") != {root!r})]
import pytest
status = pytest.main(sys.argv[1:])
import lsr_scale, tests
assert os.path.dirname(lsr_scale.__path__[0]) == os.path.dirname(tests.__path__[0])
print("found in", os.path.dirname(tests.__path__[0]))
sys.exit(status)
"""

pytestmark = pytest.mark.slow


def run(*words, cwd, **variables):
    """Run a command as a user's shell would, with nothing of this checkout on the path; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env={**kept, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def sdist(place):
    """Return the unpacked sdist of this tree."""
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=NOT_COPIED)
    run(sys.executable, "-c", BUILD, "build_sdist", place, cwd=place / "tree")
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(place, sdist):
    """Return the wheel that is made of the sdist."""
    run(sys.executable, "-c", BUILD, "build_wheel", place, cwd=sdist)
    (file,) = place.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(place, wheel):
    """Return the folder of the commands of an environment in which the wheel is installed, and nothing of the checkout.

    What the package depends on is read from this environment's folder. A .pth file that lies in a folder which itself
    is named by one does nothing, so the editable install there has no effect: importing the package fails before the
    wheel is installed.
    """
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    (packages,) = (place / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    find = "import importlib.util; print(importlib.util.find_spec('lsr_scale') and 'there')"
    assert run(python, "-c", find, cwd=place) == "None\n", "the environment is empty"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    run(python, "-m", "pip", *install, wheel, cwd=place)
    where = run(python, "-c", "import importlib.util as u; print(u.find_spec('lsr_scale').origin)", cwd=place)
    assert Path(where.strip()).is_relative_to(packages)
    return python.parent


def files_of(folder):
    """Return the files below a folder, links followed, by their path in it."""
    return {
        str(Path(parent, name).relative_to(folder)): Path(parent, name).read_bytes()
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if "__pycache__" not in parent
    }


def test_the_sdist_has_every_file_of_the_checkout(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("NOT TESTED: no checkout to compare with")
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    files = [name for name in listed if name and (ROOT / name).is_file() and not name.startswith((".ci/", ".git"))]
    assert [name for name in files if not (sdist / name).is_file()] == []
    assert [name for name in files if (sdist / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_the_tests_run_in_the_unpacked_sdist(sdist):
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_layout.py", "tests/config/test_shipped.py"]
    done = run_program(TESTS.format(root=str(ROOT)), sdist, *words)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert " passed" in done.stdout
    assert f"found in {sdist}\n" in done.stdout


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {f"lsr_scale/{name}": content for name, content in files_of(ROOT / "lsr_scale").items()}
    assert sorted(found) == sorted(wanted)
    assert found == wanted
    assert "lsr_scale/configs/mistral_lsr.yaml" in found
    assert "lsr_scale/py.typed" in found


def test_the_wheel_is_used_from_an_empty_folder(environment, tmp_path):
    python, command = environment / "python", environment / "lsr-scale"
    assert "usage: lsr-scale" in run(command, "--help", cwd=tmp_path)
    assert "name: mistralai/Mistral-7B-v0.1" in run(command, "config", "mistral_lsr", cwd=tmp_path)
    # a tiny model: the built-in one's weights are in no wheel
    model = save_llama(tmp_path / "model", chat=True, max_position_embeddings=4096)
    said = run(python, "-c", USE, model, cwd=tmp_path, OMP_NUM_THREADS="1", **QUICK_START)
    assert said.startswith("LsrConfig\n")
    assert "written: chat.yaml" in said
    assert (tmp_path / "runs" / "chat" / "adapter" / "adapter_model.safetensors").is_file()
    assert said.partition("answer: ")[2].strip()
