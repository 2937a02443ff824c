"""Supervised fine-tuning: TRL's SFTTrainer, the cross-entropy of what is supervised."""

from typing import Any

from transformers import Trainer

from lsr_scale.config import RunConfig
from lsr_scale.data.token_counts import CountsTokens
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import check_head_runs
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.finite_check import FiniteCheck
from lsr_scale.training.steps.graphs import GraphSteps
from lsr_scale.training.steps.head_loss import HeadLoss
from lsr_scale.training.steps.meeting import MeetingSteps

# before TRL's trainer, in this order; none adds a name that another adds
BASES = (CountsTokens, Resumable, FiniteCheck, EngineSteps, MeetingSteps, GraphSteps, HeadLoss, OwnOptimizers)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    """Return the trainer.

    Args:
        run: The run.
        options: What transformers' trainers take, the rows as `build_dataset` made them, and what `CountsTokens` takes.
    """
    from trl import SFTTrainer

    check_head_runs()

    class AdapterSFTTrainer(*BASES, SFTTrainer):
        supervise_assistant = run.training.get("assistant_only_loss") is not False

    return AdapterSFTTrainer(**options)
