"""What a run will take in parameters and memory, without weights, network or GPU."""

from lsr_scale.planning.fit import Fit, fit
from lsr_scale.planning.planner import Plan, plan
from lsr_scale.planning.tables import render

__all__ = ["Fit", "Plan", "fit", "plan", "render"]
