"""A frozen base cut up among processes: each holds its part of every matrix, and a layer is whole while it is used.

This is ZeRO-3 for what is frozen. DeepSpeed's own treats every parameter of a model alike, one by one in every step: a
thousand small factors are cut up and gathered again, which costs a GPU more time than it has to hide, and quantized
weights it cuts up only once they are all there. So with `stage: 3` DeepSpeed sees to what trains (see
`training.engine_steps`), and the base is cut up here. With P processes a matrix of B bytes (its codes, where it is
quantized) is P parts of B / P bytes, rounded up to 16. Vectors and quantization states stay whole.

Every weight is cut the moment it is in place while the model is loaded, so no process ever holds more than its share,
the states, and one weight. Later a layer's matrices are gathered together, in one call, before its forward and before
its backward pass; meanwhile those of the layer after it (before it, on the way back) are on their way; and when the
next layer begins they are let go of. So two layers are whole at the most, or one and the head or the embedding. Whoever
reads a matrix at another time finds it empty, `[0]`.

Every process must run the same layers in the same order, and a loss that reads the head again in its backward pass
needs that before the next forward pass.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from transformers import PreTrainedModel, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from lsr_scale.distributed import rank, world_size
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import FrozenLinear

logger = logging.getLogger(__name__)

# torch 2.13 gave it another name
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

# NCCL copies what is aligned by so many bytes at once, and byte by byte what is not
_ALIGNED = 16
# Pinned memory comes in powers of two: a part of its own would take up to twice its bytes.
_SLAB = 2**28
# the attribute of a cut model that holds its `_Course`
_COURSE = "course_of_passes"


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model is cut up, so that all processes must run it together."""
    return any(hasattr(parameter, "part") for parameter in model.parameters())


