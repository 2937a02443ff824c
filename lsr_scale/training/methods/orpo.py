"""Odds ratio preference optimization: TRL's ORPOTrainer, on pairs of a chosen and a rejected completion, without a
reference.

    loss = cross-entropy(prompt and chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))

odds(y) = p(y) / (1 - p(y)), p(y) the geometric mean of the tokens': https://huggingface.co/papers/2403.07691
"""

from typing import Any

from transformers import Trainer

from lsr_scale import distributed
from lsr_scale.config import RunConfig
from lsr_scale.data.completions import as_texts
from lsr_scale.fused.loss import IGNORE_INDEX
from lsr_scale.training.checkpoint.resumable import Resumable
from lsr_scale.training.optimizers.create import OwnOptimizers
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.evaluation_means import EvaluationMeans
from lsr_scale.training.steps.finite_check import FiniteCheck

_Base: Any = Trainer


class WithoutLogits(_Base):
    """TRL's forward pass by the fused head, where `fused_head` is set; goes before TRL's trainer.

    Of the logits TRL logs the mean alone; here that of the positions that are learned, without the padding.
    """

    fused_head = False

    def concatenated_forward(self, model: Any, batch: Any) -> tuple[Any, ...]:
        """Return the mean log-probabilities of chosen and rejected, mean logits of both, and chosen's cross-entropy."""
        if not self.fused_head:
            return super().concatenated_forward(model, batch)
        both = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, attended, labels = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        chosen = len(batch["chosen_labels"])
        wanted = labels.clone()  # of the chosen rows the prompt too
        wanted[:chosen] = ids[:chosen].where(attended[:chosen] == 1, IGNORE_INDEX)
        outputs = model(input_ids=ids, attention_mask=attended, labels=wanted, fused_lm_head=True)
        of_completions = labels[:, 1:] != IGNORE_INDEX
        means = (outputs.log_probs * of_completions).sum(-1) / of_completions.sum(-1)
        of_chosen = outputs.label_mask[:chosen]
        cross_entropy = -outputs.log_probs[:chosen].sum() / of_chosen.sum()
        mean_logits = [outputs.mean_logits[rows].sum() / outputs.label_mask[rows].sum() for rows in _halves(chosen)]
        return means[:chosen], means[chosen:], *mean_logits, cross_entropy

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as TRL does, and count the tokens."""
        if model.training:
            self._tokens += int(sum(inputs[f"{name}_attention_mask"].sum() for name in ("chosen", "rejected")))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the tokens of all processes; every process takes part."""
        if "loss" in logs:
            logs["num_tokens"] = float(sum(distributed.gather([self._tokens])))
        super().log(logs, start_time)


def _halves(chosen: int) -> tuple[slice, slice]:
    return slice(chosen), slice(chosen, None)


BASES = (Resumable, FiniteCheck, EngineSteps, EvaluationMeans, OwnOptimizers, WithoutLogits)


def make_trainer(run: RunConfig, options: dict[str, Any]) -> Trainer:
    """Return the trainer; see `methods.sft`."""
    from trl.experimental.orpo import ORPOTrainer

    class AdapterORPOTrainer(*BASES, ORPOTrainer):
        pass

    tokenizer, num_proc = options["processing_class"], run.training.get("dataset_num_proc")
    parts = {name: options[name] for name in ("train_dataset", "eval_dataset") if options[name] is not None}
    texts = {name: as_texts(rows, tokenizer, num_proc) for name, rows in parts.items()}
    return AdapterORPOTrainer(**{**options, **texts})
