"""The trained parameters and their optimizer's state, unsharded and by parameter name, saved from and loaded into any
engine.

Engines shard these tensors in ways of their own: a rank of DeepSpeed's ZeRO holds a slice of one flat float32 tensor a
group, DDP and a single process hold all. A checkpoint depends on none of that. Tensors are copied, never computed, so a
run that resumes on the same number of processes is equal bit for bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from lsr_scale.errors import UserError

PARAMETER, OPTIMIZER = "parameter/", "optimizer/"


def collect(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors by name, on the CPU, and the scalars; a collective, for shards are gathered.

    Names are `parameter/NAME` (float32 masters, unsharded) and `optimizer/NAME/KEY`, such as `optimizer/NAME/exp_avg`;
    NAME is the parameter's in the model.

    Raises:
        UserError: for an optimizer whose state under ZeRO belongs to no single parameter.
        RuntimeError: for a tensor that is empty, of another shape than the model's, or not finite: a bug.
    """
    zero = _zero_optimizer(trainer)
    flats = _flats(zero) if zero else {}
    plain = {} if zero else _plain_state(trainer)
    if zero:
        _link_state(zero)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in _trained(trainer):
        if zero:
            full, state = _from_zero(zero, name, parameter, flats[id(parameter)])
        else:
            full, state = parameter, plain[name]
        tensors[PARAMETER + name] = full.detach().to("cpu", torch.float32, copy=True).contiguous()
        for path, value in _leaves(state, OPTIMIZER + name):
            if isinstance(value, torch.Tensor):
                tensors[path] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[path] = value
        saved = tensors[PARAMETER + name]
        if saved.shape != parameter.shape:
            raise RuntimeError(f"{name}: {list(saved.shape)} gathered, {list(parameter.shape)} in the model")
        if not torch.isfinite(saved).all():
            raise RuntimeError(f"{name}: not finite, so not saved")
    empty = [path for path, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise RuntimeError(f"empty tensors: {empty[:3]}")
    return tensors, scalars


def restore(trainer: Trainer, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Load what `collect` returned, under the same engine or another, with as many processes or not."""
    restore_parameters(trainer, tensors)
    zero = _zero_optimizer(trainer)
    states: dict[str, dict[str, Any]] = {name: {} for name, _ in _trained(trainer)}
    for path, value in (*tensors.items(), *scalars.items()):
        if path.startswith(OPTIMIZER):
            name, *keys = path.removeprefix(OPTIMIZER).split("/")
            inner = states[name]
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = value
    if zero:
        _into_zero(zero, trainer, states)
        return
    optimizer, names = base_optimizer(trainer), _names_in_order(trainer)
    current = optimizer.state_dict()
    current["state"] = {index: states[name] for index, name in enumerate(names) if states[name]}
    optimizer.load_state_dict(current)


def restore_parameters(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> None:
    """Load the parameters alone."""
    zero = _zero_optimizer(trainer)
    flats = _flats(zero) if zero else {}
    for name, parameter in _trained(trainer):
        value = tensors[PARAMETER + name]
        parameter.data.copy_(value)
        if zero:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value.to(flats[id(parameter)].device))


def base_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """Return torch's (or bitsandbytes') optimizer under what accelerate and DeepSpeed wrapped around it."""
    zero = _zero_optimizer(trainer)
    if zero:
        return zero.optimizer
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def optimizer_name(trainer: Trainer) -> str:
    """Return what a checkpoint calls the optimizer: those of one name read each other's state."""
    kind = type(base_optimizer(trainer))
    return getattr(kind, "saved_as", kind.__name__)


def parameter_groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the optimizer's current settings, such as `lr`, one dictionary a group."""
    groups = base_optimizer(trainer).param_groups
    return [{key: value for key, value in group.items() if _is_plain(value)} for group in groups]


def restore_groups(trainer: Trainer, saved: list[dict[str, Any]]) -> None:
    """Load what `parameter_groups` returned."""
    groups = base_optimizer(trainer).param_groups
    for group, values in zip(groups, saved, strict=True):
        wrong = [k for k, v in values.items() if isinstance(group.get(k), int | float) and isinstance(v, str)]
        if wrong:
            raise TypeError(f"{wrong[0]}: expected a number, got {values[wrong[0]]!r:.60}")
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "params"})


