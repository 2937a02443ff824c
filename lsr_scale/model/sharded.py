"""A frozen base cut up among processes: each holds its part of every matrix, and a layer is whole while it is used.

This is ZeRO-3 for what is frozen. DeepSpeed's own treats every parameter of a model alike, one by one in every step: a
thousand small factors are cut up and gathered again, which costs a GPU more time than it has to hide, and quantized
weights it cuts up only once they are all there. So with `stage: 3` DeepSpeed runs its stage 2 for what trains, and the
base is cut up here. With P processes a matrix of B bytes (its codes, where it is quantized) is P parts of ceil(B / P)
bytes. Vectors and quantization states stay whole, and what a module has beside modules of its own (a ViT's positions).

Every weight is cut the moment it is in place while the model is loaded, so no process ever holds more than its share,
the states, and one weight. Later a layer's matrices are gathered together, in one call, before its forward and before
its backward pass; meanwhile those of the layer after it (before it, on the way back) are on their way; and when the
next layer begins they are let go of. So two layers are whole at the most, or one and the head. Whoever reads a matrix
at another time finds it empty, `[0]`. Every process must run the same layers in the same order.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from transformers import PreTrainedModel, modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from lsr_scale.distributed import rank, world_size
from lsr_scale.quantized import FrozenLinear

# torch 2.13 gave it another name
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


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
    """

    def __init__(self, offload: bool = False, whole: Iterable[str] = ()) -> None:
        self.offload, self.whole = offload, tuple(whole)
        self.active = offload or world_size() > 1

    @contextmanager
    def loading(self) -> Iterator[Callable[[nn.Module], None]]:
        """Cut up what is loaded here. Every process must load the same.

        Matrices that are registered with a module after they got their values are cut at once. Transformers marks
        them by `_is_hf_initialized`; others, which it has yet to initialize, wait. What is yielded cuts all that is
        left in a module, itself and all below it.
        """
        if not self.active:
            yield lambda module: None
            return

        def when_registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and not parameter.is_meta and getattr(parameter, "_is_hf_initialized", False):
                self._cut(module, parameter)

        def rest(module: nn.Module) -> None:
            for child in module.modules():
                for parameter in child.parameters(recurse=False):
                    self._cut(child, parameter)

        warm_up = modeling_utils.caching_allocator_warmup
        hook = nn.modules.module.register_module_parameter_registration_hook(when_registered)
        # it would take memory for the whole model first
        modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
        try:
            yield rest
        finally:
            hook.remove()
            modeling_utils.caching_allocator_warmup = warm_up

    def _cut(self, module: nn.Module, parameter: Any) -> None:
        """Keep this process's part of a matrix, as bytes, and its shape; the last parts are filled up with zeros."""
        if parameter.dim() < 2 or hasattr(parameter, "part") or any(True for _ in module.children()):
            return
        if hasattr(parameter, "CB"):
            parameter.CB = None  # an int8 weight's second reference to its codes would keep them whole
        data = parameter.requires_grad_(False).data
        held = data.contiguous().reshape(-1).view(torch.uint8)
        size = -(-held.numel() // world_size())
        mine = held[rank() * size : (rank() + 1) * size]
        pinned = self.offload and data.is_cuda
        device = "cpu" if self.offload else data.device
        parameter.part = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        parameter.part[: mine.numel()].copy_(mine)
        # by DeepSpeed's names, which PEFT and Transformers know
        parameter.ds_shape, parameter.ds_numel = data.shape, data.numel()
        parameter.ds_optim_param = True  # DeepSpeed's sign that each process holds another part: nothing to broadcast
        parameter.users = 0
        parameter.data = data.new_empty(0)


class _Unit:
    """Matrices that are gathered together.

    Attributes:
        matrices: Those; one that is tied may belong to two units.
        before: The unit that the backward pass comes to next, if that is known.
        after: The unit that the forward pass comes to next, if that is known.
    """

    def __init__(self, matrices: Iterable[nn.Parameter]) -> None:
        self.matrices: list[Any] = list(matrices)
        self.before: _Unit | None = None
        self.after: _Unit | None = None
        self.state: str = "apart"  # then "on the way", then "whole"
        self._gathered: list[tuple[Any, Tensor, Tensor]] = []  # matrix, this process's part, all parts
        self._works: list[Any] = []  # what to wait for

    def start(self, stream: Any) -> None:
        """Begin to gather, unless that has begun; on a stream of its own where parts come from the CPU."""
        if self.state != "apart":
            return
        self.state = "on the way"
        wanted = [matrix for matrix in self.matrices if matrix.users == 0]
        for matrix in self.matrices:
            matrix.users += 1
        num = world_size()
        wholes = [m.new_empty(num * m.part.numel(), dtype=torch.uint8) for m in wanted] if num > 1 else []
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())  # which may still use the memory that is written here
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            parts = [matrix.part.to(matrix.device, non_blocking=True) for matrix in wanted]
            self._works = _gather(parts, wholes) if num > 1 else []
            if stream is not None:
                self._works.append(stream.record_event())
        self._gathered = list(zip(wanted, parts, wholes or parts, strict=True))

    def finish(self, stream: Any) -> None:
        """Make the matrices whole: on a GPU what is launched after this waits for them, not the host."""
        self.start(stream)
        if self.state == "whole":
            return
        for work in self._works:
            work.wait()
        for matrix, _, whole in self._gathered:
            size = matrix.ds_numel * matrix.dtype.itemsize
            matrix.data = whole[:size].view(matrix.dtype).view(matrix.ds_shape)
        self.state, self._gathered, self._works = "whole", [], []

    def let_go(self) -> None:
        """Leave the matrices to other units, or empty."""
        self.state = "apart"
        for matrix in self.matrices:
            matrix.users -= 1
            if matrix.users == 0:
                matrix.data = matrix.data.new_empty(0)


