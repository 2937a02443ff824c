"""All-gathers of a sharded base's matrices, for as long as they are used (`model.shard` has sharded them).

A layer's matrices are gathered together, in one call, before its forward and before its backward pass; meanwhile those
of the layer after it (before it, in a backward pass) are prefetched; and when the next layer begins they are resharded.
So at most two layers are unsharded, or one and the head or the embedding; for generation all are (`gathered`).

Every process must run the same layers in the same order, and a loss that reads the head again in its backward pass
needs that before the next forward pass.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lsr_scale.distributed import world_size
from lsr_scale.layers.frozen_linear import FrozenLinear
from lsr_scale.model.shard import forget_sharding, sharded_matrices

logger = logging.getLogger(__name__)

# torch 2.13 gave it another name
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

# the attribute of a sharded model that holds its `GatherSchedule`
_SCHEDULE = "gather_schedule"


class GatherGroup:
    """Matrices that are all-gathered together, and resharded together.

    Attributes:
        matrices: Those; one that is tied belongs to two groups.
        next_backward: The group that the backward pass comes to next, if that is known.
        next_forward: The group that the forward pass comes to next, if that is known.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], stream: Any = None) -> None:
        self.matrices: list[Any] = list(matrices)
        self.stream = stream
        self.next_backward: GatherGroup | None = None
        self.next_forward: GatherGroup | None = None
        self._in_flight: list[tuple[Any, Tensor, Tensor]] | None = None  # matrix, this process's shard, all shards
        self._works: list[Any] = []  # what to wait for

    def prefetch(self) -> None:
        """Start to all-gather, unless that has started; on a stream of its own where shards come from the CPU."""
        if self._in_flight is not None:
            return
        num, stream = world_size(), self.stream
        fulls = [m.new_empty(num * m.shard.numel(), dtype=torch.uint8) for m in self.matrices] if num > 1 else []
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # which may still use the memory that is written here
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            shards = [matrix.shard.to(matrix.device, non_blocking=True) for matrix in self.matrices]
            self._works = start_all_gather(shards, fulls) if num > 1 else []
            if stream is not None:
                self._works.append(stream.record_event())
        self._in_flight = list(zip(self.matrices, shards, fulls or shards, strict=True))

    def unshard(self) -> None:
        """Give the matrices all of their elements: on a GPU what is launched after this waits, not the host."""
        self.prefetch()
        for work in self._works:
            work.wait()
        for matrix, _, full in self._in_flight or ():
            size = matrix.ds_numel * matrix.dtype.itemsize
            matrix.data = full[:size].view(matrix.dtype).view(matrix.ds_shape)
        self._in_flight, self._works = None, []

    def reshard(self) -> None:
        """Free what was gathered; the matrices are empty again."""
        for matrix in self.matrices:
            matrix.data = matrix.data.new_empty(0)


def start_all_gather(shards: list[Tensor], fulls: list[Tensor]) -> list[Any]:
    """Start to gather, all in one call, and return what to wait for.

    Args:
        shards: This process's, of bytes.
        fulls: Where to, as many times as long as there are processes.
    """
    if not shards:
        return []
    if shards[0].is_cuda and distributed.get_backend() == "gloo":  # which cannot do that on a GPU
        lists = [list(full.chunk(world_size())) for full in fulls]
        return [distributed.all_gather(into, shard, async_op=True) for into, shard in zip(lists, shards, strict=True)]
    coalescing = _coalescing_manager()
    if coalescing is None:
        return [_all_gather(full, shard, async_op=True) for shard, full in zip(shards, fulls, strict=True)]
    with coalescing(async_ops=True) as works:
        for shard, full in zip(shards, fulls, strict=True):
            _all_gather(full, shard)
    return [works]


@functools.cache
def _coalescing_manager() -> Any:
    """Return PyTorch's context that makes one call of several, or None where it is no more as it was."""
    manager = getattr(distributed, "_coalescing_manager", None)
    if manager is not None and "async_ops" in inspect.signature(manager).parameters:
        return manager
    logger.warning(
        "a layer's matrices are gathered one by one: PyTorch %s makes no one call of them", torch.__version__
    )
    return None


