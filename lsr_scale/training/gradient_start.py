"""`adapter.init: gradient`: factors that begin in the directions of the loss's gradient by the frozen weights.

The gradient of each adapted weight, `G = sum dy^T x` over the tokens of some training rows, is that of their mean loss.
Of LoRA-GA's start (arXiv 2407.05000) `down` has the first right singular vectors, and `up` is zero, whereas the paper
gives it the next left ones and takes the product off the weight. Here nothing is taken off: a quantized base cannot
hold it, trials share theirs, and an export would be of another model. So the function at step 0 is the base's to the
bit, on every base, at no cost in width or bytes, and the first step of gradient descent moves the weight by the nearest
matrix of rank r to its gradient; the paper's, which moves `down` too, by that of rank 2r. What LSR-Adapt and Kron-LoRA
take of G is in their own files.

Rows are run one by one, without padding or packing. Gradients are float32 and of one group of modules at a time, of at
most `GROUP_BYTES` (or one module's): so often the rows are run. All else is as in training, but for dropout, and for
fused layers, whose operations are not: singular vectors of values that lie close together turn by the rounding over the
distance of the values, so that of a gradient rounded otherwise (by 3e-7) factors would differ by up to 7e-5.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lsr_scale import distributed
from lsr_scale.adapters.pairs import Adapter, active_adapters
from lsr_scale.adapters.peft import in_out_features
from lsr_scale.config import RunConfig
from lsr_scale.config.training import Task
from lsr_scale.errors import UserError
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.fused.subclass import original_classes

GROUP_BYTES = 8 * 2**30


def start_from_gradient(trainer: Any, run: RunConfig, say: Callable[[str], None]) -> None:
    """Set the factors of a trainer's model, if the run wants them to start from the gradient.

    The rows are drawn by the run's seed; their order in training stays. Every process of several runs its share of them
    and all have the same factors.

    Raises:
        UserError: for fewer rows than `adapter.init_rows`, none with anything to be learned, or a gradient that is not
            finite.
    """
    if run.adapter.options.get("init") != "gradient":
        return
    wanted, seed = run.adapter.options["init_rows"], run.training["seed"]
    rows = list(_rows(trainer, wanted, seed))
    adapters = {name: found[0] for name, module in trainer.model.named_modules() if (found := active_adapters(module))}
    groups, shares = list(grouped(adapters)), []
    for group in groups:
        for name, gradient in _gradients(trainer.model, group, rows, run.model.task).items():
            if not gradient.isfinite().all():
                raise UserError(
                    f"adapter.init: gradient: the gradient of {name.removeprefix('base_model.model.')} is not finite; "
                    "set model.dtype: float32, or adapter.init: zero"
                )
            if gradient.any():  # a layer that no row reaches starts as it was drawn
                shares.append(_set(group[name], gradient, seed))
    median = f"{sorted(shares)[len(shares) // 2]:.0%}" if shares else "none"
    say(
        f"adapters start from the gradient of {wanted} rows, run {len(groups)} time{'s' * (len(groups) > 1)}; their "
        f"directions hold {median} of its square (median of {len(shares)} modules)"
    )


def planned_start(model: nn.Module, rows: int) -> str:
    """Return in words what the start of a model costs before the first step, on any device, meta too."""
    adapters = {name: found[0] for name, module in model.named_modules() if (found := active_adapters(module))}
    sizes = [sum(4 * math.prod(_size(one)) for one in group.values()) for group in grouped(adapters)]
    return (
        f"adapter.init: gradient runs {rows} rows forward and backward {len(sizes)} time{'s' * (len(sizes) > 1)} "
        f"before the first step, unfused and recomputing nothing, with up to {max(sizes) / 2**30:.2f} GiB of gradients"
    )


def grouped(adapters: dict[str, Adapter]) -> Iterator[dict[str, Adapter]]:
    """Yield the modules whose gradients are held at once, in order."""
    group: dict[str, Adapter] = {}
    size = 0
    for name, adapter in adapters.items():
        own = 4 * math.prod(_size(adapter))
        if group and size + own > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = adapter
        size += own
    if group:
        yield group


def _size(adapter: Adapter) -> tuple[int, int]:
    layer: Any = adapter.linear
    size = in_out_features(layer.get_base_layer())
    assert size is not None
    return size


def _rows(trainer: Any, wanted: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield some rows as batches of one, on the CPU, packed ones taken apart; of this process, every so manieth."""
    dataset = trainer.train_dataset
    if len(dataset) < wanted:
        raise UserError(
            f"adapter.init_rows: {wanted}, but there are {len(dataset):,} training rows; set it to that or less"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    for place, index in enumerate(order):
        if place % distributed.world_size() == distributed.rank():
            for row in _documents(dataset[index]):
                yield trainer.data_collator([row])


def _documents(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the documents that are packed in a row: the row itself, where it is one."""
    lengths = row.get("seq_lengths")
    if lengths is None:
        yield row
        return
    names = ("input_ids", "labels", "completion_mask", "assistant_masks")  # the latter with TRL's earlier releases
    begin = 0
    for length in map(int, lengths):
        yield {name: row[name][begin : begin + length] for name in names if name in row}
        begin += length


def _gradients(model: Any, group: dict[str, Adapter], rows: Sequence[dict[str, Any]], task: Task) -> dict[str, Tensor]:
    """Return the gradients `[out, in]` of the mean loss by the weights of some modules."""
    device = model.get_input_embeddings().weight.device
    sizes = {name: _size(adapter) for name, adapter in group.items()}
    gradients = {name: torch.zeros(out, inner, device=device) for name, (inner, out) in sizes.items()}
    is_classifier = task == "seq_cls"
    counts = [1 if is_classifier else int((row["labels"][..., 1:] != IGNORE_INDEX).sum()) for row in rows]
    total = torch.tensor(float(sum(counts)), device=device)
    distributed.sum_tensor(total)
    if not total:
        raise UserError("adapter.init: gradient: none of its rows has anything to be learned; raise adapter.init_rows")
    with _collecting(model, group, gradients):
        for row, count in zip(rows, counts, strict=True):
            if not count:
                continue
            batch = {name: value.to(device) for name, value in row.items() if isinstance(value, Tensor)}
            extra = {} if is_classifier else {"use_cache": False}
            (model(**batch, **extra).loss * (count / total)).backward()
    for gradient in gradients.values():
        distributed.sum_tensor(gradient)
    return gradients


@contextmanager
def _collecting(model: nn.Module, group: dict[str, Adapter], gradients: dict[str, Tensor]) -> Iterator[None]:
    """Add to gradients what each backward pass brings; the model is as it was afterwards, without gradients.

    Whatever is trained gets a gradient too, which is dropped; an update of 0 leaves those of the weights as they are.
    """
    modes = {module: module.training for module in model.modules()}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:  # not in the first pass of reentrant checkpointing
                x = inputs[0].detach()
                output.register_hook(lambda dy: add(name, dy, x))

        return on_forward

    def add(name: str, dy: Tensor, x: Tensor) -> None:
        gradients[name] += dy.flatten(0, -2).to(gradients[name]).T @ x.flatten(0, -2).to(gradients[name])

    try:
        for name, adapter in group.items():
            handles.append(adapter.linear.register_forward_hook(hook(name)))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        with original_classes(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None


@torch.no_grad()
def _set(adapter: Adapter, gradient: Tensor, seed: int) -> float:
    """Set a module's factors, alike on all processes, and return the share of the gradient that they hold."""
    factors = {name: factor.data for name, factor in adapter.factors().items()}
    like = next(iter(factors.values()))
    share = adapter.method.start_from_gradient(factors, gradient.to(like), torch.Generator().manual_seed(seed))
    for factor in factors.values():
        distributed.broadcast_tensor(factor)
    return share
