"""Checkpoints: what is saved, whether it is whole, and how a run resumes from it with any number of processes."""