class GatherSchedule:
    """Which group is unsharded in a pass through the model: one that is needed, until the next one is.

    Attributes:
        groups: All of them.
    """

    def __init__(self) -> None:
        self.groups: list[GatherGroup] = []
        self.holds_all = False  # see `gathered`
        self.unsharded: GatherGroup | None = None
        self.backward = -1  # the number of the backward pass at whose end that group is resharded

    def pre_forward(self, group: GatherGroup) -> None:
        """Unshard a group before its forward pass, which may be a recomputation within a backward pass."""
        if torch._C._current_graph_task_id() != -1:
            self.pre_backward(group)
        else:
            self._use(group, group.next_forward)

    def pre_backward(self, group: GatherGroup) -> None:
        """Unshard a group before its backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self.backward:
            self.backward = task
            Variable._execution_engine.queue_callback(self.reshard)  # pyright: ignore[reportAttributeAccessIssue]
        self._use(group, group.next_backward)

    def pre_head(self, head: GatherGroup) -> None:
        """Unshard the head, which is used until the backward pass comes to the last layer."""
        self._use(head, head.next_backward if torch.is_grad_enabled() else None)

    def _use(self, group: GatherGroup, next_group: GatherGroup | None) -> None:
        if self.holds_all:
            return
        if group is not self.unsharded:
            self.reshard()
            group.unshard()
            self.unsharded = group
        if next_group is not None:
            next_group.prefetch()

    def reshard(self) -> None:
        """Reshard the group that is unsharded; what is being prefetched stays so."""
        if self.unsharded is not None:
            self.unsharded.reshard()
        self.unsharded = None

    @contextmanager
    def all_unsharded(self) -> Iterator[None]:
        """Have every group unsharded meanwhile."""
        self.reshard()
        self.holds_all = True
        try:
            for group in self.groups:
                group.unshard()
            yield
        finally:
            self.holds_all = False
            for group in self.groups:
                group.reshard()


def gather_on_use(model: PreTrainedModel, offload: bool = False) -> None:
    """Have the layers of a sharded model gathered when they are used, from now on; before adapters are put into it.

    A group are the matrices of a layer, or else what a module has of its own. The head, which losses read without
    calling it, is gathered when the layers are done. What a module outside layers has beside modules of its own (a
    ViT's positions) is replicated again, for it would be resharded when one of those begins.
    """
    schedule = vars(model)[_SCHEDULE] = GatherSchedule()
    stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None
    body: nn.Module = model.base_model
    outside = () if body is model else (child for child in model.children() if child is not body)
    head = GatherGroup(sharded_matrices(outside), stream)
    layers = _layers(body)
    inside = {id(module) for layer in layers for module in layer.modules()}
    groups = {layer: GatherGroup(sharded_matrices([layer]), stream) for layer in layers}
    for module in body.modules():
        if type(module) is nn.Linear and hasattr(module.weight, "shard"):
            module.__class__ = FrozenLinear  # nn.Linear would keep what was gathered alive
        if id(module) in inside:
            continue
        if any(True for _ in module.children()):
            replicate(module, recurse=False)
        else:
            groups[module] = GatherGroup(sharded_matrices([module]), stream)
    for first, second in itertools.pairwise(layers):
        groups[first].next_forward, groups[second].next_backward = groups[second], groups[first]
    embeddings: Any = model.get_input_embeddings()
    if layers and embeddings in groups:
        groups[embeddings].next_forward = groups[layers[0]]
    if layers and head.matrices:
        groups[layers[-1]].next_forward, head.next_backward = head, groups[layers[-1]]
    schedule.groups = [group for group in (*groups.values(), head) if group.matrices]
    for module, group in groups.items():
        if group.matrices:
            _register_hooks(module, group, schedule)
    if head.matrices:
        body.register_forward_hook(lambda *_: schedule.pre_head(head))


def reshard(model: nn.Module) -> None:
    """Reshard what a forward pass without a backward pass left: the head stays unsharded until the next one."""
    for module in model.modules():
        if _SCHEDULE in vars(module):
            vars(module)[_SCHEDULE].reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all of a sharded model on every process meanwhile: each may run as many forward passes as it wants, as in
    generation, and takes the memory of the whole base. Every process must begin it; nothing to do for other models.
    """
    schedules = [vars(module)[_SCHEDULE] for module in model.modules() if _SCHEDULE in vars(module)]
    with ExitStack() as stack:
        for schedule in schedules:
            stack.enter_context(schedule.all_unsharded())
        yield


def replicate(module: nn.Module, recurse: bool = True) -> None:
    """Gather the matrices of a module for good, since it will be trained. Every process must call it."""
    group = GatherGroup(sharded_matrices([module], recurse))
    if group.matrices:
        group.unshard()
    for matrix in group.matrices:
        if matrix.data.untyped_storage().nbytes() != matrix.data.nbytes:
            matrix.data = matrix.data.clone()  # not a part of a longer buffer
        forget_sharding(matrix)


def _register_hooks(module: nn.Module, group: GatherGroup, schedule: GatherSchedule) -> None:
    """Have a module's group unsharded before the module's forward and backward pass."""

    def pre_backward(_: Tensor) -> None:
        schedule.pre_backward(group)

    def post_forward(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(pre_backward)

    module.register_forward_pre_hook(lambda *_: schedule.pre_forward(group))
    module.register_forward_hook(post_forward)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a Transformers model, none of which is within another, in order."""
    layers: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            layers.append(module)
            inside |= {id(child) for child in module.modules()}
    return layers
