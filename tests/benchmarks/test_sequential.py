"""One task after another: the program around two runs, and its table."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import commonsense, commonsense_methods, sequential, trials
from benchmarks.quality.trials import Trial
from tests.helpers.tiny_runs import do_all_here, save_llama


def test_the_second_run_starts_from_the_first_at_the_chosen_rate(tmp_path):
    setting = commonsense.Setting(tmp_path)
    chosen = sequential.providers()
    for name, provider in chosen.items():
        (point,) = provider.points
        rates = [other["learning_rate"] * sequential.SLOWER for other in commonsense_methods.PROVIDERS[name].points]
        assert point["learning_rate"] in rates
        trial = Trial("arc_easy-hellaswag", name, 1, 0)
        first, second = (sequential.config(trial, point, setting, when) for when in (False, True))
        assert first["adapter"]["start_from"] is None
        assert second["adapter"]["start_from"] == first["training"]["output_dir"]
        assert [Path(run["data"]["train"][0]["path"]).name for run in (first, second)] == ["arc_easy", "hellaswag"]
        assert first["eval"]["tasks"] == second["eval"]["tasks"]


def test_both_tasks_are_trained_and_scored_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trials, "do_all", do_all_here)
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    words = ["--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--smoke"]
    words += ["--model", model, "--seeds", "1", "--providers", "lora_8", "--pairs", "arc_challenge-arc_easy"]
    assert sequential.main(words) == 0
    result = trials.load(tmp_path / "results")["arc_challenge-arc_easy-lora_8-seed0"]
    for when in ("zero_shot", "after_first", "after_second"):
        assert set(result[when]) == {"arc_challenge", "arc_easy"}
    assert [Path(run["training"]["output_dir"]).name for run in result["configs"]] == ["first", "second"]
    assert str(tmp_path / "work") not in json.dumps(result["configs"])
    assert result["score"] == result["after_second"]["arc_challenge"]
    capsys.readouterr()
    assert sequential.main(words) == 0
    assert "seed0" not in capsys.readouterr().out, "it is not done twice"
    sequential.main(["--table", "--results", str(tmp_path / "results")])
    assert "LoRA r=8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sequential.main([*words[:4], "--smoke"])


def test_the_table_says_what_was_lost(tmp_path):
    for seed, left in ((0, 0.4), (1, 0.5)):
        result = {
            **{"task": "arc_challenge-arc_easy", "provider": "lsr_4", "seed": seed, "score": left},
            "after_first": {"arc_challenge": 0.6, "arc_easy": 0.2},
            "after_second": {"arc_challenge": left, "arc_easy": 0.7},
            "adapter_parameters": 698880,
        }
        trials.add(tmp_path, str(seed), result)
    (row,) = sequential.table(tmp_path).splitlines()[4:]
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert cells == ["2", "60.0 +- 0.0", "45.0 +- 7.1", "-15.0 +- 7.1", "70.0 +- 0.0"]
