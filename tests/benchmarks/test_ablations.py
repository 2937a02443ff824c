"""The ablations: every setting is an ordinary run, equal to others where it says so, and marked where too large."""

import json

import pytest

from benchmarks.quality import ablations, commonsense_data, trials
from benchmarks.quality.ablations import AXES, BASE, PROVIDERS, SMOLLM2_SHAPES
from benchmarks.quality.trials import TUNING_SEED, Trial
from lsr_scale.adapters import METHODS
from lsr_scale.config import run_from_dict
from tests.helpers.tiny_runs import save_llama


def parameters(name):
    provider = PROVIDERS[name]
    method = METHODS[provider.method]
    config = method.config_class(**provider.options)
    total = 0
    for shape in SMOLLM2_SHAPES:
        for factor in method.parameter_shapes(*shape, config).values():
            count = 1
            for length in factor:
                count *= length
            total += count
    return total


def test_every_setting_is_on_an_axis_and_every_axis_has_the_base_or_lora_beside_it():
    assert {name for names in AXES.values() for name in names} == set(PROVIDERS)
    assert all(BASE in names for names in AXES.values())


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_setting_is_an_ordinary_run(name, tmp_path):
    for point in PROVIDERS[name].points:
        config = ablations.config_of(tmp_path, "builtin:smollm2-135m-instruct", False, Trial("small", name, 0), point)
        run = run_from_dict(config)
        assert all(source.split == "dev" for source in run.eval.tasks)  # no test row is read


def test_settings_that_are_called_equal_have_equal_parameters():
    assert len({parameters(name) for name in AXES["rank"]}) == 1
    assert parameters("skewed") > 1.3 * parameters(BASE)
    assert parameters("skewed_equal") == pytest.approx(parameters(BASE), rel=0.03)


def test_sides_larger_than_dense_are_marked():
    assert not ablations.oversized(PROVIDERS[BASE])
    assert (576, 192) in ablations.oversized(PROVIDERS["r1_s64"])
    assert ablations.oversized(PROVIDERS["lora_8"]) == []


def test_a_run_leaves_its_accuracy_on_the_development_part(data, tmp_path):
    commonsense_data.prepare(data, tmp_path / "work")
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    trial = Trial("small", "r16_s2", TUNING_SEED, 0)
    result = ablations.measure(tmp_path / "work", model, True, trial, dict(PROVIDERS["r16_s2"].points[0]))
    assert result["condition_down_max"] > 0
    assert set(result["accuracy"]) == set(ablations.TASKS)
    assert result["score"] == pytest.approx(sum(result["accuracy"].values()) / 3)
    assert result["steps"] == 2
    assert str(tmp_path) not in json.dumps(result["config"]["data"])
    trials.add(tmp_path / "results", trial.name, result)
    with pytest.raises(ValueError, match="trial of the program"):
        ablations.tables(tmp_path / "results")


def test_tables_mark_what_is_larger_than_dense(tmp_path):
    for name in ("r16_s16", "r16_s48", "lora_8"):
        trial = Trial("small", name, 0)
        row = {"task": "small", "provider": name, "seed": 0, "score": 0.5, "settings": {}, "adapter_parameters": 1}
        if name.startswith("r16"):
            row |= {"condition_down_max": 1.234, "condition_up_max": 2.0}
        trials.add(tmp_path, trial.name, row)
    lines = ablations.tables(tmp_path)
    assert lines[-2:] == ["| r16_s16 | 1.23 | 2.00 |", "| r16_s48 | 1.23 | 2.00 |"]
    assert sum(line.startswith("| r16_s48, larger than dense | 1 | 50.0 | 1 |") for line in lines) == 1
    assert sum(line.startswith("| r16_s16 | 1 |") for line in lines) == 7


def test_a_dry_run_counts_shared_settings_once(tmp_path, capsys):
    assert ablations.main(["--dry-run", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{len(PROVIDERS) * (trials.NUM_POINTS + 3)} of " in out
