"""`adapter.init: gradient`: factors that begin in the directions of the loss's gradient by the frozen weights.

The gradient of each adapted weight, `G = sum dy^T x` over the tokens of some training rows, is that of their mean loss.
Of LoRA-GA's start (arXiv 2407.05000) `down` has the first right singular vectors, and `up` is zero, whereas the paper
gives it the next left ones and takes the product off the weight. Here nothing is taken off: a quantized base cannot
hold it, trials share theirs, and an export would be of another model. So the function at step 0 is the base's to the
bit, on every base, at no cost in width or bytes, and the first step of gradient descent moves the weight by the nearest
matrix of rank r to its gradient; the paper's, which moves `down` too, by that of rank 2r. What LSR-Adapt and Kron-LoRA
take of G is in their own files.

Packed sequences are taken apart into their documents, and rows or documents of similar lengths are padded to batches,
the form that every architecture takes, classifiers too: of so many tokens as `pass_tokens` says, or of one that is
longer. Gradients are float32 and of one group of modules at a time, of at most `GROUP_BYTES` (or one module's): so
often the rows are run. All else is as in training, but for what is random, such as dropout, for recomputation, and for
fused layers, whose operations are not: singular vectors of values that lie close together turn by the rounding over the
distance of the values. Of gradients that were rounded otherwise, by 1e-6 at most (70 modules of SmolLM2-135M in NF4),
factors of LoRA and Kron-LoRA differed by up to 3e-5 of their norm; LSR-Adapt's, which are found by turns, by 5e-4 in
the median, and by up to half where another turn was the best.

Trials of a sweep that would compute the same start take the first one's (`trial_starts`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lsr_scale.training.trial_starts import Start, TrialStarts, start_key
from lsr_scale.units import amount

GROUP_BYTES = 8 * 2**30
# What a pass's linears read and write, in numbers, if it is not of one row. Of models of 0.1 to 7 billion parameters in
# bfloat16 its backward pass needs 1.6 to 2.4 GiB then, as counted.
PASS_NUMBERS = 2**30


def start_from_gradient(
    trainer: Any, run: RunConfig, say: Callable[[str], None], starts: TrialStarts | None = None
) -> None:
    """Set the factors of a trainer's model, if the run wants them to start from the gradient.

    The rows are drawn by the run's seed; their order in training stays. Every process of several runs its share of them
    and all have the same factors.

    Args:
        trainer: The trainer, whose adapters are as they were drawn.
        run: Its run.
        say: Told in a line what was done.
        starts: Those of trials before, all of one process; None: there are none.

    Raises:
        UserError: for fewer rows than `adapter.init_rows`, none with anything to be learned, or a gradient that is not
            finite.
    """
    if run.adapter.options.get("init") != "gradient":
        return
    model, seed = trainer.model, run.training["seed"]
    adapters = _adapters(model)
    passes = list(_passes(trainer.data_collator, _rows(trainer, run), pass_tokens(model)))
    key = None if starts is None else start_key(run, adapters, passes)
    if starts is not None and key is not None and (known := starts.of(key)) is not None:
        known.give(adapters)
        say(f"{known.said}: computed for an earlier trial")
        return
    groups, shares = list(grouped(adapters)), []
    for group in groups:
        for name, gradient in _gradients(model, group, passes, run.model.task).items():
            if not gradient.isfinite().all():
                raise UserError(
                    f"adapter.init: gradient: the gradient of {name.removeprefix('base_model.model.')} is not finite; "
                    "set model.dtype: float32, or adapter.init: zero"
                )
            if gradient.any():  # a layer that no row reaches starts as it was drawn
                shares.append(_set(group[name], gradient, seed))
    median = f"{sorted(shares)[len(shares) // 2]:.0%}" if shares else "none"
    said = (
        f"adapters start from the gradient of {_rows_in_words(run)}, run {amount(len(groups), 'time')}; their "
        f"directions hold {median} of its square (median of {amount(len(shares), 'module')})"
    )
    if starts is not None and key is not None:
        starts.keep(key, Start.of(adapters, said))
    say(said)


def planned_start(model: nn.Module, run: RunConfig) -> str:
    """Return in words what the start of a run's model costs before the first step, on any device, meta too."""
    sizes = [sum(4 * math.prod(_size(one)) for one in group.values()) for group in grouped(_adapters(model))]
    what, tokens = "document" if run.training.get("packing") else "row", pass_tokens(model)
    at_once = f"{tokens:,} tokens or one longer {what}" if tokens else f"one {what}"
    return (
        f"adapter.init: gradient runs {_rows_in_words(run)} forward and backward {amount(len(sizes), 'time')} before "
        f"the first step, {at_once} at once, unfused and recomputing nothing, with up to {max(sizes) / 2**30:.2f} GiB "
        "of gradients"
    )


