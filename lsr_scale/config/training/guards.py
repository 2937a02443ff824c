"""What is watched while training, and what is done then: values that are not finite, terms that cancel."""

from typing import Literal

from lsr_scale.config.training.subject import Subject

GUARDS = Subject(
    defaults={
        "on_nonfinite": "stop",
        "condition_guard": "warn",
        "condition_tolerance": 2.0**-7,  # see lsr_scale/adapters/condition.py
    },
    bounds={"condition_tolerance": {"gt": 0}},
    own={
        "on_nonfinite": (
            Literal["stop", "skip"],
            "A batch whose loss is not finite, or a step whose gradient is not, ends the run ('stop') or counts for "
            "nothing ('skip'); both are noted in nonfinite.jsonl.",
        ),
        "condition_guard": (
            Literal["warn", "rescale", "fp32"],
            "What is done where the terms of a sum of Kronecker products cancel so far that rounding the factors may "
            "change an update by more than condition_tolerance: 'warn', 'rescale' (orthogonal terms) or 'fp32'.",
        ),
        "condition_tolerance": (float, "Tolerated relative change of an update by rounding its factors."),
    },
)
