"""Question files of every task of the accuracy comparison, as the benchmarks read them."""

import gzip
import json
import multiprocessing

import pytest

from tests.helpers.programs import with_libraries


@pytest.fixture(autouse=True)
def _processes_that_need_not_import(monkeypatch):
    """Have the benchmarks' processes forked off one that has imported the libraries: a spawned one takes seconds to."""
    of_method = multiprocessing.get_context

    def get_context(method=None):
        return with_libraries() if method == "spawn" else of_method(method)

    monkeypatch.setattr(multiprocessing, "get_context", get_context)


def rows_of(task, split, count=160):
    for index in range(count):
        question = f"{task} {split} question {index // 2}"
        if task == "hellaswag":
            question = f"Activity {index // 4}: {question}. more {index}"
        # WinoGrande's pairs differ by the end of their id, others repeat a question
        yield {
            "id": f"{task}-{split}-{index // 2}-{index % 2}",
            "question": question,
            "choices": ["a knife", "a broom"],
            "answer": index % 2,
        }


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    from benchmarks.quality.commonsense_data import REGIMES

    folder = tmp_path_factory.mktemp("data")
    for task in {task for regime in REGIMES.values() for task in regime.tasks}:
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows_of(task, split))
    return folder