def restore_schedule(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Load a schedule's state; the rate is that of its step in this run, which may be longer than the saved one.

    Of a run that was to end there the saved rate would be 0, for one step.
    """
    schedule: Any = trainer.lr_scheduler
    schedule.load_state_dict(saved)
    while hasattr(schedule, "scheduler"):  # accelerate's and DeepSpeed's wrappers
        schedule = schedule.scheduler
    if not isinstance(schedule, LambdaLR):
        return
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule._last_lr = rates
    for group, rate in zip(base_optimizer(trainer).param_groups, rates, strict=True):
        group["lr"] = rate


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, int | float | str) for item in value) and len(value) > 0
    return value is None or isinstance(value, int | float | str)


def _trained(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    model: Any = trainer.model
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of everything in nested dictionaries."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def _names_in_order(trainer: Trainer) -> list[str]:
    """Return the parameters' names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in _trained(trainer)}
    return [names[id(p)] for group in base_optimizer(trainer).param_groups for p in group["params"]]


def _plain_state(trainer: Trainer) -> dict[str, dict[str, Any]]:
    state = base_optimizer(trainer).state_dict()["state"]
    return {name: state.get(index, {}) for index, name in enumerate(_names_in_order(trainer))}


def _zero_optimizer(trainer: Trainer) -> Any:
    """Return DeepSpeed's ZeRO optimizer, None where the state is not sharded."""
    if not trainer.is_deepspeed_enabled:
        return None
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    return optimizer if isinstance(optimizer, ZeROOptimizer) else None


def _flats(zero: Any) -> dict[int, torch.Tensor]:
    """Return the flat float32 partition in which each parameter's slice lies, by the parameter's id."""
    flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
    return {id(parameter): flat for flat, group in zip(flats, groups, strict=True) for parameter in group}


def _link_state(zero: Any) -> None:
    """Have each parameter find its share of the optimizer's state.

    DeepSpeed does so once, after the first step of the first group, when the others have no state: those that are not
    decayed, or LoRA+'s second factors.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _from_zero(
    zero: Any, name: str, parameter: torch.nn.Parameter, flat: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return a parameter's master and state, gathered from the shards of all processes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, Any] = {}
    for key, value in zero.optimizer.state[flat].items():
        if isinstance(value, torch.Tensor) and value.shape == flat.shape and value.is_floating_point():
            state[key] = safe_get_full_optimizer_state(parameter, key)
        elif isinstance(value, torch.Tensor) and value.numel() != 1:
            raise UserError(
                f"training.optim: {type(zero.optimizer).__name__} keeps {key!r} of {name} in blocks over all "
                "parameters, which cannot be saved by parameter under ZeRO-1 to 3; use adamw_torch, or set "
                "deepspeed.config to zero0"
            )
        else:
            state[key] = value
    full = safe_get_full_fp32_param(parameter)
    assert full is not None, f"{name}: no float32 master in the engine"
    return full, state


def _into_zero(zero: Any, trainer: Trainer, states: dict[str, dict[str, Any]]) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    flats = _flats(zero)
    fused = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for name, parameter in _trained(trainer):
        flat = flats[id(parameter)]
        for key, value in states[name].items():
            held = zero.optimizer.state[flat]
            if not isinstance(value, torch.Tensor):
                held[key] = value
            elif value.shape != parameter.shape:
                held[key] = value.to(flat.device) if fused else value.clone()
            elif key not in held:
                held[key] = torch.zeros_like(flat)
    _link_state(zero)
    for name, parameter in _trained(trainer):
        for key, value in states[name].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                safe_set_full_optimizer_state(parameter, value.to(flats[id(parameter)].device), key)
