"""ZeRO-3 from the first weight on: a model is cut up among the processes while it is loaded, or loaded beside it whole.

Transformers shards what it loads only if nothing is quantized; a quantized model it loads whole on every process. Here
every weight, quantized or not, goes to DeepSpeed the moment it is in place, which keeps this process's part of it. So
no process ever holds more than its share of the model, the quantization states, and one weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import modeling_utils
from transformers.integrations import deepspeed

Shard = Callable[[nn.Module], None]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether ZeRO-3 holds only a part of the parameters here."""
    return any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters())


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """Make or load a model here as if there were no DeepSpeed."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


@contextmanager
def sharding() -> Iterator[Shard]:
    """Shard weights as they are loaded here, if a ZeRO-3 run is set up; nothing changes otherwise.

    Weights that are registered with a module after they got their values are sharded at once. Transformers marks them
    by `_is_hf_initialized`; others, which it has yet to initialize, wait. What is yielded shards what is left in a
    module, itself and all below it, and does nothing without ZeRO-3. Every process must load the same in the same
    order: the first one's values are everybody's.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield lambda module: None
        return
    import deepspeed as engine

    class Init(engine.zero.Init):
        """What stays whole, as factors do, is gathered after each step: all at once, a thousand small tensors."""

        def _all_gather(self, *args: Any, **kwargs: Any) -> Any:
            one_by_one, self.allgather_sequential = self.allgather_sequential, False
            try:
                return super()._all_gather(*args, **kwargs)
            finally:
                self.allgather_sequential = one_by_one

    # the engine goes on with this object: it holds where parts live (offload_param) and who shares them
    zero: Any = Init(module=nn.Module(), config_dict_or_path=deepspeed.deepspeed_config())
    # A buffer for each weight. By default weights that are gathered together are copied out of one buffer, which lives
    # on until the last of them is used: all of them are held twice. (In the file the option sets prefetching to 1.)
    limits = (deepspeed.deepspeed_config() or {}).get("zero_optimization", {})
    zero.allgather_sequential = limits.get("stage3_allgather_sequential", True)

    def shard(module: nn.Module) -> None:
        for child in module.modules():
            for parameter in child.parameters(recurse=False):
                keep_part(parameter)

    def keep_part(parameter: Any) -> None:
        if hasattr(parameter, "CB"):
            parameter.CB = None  # an int8 weight's second reference to its codes would keep them whole
        zero._convert_to_zero_parameters([parameter.requires_grad_(False)])

    def when_registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and getattr(parameter, "_is_hf_initialized", False):
            keep_part(parameter)

    warm_up = modeling_utils.caching_allocator_warmup
    hook = nn.modules.module.register_module_parameter_registration_hook(when_registered)
    # it would take memory for the whole model first
    modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
    try:
        with without_deepspeed():
            yield shard
    finally:
        hook.remove()
        modeling_utils.caching_allocator_warmup = warm_up


def gather(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which these parameters are whole on every process, which all of them must enter."""
    import deepspeed as engine

    return engine.zero.GatheredParameters(parameters)


@contextmanager
def gathered_as_called(model: nn.Module) -> Iterator[None]:
    """Gather the weights of each module of a sharded model when it is called, and let go of them after its forward.

    For forward passes without gradients before there is an engine, whose hooks do the same. Every process must make
    the same calls.
    """
    hooks: list[Any] = []

    def watch(module: nn.Module, own: list[Any]) -> None:
        hooks.append(module.register_forward_pre_hook(lambda *_: own[0].all_gather(param_list=own)))
        hooks.append(module.register_forward_hook(lambda *_: own[0].partition(param_list=own)))

    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
        if own:
            watch(module, own)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
