"""Kahneman-Tversky optimization: TRL's KTOTrainer, on completions that are desirable or not.

    loss = w_d [1 - sigmoid(beta (log p(y) - log r(y) - KL))]    of a desirable y
           w_u [1 - sigmoid(beta (KL - log p(y) + log r(y)))]    of another one

p is the model, r the reference (`lsr_scale.training.reference`); the KL is that of the batch's prompts with each
other's completions, so rows keep their order: https://huggingface.co/papers/2402.01306
"""

from typing import Any

from transformers import Trainer

from lsr_scale import distributed
from lsr_scale.config import RunConfig
from lsr_scale.data.completions import TokenizesRows
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import check_head_runs
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.evaluation_means import EvaluationMeans
from lsr_scale.training.steps.finite_check import FiniteCheck


class EvaluationOfLabels(EvaluationMeans):
    """Evaluations whose rewards are means over all desirable completions, and over all others."""

    def weight_of(self, name: str, inputs: Any) -> float:
        """Return how much a batch's value counts for: of one label the rows that have it."""
        label = {"chosen": True, "rejected": False}.get(name.rpartition("/")[2])
        if label is None:
            return super().weight_of(name, inputs)
        return sum(distributed.gather([sum(bool(one) is label for one in inputs["label"])]))

    def means_of(self, kept: dict[str, list[Any]]) -> dict[str, float]:
        """Return the means; the margin is that between two of them, also where batches have one label alone."""
        means = super().means_of(kept)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


BASES = (Resumable, FiniteCheck, EngineSteps, EvaluationOfLabels, OwnOptimizers, TokenizesRows)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    """Return the trainer; see `methods.sft`."""
    from trl import KTOTrainer

    check_head_runs()

    class AdapterKTOTrainer(*BASES, KTOTrainer):
        pass

    return AdapterKTOTrainer(**options)
