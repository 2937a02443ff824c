"""What a run takes, told without weights, network or GPU."""

from lsr_scale.plan.fit import Fit, fit
from lsr_scale.plan.planner import Plan, plan, render

__all__ = ["Fit", "Plan", "fit", "plan", "render"]