def _rows_in_words(run: RunConfig) -> str:
    number = run.adapter.options["init_rows"]
    return amount(number, "packed sequence" if run.training.get("packing") else "row")


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the first active adapter of each adapted module, by the module's name."""
    return {name: found[0] for name, module in model.named_modules() if (found := active_adapters(module))}


def pass_tokens(model: Any) -> int:
    """Return how many tokens a pass of several rows has at most, padding included; 0 where each runs by itself.

    What a pass keeps grows with its tokens, and with what the linears read and write for each.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        return 0  # the experts' own loss is no mean over tokens
    numbers = sum(sum(in_out_features(module) or ()) for module in model.modules())
    # experts are one parameter `[experts, out, in]`
    experts = [one for one in model.parameters() if one.dim() == 3 and not one.requires_grad]
    numbers += (getattr(config, "num_experts_per_tok", None) or 1) * sum(sum(one.shape[1:]) for one in experts)
    return PASS_NUMBERS // max(1, numbers)


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


def _rows(trainer: Any, run: RunConfig) -> Iterator[dict[str, Any]]:
    """Yield the documents of some rows, a row that is not packed as it is; of this process, of every so manieth."""
    dataset, wanted = trainer.train_dataset, run.adapter.options["init_rows"]
    if len(dataset) < wanted:
        kind = "packed sequences" if run.training.get("packing") else "training rows"
        raise UserError(f"adapter.init_rows: {wanted}, but there are {len(dataset):,} {kind}; set it to that or less")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(run.training["seed"]))
    for place, index in enumerate(order[:wanted].tolist()):
        if place % distributed.world_size() == distributed.rank():
            yield from _documents(dataset[index])


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


def _passes(collate: Any, rows: Iterable[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """Yield rows as batches, on the CPU, the longest first.

    Args:
        collate: The trainer's collator.
        rows: The rows, none packed.
        most: Tokens of a batch of several, padding included, of which less than half is padding.
    """
    if getattr(collate, "padding_free", False):
        collate = dataclasses.replace(collate, padding_free=False)
    batch: list[dict[str, Any]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        if batch and (longest * (len(batch) + 1) > most or 2 * length < longest):
            yield collate(batch)
            batch = []
        longest = longest if batch else length
        batch.append(row)
    if batch:
        yield collate(batch)


def _gradients(
    model: Any, group: dict[str, Adapter], passes: Sequence[dict[str, Any]], task: Task
) -> dict[str, Tensor]:
    """Return the gradients `[out, in]` of the mean loss by the weights of some modules.

    It is the mean over all that is supervised: tokens, or a classifier's rows.
    """
    device = model.get_input_embeddings().weight.device
    sizes = {name: _size(adapter) for name, adapter in group.items()}
    gradients = {name: torch.zeros(out, inner, device=device) for name, (inner, out) in sizes.items()}
    is_classifier = task == "seq_cls"
    counts = [
        len(batch["labels"]) if is_classifier else int((batch["labels"][..., 1:] != IGNORE_INDEX).sum())
        for batch in passes
    ]
    total = torch.tensor(float(sum(counts)), device=device)
    distributed.sum_tensor(total)
    if not total:
        raise UserError("adapter.init: gradient: none of its rows has anything to be learned; raise adapter.init_rows")
    with _collecting(model, group, gradients):
        for given, count in zip(passes, counts, strict=True):
            if not count:
                continue
            batch = {name: value.to(device) for name, value in given.items() if isinstance(value, Tensor)}
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
            # no dropout, which attention, and some layers, do by their own flag; bitsandbytes' linears heed theirs
            module.training = isinstance(module, nn.Linear)
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
