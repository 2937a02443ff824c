"""Checkpoints: what is saved, whether it is complete, and how a run resumes from it with any number of processes."""
