"""Group relative policy optimization: TRL's GRPOTrainer, on prompts whose completions `training.reward` judges.

    advantage_i = (reward_i - mean) / std                       over the completions of one prompt
    loss = -mean_t min(ratio_t advantage, clip(ratio_t, 1 - epsilon, 1 + epsilon) advantage) + beta KL(p || r)

ratio_t is the model's probability of a token over the one that it was drawn with, r the reference
(`lsr_scale.training.reference`), needed where beta > 0: https://huggingface.co/papers/2402.03300. Completions are the
decoder's (`steps/completions.py`).
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lsr_scale.config import RunConfig
from lsr_scale.data.answered_prompts import longest_prompt
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.methods import check_head_runs
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.completions import DecodedCompletions
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.evaluation_means import EvaluationMeans
from lsr_scale.training.steps.finite_check import FiniteCheck
from lsr_scale.training.steps.log_probs import head_fallback_reason, use_fused_head
from lsr_scale.training.steps.vllm_adapter import sending_adapter

BASES = (Resumable, FiniteCheck, EngineSteps, EvaluationMeans, DecodedCompletions, OwnOptimizers)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Any:
    """Return the trainer; see `methods.sft`. The options have the rewards, `reward_funcs`."""
    from trl import GRPOTrainer

    check_head_runs()

    class AdapterGRPOTrainer(*BASES, GRPOTrainer):
        pass

    del run
    arguments, rewards = options["args"], options["reward_funcs"]
    arguments.reward_weights = [one.reward.weight for one in rewards]
    with sending_adapter() if arguments.use_vllm else nullcontext():
        trainer = AdapterGRPOTrainer(**options)
    base = trainer.model.get_base_model()
    # fused or not: on a CPU TRL's makes the logits of prompts too. A bonus on entropies has its gradient by them
    if not trainer._entropy_bonus_enabled and head_fallback_reason(base, arguments) is None:
        use_fused_head(base, arguments.temperature, only_entropy=True)
        trainer.fused_head = True
    trainer.completions_file = RunFolder(Path(arguments.output_dir)).completions
    longest = longest_prompt(trainer.train_dataset, options["processing_class"])
    trainer.longest_row = longest + arguments.max_completion_length
    return trainer
