"""The accuracy comparison: its parts do not overlap, its runs are ordinary ones, its statistics find what is there."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

from benchmarks.quality import commonsense, commonsense_data, rounded_adapters, trials
from benchmarks.quality.commonsense import TUNING_SEED, Run, Setting
from benchmarks.quality.commonsense_data import REGIMES
from benchmarks.quality.commonsense_methods import PROVIDERS
from benchmarks.report import commonsense_tables
from lsr_scale.config import run_from_dict
from tests.helpers.tiny_runs import do_all_here, save_llama


def test_parts_do_not_overlap_and_pairs_stay_together(data, tmp_path):
    described = commonsense_data.prepare(data, tmp_path)
    for task, parts in described.items():
        rows = {
            part: [json.loads(line) for line in (tmp_path / "data" / task / f"{part}.jsonl").read_text().splitlines()]
            for part in parts
        }
        groups = {part: {row["id"].rpartition("-")[0] for row in part_rows} for part, part_rows in rows.items()}
        if task == "hellaswag":
            groups = {part: {row["question"].split(". ")[0] for row in part_rows} for part, part_rows in rows.items()}
        assert groups["train"].isdisjoint(groups["dev"])
        assert groups["train"].isdisjoint(groups["test"])
        assert groups["dev"].isdisjoint(groups["test"])
        assert all(rows.values())
        if task != "hellaswag":
            assert len(rows["train"]) + len(rows["dev"]) == 160
            assert len(rows["dev"]) < 40
    assert commonsense_data.prepare(data, tmp_path) == described


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_point_is_a_run_that_a_user_could_write(name, tmp_path):
    for index, point in enumerate(PROVIDERS[name].points):
        run = Run("joint", "bf16", name, TUNING_SEED, index)
        parsed = run_from_dict(commonsense.config_of(run, point, Setting(tmp_path)), run.name)
        assert parsed.training["learning_rate"] == point["learning_rate"]
        wanted = PROVIDERS[name].options | point
        assert {key: parsed.adapter.options[key] for key in wanted if key != "learning_rate"} == {
            key: value for key, value in wanted.items() if key != "learning_rate"
        }


def test_every_prefix_of_the_plan_is_of_use():
    runs = commonsense.plan(["headline", "quantized"], PROVIDERS, 5)
    rows = len(PROVIDERS)
    assert len(runs) == len(set(runs)) == 6 * rows + 5 * rows + 18
    # six points, then the first seed, for one provider after the other
    assert [run.tunes for run in runs[: 7 * rows]] == ([True] * 6 + [False]) * rows
    assert [run.seed for run in runs[7 * rows : 9 * rows]] == [1] * rows + [2] * rows
    assert commonsense.plan(["headline"], PROVIDERS, 0) == [run for run in runs if run.tunes]


def test_runs_leave_a_result_each_and_are_not_done_twice(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commonsense, "do_all", do_all_here)
    monkeypatch.setattr(commonsense, "BATCH", 8)  # attention between all tokens of a step takes the longest
    setting = Setting(tmp_path / "work", str(save_llama(tmp_path / "model", num_hidden_layers=2)), smoke=True)
    hashes, results = commonsense_data.prepare(data, setting.work), tmp_path / "results"
    tuning = Run("small", "bf16", "lora_2", TUNING_SEED, 3)
    missing = Run("small", "bf16", "lora_2", 0, None)  # its point is not known before all were tried
    assert commonsense.execute([tuning, missing], hashes, setting, results, 1, math.inf) == 0
    assert "1 runs left, 0 failed" in capsys.readouterr().out
    result = trials.load(results)[tuning.name]
    assert (result["part"], result["seed"], result["settings"]) == ("dev", TUNING_SEED, {"learning_rate": 2e-3})
    assert set(result["tasks"]) == set(REGIMES["small"].tasks)
    assert all(len(task["after"]["right"]) == 8 for task in result["tasks"].values())
    assert result["trainable_parameters"] > 0
    assert result["data"]["openbookqa"] == hashes["openbookqa"]
    assert str(tmp_path / "work") not in json.dumps(result["config"])
    folder = setting.work / "runs" / tuning.name
    by_bits = rounded_adapters.score_rounded(folder)
    assert by_bits["4"]["bytes"] < by_bits["8"]["bytes"]
    assert {task: len(row["right"]) for task, row in by_bits["8"]["tasks"].items()} == dict.fromkeys(result["tasks"], 8)
    capsys.readouterr()
    assert commonsense.execute([tuning], hashes, setting, results, 1, math.inf) == 0
    assert capsys.readouterr().out == "0 runs left, 0 failed\n"
    with pytest.raises(ValueError, match="trial"):
        commonsense_tables.load(results)


def made_up(provider, seed, accuracy, parameters=100, examples=400):
    generator = np.random.default_rng([seed, *provider.encode()])
    tasks = {}
    for more, task in enumerate(REGIMES["joint"].tasks):
        number = examples + 100 * more
        shared = np.random.default_rng(7).random(number)  # the same questions are hard for all
        right = 0.8 * shared + 0.2 * generator.random(number) < accuracy
        word = "".join(str(int(value)) for value in right)
        tasks[task] = {"after": {"accuracy": float(right.mean()), "ids_sha256": task, "right": word}}
    return {
        **{"regime": "joint", "base": "bf16", "provider": provider, "seed": seed, "part": "test"},
        **{"settings": {"learning_rate": 1e-3}, "trainable_parameters": parameters, "tasks": tasks},
    }


def test_a_difference_is_found_where_there_is_one_and_nowhere_else():
    seeds = range(5)
    better, worse, same = (
        {seed: made_up(name, seed, accuracy) for seed in seeds}
        for name, accuracy in (("lora_8", 0.60), ("lora_2", 0.55), ("lsr_4", 0.60))
    )
    found = commonsense_tables.compare(better, worse)
    mean_accuracy = commonsense.mean_accuracy
    assert found.value == pytest.approx(
        statistics.fmean(mean_accuracy(better[seed]) - mean_accuracy(worse[seed]) for seed in seeds)
    ), "tasks weigh the same, whatever their numbers of examples"
    assert found.interval[0] > 0
    assert found.separates
    assert found.p < 0.05
    found = commonsense_tables.compare(better, same)
    assert not found.separates
    assert found.p > 0.05
    assert commonsense_tables.compare({0: better[0]}, worse) is None
    worse[1]["tasks"]["piqa"]["after"]["ids_sha256"] = "others"
    with pytest.raises(ValueError, match="piqa, seed 1: the two were scored on different examples"):
        commonsense_tables.compare(better, worse)


def test_tables_say_no_separation_and_plots_know_their_results(tmp_path):
    for name, accuracy in (("lora_8", 0.60), ("lora_2", 0.55), ("lsr_4", 0.60)):
        for seed in range(3):
            trials.add(tmp_path, f"joint-bf16-{name}-seed{seed}", made_up(name, seed, accuracy))
    ((stem, (text, results)),) = commonsense_tables.sections(tmp_path).items()
    assert (stem, len(results)) == ("joint-bf16", 9)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert "no separation" in lines["**LSR-Adapt** r=4 s=16"].split("|")[-3]
    assert "p = " in lines["LoRA r=2"]
    short = commonsense_tables.short_table(commonsense_tables.load(tmp_path)).splitlines()
    assert [line.split("|")[1].strip() for line in short[2:]][-1] == "LoRA r=2"  # the best first
    commonsense_tables.draw(results, tmp_path / "a.png")
    from PIL import Image

    assert Image.open(tmp_path / "a.png").info["Source"] == commonsense_tables.digest(results)


def test_a_quantized_base_is_compared_with_itself_on_bf16_whose_separation_counts(tmp_path):
    rows = [made_up(name, seed, 0.6 if name == "lora_8" else 0.5) for name in ("lora_8", "lora_2") for seed in range(3)]
    worse = [{**made_up("lora_8", seed, 0.55), "base": "nf4"} for seed in range(3)]
    worse += [{**made_up("lsr_4", seed, 0.5), "base": "nf4"} for seed in range(3)]
    lines = commonsense_tables.table([*rows, *worse], "joint", "nf4").splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[-3:-1]] == ["against LoRA r=8", "against itself on bf16"]
    lora, lsr = ([cell.strip() for cell in line.split("|")[-3:-1]] for line in lines[2:])
    assert lora[0] == ""
    assert lora[1].startswith("-")
    assert "p = " in lora[1]
    assert "p = " in lsr[0]
    assert lsr[1] == ""  # it was not run on bf16


def test_the_best_point_stands_out_and_unfinished_tuning_is_left_out():
    def tuned(provider):
        return [
            {**made_up(provider, TUNING_SEED, 0.5 + 0.02 * index), "point": index, "part": "dev", "settings": point}
            for index, point in enumerate(PROVIDERS[provider].points)
        ]

    stale = [{**tuned("lsr_4")[0], "settings": {"learning_rate": 7.0}}, *tuned("lsr_4")[1:]]
    lines = commonsense_tables.tuning_table([*tuned("lora_2"), *tuned("lora_8")[:1], *stale]).splitlines()
    (row,) = lines[2:]
    assert "LoRA r=2" in row
    # in the order of their rates, the largest but one the last of the points
    assert [("**" in cell) for cell in row.split("|")[2:-1]] == [False] * 4 + [True, False]


def test_only_results_of_todays_points_count():
    points = PROVIDERS["lora_2"].points
    runs = [Run("joint", "bf16", "lora_2", TUNING_SEED, index) for index in range(len(points))]
    seed, done = Run("joint", "bf16", "lora_2", 0, None), {}
    for index, run in enumerate(runs):
        result = {**made_up("lora_2", TUNING_SEED, 0.5 + 0.02 * (index == 3)), "settings": points[index]}
        done[run.name] = result
    assert commonsense.best_point(seed, done) == 3
    assert commonsense.finished(runs[0], points[0], done) is not None
    done[runs[0].name] = {**result, "settings": {"learning_rate": 7.0}}
    assert commonsense.finished(runs[0], points[0], done) is None
    assert commonsense.best_point(seed, done) is None


def test_rounded_factors_are_near_and_small():
    generator = torch.Generator().manual_seed(0)
    names = [f"base_model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight" for n in (0, 1) for side in "AB"]
    factors = {name: torch.randn(64, 48, generator=generator) for name in names}
    for bits, error in ((8, 0.01), (4, 0.12)):
        unpacked, size = rounded_adapters.rounded(factors, bits)
        assert unpacked.keys() == factors.keys()
        assert size < 1.35 * sum(factor.numel() for factor in factors.values()) * bits / 8
        for name, factor in factors.items():
            assert float((unpacked[name] - factor).norm() / factor.norm()) < error
    with pytest.raises(ValueError, match="_proj"):
        rounded_adapters.rounded({"lm_head.lora_A.weight": torch.zeros(2, 2)}, 8)


def test_what_rounding_loses_is_a_table():
    results = [made_up("lsr_4", seed, 0.6) for seed in range(3)]
    for result in results:
        tasks = {task: {"accuracy": row["after"]["accuracy"] - 0.01} for task, row in result["tasks"].items()}
        result["rounded"] = {bits: {"bytes": 1000, "tasks": tasks} for bits in ("8", "4")}
    row = commonsense_tables.rounded_table(results).splitlines()[-1]
    assert row == "| **LSR-Adapt** r=4 s=16 | 3 | 1,000 | 1.00 +- 0.00 | 1,000 | 1.00 +- 0.00 |"