def whole_numel(parameter: nn.Parameter) -> int:
    """Return how many elements a parameter has, as it is stored, whether it is cut up or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, as it is stored, whether it is cut up or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


class Sharding:
    """How a base model is cut up while it is loaded.

    Attributes:
        offload: Parts are held on the CPU; a layer's are copied to the GPU before it is gathered.
        whole: Ends of the names of modules that stay whole, since they will be trained.
        active: There is something to cut: several processes, or parts that go to the CPU.

    Raises:
        UserError: where PyTorch does not tell which backward pass runs.
    """

    def __init__(self, offload: bool = False, whole: Iterable[str] = ()) -> None:
        # neither of them is promised by PyTorch
        if not (hasattr(torch._C, "_current_graph_task_id") and hasattr(Variable._execution_engine, "queue_callback")):  # pyright: ignore
            raise UserError(
                f"deepspeed.config: PyTorch {torch.__version__} does not tell which backward pass runs, so a frozen "
                "base cannot be sharded; pip install 'torch>=2.11,<2.14', or set deepspeed.config to zero2"
            )
        self.offload, self.whole = offload, tuple(whole)
        self.active = offload or world_size() > 1
        self._slab = torch.empty(0, dtype=torch.uint8)  # memory on the CPU that is not yet used

    @contextmanager
    def loading(self, tied: bool = False) -> Iterator[Callable[[nn.Module], None]]:
        """Cut up what is loaded here. Every process must load the same.

        Matrices that are registered with a module after they got their values are cut at once. Transformers marks
        them by `_is_hf_initialized`; others, which it has yet to initialize, wait. What is yielded cuts all that is
        left in a module, itself and all below it.

        Args:
            tied: Head and embedding shall be one if a checkpoint has equal ones. Then embeddings wait: of two that are
                cut Transformers could not tell that they differ.
        """
        if not self.active:
            yield lambda module: None
            return

        def when_registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is None or parameter.is_meta or (tied and isinstance(module, nn.Embedding)):
                return
            if getattr(parameter, "_is_hf_initialized", False):
                self._cut(parameter)

        def rest(module: nn.Module) -> None:
            for parameter in module.parameters():
                self._cut(parameter)

        warm_up = modeling_utils.caching_allocator_warmup
        hook = nn.modules.module.register_module_parameter_registration_hook(when_registered)
        # it would take memory for the whole model first
        modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
        try:
            yield rest
        finally:
            hook.remove()
            modeling_utils.caching_allocator_warmup = warm_up

    def _cut(self, parameter: Any) -> None:
        """Keep this process's part of a matrix, as bytes, and its shape; the last parts are filled up with zeros."""
        if parameter.dim() < 2 or hasattr(parameter, "part"):
            return
        if hasattr(parameter, "CB"):
            parameter.CB = None  # an int8 weight's second reference to its codes would keep them whole
        data = parameter.requires_grad_(False).data
        held = data.contiguous().reshape(-1).view(torch.uint8)
        size = -(-held.numel() // (_ALIGNED * world_size())) * _ALIGNED
        mine = held[rank() * size : (rank() + 1) * size]
        parameter.part = self._take(size, pinned=data.is_cuda) if self.offload else held.new_empty(size)
        parameter.part[: mine.numel()] = mine
        parameter.part[mine.numel() :] = 0
        # by DeepSpeed's names, which PEFT and Transformers know
        parameter.ds_shape, parameter.ds_numel = data.shape, data.numel()
        parameter.ds_optim_param = True  # DeepSpeed's sign that each process holds another part: nothing to broadcast
        parameter.data = data.new_empty(0)

    def _take(self, size: int, pinned: bool) -> Tensor:
        """Return so many bytes on the CPU."""
        if size > len(self._slab):
            self._slab = torch.empty(max(size, _SLAB if pinned else 0), dtype=torch.uint8, pin_memory=pinned)
        part, self._slab = self._slab[:size], self._slab[size:]
        return part


class _Unit:
    """Matrices that are gathered together.

    Attributes:
        matrices: Those; one that is tied belongs to two units.
        before: The unit that the backward pass comes to next, if that is known.
        after: The unit that the forward pass comes to next, if that is known.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], stream: Any = None) -> None:
        self.matrices: list[Any] = list(matrices)
        self.stream = stream
        self.before: _Unit | None = None
        self.after: _Unit | None = None
        self._on_the_way: list[tuple[Any, Tensor, Tensor]] | None = None  # matrix, this process's part, all parts
        self._works: list[Any] = []  # what to wait for

    def start(self) -> None:
        """Begin to gather, unless that has begun; on a stream of its own where parts come from the CPU."""
        if self._on_the_way is not None:
            return
        num, stream = world_size(), self.stream
        wholes = [m.new_empty(num * m.part.numel(), dtype=torch.uint8) for m in self.matrices] if num > 1 else []
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # which may still use the memory that is written here
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            parts = [matrix.part.to(matrix.device, non_blocking=True) for matrix in self.matrices]
            self._works = _gather(parts, wholes) if num > 1 else []
            if stream is not None:
                self._works.append(stream.record_event())
        self._on_the_way = list(zip(self.matrices, parts, wholes or parts, strict=True))

    def make_whole(self) -> None:
        """Make the matrices whole: on a GPU what is launched after this waits for them, not the host."""
        self.start()
        for work in self._works:
            work.wait()
        for matrix, _, whole in self._on_the_way or ():
            size = matrix.ds_numel * matrix.dtype.itemsize
            matrix.data = whole[:size].view(matrix.dtype).view(matrix.ds_shape)
        self._on_the_way, self._works = None, []

    def let_go(self) -> None:
        """Leave the matrices empty."""
        for matrix in self.matrices:
            matrix.data = matrix.data.new_empty(0)


def _gather(parts: list[Tensor], wholes: list[Tensor]) -> list[Any]:
    """Begin to gather what each process has a part of, all in one call, and return what to wait for."""
    if not parts:
        return []
    if parts[0].is_cuda and distributed.get_backend() == "gloo":  # which cannot do that on a GPU
        lists = [list(whole.chunk(world_size())) for whole in wholes]
        return [distributed.all_gather(into, part, async_op=True) for into, part in zip(lists, parts, strict=True)]
    together = _coalescing()
    if together is None:
        return [_all_gather(whole, part, async_op=True) for part, whole in zip(parts, wholes, strict=True)]
    with together(async_ops=True) as works:
        for part, whole in zip(parts, wholes, strict=True):
            _all_gather(whole, part)
    return [works]


@functools.cache
def _coalescing() -> Any:
    """Return PyTorch's context that makes one call of several, or None where it is no more as it was."""
    found = getattr(distributed, "_coalescing_manager", None)
    if found is not None and "async_ops" in inspect.signature(found).parameters:
        return found
    logger.warning(
        "a layer's matrices are gathered one by one: PyTorch %s makes no one call of them", torch.__version__
    )
    return None


class _Course:
    """Where a pass through the model is: what begins is made whole, and what was whole until then is let go of."""

    def __init__(self) -> None:
        self.current: _Unit | None = None
        self.backward = -1  # the number of the backward pass at whose end that is let go of

    def forward_begins(self, unit: _Unit) -> None:
        """Make a unit whole before its forward pass, which may be computed again in the midst of a backward pass."""
        if torch._C._current_graph_task_id() != -1:
            self.backward_begins(unit)
        else:
            self._use(unit, unit.after)

    def backward_begins(self, unit: _Unit) -> None:
        """Make a unit whole before its backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self.backward:
            self.backward = task
            Variable._execution_engine.queue_callback(self.end)  # pyright: ignore[reportAttributeAccessIssue]
        self._use(unit, unit.before)

    def head_begins(self, head: _Unit) -> None:
        """Make the head whole, which is used until the backward pass comes to the last layer."""
        self._use(head, head.before if torch.is_grad_enabled() else None)

    def _use(self, unit: _Unit, next_one: _Unit | None) -> None:
        if unit is not self.current:
            self.end()
            unit.make_whole()
            self.current = unit
        if next_one is not None:
            next_one.start()

    def end(self) -> None:
        """Let go of what is whole; what is on its way stays so."""
        if self.current is not None:
            self.current.let_go()
        self.current = None


def gather_as_used(model: PreTrainedModel, offload: bool = False) -> None:
    """Have the layers of a cut model gathered when they are used, from now on; before adapters are put into it.

    What is gathered together are the matrices of a layer, or else what a module has of its own. The head, which losses
    read without calling it, is gathered when the layers are done. What a module outside layers has beside modules of
    its own (a ViT's positions) is made whole again, for it would be let go of when one of those begins.
    """
    course = vars(model)[_COURSE] = _Course()
    stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None
    body: nn.Module = model.base_model
    outside = () if body is model else (child for child in model.children() if child is not body)
    head = _Unit(_cut_matrices(outside), stream)
    layers = _layers(body)
    inside = {id(module) for layer in layers for module in layer.modules()}
    units = {layer: _Unit(_cut_matrices([layer]), stream) for layer in layers}
    for module in body.modules():
        if type(module) is nn.Linear and hasattr(module.weight, "part"):
            module.__class__ = FrozenLinear  # nn.Linear would keep what was gathered alive
        if id(module) in inside:
            continue
        if any(True for _ in module.children()):
            make_whole(module, recurse=False)
        else:
            units[module] = _Unit(_cut_matrices([module]), stream)
    for first, second in itertools.pairwise(layers):
        units[first].after, units[second].before = units[second], units[first]
    embeddings: Any = model.get_input_embeddings()
    if layers and embeddings in units:
        units[embeddings].after = units[layers[0]]
    if layers and head.matrices:
        units[layers[-1]].after, head.before = head, units[layers[-1]]
    for module, unit in units.items():
        if unit.matrices:
            _watch(module, unit, course)
    if head.matrices:
        body.register_forward_hook(lambda *_: course.head_begins(head))


def let_go(model: nn.Module) -> None:
    """Let go of what is whole after a forward pass without a backward pass: the head stays so until the next one."""
    for module in model.modules():
        if _COURSE in vars(module):
            vars(module)[_COURSE].end()


def _watch(module: nn.Module, unit: _Unit, course: _Course) -> None:
    """Tell a pass's course when a module begins, forward and backward."""

    def backward_begins(_: Tensor) -> None:
        course.backward_begins(unit)

    def forward_ends(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(backward_begins)

    module.register_forward_pre_hook(lambda *_: course.forward_begins(unit))
    module.register_forward_hook(forward_ends)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a Transformers model, none of which is within another, in order."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside |= {id(child) for child in module.modules()}
    return found


def _cut_matrices(modules: Iterable[nn.Module], recurse: bool = True) -> list[nn.Parameter]:
    parameters = [parameter for module in modules for parameter in module.parameters(recurse)]
    return [parameter for parameter in dict.fromkeys(parameters) if hasattr(parameter, "part")]


def make_whole(module: nn.Module, recurse: bool = True) -> None:
    """Hold the matrices of a module whole again, for good: of one that will be trained. Every process must call it."""
    unit = _Unit(_cut_matrices([module], recurse))
    if unit.matrices:
        unit.make_whole()
    for matrix in unit.matrices:
        matrix.data = matrix.data.clone()  # not a part of a longer buffer
        for name in ("part", "ds_shape", "ds_numel", "ds_optim_param"):
            delattr(matrix, name)
