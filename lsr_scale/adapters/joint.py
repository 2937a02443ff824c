"""A linear layer that several trials adapt at once: the base's product for all rows, each trial's update for its own.

    y_t = W x_t + scaling_t * up_t (down_t x_t),        x_t the rows of trial t

Rows are sorted by trial, equally many each, so the updates of neighbouring trials of one rank are two batched products.
No trial's values meet another's: what is not finite in one stays there.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tinylora.layer import TinyLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.adapters.pairs import Adapter, AdapterBlocks, Pair, active_adapters, kind_of
from lsr_scale.adapters.peft import AdapterLinear, in_out_features, upcast
from lsr_scale.errors import UserError


class JointLinear(nn.Module):
    """A frozen linear layer and the adapted layers that trials have in its place; parameters and modules are theirs.

    Attributes:
        base_layer: The linear layer, of a base that the trials share.
        layers: What each trial has here: an `AdapterLinear` of any method, a layer of PEFT's own, None for no adapter.
        adapters: The adapter of each that has a low-rank pair, else None.
        blocks: Trials `[start, stop)` whose pairs have equal shapes and are materialized as one stack.
        pairs: Of each block, `(down [n, r, in], scaling * up [n, out, r])`, while `JointPairs` has materialized
            them for a forward pass of the whole model; without, a forward pass materializes its own.
        tokens: Expected for each trial in a forward pass, if set.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[nn.Module | None]) -> None:
        """Take the layers of the trials, in the order of their rows.

        Raises:
            UserError: for an adapter whose update cannot be computed beside others.
        """
        super().__init__()
        size = in_out_features(base_layer)
        if size is None:
            raise UserError(f"a shared step adapts linear layers, not {type(base_layer).__name__}; train alone")
        self.base_layer = base_layer
        self.in_features, self.out_features = size
        # a tuple: modules in it are no submodules, and stay those of the trials' models
        self.layers = tuple(layers)
        self.adapters = tuple(_low_rank_adapter(layer) for layer in self.layers)
        self.blocks = _blocks(self.adapters)
        self.pairs: Sequence[Pair] | None = None
        self.tokens: int | None = None

    @property
    def weight(self) -> Any:
        """Return the frozen weight: some models read its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Return the frozen bias, if there is one."""
        return self.base_layer.bias

    def adapter_blocks(self) -> list[list[Adapter]]:
        """Return the adapters of each block."""
        return [[adapter for adapter in self.adapters[block] if adapter is not None] for block in self.blocks]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `[..., out]` for `x [..., in]`, whose rows, in order, are the trials' in equal shares.

        Raises:
            UserError: if the rows are not the batch's: the trials' cannot be told apart.
        """
        result = self.base_layer(x, *args, **kwargs)
        n = len(self.layers)
        count = x.numel() // self.in_features
        if count % n or (self.tokens is not None and count != n * self.tokens):
            raise UserError(
                f"a layer {self.in_features} -> {self.out_features} was given {count} rows, not those of {n} trials; "
                "rows that a model picks, as for experts, cannot be shared; train such a model's trials one by one"
            )
        rows, results = x.reshape(n, -1, self.in_features), result.reshape(n, -1, self.out_features)
        pairs = AdapterBlocks(self.adapter_blocks()).pairs() if self.pairs is None else self.pairs
        parts: list[Tensor] = []
        done = 0
        for block, down, up in _by_rank(self.blocks, pairs):
            parts += self._own_updates(rows, results, done, block.start)
            down, up = down.to(x.dtype), up.to(x.dtype)
            thin = torch.bmm(rows[block], down.transpose(1, 2)).to(result.dtype)
            parts.append(torch.baddbmm(results[block], thin, up.transpose(1, 2).to(result.dtype)))
            done = block.stop
        parts += self._own_updates(rows, results, done, n)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(result)

    def _own_updates(self, rows: Tensor, results: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the outputs of the trials `[start, stop)`, none of which has a low-rank pair."""
        for trial in range(start, stop):
            layer, result = self.layers[trial], results[trial : trial + 1]
            yield result if layer is None else _add_own(layer, result, rows[trial : trial + 1])


