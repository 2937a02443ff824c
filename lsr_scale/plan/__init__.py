"""What a run will take in parameters and memory, without weights, network or GPU."""

from lsr_scale.plan.fit import Fit, fit
from lsr_scale.plan.planner import Plan, plan
from lsr_scale.plan.tables import render

__all__ = ["Fit", "Plan", "fit", "plan", "render"]
