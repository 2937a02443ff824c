"""The step of several trials at once: one forward and backward pass over the rows of all, on one frozen base.

Each trial is an ordinary run with a model, a trainer and an optimizer of its own. In training its micro-batches go
through a model that they have in common, in which every adapted linear is a `JointLinear` (`adapters/joint.py`). A
trial gets the loss and the gradients that it would get alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from lsr_scale.adapters.identity import base_description
from lsr_scale.adapters.joint import JointLinear, JointPairs
from lsr_scale.adapters.pairs import active_adapters, kind_of
from lsr_scale.config import RunConfig
from lsr_scale.config.training import checkpoints_layers, wants_fused
from lsr_scale.errors import first_line
from lsr_scale.fused import fit_memory, fuse
from lsr_scale.fused.cuda_graphs import Shapes
from lsr_scale.fused.fallback import CAUSAL_LMS, lm_head_fallback_reason
from lsr_scale.fused.joint_graphs import JointGraphs, join_static
from lsr_scale.fused.loss import token_losses
from lsr_scale.fused.subclass import original_class
from lsr_scale.model.share import share_base
from lsr_scale.training.callbacks.memory import FreeMemory
from lsr_scale.training.steps.graphs import host_bound
from lsr_scale.training.steps.head_loss import at_least_one
from lsr_scale.training.steps.joint_batch import JointBatch, joint_batch

_EAGER_STEPS = 2  # before graphs are captured: kernels are compiled


@dataclass(eq=False)
class Member:
    """A trial that takes part in a step, and what it gets of it beside the loss.

    Attributes:
        model: Its model: its adapter in a copy of the base that `share_base` made.
        inputs: Its micro-batch, as its data collator made it, on any device.
        divisor: What its summed loss is divided by; None: the number of its supervised tokens.
        most_tokens: How many tokens, padding included, a micro-batch of it can have at most; None if unknown: then
            fused layers recompute all that they can.
        gradient: `[n]`, the gradients of the trained parameters one after another, in the order of
            `model.parameters()`, where a step gives them so, in place of `grad`. The next step may write over it.
    """

    model: PeftModel
    inputs: Mapping[str, Any]
    divisor: Tensor | float | None = None
    most_tokens: int | None = None
    gradient: Tensor | None = None


class JointStep:
    """Losses and gradients of the micro-batches of several trials at once.

        step = JointStep(base, run)
        losses = step.run([Member(model, batch, divisor) for ...])      # and then every trial's optimizer.step()

    Which trials take part, and in which order they are given, may differ from call to call. The joint model is made
    anew where they do.

    Attributes:
        model: The joint model, after the first call.
        linears: Its `JointLinear`s by path.
    """

    def __init__(
        self, base: Any, run: RunConfig, say: Callable[[str], None] = lambda text: None, gpu: Any = None
    ) -> None:
        """Take what the trials share.

        It is to be checked first that they can: `sharing_fallback_reason` and `base_fallback_reason`.

        Args:
            base: The frozen base, which stays as it is.
            run: The run of one of the trials, for the settings that they have in common.
            say: Told, in a line, what a user should know.
            gpu: Memory statistics of the GPU, in torch.cuda's functions; by default torch.cuda, where there is one.
        """
        self.gpu: Any = torch.cuda if gpu is None and torch.cuda.is_available() else gpu
        self.base, self.training, self.say = base, run.training, say
        self._parameters = base_description(base)["num_parameters"]
        self.model: Any = None
        self.linears: dict[str, JointLinear] = {}
        self._members: list[PeftModel] = []
        self._pairs = JointPairs([])
        self._graphs: JointGraphs | None = None
        self._captures = 0, 0.0  # of graphs of trials before
        self._eager_steps = 0  # of this joint model
        self._shapes = Shapes()  # of the batches of these trials
        self._free: FreeMemory | None = None
        self._said = ""

    def run(self, members: Sequence[Member]) -> list[Tensor]:
        """Do a micro-batch of each member.

        Gradients are added to `grad` of its model's trained parameters as `backward()` does, or they are the member's
        `gradient`: where the batches are `PackedCollator`'s and it pays (`training.cuda_graphs`), CUDA graphs are
        replayed from the third step of the same trials on.

        Returns:
            The loss of each, a scalar without a graph: the sum of the cross-entropy of its supervised tokens over its
            divisor, which `HeadLoss` and TRL return for it alone.

        Raises:
            UserError: for batches or adapters that cannot be joined.
        """
        order = self._make_model([member.model for member in members])
        sorted_members = [members[place] for place in order]
        losses = self._replay(sorted_members) or self._run_eagerly(sorted_members)
        found = dict(zip(order, losses, strict=True))
        return [found[place].detach() for place in range(len(members))]

    @property
    def captures(self) -> tuple[int, float]:
        """How many graphs were captured, and the seconds that this took; see `StepGraphs`."""
        number, seconds = (0, 0.0) if self._graphs is None else self._graphs.captures
        return self._captures[0] + number, self._captures[1] + seconds

    def _run_eagerly(self, sorted_members: Sequence[Member]) -> list[Tensor]:
        """Return the losses of members in the order of their rows; gradients are the parameters'."""
        self._eager_steps += 1
        if self._eager_steps == 2:
            self._fit_memory([member.most_tokens for member in sorted_members])
        batch = joint_batch([member.inputs for member in sorted_members], flat=self._takes_flat_rows())
        with torch.enable_grad():
            losses = self._losses(batch, [member.divisor for member in sorted_members])
            torch.stack(losses).sum().backward()
        return losses

    def _replay(self, sorted_members: Sequence[Member]) -> list[Tensor] | None:
        """Return the losses of members by a CUDA graph; None where the step must be eager."""
        batches = [member.inputs.get("static") for member in sorted_members]
        if self._graphs is None or self._eager_steps < _EAGER_STEPS or None in batches:
            return None
        if self.training["cuda_graphs"] == "auto" and not self._is_host_bound():
            return None
        reason = ""
        try:
            static = [batch for batch in batches if batch]
            where = static[0]["weights"].device
            divisors = [
                batch["weights"].sum() if member.divisor is None else member.divisor
                for batch, member in zip(static, sorted_members, strict=True)
            ]
            divisor = torch.stack([torch.as_tensor(at_least_one(one), device=where) for one in divisors])
            # joined where the collators made them, on the host; then one copy to the graph's inputs
            joined = join_static(static, self._shapes)
            batch = {name: _pinned(value, self._device()) for name, value in joined.items()}
            losses, gradients = self._graphs.replay(batch, _pinned(divisor, self._device()))
            for member, gradient in zip(sorted_members, gradients, strict=True):
                member.gradient = gradient
            return list(losses)
        except RuntimeError as error:
            if self._graphs.captured and not isinstance(error, torch.OutOfMemoryError):
                raise
            reason = first_line(error)
        # steps are eager from here on; not within the handler: until its end the error holds what a capture allocated
        self._captures = self.captures
        self._graphs = None
        self.say(f"CUDA graphs are off: {reason}")
        return None

    def _is_host_bound(self) -> bool:
        """Tell whether graphs pay for batches of the size of the eager steps'."""
        tokens = next(iter(self.linears.values())).tokens or 0
        return host_bound(self._parameters, len(self.model.model.layers), len(self._members) * tokens, joint=True)

    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _make_model(self, models: Sequence[PeftModel]) -> list[int]:
        """Have the joint model be that of these trials, and return their places in the order of its rows."""
        places = {id(model): place for place, model in enumerate(models)}
        if len(places) < len(models):
            raise ValueError("a trial takes part in a step twice")
        if places.keys() == {id(model) for model in self._members}:
            return [places[id(model)] for model in self._members]
        adapted = [dict(_adapted_linears(one)) for one in models]
        order = _order(adapted)
        adapted = [adapted[place] for place in order]
        self._captures = self.captures
        self._graphs, self._eager_steps = None, 0  # a graph is of its trials' parameters
        self._shapes = Shapes()
        model: Any = share_base(self.base)
        self.linears = {}
        for path in dict.fromkeys(path for layers in adapted for path in layers):
            parent, _, name = path.rpartition(".")
            linear = JointLinear(model.get_submodule(path), [layers.get(path) for layers in adapted])
            setattr(model.get_submodule(parent), name, linear)
            self.linears[path] = linear
        self._pairs = JointPairs(list(self.linears.values()))
        self._members, self.model = [models[place] for place in order], model.train()
        self._set_speed()
        return order

    def _set_speed(self) -> None:
        """Have the joint model recompute activations, and run fused, as each trial's does alone."""
        recomputes = checkpoints_layers(self.training)
        if wants_fused(self.training, pays=torch.cuda.is_available()):
            report = fuse(self.model, "full" if recomputes else "none", self.training["memory"] == "speed")
            if report.fused or report.unfused:
                # the layers see to it themselves, and make the pairs too
                self._pairs = JointPairs([])
                if not report.unfused and lm_head_fallback_reason(self.model, {}) is None:
                    trained = [[one for one in model.parameters() if one.requires_grad] for model in self._members]
                    self._graphs = JointGraphs(self.model, trained)
                fits = self.training["memory"] == "auto" and self.training["gradient_checkpointing"] is None
                self._free = FreeMemory(self.gpu) if fits and self.gpu is not None else None
                return
        if recomputes and self.model.supports_gradient_checkpointing:
            # not the reentrant kind: pairs are made outside of what is recomputed
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _fit_memory(self, most_tokens: Sequence[int | None]) -> None:
        """Let fused layers keep what fits beside the first step of these trials; optimizers have their state by now."""
        free, self._free = self._free, None
        known = [number for number in most_tokens if number is not None]
        if free is None or len(known) < len(most_tokens):
            return
        tokens = sum(known)
        report = fit_memory(self.model, free.after_step(self.model, tokens), tokens)
        line = f"{len(self._members)} trials in a step: {report}"
        if report is not None and line != self._said:  # the model is made anew for every other trial
            self._said = line
            self.say(line)
        self.gpu.empty_cache()  # frees cached blocks of the first step's sizes

    def _takes_flat_rows(self) -> bool:
        """Tell whether attention reads boundaries of documents; masks would be of all trials' tokens squared."""
        fused = original_class(self.model) is not type(self.model)
        return fused or self.model.config._attn_implementation.startswith("flash")

    def _losses(self, batch: JointBatch, divisors: Sequence[Tensor | float | None]) -> list[Tensor]:
        """Return the loss of each member."""
        model = self.model
        device = self._device()
        inputs = {name: _to(value, device) for name, value in batch.inputs.items()}
        supervised, targets = _to(batch.supervised, device), _to(batch.targets, device)
        for linear in self.linears.values():
            linear.tokens = batch.tokens
        if "cu_seq_lens_q" in inputs and type(model) is not original_class(model):
            # fused, rows of their own may be packed: what is not finite in one stays there under attention's masks too
            inputs |= {name: inputs[name].view(len(divisors), -1) for name in ("input_ids", "position_ids")}
        with self._pairs:
            if original_class(model) in CAUSAL_LMS and lm_head_fallback_reason(model, {}) is None:
                known = {} if type(model) is original_class(model) else {"mask_is_needed": batch.mask_is_needed}
                hidden = model.model(**inputs, **known, use_cache=False).last_hidden_state
                chosen, weight = hidden.flatten(0, 1)[supervised], model.lm_head.weight
                losses = token_losses(chosen.to(weight.dtype), weight, targets)
            else:
                logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[supervised]
                losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        return [
            part.sum() / _to(at_least_one(len(part) if divisor is None else divisor), device)
            for part, divisor in zip(losses.split(batch.counts), divisors, strict=True)
        ]


def _adapted_linears(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the adapted linears of a trial's model by their paths in its base."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, nn.Module) and isinstance(module, BaseTunerLayer):
            yield path, module


def _order(adapted: Sequence[Mapping[str, nn.Module]]) -> list[int]:
    """Return an order in which trials of equal adapters are neighbours: they are computed as one stack."""
    kinds = []
    for layers in adapted:
        adapters = [(path, one) for path, layer in layers.items() for one in active_adapters(layer)]
        kinds.append(tuple((path, kind_of(one, one.factors())) for path, one in adapters))
    return sorted(range(len(kinds)), key=lambda place: kinds.index(kinds[place]))


def _to(value: Any, device: torch.device) -> Any:
    return _pinned(value, device).to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _pinned(value: Any, device: torch.device) -> Any:
    """Return a tensor of the host in memory that is copied to a GPU without waiting."""
    is_to_copy = isinstance(value, Tensor) and device.type == "cuda" and value.device.type == "cpu"
    return value.pin_memory() if is_to_copy else value
