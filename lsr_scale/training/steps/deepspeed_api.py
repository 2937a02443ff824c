"""What is relied on of DeepSpeed beyond its documentation, and whether the release that is installed still has it.

`training.steps.engine` patches an engine, `training.steps.zero_optimizer` its ZeRO optimizer, and
`training.checkpoint.trained_state` reads and writes what that optimizer shards. `make test` runs them with DeepSpeed's
newest release, too (`NEWEST_DEEPSPEED`).
"""

import importlib
import inspect
from typing import Any

from lsr_scale.errors import UserError

TESTED = "0.19.8"  # the release that is installed with the embedded default, see the Makefile

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
# what is called or overridden, by module:name, with the parameters that it is called with
SIGNATURES: dict[str, tuple[str, ...] | None] = {
    f"{_ENGINE}.gradient_clipping": ("self",),
    f"{_ENGINE}.get_global_grad_norm": ("self",),
    f"{_ZERO}.reduce_gradients": ("self", "pipeline_parallel"),
    f"{_ZERO}.get_gradient_for_reduction": ("self", "param"),
    f"{_ZERO}.step": ("self", "closure"),
    f"{_ZERO}._update_model_bit16_weights": ("self", "group_index"),
    "deepspeed.runtime.zero.stage_1_and_2:GradPartitionBufferGroup": ("grad_buffers", "flat_partition"),
    "deepspeed.runtime.base_optimizer:ZeROOptimizer": None,  # isinstance
    "deepspeed.utils:lazy_init_hp_params_optimizer_state": ("lp_param_list", "flat_hp_partition", "optimizer_state"),
    "deepspeed.utils:safe_get_full_fp32_param": ("param",),
    "deepspeed.utils:safe_get_full_optimizer_state": ("param", "optim_state_key"),
    "deepspeed.utils:safe_set_full_fp32_param": ("param", "value"),
    "deepspeed.utils:safe_set_full_optimizer_state": ("param", "value", "optim_state_key"),
}
# settings of `zero_optimization` that are written
SETTINGS = ("stage", "compute_grad_norm", "overlap_comm", "contiguous_gradients", "offload_optimizer")
# attributes that an engine and its ZeRO optimizer have once they are made
ENGINE_ATTRIBUTES = ("module", "optimizer", "_global_grad_norm")
OPTIMIZER_ATTRIBUTES = (
    *("optimizer", "compute_grad_norm", "dp_process_group", "real_dp_process_group", "partition_size"),
    *("bit16_groups", "bit16_groups_flat", "round_robin_bit16_groups", "round_robin_bit16_padding"),
    *("single_partition_of_fp32_groups", "averaged_gradients", "_global_grad_norm"),
)


def check_release() -> None:
    """See that DeepSpeed has the functions and settings that are relied on, with their parameters.

    Raises:
        UserError: naming the one that is missing, DeepSpeed's version, and what to install.
    """
    for path, expected in SIGNATURES.items():
        module, _, name = path.partition(":")
        try:
            value: Any = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError):
            raise _missing(f"{module}.{name}") from None
        if expected is None:
            continue
        parameters = inspect.signature(value).parameters.values()
        names = tuple(parameter.name for parameter in parameters)
        needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if names[: len(expected)] != expected or any(parameter.name not in expected for parameter in needed):
            raise _missing(f"{module}.{name}({', '.join(expected)}): it takes ({', '.join(names)})")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in SETTINGS:
        if name not in DeepSpeedZeroConfig.model_fields:
            raise _missing(f"zero_optimization.{name}")


def check_engine(engine: Any) -> None:
    """See that an engine, and its optimizer if that is a ZeRO optimizer, have the attributes that are relied on.

    Raises:
        UserError: naming the one that is missing, DeepSpeed's version, and what to install.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    pairs = [(engine, name) for name in ENGINE_ATTRIBUTES]
    if isinstance(engine.optimizer, ZeROOptimizer):
        pairs += [(engine.optimizer, name) for name in OPTIMIZER_ATTRIBUTES]
    for owner, name in pairs:
        if not hasattr(owner, name):
            raise _missing(f"{type(owner).__name__}.{name}")


def _missing(what: str) -> UserError:
    import deepspeed

    return UserError(
        f"deepspeed.config: DeepSpeed {deepspeed.__version__} has no {what}, which training under it relies on; "
        f"pip install deepspeed=={TESTED}, or train without its engine: --set deepspeed.config=null"
    )