def _gather(parts: list[Tensor], wholes: list[Tensor]) -> list[Any]:
    """Begin to gather what each process has a part of, all in one call, and return what to wait for."""
    if not parts:
        return []
    if parts[0].is_cuda and distributed.get_backend() == "gloo":  # which cannot do that on a GPU
        lists = [list(whole.chunk(world_size())) for whole in wholes]
        return [distributed.all_gather(into, part, async_op=True) for into, part in zip(lists, parts, strict=True)]
    with distributed._coalescing_manager(async_ops=True) as works:
        for part, whole in zip(parts, wholes, strict=True):
            _all_gather(whole, part)
    return [works]


class _Course:
    """Where a pass through the model is: what begins is made whole, and what was whole until then is let go of."""

    def __init__(self, offload: bool) -> None:
        self.stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None
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
            unit.finish(self.stream)
            self.current = unit
        if next_one is not None:
            next_one.start(self.stream)

    def end(self) -> None:
        """Let go of what is whole; what is on its way stays so."""
        if self.current is not None:
            self.current.let_go()
        self.current = None


def gather_as_used(model: PreTrainedModel, offload: bool = False) -> None:
    """Have the layers of a cut model gathered when they are used, from now on; before adapters are put into it.

    What is gathered together are the matrices of a layer, or else what a module has of its own. The head, which losses
    read without calling it, is gathered when the layers are done.
    """
    course = _Course(offload)
    body: nn.Module = model.base_model
    head = _Unit([] if body is model else _cut_matrices(child for child in model.children() if child is not body))
    layers = _layers(body)
    inside = {id(module) for layer in layers for module in layer.modules()}
    others = [module for module in body.modules() if id(module) not in inside]
    units: dict[nn.Module, _Unit] = {}
    for layer in layers:
        units[layer] = _Unit(_cut_matrices([layer]))
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear  # nn.Linear would keep what was gathered alive
    units |= {module: _Unit(_cut_matrices([module], recurse=False)) for module in others}
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


def make_whole(module: nn.Module) -> None:
    """Hold the matrices of a module whole again, for good: of one that will be trained. Every process must call it."""
    unit = _Unit(_cut_matrices([module]))
    if not unit.matrices:
        return
    unit.finish(None)
    for matrix in unit.matrices:
        matrix.data = matrix.data.clone()  # not a part of a longer buffer
        for name in ("part", "ds_shape", "ds_numel", "ds_optim_param", "users"):
            delattr(matrix, name)
