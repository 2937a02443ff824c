"""Direct preference optimization: TRL's DPOTrainer, on pairs of a chosen and a rejected completion.

    loss = -log sigmoid(beta [(log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))])

p is the model, r the reference (`lsr_scale.training.reference`): https://huggingface.co/papers/2305.18290
"""

from typing import Any

from transformers import Trainer

from lsr_scale.config import RunConfig
from lsr_scale.data.completions import TokenizesRows
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import check_head_runs
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.evaluation_means import EvaluationMeans
from lsr_scale.training.steps.finite_check import FiniteCheck

BASES = (Resumable, FiniteCheck, EngineSteps, EvaluationMeans, OwnOptimizers, TokenizesRows)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    """Return the trainer; see `methods.sft`."""
    from trl import DPOTrainer

    check_head_runs()

    class AdapterDPOTrainer(*BASES, DPOTrainer):
        pass

    return AdapterDPOTrainer(**options)
