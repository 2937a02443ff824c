"""CUDA graphs without a GPU: what a capture launches is recorded, and a replay launches that again and nothing else.

As on a GPU, none of Python's decisions is made again at replay, all tensors stay where they were, and what is read is
what lies there by then. What the processor decides by a tensor's content (the documents' boundaries, in the plain
reference of attention) is fixed at capture too, so batches must be alike in that.
"""

import contextlib
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    made = 0  # how many captures there were
    replays = 0

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.launched.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        RecordedGraph.replays += 1
        for func, args, kwargs, out in self.launched:
            for there, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(there, torch.Tensor) and there.data_ptr() != new.data_ptr():  # no view, not in place
                    there.copy_(new)

    def pool(self):
        return None


class Pool:
    """Stands in for `torch.cuda.MemPool`."""

    used: ClassVar[list[tuple]] = []  # by warm-ups and captures: which, the pool's id, the stream

    @property
    def id(self):
        return id(self)


@contextlib.contextmanager
def use_pool(pool):
    """Stands in for `torch.cuda.use_mem_pool`, whose pool is for the allocations of this thread alone."""
    Pool.used.append(("warm-up", pool.id, torch.cuda.current_stream()))
    yield


@contextlib.contextmanager
def recording(graph, pool=None, stream=None, **options):
    """Stands in for `torch.cuda.graph`."""
    RecordedGraph.made += 1
    Pool.used.append(("capture", pool, stream))
    with graph:
        yield


def new_stream():
    """Return what stands in for a stream."""
    return SimpleNamespace(wait_stream=lambda other: None)


def stand_in(patch):
    """Have graphs be captured and replayed on the CPU, with pytest's monkeypatch."""
    streams = [new_stream()]

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph", recording)
    patch.setattr(torch.cuda, "Stream", new_stream)
    patch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    patch.setattr(torch.cuda, "stream", on)
    patch.setattr(torch.cuda, "MemPool", Pool)
    patch.setattr(torch.cuda, "use_mem_pool", use_pool)
    patch.setattr(Pool, "used", [])
    patch.setattr(RecordedGraph, "made", 0)
    patch.setattr(RecordedGraph, "replays", 0)
