"""The texts of the frontier: two regimes with their training rows, and the answers whose likelihood is measured."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gsm8k
from benchmarks.quality.commonsense_data import JOINT, prepare
from lsr_scale import files
from lsr_scale.data.sources import load_rows
from lsr_scale.data.tasks import Example, examples
from lsr_scale.scoring.scorer import encode_pairs

REGIMES: dict[str, tuple[str, ...]] = {"commonsense": JOINT, "gsm8k": ("gsm8k",)}
EPOCHS = {"commonsense": 2, "gsm8k": 3}  # of the trials with seeds; one where a rate is chosen
PART_OF = {True: "dev", False: "test"}  # by whether a trial is for tuning


def write_parts(data: Path, work: Path, regime: str) -> dict[str, Any]:
    """Write a regime's rows to `work/data/<task>/{train,dev,test}.jsonl`; return rows and hashes of every part.

    Of GSM8K a tenth of the train part is held out by the hash of its question.
    """
    if regime == "commonsense":
        return prepare(data, work)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "dev": []}
    for row in gsm8k.read(data / "gsm8k", "train"):
        held_out = int(hashlib.sha256(row["question"].encode()).hexdigest(), 16) % 10 == 0
        parts["dev" if held_out else "train"].append(row)
    parts["test"] = gsm8k.read(data / "gsm8k", "test")
    described = {}
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(work / "data" / "gsm8k" / f"{part}.jsonl", text)
        described[part] = {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"gsm8k": described}


def questions(work: Path, regime: str, part: str, limit: int | None) -> dict[str, list[Example]]:
    """Return what is scored of a part, by task: GSM8K's solutions are questions with one choice."""
    if regime == "commonsense":
        folders = {task: str(work / "data" / task) for task in REGIMES[regime]}
        return {task: examples(load_rows(path, split=part))[:limit] for task, path in folders.items()}
    pairs = [(_prompt(row), f" {row['answer']}") for row in _gsm8k(work, part, limit)]
    return {"gsm8k": [Example(str(i), (q,), (a,), 0, (len(a),)) for i, (q, a) in enumerate(pairs)]}


def judged(work: Path, part: str, limit: int | None) -> list[dict[str, str]]:
    """Return GSM8K's questions as they are asked in training, and the line of each solution that has the number."""
    rows = _gsm8k(work, part, limit)
    return [{"prompt": _prompt(row), "answer": row["answer"].rpartition("\n")[2]} for row in rows]


def _gsm8k(work: Path, part: str, limit: int | None) -> list[dict[str, str]]:
    return [json.loads(line) for line in gsm8k.lines_of(work / "data" / "gsm8k" / f"{part}.jsonl")[:limit]]


def _prompt(row: dict[str, str]) -> str:
    """Return a question as `lsr_scale.data.formats` writes rows with a question and an answer."""
    return f"Question: {row['question']}\nAnswer:"


def num_tokens(tokenizer: Any, rows: Sequence[Example]) -> "np.ndarray":
    """Return how many tokens the right answer of each question has."""
    pairs = [(row.contexts[0], row.continuations[0]) for row in map(right_alone, rows)]
    return np.array([len(target) for _, target in encode_pairs(tokenizer, pairs)])


def right_alone(row: Example) -> Example:
    """Return a question with its right answer as its one choice."""
    right = row.answer
    return Example(row.id, (row.contexts[right],), (row.continuations[right],), 0, (row.normalizers[right],))
