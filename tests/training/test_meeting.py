"""A trial's own part of a joint step: what its micro-batches leave is one step's gradient, whoever holds it."""

from typing import Any

import pytest
import torch
from torch import nn

from lsr_scale.training.steps.flat_adamw import FlatAdamW
from lsr_scale.training.steps.meeting import MeetingSteps

NAMES = ("first", "second", "third", "last")
BATCHES = {
    "all have one": [NAMES, NAMES],
    "the second batch has few": [NAMES, ("last",)],
    "the first batch has few": [("last",), NAMES],
    "each has others": [("first", "second"), ("third", "last")],
    "some never have one": [("second", "last"), ("last",)],
    "one of a group never has one": [("second", "third", "last"), ("second", "third", "last")],
}


class Trainer(MeetingSteps):
    """The part of a trainer that a meeting needs; its batches say which parameters get a gradient."""

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], given: bool, groups: int = 1) -> None:
        self.model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in NAMES})
        for place, parameter in enumerate(self.model.parameters()):
            parameter.data = torch.arange(6.0).reshape(2, 3) + 10 * place
        self._trained, self.given = list(self.model.parameters()), given
        parts = [self._trained] if groups == 1 else [self._trained[:2], self._trained[2:]]
        self.optimizer = optimizer_class([{"params": part} for part in parts], lr=0.1)
        self.current_gradient_accumulation_steps, self._tokens = 2, 0
        self.is_deepspeed_enabled = False
        self.meet = self.do_batch

    def is_skipped(self, loss, inputs):
        return False

    def count_tokens(self, head):
        pass

    def do_batch(self, member: Any) -> torch.Tensor:
        number, names = member.inputs["batch"]
        wanted = [name in names for name in self.model]
        values = [torch.full((2, 3), float(number + 1 + place)) for place in range(len(NAMES))]
        if self.given and all(wanted):
            member.gradient = torch.cat([value.reshape(-1) for value in values])
        else:
            for parameter, value, wants in zip(self._trained, values, wanted, strict=True):
                assert parameter.grad is None, "a joint step begins without gradients"
                parameter.grad = value if wants else None
        return torch.tensor(1.0)

    def do_step(self, batches) -> torch.Tensor:
        for batch in enumerate(batches):
            self.training_step(self.model, {"batch": batch, "head": {}}, num_items_in_batch=1)
        norm = self._get_grad_norm(self.model)
        self.optimizer.step()
        self._drop_joint_gradients()
        assert all(parameter.grad is None for parameter in self._trained)
        return norm


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("optimizer_class", [FlatAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("case", BATCHES)
def test_gradients_of_all_micro_batches_are_in_the_step(case, optimizer_class, given, groups):
    trainer = Trainer(optimizer_class, given, groups)
    reference = Trainer(torch.optim.AdamW, given)
    for batches in (BATCHES[case], BATCHES["all have one"], BATCHES[case]):
        norm = trainer.do_step(batches)
        for number, names in enumerate(batches):
            for place, (name, parameter) in enumerate(zip(reference.model, reference._trained, strict=True)):
                if name in names:
                    value = torch.full((2, 3), float(number + 1 + place))
                    parameter.grad = value if parameter.grad is None else parameter.grad + value
        of_all = [parameter.grad for parameter in reference._trained if parameter.grad is not None]
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(of_all))
        reference.optimizer.step()
        reference.optimizer.zero_grad()
    for mine, theirs in zip(trainer._trained, reference._trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
