"""AdamW whose parameters, gradients and moments are one vector a group: a step costs the host one call, not hundreds.

An adapter is hundreds of small factors. torch's AdamW looks at each of them in every step, and so does the clipping of
its gradient's norm; that is most of what a trainer's host does in a step whose forward and backward pass it shares
with other trainers (`steps.meeting`).
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.optim.adam import adam


@dataclass
class Vector:
    """The parameters of a group, one after another, and what goes with them."""

    parameters: list[nn.Parameter]
    data: Tensor
    gradient: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)  # as AdamW has it of one parameter

    def is_of(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Tell whether these are the parameters, in that order."""
        return len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's parts, in the parameters' shapes."""
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]


class FlatAdamW(torch.optim.AdamW):
    """torch's AdamW, elementwise and so in value, on one vector a group.

    Each parameter's `data`, and its `exp_avg` and `exp_avg_sq` in `state`, are views of its group's vectors, so what
    reads and writes them, such as checkpoints, finds an ordinary AdamW. Gradients are the parameters' `grad`, or given
    as vectors (`give`).

    Groups that are no vector stay as torch has them: parameters of several dtypes or devices, or whose states are not
    of one step, as where `condition_guard: rescale` dropped those of some.
    """

    saved_as = "AdamW"  # the name of the optimizer in checkpoints, which are exchangeable

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vectors: dict[int, Vector] = {}  # by the id of a group's first parameter
        self._num_states = 0  # with fewer, somebody dropped one
        for group in self.param_groups:
            self._flatten(group)

    @property
    def is_flat(self) -> bool:
        """Whether every group is a vector still."""
        return all(self._vector(group) is not None for group in self.param_groups if group["params"])

    def give(self, gradient: Tensor, parameters: Sequence[nn.Parameter], accumulate: bool = False) -> None:
        """Take the gradients of all parameters as one vector; a step takes them and the parameters' `grad` together.

        Args:
            gradient: `[n]`, the parameters' gradients one after another. Where there is one group, and nothing is
                accumulated, it is not copied; clipping changes it.
            parameters: In that order.
            accumulate: Add it to what was given or gathered since `drop`; what is given first is copied then.
        """
        vectors = [self._vector(group) for group in self.param_groups if group["params"]]
        if len(vectors) == 1 and vectors[0] is not None and vectors[0].is_of(parameters):
            parts = [gradient]
        else:
            split = gradient.split([parameter.numel() for parameter in parameters])
            by_id = {id(parameter): part for parameter, part in zip(parameters, split, strict=True)}
            parts = [torch.cat([by_id[id(p)] for p in vector.parameters]) for vector in vectors if vector is not None]
        for vector, part in zip(vectors, parts, strict=True):
            assert vector is not None, "gradients are given as a vector where every group is one: see is_flat"
            if accumulate and vector.gradient is not None:
                vector.gradient += part
            else:
                vector.gradient = part.clone() if accumulate else part

    def gather(self) -> None:
        """Move the parameters' `grad` into vectors, and add them to what was given or gathered since `drop`.

        Where some parameters of a group have none, and nothing was given, they stay: AdamW passes over those.
        """
        for group in self.param_groups:
            vector = self._vector(group)
            gradient = None if vector is None else self._gradient_of(vector)
            if vector is None or gradient is None:
                continue
            if vector.gradient is None:
                vector.gradient = gradient
            else:
                vector.gradient += gradient
            for parameter in vector.parameters:
                parameter.grad = None

    def drop(self) -> None:
        """Drop the gradients that were given or gathered."""
        for vector in self._vectors.values():
            vector.gradient = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or make the parameters' zero."""
        self.drop()
        super().zero_grad(set_to_none)

    def gradients(self) -> list[Tensor]:
        """Return what the norm of the whole gradient is of: vectors, and `grad` of what is in none."""
        found = []
        for group in self.param_groups:
            vector = self._vector(group)
            if vector is not None and vector.gradient is not None:
                found.append(vector.gradient)
            else:
                found += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step: one call of AdamW a group, or torch's own where a group is no vector."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ordinary = []
        for group in self.param_groups:
            vector = self._vector(group)
            gradient = None if vector is None else self._whole_gradient(vector)
            if vector is not None and gradient is None and any(p.grad is not None for p in vector.parameters):
                vector = self._unflatten(vector)  # others have none, and AdamW passes over those
            if vector is None:
                ordinary.append(group)
            elif gradient is not None:
                self._step_vector(group, vector, gradient)
        if ordinary:
            groups, self.param_groups = self.param_groups, ordinary
            try:
                super().step()
            finally:
                self.param_groups = groups
        return loss

    def _step_vector(self, group: dict[str, Any], vector: Vector, gradient: Tensor) -> None:
        if not vector.state:
            self._begin_state(group, vector)
        beta1, beta2 = group["betas"]
        largest = [vector.state["max_exp_avg_sq"]] if group["amsgrad"] else []
        adam(
            [vector.data],
            [gradient],
            [vector.state["exp_avg"]],
            [vector.state["exp_avg_sq"]],
            largest,
            [vector.state["step"]],
            beta1=beta1,
            beta2=beta2,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **{name: group[name] for name in _PASSED_ON},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's AdamW has it: each parameter's with a count of steps of its own."""
        found = super().state_dict()
        states = {
            index: {name: value.clone() if name == "step" else value for name, value in state.items()}
            for index, state in found["state"].items()
        }
        return {**found, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, or of torch's AdamW."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            vector = self._vector(group)
            if vector is not None:
                self._load_vector(vector)

    def _load_vector(self, vector: Vector) -> None:
        """Make a vector's state that of its parameters."""
        states = [self.state.get(parameter) or {} for parameter in vector.parameters]
        vector.state = {}
        if not any(states):
            return
        if not _are_of_one_step(states):
            self._unflatten(vector)
            return
        for name, value in states[0].items():
            parts = [one[name].reshape(-1) for one in states]
            vector.state[name] = value.clone() if name == "step" else torch.cat(parts)
        self._bind_state(vector)

    def _flatten(self, group: dict[str, Any]) -> Vector | None:
        """Move a group's parameters into a vector, where they can be one."""
        if not _is_uniform(group["params"]) or group["differentiable"]:
            return None
        vector = self._vectors[id(group["params"][0])] = _flattened(group["params"])
        return vector

    def _whole_gradient(self, vector: Vector) -> Tensor | None:
        """Return what was given or gathered and the parameters' `grad`, which stay as they are; None as `_gradient_of`.

        A step reads `grad` as torch's optimizers do: it is there until somebody drops it.
        """
        gradient = self._gradient_of(vector)
        if gradient is None or vector.gradient is None:
            return vector.gradient if gradient is None else gradient
        return vector.gradient + gradient

    def _gradient_of(self, vector: Vector) -> Tensor | None:
        """Return the parameters' `grad` as one vector, None where none has one, or some have none at all.

        With a vector that was given every parameter has a gradient, and its `grad` is zero where it is None.
        """
        gradients: list[Any] = [parameter.grad for parameter in vector.parameters]
        missing = sum(gradient is None for gradient in gradients)
        if missing == len(gradients) or (missing and vector.gradient is None):
            return None
        if missing:
            both = zip(vector.parameters, gradients, strict=True)
            gradients = [torch.zeros_like(one) if gradient is None else gradient for one, gradient in both]
        return _flatten_dense_tensors(gradients)

    def _vector(self, group: dict[str, Any]) -> Vector | None:
        """Return a group's vector, None where it has none, or no longer since somebody dropped a parameter's state."""
        vector = self._vectors.get(id(group["params"][0])) if group["params"] else None
        if vector is None or not vector.state or len(self.state) >= self._num_states:
            return vector
        return vector if all(parameter in self.state for parameter in vector.parameters) else self._unflatten(vector)

    def _unflatten(self, vector: Vector) -> None:
        """Leave a group to torch's AdamW from here on: each parameter has a step count and a gradient of its own."""
        del self._vectors[id(vector.parameters[0])]
        if vector.gradient is not None:
            for parameter, gradient in zip(vector.parameters, vector.views(vector.gradient), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for parameter in vector.parameters:
            if parameter in self.state:
                self.state[parameter]["step"] = self.state[parameter]["step"].clone()

    def _begin_state(self, group: dict[str, Any], vector: Vector) -> None:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        on_device = group["fused"] or group["capturable"]
        step = torch.zeros((), dtype=torch.float32, device=vector.data.device if on_device else "cpu")
        vector.state = {"step": step, **{name: torch.zeros_like(vector.data) for name in names}}
        self._bind_state(vector)

    def _bind_state(self, vector: Vector) -> None:
        """Make the parameters' states views of the vector's; they share its count of steps."""
        views = {name: vector.views(value) for name, value in vector.state.items() if name != "step"}
        for index, parameter in enumerate(vector.parameters):
            of_one = {name: parts[index] for name, parts in views.items()}
            self.state[parameter] = {"step": vector.state["step"], **of_one}
        self._num_states = len(self.state)


_PASSED_ON = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
_PASSED_ON += ("decoupled_weight_decay",)


def clip(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Return the norm of gradients as one vector, a scalar, after scaling them in place so that it is at most max_norm.

    Args:
        gradients: Tensors of any shapes, at least one.
        max_norm: None scales nothing.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _is_uniform(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether parameters can be one vector."""
    kinds = {(p.dtype, p.device, p.layout, type(p.data)) for p in parameters}
    return len(kinds) == 1 and next(iter(kinds))[2:] == (torch.strided, Tensor)


def _flattened(parameters: list[nn.Parameter]) -> Vector:
    """Move parameters into one vector."""
    with torch.no_grad():
        vector = Vector(list(parameters), torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    for parameter, view in zip(vector.parameters, vector.views(vector.data), strict=True):
        parameter.data = view
    return vector


def _are_of_one_step(states: list[dict[str, Any]]) -> bool:
    """Tell whether states are of the same kind and count the same steps."""
    if any(state.keys() != states[0].keys() or "step" not in state for state in states):
        return False
    steps = torch.stack([torch.as_tensor(state["step"], dtype=torch.float32) for state in states])
    return bool((steps == steps[0]).all())
