"""The questions of the accuracy comparison: which tasks are trained on, and their train, dev and test parts."""

import dataclasses
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from lsr_scale import files

JOINT = ("arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande")
TEST_SPLITS = {"arc_easy": "test", "arc_challenge": "test", "openbookqa": "test"}  # validation elsewhere


@dataclasses.dataclass(frozen=True)
class Regime:
    """What is trained on, and how often it is seen."""

    tasks: tuple[str, ...]
    epochs: int


REGIMES = {
    "joint": Regime(JOINT, 2),
    "small": Regime(JOINT[:3], 4),
    "joint_long": Regime(JOINT, 6),
    "hellaswag": Regime(("hellaswag",), 4),
    "boolq": Regime(("boolq",), 3),
}


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def held_out(task: str, row: dict[str, Any], share: int) -> bool:
    """Tell whether a row's group falls into the one of `share` parts that is held out.

    Rows of a group stay together: the two sentences of a WinoGrande pair, HellaSwag's contexts of one first sentence,
    the rows of one question elsewhere.
    """
    group = row["question"]
    if task == "winogrande":
        group = row["id"].rpartition("-")[0]
    if task == "hellaswag":
        group = group.split(". ")[0]
        return int(hashlib.sha1(group.encode()).hexdigest(), 16) % share == 0
    return int(hashlib.sha256(f"{task}: {group}".encode()).hexdigest(), 16) % share == 0


def _answered(row: dict[str, Any]) -> tuple[str, str]:
    """Return a question with its right answer, whatever their case and spaces."""
    words = (row["question"], str(row["choices"][row["answer"]]))
    question, answer = (" ".join(text.lower().split()) for text in words)
    return question, answer


def prepare(data: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Write `work/data/<task>/{train,dev,test}.jsonl` and return the rows, hashes and supervised sizes of each part."""
    described: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(task for regime in REGIMES.values() for task in regime.tasks):
        folder = data / task
        if task == "hellaswag":
            everything = _rows(folder / "validation.jsonl.gz")
            test = [row for row in everything if held_out(task, row, 5)]
            train = [row for row in everything if not held_out(task, row, 5)]
            # the groups of the development set by another hash, or they would all be the test's
            dev = [row for row in train if held_out("hellaswag-dev", {"question": row["question"].split(". ")[0]}, 10)]
        else:
            train = _rows(folder / "train.jsonl.gz")
            test = _rows(folder / f"{TEST_SPLITS.get(task, 'validation')}.jsonl.gz")
            dev = [row for row in train if held_out(task, row, 10)]
        seen = {_answered(row) for row in test}
        num = len(train)
        train, dev = ([row for row in rows if _answered(row) not in seen] for rows in (train, dev))
        left_out = num - len(train)
        chosen = {row["id"] for row in dev}
        parts = {"train": [row for row in train if row["id"] not in chosen], "dev": dev, "test": test}
        for part, rows in parts.items():
            lines = (json.dumps({k: v for k, v in row.items() if k != "passage"}, ensure_ascii=False) for row in rows)
            text = "\n".join(lines) + "\n"
            files.write_text(work / "data" / task / f"{part}.jsonl", text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            described.setdefault(task, {})[part] = {"rows": len(rows), "sha256": digest, "characters": len(text)}
        described[task]["train"]["left_out"] = left_out
    return described
