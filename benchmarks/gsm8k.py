"""GSM8K's questions as prompts whose answers are judged: what GRPO is measured and compared on."""

import gzip
import json
from pathlib import Path
from typing import Any

INSTRUCTION = "Reason step by step, then give the final number after ####."


def read(folder: Path, part: str) -> list[dict[str, Any]]:
    """Return the rows of `train` or `test`, with `question` and `answer`, a solution that ends in #### and a number."""
    with gzip.open(folder / f"{part}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file of rows, in which other characters that end lines may stand."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row's question as a conversation that the assistant is to answer."""
    return [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}]


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as GRPO takes it: the prompt, and the line of the solution that has the number."""
    return {"prompt": prompt(row), "answer": row["answer"].rpartition("\n")[2]}
