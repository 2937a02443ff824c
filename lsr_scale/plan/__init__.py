"""What a run takes, told without weights, network or GPU."""

from lsr_scale.plan.planner import Plan, plan, render

__all__ = ["Plan", "plan", "render"]
