"""Hostile inputs to every command: `runner.py` tries them, the others have their shapes, by area."""
