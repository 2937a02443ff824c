"""What was measured, and how. Every script runs from the repository's root, as `python -m benchmarks.FOLDER.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_RESULTS = ROOT / "benchmarks/results"
