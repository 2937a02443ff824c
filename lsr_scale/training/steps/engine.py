"""A trainer whose steps under DeepSpeed cost the host little and never make it wait: a GPU is to have work meanwhile.

DeepSpeed is made for large parameters: it copies, reduces, measures and frees the gradient of each by itself, and reads
their norm in every step. An adapter has a thousand small ones, for which that takes a tenth of a 7B model's step. Here
they are one vector, averaged and clipped at once, and nothing is read that is not logged.

That takes a class of our own in place of DeepSpeed's ZeRO optimizer (`zero_optimizer`), and DeepSpeed's engine makes
its optimizer itself, so the class is changed afterwards. What does without that costs more, or gives something up. A
step of 448 factors on each of two CPU processes (`benchmarks/speed/engine_steps.py`; all have the same losses and
norms, and only DeepSpeed's ZeRO-1 and DistributedDataParallel as they come walk over the model's modules):

| | operators | collectives | Python calls |
|---|---:|---:|---:|
| patched, ZeRO-1 to 3 | 32,734 | 3 | 27,505 |
| DeepSpeed's ZeRO-1 as it comes | 43,472 | 67 | 82,364 |
| with the settings that spare it most | 38,458 | 3 | 35,677 |
| DistributedDataParallel as it comes | 39,415 | 2 | 86,454 |
| with one bucket, of which gradients are views | 40,744 | 1 | 28,353 |
| and ZeroRedundancyOptimizer | 39,176 | 3 | 28,450 |
| one all-reduce, DeepSpeed's engine at stage 0, ZeroRedundancyOptimizer | 34,241 | 3 | 27,401 |

The last is as fast. But ZeroRedundancyOptimizer gives whole parameters to processes: of a head among `modules_to_save`
one holds all moments, where ZeRO-1 holds a share on each. Its state can be had on one process alone, pickled. And
`offload_optimizer` needs DeepSpeed's ZeRO optimizer in any case: there would be two ways to hold the state.

So what is relied on is listed and checked (`deepspeed_api`): a release that lacks it is refused before a model is
loaded, and `make test` tries the newest one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from lsr_scale.config import offloads_optimizer
from lsr_scale.training.steps import deepspeed_api

_Base: Any = Trainer


class EngineSteps(_Base):
    """Steps by DeepSpeed for a trainer; goes before it among a class's bases. Without DeepSpeed it changes nothing."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with without_engine_gradients(self.accelerator.state.deepspeed_plugin.deepspeed_config):
            prepared = super()._prepare_for_training(*args, **kwargs)
        skipping = getattr(self, "skipping", None)
        patch_engine(self.deepspeed, self.args.max_grad_norm, skipping.decide if skipping else lambda norm: None)
        return prepared

    def _clip_grad_norm(self, model: Any) -> Any:
        """Return the norm of the gradients, which the engine has clipped by now."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.get_global_grad_norm()  # not by `_get_grad_norm`, which the trainer calls once a step
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients; of an engine's as a tensor that nobody waited for."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.get_global_grad_norm()
        return super()._get_grad_norm(model, grad_norm)


@contextmanager
def without_engine_gradients(config: dict[str, Any]) -> Iterator[None]:
    """Have an engine that is made here neither hook nor clip gradients; `patch_engine` sees to them.

    Args:
        config: DeepSpeed's configuration; it is as before after this, since Trainer compares it with its arguments. One
            that offloads the optimizer is left as it is: DeepSpeed reduces and clips its gradients itself.
    """
    if offloads_optimizer(config):
        yield
        return
    clipping, zero = config.get("gradient_clipping"), config.get("zero_optimization", {})
    changed = dict(zero)
    if zero.get("stage", 0) > 0:
        # stage 2 would hook every parameter; `FlatZeroOptimizer` shards gradients as it does
        changed |= {"stage": 1, "compute_grad_norm": False, "overlap_comm": False, "contiguous_gradients": False}
    config |= {"gradient_clipping": 0.0, "zero_optimization": changed}
    try:
        yield
    finally:
        config |= {"gradient_clipping": clipping, "zero_optimization": zero}


def patch_engine(engine: Any, max_norm: float, decide: Callable[[Tensor], None] = lambda norm: None) -> None:
    """Have DeepSpeed's engine average and clip all gradients at once, if it was made `without_engine_gradients`.

    Args:
        engine: DeepSpeed's.
        max_norm: Of all gradients, of all processes, as one vector; 0 clips nothing.
        decide: Told that norm, the same on every process, before a step is taken.

    Raises:
        UserError: if this release of DeepSpeed lacks what is relied on here.
    """
    deepspeed_api.check_engine(engine)
    optimizer, module = engine.optimizer, engine.module
    module.train()  # all of it: PEFT puts adapters in training mode into a base that is not
    # DeepSpeed's own walk over all modules of a model in every step
    engine.train = lambda mode=True: module.training == mode or module.train(mode)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine.zero_grad = lambda: [setattr(parameter, "grad", None) for parameter in trained]
    if engine.gradient_clipping() > 0:
        return  # the optimizer is offloaded
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0

        def clip(*_: Any) -> None:
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(trained, max_norm or math.inf, foreach=True)
            decide(engine._global_grad_norm)

        optimizer.register_step_pre_hook(clip)
    elif not getattr(optimizer, "compute_grad_norm", True):
        from lsr_scale.training.steps.zero_optimizer import FlatZeroOptimizer  # imports DeepSpeed

        FlatZeroOptimizer.convert(optimizer, max_norm, decide)
