"""Libraries are imported without garbage collections and without a compiler, and afterwards both are as they were."""

import gc
import subprocess
import sys

import pytest
import torch

from lsr_scale.quick_imports import quick_imports


@pytest.fixture
def compiled(monkeypatch):
    """Return what torch.compile is called for; it leaves a function as it is."""
    calls = []

    def compile_now(model, **options):
        calls.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    return calls


def test_what_is_decorated_meanwhile_is_compiled_when_it_is_called_first(compiled):
    def double(x, more=0):
        """Double it."""
        return 2 * x + more

    with quick_imports():
        plain = torch.compile(double)
        with_options = torch.compile(dynamic=False)(double)
    assert compiled == []
    assert plain.__doc__ == "Double it."
    assert [plain(2), plain(3, more=1)] == [4, 7]
    assert with_options(4) == 8
    assert compiled == [(double, {}), (double, {"dynamic": False})]


def test_a_module_is_compiled_at_once_and_later_everything_is(compiled):
    module, before = torch.nn.Linear(2, 2), torch.compile
    with quick_imports():
        assert torch.compile(module, fullgraph=True) is module
    assert compiled == [(module, {"fullgraph": True})]
    assert torch.compile is before


def fail(rests):
    """Leave quick_imports by an error; note whether the collector rested within."""
    with quick_imports():
        rests.append(not gc.isenabled())
        raise ImportError


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_as_it_was_whatever_happens(collects):
    frozen, rests = gc.get_freeze_count(), []
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError):
            fail(rests)
        assert (rests, gc.isenabled()) == ([True], collects)
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen, "torch was there before, and with it what may hold memory"


@pytest.mark.slow
def test_the_package_brings_no_compiler_and_freezes_what_comes_with_torch():
    program = "import gc, sys, lsr_scale; "
    program += "print('torch._inductor.compile_fx' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
