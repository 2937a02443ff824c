"""Kahneman-Tversky optimization: TRL's KTOTrainer, on completions that are desirable or not.

    loss = w_d [1 - sigmoid(beta (log p(y) - log r(y) - KL))]    of a desirable y
           w_u [1 - sigmoid(beta (KL - log p(y) + log r(y)))]    of another one

p is the model, r the reference (`lsr_scale.training.reference`); the KL is that of the batch's prompts with each
other's completions, so rows keep their order: https://huggingface.co/papers/2402.01306
"""

from typing import Any

from transformers import Trainer

from lsr_scale.config import RunConfig
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import check_head_runs
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.finite_check import FiniteCheck

BASES = (Resumable, FiniteCheck, EngineSteps, OwnOptimizers)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    """Return the trainer; see `methods.sft`."""
    from trl import KTOTrainer

    check_head_runs()

    class AdapterKTOTrainer(*BASES, KTOTrainer):
        pass

    return AdapterKTOTrainer(**options)
