"""Sweeps: many runs on one base model, which take turns in a process and share their training steps.

The package is not called `sweep`: that is the function `lsr_scale.sweep`.
"""
