"""What trials of a sweep take on one GPU where they share their training steps: one base, and each its own adapter.

A further trial adds its rows to the batch, and its adapter with gradients and AdamW's moments; the base stays one.
"""

from dataclasses import dataclass, field, replace

from lsr_scale.config import RunConfig
from lsr_scale.config.deepspeed import SHIPPED, beyond_a_trial
from lsr_scale.config.training import longest_row
from lsr_scale.config.trials import Sweep
from lsr_scale.planning.fit import reserve
from lsr_scale.planning.planner import Plan, plan
from lsr_scale.planning.stages import GIB
from lsr_scale.training.steps.sharing import alone_reasons, sharing_fallback_reason

_BYTES_PER_PARAMETER = 4 * 4  # a float32 factor, its gradient and two moments


@dataclass(frozen=True)
class TogetherPlan:
    """The plan of a sweep's largest trial, and what each further one of its size adds, in GiB.

    The largest has the most tokens at a time, and of those the most parameters.
    `alone_because` is why trials cannot share a step, as far as runs tell; then one is in memory at a time. Where some
    can, `num_sharing` is how many, and `alone` has the names of the others, and why they cannot.
    """

    trial: str
    num_trials: int
    one: Plan
    further_gib: float
    num_sharing: int
    alone_because: str | None = None
    alone: dict[str, str] = field(default_factory=dict)

    def gib(self, number: int) -> float:
        """Return what so many take."""
        return self.one.memory_gib.total + (number - 1) * self.further_gib

    def totals(self) -> dict[int, float]:
        """Return what 1, 2, 4, ... of them take, and all."""
        all_of_them = self.num_sharing
        numbers = [2**power for power in range(all_of_them.bit_length()) if 2**power < all_of_them]
        return {number: round(self.gib(number), 4) for number in [*numbers, all_of_them]}

    def most(self, card: float) -> int:
        """Return how many fit a GPU of so many GiB beside the reserve, at a time; 0 where not one does."""
        left = card - reserve(card) - max(self.one.memory_gib.total, self.one.memory_gib.loading)
        if left < 0 or self.alone_because:
            return int(left >= 0)
        return min(self.num_sharing, 1 + int(left / self.further_gib))


def _size_key(run: RunConfig) -> str:
    """Return a text that is the same for runs, of one base, with as many tokens at a time and parameters."""
    rows = run.training["per_device_train_batch_size"], longest_row(run.training), run.training.get("packing")
    return str((run.adapter.model_dump(), run.training["method"], *rows))


def plan_together(sweep: Sweep) -> TogetherPlan:
    """Return what a sweep's trials take; nothing is loaded.

    Raises:
        UserError: as `plan`.
    """
    kinds = {_size_key(trial.run): trial for trial in sweep.trials}
    plans = {name: plan(trial.run, trace=False) for name, trial in kinds.items()}
    largest = kinds[max(plans, key=lambda name: (plans[name].tokens_per_gpu, plans[name].trainable_parameters))]
    one, alone = plan(largest.run), alone_reasons({trial.name: trial.run for trial in sweep.trials})
    sharing = [trial.run for trial in sweep.trials if trial.name not in alone]
    alone_because = sharing_fallback_reason(sharing)
    one = replace(one, table=[row for row in one.table if not beyond_a_trial(SHIPPED[row.stage])], sharded={})
    if alone_because:
        return TogetherPlan(largest.name, len(sweep.trials), one, 0.0, 1, alone_because)
    rows = 2 * largest.run.training["per_device_train_batch_size"]
    twice = plan(
        largest.run.model_copy(update={"training": {**largest.run.training, "per_device_train_batch_size": rows}})
    )
    work = [part.memory_gib.activations + part.memory_gib.workspace for part in (one, twice)]
    further = work[1] - work[0] + one.trainable_parameters * _BYTES_PER_PARAMETER / GIB
    return TogetherPlan(largest.name, len(sweep.trials), one, further, len(sharing), alone=alone)
