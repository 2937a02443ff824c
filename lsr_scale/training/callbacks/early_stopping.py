"""`training.early_stopping`: training ends where evaluations no longer improve; resuming knows of those before."""

from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from lsr_scale import distributed


class StopEarly(EarlyStoppingCallback):
    """Transformers' early stopping, the same on all processes, whose count of evaluations outlives a checkpoint.

    Transformers writes the count into a checkpoint, and reads no callback's state back by default.

    Attributes:
        stopped: Training ended here.
    """

    stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count of a run that resumes."""
        self.early_stopping_patience_counter = _count(state)
        self.stopped = self.was_over(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Count an evaluation without improvement; end training after `patience` of them."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        count: Any = distributed.broadcast(self.early_stopping_patience_counter)
        self.early_stopping_patience_counter = count
        self.stopped = count >= self.early_stopping_patience
        if self.stopped:  # what else stops training, such as its last step, stands
            control.should_training_stop = True

    def was_over(self, state: TrainerState) -> bool:
        """Tell whether the run that saved this state had stopped early, by the patience that there is now."""
        return _count(state) >= self.early_stopping_patience

    def in_words(self, args: TrainingArguments, state: TrainerState) -> str:
        """Return where and why training ended, in a sentence."""
        number, least = self.early_stopping_patience, self.early_stopping_threshold
        times = "evaluation" if number == 1 else f"{number} evaluations"
        by = f" by more than {least:g}" if least else ""
        return (
            f"stopped early after step {state.global_step}: {args.metric_for_best_model} is no better{by} for {times}"
        )


def early_stopping_of(trainer: Trainer) -> StopEarly | None:
    """Return a trainer's callback that stops it early, None where it has none."""
    return next((one for one in trainer.callback_handler.callbacks if isinstance(one, StopEarly)), None)


def _count(state: TrainerState) -> int:
    """Return how many evaluations without improvement a checkpoint's state tells of."""
    callbacks: Any = state.stateful_callbacks or {}
    saved = callbacks.get(StopEarly.__name__)
    count = saved.get("attributes", {}).get("early_stopping_patience_counter", 0) if isinstance(saved, dict) else 0
    return count if isinstance(count, int) and state.global_step else 0
