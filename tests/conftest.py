"""What holds for all tests. It imports no library, for which the process that only hands tests out would wait."""

import gc
import importlib
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.once import do_once

if TYPE_CHECKING:
    import torch

# The files that take longest, the longest first. Test processes take files in this order, then those that start whole
# processes, then the others, so that none ends alone with a long one.
LONGEST = [
    "training/test_two_ranks.py",
    "planning/test_planner.py",
    "test_wheel.py",
    "training/test_faults.py",
    "training/test_sharding.py",
    "sweeping/test_workers.py",
    "sweeping/test_sweep.py",
    "training/test_resume.py",
    "training/test_joint.py",
    "test_api.py",
]

# what a shell may hold: a cluster's job, a terminal's width and colours, how much the libraries say
OF_THE_SHELL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_THE_SHELL += ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")


def pytest_configure(config: pytest.Config) -> None:
    """Start from what no test asked for; import what processes that test need first."""
    for name in OF_THE_SHELL:
        os.environ.pop(name, None)
    if not getattr(config.option, "numprocesses", None):  # of xdist's processes only the first has it
        importlib.import_module("tests.helpers.tiny_models")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name a case with bytes by its argument: gzip writes the time into them, and processes must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files go first, after them those that start whole processes."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST) + (item.path not in slow)))


@pytest.fixture(autouse=True)
def _plots_without_a_screen() -> Iterator[None]:
    """Let no test choose the backend with which the next ones draw."""
    yield
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot and pyplot.get_backend() != "agg":
        pyplot.switch_backend("agg")


@pytest.fixture(autouse=True, scope="module")
def _pictures_that_nobody_looks_at(request) -> Iterator[Callable[..., None]]:
    """Have the package's figures made but not rendered, which is half of a tiny run's time.

    In a picture's place is an empty one of the same format, with the same metadata. A module with LOOKS_AT_PICTURES, or
    a test with the fixture `rendered`, has the pictures themselves.
    """
    from matplotlib.figure import Figure

    render, empty = Figure.savefig, {}
    if getattr(request.module, "LOOKS_AT_PICTURES", False):
        yield render
        return

    def save_empty(figure, target, **options):
        if "format" not in options:  # a benchmark's
            return render(figure, target, **options)
        key = str(sorted(options.items()))
        if key not in empty:
            drawn = io.BytesIO() if options["format"] == "png" else io.StringIO()
            render(Figure(figsize=(0.1, 0.1)), drawn, **options)
            empty[key] = drawn.getvalue()
        target.write(empty[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_empty)
        yield render


@pytest.fixture(autouse=True, scope="module")
def with_pages(request) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Leave out a run's pictures and page at its end, a third of a tiny run's time; return a context with them.

    A module with LOOKS_AT_PAGES, or a test with the fixture `written_pages`, has them.
    """
    modules = [importlib.import_module(name) for name in ("lsr_scale.run.train", "lsr_scale.sweeping.pages")]
    write = modules[0].show_at_end

    @contextmanager
    def all_with(show_at_end: Callable[..., str]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "show_at_end", show_at_end)
            yield

    if getattr(request.module, "LOOKS_AT_PAGES", False):
        yield nullcontext
        return
    with all_with(lambda folder, plan=None: "report   left out"):
        yield lambda: all_with(write)


@pytest.fixture
def written_pages(with_pages) -> Iterator[None]:
    """Have the runs of a test draw their pictures and write their pages at their end."""
    with with_pages():
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_collections() -> Iterator[None]:
    """Have the garbage collector pass over what the libraries brought, also after a sweep, which lets it look again.

    Runs collect garbage as they begin and end, and to look at half a million objects takes a third of a second.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _done_once() -> Iterator[None]:
    """Have libraries do once what they would do again in every run."""
    with pytest.MonkeyPatch.context() as patch:
        do_once(patch.setattr)
        yield


@pytest.fixture
def rendered(monkeypatch, _pictures_that_nobody_looks_at) -> None:
    """Have the pictures of a test rendered."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _pictures_that_nobody_looks_at)


@pytest.fixture
def device() -> str:
    """Return where kernels are tested: the GPU, or the CPU through Triton's interpreter."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def ids() -> "torch.Tensor":
    """Return a batch of token ids for `tiny_llama`."""
    import torch

    return torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory):
    """Leave the folder in which pytest was started: its `runs/`, such as `make demo` leaves, is no test's business."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(autouse=True, scope="session")
def _any_cpu() -> Iterator[None]:
    """Have `model.dtype: auto` be bfloat16 on every CPU; processes that tests start take what is said outright."""
    from lsr_scale.model import dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtype, "cpu_has_bfloat16", lambda: True)
        yield


@pytest.fixture(scope="session")
def _working_folders(tmp_path_factory) -> Iterator[Path]:
    """Return empty folders; pytest would look through those of all tests before for the next one's number."""
    parent = tmp_path_factory.mktemp("working-folders")

    def make(number: int) -> Path:
        folder = parent / str(number)
        folder.mkdir()
        return folder

    return map(make, itertools.count())


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process(_working_folders, monkeypatch):
    """Undo what a command that ran in this process set for the whole of it; take Ctrl-C as a terminal gives it."""
    monkeypatch.chdir(next(_working_folders))  # an empty one of its own
    level = logging.getLogger().level
    # a shell's background job, such as a CI's, starts with SIGINT ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    logging.getLogger().setLevel(level)
