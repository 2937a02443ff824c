"""Sharding of a frozen base among processes: each holds its shard of every matrix, from the first weight on.

This is ZeRO-3 for what is frozen. DeepSpeed's own treats every parameter of a model alike, one by one in every step: a
thousand small factors are partitioned and gathered again, which costs a GPU more time than it has to hide, and
quantized weights it partitions only once they are all there. So with `stage: 3` DeepSpeed sees to what trains (see
`training.steps.engine`), and the base is sharded here. With P processes a matrix of B bytes (its codes, where it is
quantized) becomes P shards of B / P bytes, rounded up to 16. Vectors and quantization states are replicated.

Every weight is sharded the moment it is in place while the model is loaded, so no process ever holds more than its
share, the states, and one weight. `model.gather` all-gathers a layer's matrices for as long as they are used; whoever
reads one at another time finds it empty, `[0]`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import modeling_utils

from lsr_scale.distributed import rank, world_size
from lsr_scale.errors import UserError
from lsr_scale.model.quantize import store_as_bytes

# NCCL copies what is aligned by so many bytes at once, and byte by byte what is not
_ALIGNMENT = 16
# Pinned memory comes in powers of two: a shard of its own would take up to twice its bytes.
_PINNED_BYTES = 2**28
# by which Transformers loads one weight after the other
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
# what a sharded matrix carries; but for the first by DeepSpeed's names, which PEFT and Transformers know
_ATTRIBUTES = ("shard", "ds_shape", "ds_numel", "ds_optim_param")


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model is sharded, so that all processes must run it together."""
    return any(hasattr(parameter, "shard") for parameter in model.parameters())


def full_numel(parameter: nn.Parameter) -> int:
    """Return how many elements a parameter has, as it is stored, whether it is sharded or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, as it is stored, whether it is sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def sharded_matrices(modules: Iterable[nn.Module], recurse: bool = True) -> list[nn.Parameter]:
    """Return the parameters of some modules that are sharded, each once."""
    parameters = [parameter for module in modules for parameter in module.parameters(recurse)]
    return [parameter for parameter in dict.fromkeys(parameters) if hasattr(parameter, "shard")]


class Sharding:
    """How a base model is sharded while it is loaded.

    Attributes:
        offload: Shards are held on the CPU; a layer's are copied to the GPU before it is gathered.
        replicated: Ends of the names of modules that every process holds in full, since they will be trained.
        active: There is something to do: several processes, or shards that go to the CPU.

    Raises:
        UserError: where PyTorch does not tell which backward pass runs.
    """

    def __init__(self, offload: bool = False, replicated: Iterable[str] = ()) -> None:
        # neither of them is promised by PyTorch
        if not (hasattr(torch._C, "_current_graph_task_id") and hasattr(Variable._execution_engine, "queue_callback")):  # pyright: ignore
            raise UserError(
                f"deepspeed.config: PyTorch {torch.__version__} does not tell which backward pass runs, so a frozen "
                "base cannot be sharded; pip install 'torch>=2.11,<2.14', or set deepspeed.config to zero2"
            )
        self.offload, self.replicated = offload, tuple(replicated)
        self.active = offload or world_size() > 1
        self._host_buffer = torch.empty(0, dtype=torch.uint8)  # memory on the CPU that no shard has yet

    @contextmanager
    def loading(self, tied: bool = False) -> Iterator[Callable[[nn.Module], None]]:
        """Shard what is loaded here. Every process must load the same.

        Matrices that are registered with a module after they got their values are sharded at once. Transformers marks
        them by `_is_hf_initialized`; others, which it has yet to initialize, wait. What is yielded shards all that is
        left in a module, itself and all below it.

        Args:
            tied: Head and embedding shall be one if a checkpoint has equal ones. Then embeddings wait: of two that are
                sharded Transformers could not tell that they differ.
        """
        if not self.active:
            yield lambda module: None
            return

        def on_registration(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is None or parameter.is_meta or (tied and isinstance(module, nn.Embedding)):
                return
            whole = parameter.data
            if getattr(parameter, "_is_hf_initialized", False) and self._shard(parameter):
                _free(whole)

        def shard_rest(module: nn.Module) -> None:
            for parameter in module.parameters():
                if not parameter.is_meta:  # of a module below, whose turn is to come
                    self._shard(parameter)

        warm_up, threads = modeling_utils.caching_allocator_warmup, os.environ.get(_NO_THREADS)
        hook = nn.modules.module.register_module_parameter_registration_hook(on_registration)
        # it would take memory for the unsharded model first
        modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
        # threads would put weights on the device ahead of the one that shards them, as many as there are
        os.environ[_NO_THREADS] = "1"
        try:
            yield shard_rest
        finally:
            hook.remove()
            modeling_utils.caching_allocator_warmup = warm_up
            os.environ.pop(_NO_THREADS)
            if threads is not None:
                os.environ[_NO_THREADS] = threads

    def cast(self, matrix: Any, dtype: torch.dtype) -> None:
        """Cast a sharded matrix: each process its shard, so that none holds it all."""
        cast = matrix.shard.view(matrix.dtype).to(dtype).view(torch.uint8)
        if self.offload:
            matrix.shard = self._host_memory(len(cast), pinned=matrix.is_cuda).copy_(cast)
        else:
            matrix.shard = cast
        matrix.data = matrix.data.to(dtype)

    def _shard(self, parameter: Any) -> bool:
        """Keep this process's shard of a matrix, as bytes, and its shape; the last shards are padded with zeros.

        Returns:
            Whether it is one that was whole.
        """
        if parameter.dim() < 2 or hasattr(parameter, "shard"):
            return False
        store_as_bytes(parameter)
        if hasattr(parameter, "CB"):
            parameter.CB = None  # an int8 weight's second reference to its codes would keep them all
        data = parameter.requires_grad_(False).data
        full = data.contiguous().reshape(-1).view(torch.uint8)
        size = -(-full.numel() // (_ALIGNMENT * world_size())) * _ALIGNMENT
        mine = full[rank() * size : (rank() + 1) * size]
        parameter.shard = self._host_memory(size, pinned=data.is_cuda) if self.offload else full.new_empty(size)
        parameter.shard[: mine.numel()] = mine
        parameter.shard[mine.numel() :] = 0
        parameter.ds_shape, parameter.ds_numel = data.shape, data.numel()
        parameter.ds_optim_param = True  # DeepSpeed's sign that processes hold different shards: nothing to broadcast
        parameter.data = data.new_empty(0)
        return True

    def _host_memory(self, size: int, pinned: bool) -> Tensor:
        """Return so many bytes on the CPU."""
        if size > len(self._host_buffer):
            wanted = 1 << (max(size, _PINNED_BYTES) - 1).bit_length() if pinned else size
            self._host_buffer = torch.empty(wanted, dtype=torch.uint8, pin_memory=pinned)
        memory, self._host_buffer = self._host_buffer[:size], self._host_buffer[size:]
        return memory


def _free(whole: Tensor) -> None:
    """Free the memory of a matrix that is sharded: Transformers refers to one until it has read the next."""
    storage = whole.untyped_storage()
    if storage.resizable() and storage.nbytes() == whole.nbytes:  # neither a file's nor a part of another's
        storage.resize_(0)


def forget_sharding(matrix: nn.Parameter) -> None:
    """Take from a matrix, which is gathered, all that says that it is sharded."""
    for name in _ATTRIBUTES:
        delattr(matrix, name)
