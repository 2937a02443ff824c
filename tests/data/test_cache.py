"""Datasets in the cache folder: tokenized once, never a fault where that cannot be."""

import os
import time
from types import SimpleNamespace

import pytest
from datasets import Dataset

from lsr_scale.data import cache as module
from lsr_scale.data.cache import cached, digest
from tests.helpers.tiny_runs import completions, do, factors, same, save_llama, tiny_run, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MIN_ROWS", 10)
    return tmp_path / "cache/datasets"


def rows(number=12, word="a"):
    return Dataset.from_dict({"prompt": [f"{word} {i}" for i in range(number)], "completion": ["b"] * number})


def test_a_cached_dataset_has_the_same_rows_and_a_small_one_stays_in_memory(cache):
    dataset = rows()
    found = cached(dataset)
    assert found.to_dict() == dataset.to_dict()
    assert found.cache_files
    assert cached(rows())._fingerprint == found._fingerprint, "so what map makes of it is found again"
    assert len(list(cache.iterdir())) == 1
    small = rows(3)
    assert cached(small) is small


def test_the_result_of_map_on_a_cached_dataset_is_reused():
    def length(row):
        return {"length": len(row["prompt"])}

    (first,), (second,) = (cached(rows()).map(length).cache_files for _ in range(2))
    assert first == second
    made = os.stat(first["filename"])
    cached(rows()).map(length)
    assert os.stat(first["filename"]).st_mtime_ns == made.st_mtime_ns


def test_a_changed_row_is_another_dataset(cache):
    assert digest(rows()) == digest(rows())
    others = [rows(word="c"), rows(13), rows().rename_column("prompt", "text"), rows().add_column("n", range(12))]
    assert len({digest(dataset) for dataset in [rows(), *others]}) == 5


@pytest.mark.parametrize("what", ["a file is there", "no space", "damaged"])
def test_where_nothing_can_be_cached_rows_stay_in_memory(tmp_path, monkeypatch, cache, what):
    dataset = rows()
    if what == "a file is there":
        (tmp_path / "cache").write_text("")
    if what == "no space":
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    if what == "damaged":
        cached(dataset)
        (folder,) = cache.iterdir()
        (folder / "state.json").write_text("{")
    assert cached(dataset) is dataset


def test_datasets_unused_for_a_month_are_removed(cache):
    cached(rows(word="old"))
    (old,) = cache.iterdir()
    os.utime(old, (time.time() - 32 * 86_400,) * 2)
    cached(rows())
    assert not old.exists()
    assert len(list(cache.iterdir())) == 1


def test_a_run_is_the_same_with_and_without_the_cache(tmp_path, monkeypatch, cache):
    save_llama(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", completions(12))
    found = []
    for fewest in (10, 10, 1000):
        monkeypatch.setattr(module, "MIN_ROWS", fewest)
        training = {"output_dir": str(tmp_path / f"run{len(found)}"), "save_strategy": "no"}
        found.append(factors(do(tiny_run(tmp_path, training=training, eval={"tasks": []}))))
    (folder,) = cache.iterdir()
    assert list(folder.glob("cache-*.arrow")), "tokens lie beside the rows"
    assert same(found[0], found[1])
    assert same(found[0], found[2])
