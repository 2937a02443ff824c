"""What an evaluation found as a mean over its rows; goes before TRL's trainer among a class's bases.

TRL takes the mean of its batches' means, in which the rows of a smaller last batch count for more than others.
"""

import math
from typing import Any

from transformers import Trainer

_Base: Any = Trainer


class EvaluationMeans(_Base):
    """Evaluations whose rewards, accuracies and the like do not depend on how rows fall into batches."""

    _weights: dict[str, list[float]]  # of the values that TRL keeps of an evaluation's batches

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate."""
        self._weights = {}
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, and keep how much each value that TRL keeps of it counts for."""
        outcome = super().prediction_step(model, inputs, *args, **kwargs)
        for name, values in self.kept_of_evaluation().items():
            weights = self._weights.setdefault(name, [])
            weights += [self.weight_of(name, inputs)] * (len(values) - len(weights))
        return outcome

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, of an evaluation the means over all rows in place of its batches' values."""
        if any(name.startswith("eval_") for name in logs):
            kept = self.kept_of_evaluation()
            kept |= {name: [mean] for name, mean in self.means_of(kept).items()}
        super().log(logs, *args, **kwargs)

    def means_of(self, kept: dict[str, list[Any]]) -> dict[str, float]:
        """Return the means of what TRL keeps of an evaluation, of those values that are there."""
        means = {}
        for name, weights in self._weights.items():
            known = [(float(value), weight) for value, weight in zip(kept[name], weights, strict=True)]
            known = [(value, weight) for value, weight in known if not math.isnan(value)]
            if total := sum(weight for _, weight in known):
                means[name] = sum(value * weight for value, weight in known) / total
        return means

    def kept_of_evaluation(self) -> dict[str, list[Any]]:
        """Return what TRL keeps of an evaluation, a value a batch."""
        return (self._stored_metrics if hasattr(self, "_stored_metrics") else self._metrics)["eval"]

    def weight_of(self, name: str, inputs: Any) -> float:
        """Return how much a batch's value counts for: the share of a full batch, over all processes, that its rows are.

        Args:
            name: Of the value.
            inputs: The batch.
        """
        if isinstance(inputs, list):  # completions, several of a row, which accelerate does not count
            return len(inputs) / self.args.eval_batch_size
        batches = self.accelerator.gradient_state
        if batches.end_of_dataloader and batches.remainder > 0:
            return batches.remainder / batches.active_dataloader.total_batch_size
        return 1.0
