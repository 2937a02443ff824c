"""A run, from its YAML to a folder that a person can read: train, evaluate, what the folder holds, its plots."""