class JointPairs:
    """The pairs of all trials at the joint linears of a model, materialized at once, for one forward pass each time.

    with pairs:
        loss = model(...)
    """

    def __init__(self, linears: Sequence[JointLinear]) -> None:
        """Take the linears."""
        self.linears = list(linears)
        self._blocks = AdapterBlocks([block for linear in self.linears for block in linear.adapter_blocks()])

    def __enter__(self) -> None:
        pairs = iter(self._blocks.pairs())
        for linear in self.linears:
            linear.pairs = [next(pairs) for _ in linear.blocks]

    def __exit__(self, *exception: object) -> None:
        for linear in self.linears:
            linear.pairs = None


def _low_rank_adapter(layer: nn.Module | None) -> Adapter | None:
    """Return the adapter of a trial's layer if its update is a low-rank pair; None if it is not, or there is none.

    Raises:
        UserError: for an update that is not of its own rows and factors alone.
    """
    if layer is None:
        return None
    tuner: Any = layer
    if not isinstance(tuner, AdapterLinear | LoraLayer | LycorisLayer | VeraLayer | TinyLoraLayer):
        raise UserError(f"a shared step has no form for adapters of the type {type(layer).__name__}; train alone")
    if isinstance(tuner, LoraLayer) and (tuner.lora_variant or any(tuner.lora_bias.values())):
        raise UserError("a shared step has no form for LoRA variants (DoRA and the like) or a bias; train alone")
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules()):
        raise UserError("a shared step has no form for an adapter's dropout; set adapter.dropout: 0, or train alone")
    if tuner.merged:
        raise UserError("an adapter is merged into the base that others share; call unmerge_adapter() first")
    adapters: list[Adapter] = active_adapters(layer)
    if isinstance(layer, LoraLayer) and len(adapters) > 1:
        raise UserError(f"a shared step trains one adapter a trial, found {len(adapters)} active; call set_adapter")
    return adapters[0] if len(adapters) == 1 and adapters[0].method.is_low_rank() else None


def _blocks(adapters: Sequence[Adapter | None]) -> list[slice]:
    """Return the longest runs of neighbours that are materialized as one stack."""
    kinds = [None if adapter is None else (kind_of(adapter, adapter.factors()),) for adapter in adapters]
    blocks = []
    for kind, places in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        run = list(places)
        if kind is not None:
            blocks.append(slice(run[0], run[-1] + 1))
    return blocks


def _by_rank(blocks: Sequence[slice], pairs: Sequence[Pair]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield neighbouring blocks whose pairs have one rank as one, such as those of different methods."""
    block_pairs = list(zip(blocks, pairs, strict=True))
    while block_pairs:
        run = [block_pairs.pop(0)]
        rank = run[0][1][0].shape[1]
        while block_pairs and block_pairs[0][0].start == run[-1][0].stop and block_pairs[0][1][0].shape[1] == rank:
            run.append(block_pairs.pop(0))
        downs, ups = ([pair[side] for _, pair in run] for side in (0, 1))
        down, up = (side[0] if len(side) == 1 else torch.cat(side) for side in (downs, ups))
        yield slice(run[0][0].start, run[-1][0].stop), down, up


def _add_own(layer: Any, result: Tensor, x: Tensor) -> Tensor:
    """Return `result` plus a layer's update of x, as the layer itself computes it."""
    if isinstance(layer, AdapterLinear):
        for adapter in active_adapters(layer):
            delta = adapter.method.delta_forward(upcast(adapter.factors()), x) * adapter.scaling
            result = result + delta.to(result.dtype)
        return result
    for name in () if layer.disable_adapters else layer.active_adapters:
        if name in (layer._available_adapters if isinstance(layer, LycorisLayer) else layer.r):
            weight = layer.get_delta_weight(name)
            result = result + functional.linear(x.to(weight.dtype), weight).to(result.dtype)
    return result
