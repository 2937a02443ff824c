"""Data: rows from anywhere, multiple-choice prompt forms, and the datasets that the trainer takes."""
