"""A GPU of less memory than the one at hand, as far as a process of PyTorch can tell."""

from typing import Any

# what CUDA and its libraries take of a GPU, which PyTorch's allocator does not count
CONTEXT_GIB = 0.6


class SmallerGpu:
    """Reports and enforces a memory of `gib` GiB; stands for `torch.cuda` where a run reads its memory."""

    def __init__(self, gib: float, gpu: Any) -> None:
        """Take the memory's size and `torch.cuda`."""
        self.total = int(gib * 2**30)
        self.usable = int((gib - CONTEXT_GIB) * 2**30)
        self.gpu = gpu

    def limit_allocator(self) -> None:
        """Have every allocation beyond that memory fail as it would there."""
        self.gpu.set_per_process_memory_fraction(min(1.0, self.usable / self.gpu.mem_get_info()[1]))

    def mem_get_info(self) -> tuple[int, int]:
        """Return the free and the total bytes, as `torch.cuda` does."""
        return self.usable - self.gpu.memory_reserved(), self.total

    def __getattr__(self, name: str) -> Any:
        """Leave all else to `torch.cuda`."""
        return getattr(self.gpu, name)
