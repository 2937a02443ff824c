"""Activations and workspace of one training step, beside weights, gradients and optimizer: traced on fake tensors.

The model's own code runs forward and backward under FakeTensorMode (shapes only, nothing allocated, no GPU), and every
storage is counted from its first use until nothing refers to it. So whatever an architecture or an adapter saves for
the backward pass is counted, per layer and token, by construction: for LLaMA in bfloat16 two float32 copies in each
RMSNorm, the inputs of the adapted linears, q, k, v, the attention's output, and four tensors in the MLP.

Fused layers run as they are; their kernels allocate only their results. Otherwise there are three stand-ins for what
fake tensors cannot show:
- attention counts as one fused kernel: q, k, v, its output and a float32 log-sum-exp per head and token are saved, no
  S x S scores; with a padding or packing mask k and v are first repeated for every query head and the mask is saved
  once per layer in the model's dtype, as PyTorch's SDPA does;
- a quantized linear counts its dequantized weight while it is used, forward and backward;
- the language-model head counts as TRL's, in tiles of 4096 tokens x 32768 words, with a float32 gradient of its input.

With L layers every stage of the step peaks at a value linear in L, so runs of one and two layers give all depths.

torch's MemTracker, under the same FakeTensorMode and with the same stand-ins, counts the same: with LSR and 2,048
tokens 1, 2 and 4 layers of SmolLM2-135M save 0.0459, 0.0892 and 0.1758 GiB with either, one of Mistral-7B 0.3709, and
peaks are 0.7 to 2.9 % apart, by one copy of the hidden states. It is not used because it registers gradient hooks on
every parameter, which frozen ones refuse with a RuntimeError, because its time grows faster than the depth (6, 8 and
34 s on a CPU; all of SmolLM2 takes 13 s here), and because it has one peak where all depths are extrapolated from one
a stage.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lsr_scale.fused.layer_state import Recompute
from lsr_scale.fused.modules import FusedLayer

HEAD_TILE = 4096, 32768  # trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
STAGES = ("forward", "head", "backward")


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one GPU: `rows` sequences of `length` tokens; `masked` if padding or packing needs a mask."""

    rows: int
    length: int
    masked: bool


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step, without weights, gradients of parameters, and optimizer.

    `saved` is what the forward pass saves for the backward pass, `peak` the most that is allocated at any time. Neither
    has `dequantized`: what fused layers would keep of their dequantized weights.
    """

    saved: int
    peak: int
    dequantized: int = 0


class TraceError(Exception):
    """A model's code does not run on fake tensors, such as one that branches on values."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that were made under it, and their peak in each stage."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peaks: dict[str, int] = dict.fromkeys(STAGES, 0)
        self.stage: str = STAGES[0]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._finalizers: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # mixtures of experts; its meta kernel knows bfloat16 alone
            halves = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
            result = func(*halves, **(kwargs or {})).to(args[0].dtype)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def enter(self, stage: str) -> None:
        """Begin a stage."""
        self.stage = stage
        self.peaks[stage] = max(self.peaks[stage], self.live)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known and key not in self._finalizers:
            self._finalizers[key] = weakref.finalize(storage, self._drop, key, size)
            self.live += size
            self.peaks[self.stage] = max(self.peaks[self.stage], self.live)

    def _drop(self, key: int, size: int) -> None:
        del self._finalizers[key]
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        # the kernels lay their output out as [rows, length, heads, size]
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    bias = None
    if attention_mask is not None:
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        bias = torch.empty_like(attention_mask, dtype=query.dtype)
    out = _FusedAttention.apply(query, key, value, bias)
    return out.transpose(1, 2).contiguous(), None  # pyright: ignore[reportOptionalMemberAccess]


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


def attention_name(masked: bool) -> str:
    """Return the name of the stand-in for a meta model's attention, registered with Transformers from here on."""
    name = "lsr_scale_masked" if masked else "lsr_scale_plain"
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask if masked else lambda *args, **kwargs: None)
    return name


