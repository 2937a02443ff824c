"""Sweeps: many runs on one base model, which take turns in a process and share their training steps."""