def _dequantized(weight: Tensor, kind: str) -> Tensor:
    """Allocate what dequantizing allocates: the weight, and temporary float32 scales (4-bit) or products (int8)."""
    if kind == "int8":
        scaled = torch.empty_like(weight, dtype=torch.float32)
        return (scaled * 1.0).to(weight.dtype)
    scales = weight.new_empty(-(-weight.numel() // 64), dtype=torch.float32)
    result = torch.empty_like(weight)
    del scales
    return result


class _QuantizedLinear(torch.autograd.Function):
    """The same steps as `lsr_scale.layers.frozen_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, quantized: tuple[Tensor, str]) -> Tensor:
        ctx.quantized = quantized
        return functional.linear(x, _dequantized(*quantized), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        return grads[0] @ _dequantized(*ctx.quantized) if ctx.needs_input_grad[0] else None, None, None


def count_dequantization(model: nn.Module, names: Iterable[str], kind: str) -> None:
    """Have the named linears of a meta model allocate dequantized weights; call it before adapters are injected."""

    def forward_of(layer: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            return _QuantizedLinear.apply(x, layer.bias, (weight, kind))  # pyright: ignore[reportReturnType]

        return forward

    for name in names:
        layer = model.get_submodule(name)
        layer.forward = forward_of(layer)


class _TiledHead(torch.autograd.Function):
    """The buffers of TRL's fused language-model head: no logits beyond one tile."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        statistics = hidden.new_empty(7, hidden.shape[0], dtype=torch.float32)
        tile = hidden.new_empty(min(hidden.shape[0], HEAD_TILE[0]), HEAD_TILE[1])
        del tile
        return statistics.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        grad = torch.empty_like(hidden, dtype=torch.float32)
        tile = hidden.new_empty(min(hidden.shape[0], HEAD_TILE[0]), HEAD_TILE[1])
        del tile
        return grad.to(hidden.dtype)


def layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Return the decoder layers of a Transformers model as (parent, attribute, list), None if there are none."""
    candidates = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and child and isinstance(child[0], GradientCheckpointingLayer)
    ]
    return max(candidates, key=lambda item: len(item[2]), default=None)


def trace_step(
    model: Any,
    batch: Batch,
    task: str,
    supervised: int | None = None,
    fuse: Callable[[Recompute], Any] | None = None,
) -> dict[bool, StepMemory]:
    """Return the memory of one step of a `PeftModel` on the meta device, without and with checkpointing.

    The model cannot be used afterwards: its layers are cut to two and its tensors become fake ones.

    Args:
        model: The adapted meta model, built with `attention_name` and prepared with `count_dequantization`.
        batch: The micro-batch.
        task: "causal_lm" or "seq_cls".
        supervised: Positions that the loss is taken at; all but one a row by default.
        fuse: Fuses the model again with another `recompute`; it was fused, so it is built with "sdpa" and not prepared.

    Returns:
        By `checkpointing`: False, True. The same for both if the model has no checkpointing.

    Raises:
        TraceError: for a model whose code needs values.
    """
    try:
        return _trace(model, batch, task, supervised, fuse)
    except Exception as error:  # any model's code runs here, on tensors that it was not written for
        raise TraceError(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error


def _trace(
    model: Any, batch: Batch, task: str, supervised: int | None, fuse: Callable[[Recompute], Any] | None
) -> dict[bool, StepMemory]:
    stack = layer_list(model)
    depth = len(stack[2]) if stack else 1
    mode = FakeTensorMode()
    _to_fake(model, mode, stack)
    memory = {}
    for checkpointing in (False, True):
        if checkpointing and fuse is not None:
            fuse("full")
        elif checkpointing and model.get_base_model().supports_gradient_checkpointing:
            _enable_checkpointing(model)
        runs = []
        for num_layers in dict.fromkeys((1, min(2, depth))):
            if stack:
                parent, name, layers = stack
                setattr(parent, name, nn.ModuleList(_most_adapted(layers, num_layers)))
            saved, peaks = _run(model, mode, batch, task, supervised)
            # a fused layer knows its sizes once it has run
            sizes = [layer.sizes for layer in model.modules() if isinstance(layer, FusedLayer) and layer.sizes]
            runs.append((saved, peaks, sum(one.cached_weights for one in sizes)))
        (saved, peaks, dequantized), (saved_two, peaks_two, dequantized_two) = runs[0], runs[-1]
        memory[checkpointing] = StepMemory(
            saved=saved + (depth - 1) * (saved_two - saved),
            peak=max(peaks[stage] + (depth - 1) * (peaks_two[stage] - peaks[stage]) for stage in STAGES),
            dequantized=dequantized + (depth - 1) * (dequantized_two - dequantized),
        )
    return memory


def _enable_checkpointing(model: Any) -> None:
    """Checkpoint every layer; not undone, as Transformers does not remove all of its hooks."""
    base = model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has another name from Transformers 5.23 on
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()


def _most_adapted(layers: nn.ModuleList, num_layers: int) -> list[nn.Module]:
    def num_trainable(layer: nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters() if p.requires_grad)

    return sorted(layers, key=num_trainable, reverse=True)[:num_layers]


def _to_fake(model: nn.Module, mode: FakeTensorMode, stack: Any) -> None:
    """Turn the meta tensors that the shortened model needs into fake CPU tensors, gradients in place."""
    if stack:
        parent, name, layers = stack
        setattr(parent, name, nn.ModuleList(_most_adapted(layers, 2)))
    cpu = torch.device("cpu")
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = FakeTensor(mode, parameter.data.to("meta"), cpu)
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), cpu)
    with mode:
        for parameter in made.values():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)


def _run(
    model: Any, mode: FakeTensorMode, batch: Batch, task: str, supervised: int | None
) -> tuple[int, dict[str, int]]:
    """Return (bytes saved by the forward pass, peak bytes by stage) of one step at the model's present depth."""
    base = model.get_base_model()
    base.config.use_cache = False
    if base.config.get_text_config().pad_token_id is None:
        base.config.get_text_config().pad_token_id = 0  # training takes the tokenizer's, to find each sequence's end
    model.train()
    known = [*model.parameters(), *model.buffers()]
    known += [p.grad for p in model.parameters() if p.grad is not None]
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        labels = torch.zeros(batch.rows, dtype=torch.long)
        with LiveBytes(known) as tracker:
            if task == "causal_lm":
                hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
                saved = tracker.live
                hidden.register_hook(lambda grad: tracker.enter("backward"))
                tracker.enter("head")
                positions = batch.rows * (batch.length - 1) if supervised is None else supervised
                index = torch.zeros(2, positions, dtype=torch.long)
                chosen = hidden[:, :-1][index[0], index[1]]  # as indexing by a mask does
                _TiledHead.apply(chosen).sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
            else:
                loss = base(input_ids=ids, labels=labels).loss
                saved = tracker.live
                tracker.enter("backward")
                loss.backward()
    return saved, tracker.peaks
