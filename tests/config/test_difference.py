"""What `lsr-scale config` prints: a run's file of what differs from the defaults, which resolves to the same run."""

import pytest
import yaml

from lsr_scale.cli import main
from lsr_scale.config import difference, dump_yaml, load_run, run_from_dict
from lsr_scale.config.run import read_run
from tests.helpers.run_text import CONFIGS

SHIPPED = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.endswith("_sweep")]
RUN = {
    "model": {"name": "some/model"},
    "adapter": {"method": "lsr", "target_modules": ["q_proj"]},
    "data": {"train": ["rows.jsonl"]},
}


def short(data):
    return difference(run_from_dict(data), data).to_yaml()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_short_form_of_a_shipped_run_is_a_screen_and_resolves_to_the_same_run(file, tmp_path):
    run, written = read_run(file)
    text = difference(run, written).to_yaml()
    (tmp_path / "short.yaml").write_text(text)

    assert load_run(tmp_path / "short.yaml").model_dump() == run.model_dump()
    assert text.count("\n") <= 30
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"config": "zero3"}},
        {"deepspeed": {"config": None}},
        {"deepspeed": {"config": {"zero_optimization": {"stage": 1}}}},
        {"data": {"train": [{"path": "a", "limit": 3}, "b"], "validation": ["c"]}},
        {"training": {"eval_strategy": "no", "report_to": "none", "learning_rate": 1}},
        {"adapter": {"method": "kron_lora", "left_out": 4, "rank_pattern": {"q_proj": 2}}},
        {"eval": {"tasks": ["arc_easy"], "before": False}},
        {"model": {"name": "~/a: b # c", "quantization": "none"}},
    ],
    ids=str,
)
def test_any_short_form_resolves_to_the_same_run(changes, tmp_path):
    data = RUN | changes
    run = run_from_dict(data)
    (tmp_path / "short.yaml").write_text(short(data))

    assert load_run(tmp_path / "short.yaml").model_dump() == run.model_dump()


def test_defaults_are_left_out_and_what_is_derived_is_marked():
    text = short(RUN | {"adapter": {"method": "lsr", "rank": 4}, "training": {"seed": 42}, "eval": None})

    assert text == (
        "model:\n  name: some/model\nadapter:\n  method: lsr\n  rank: 4\n  alpha: 8.0  # derived\n"
        "data:\n  train: [rows.jsonl]\n"
    )
    assert "config: zero3" in short(RUN | {"deepspeed": {"config": "zero3"}})


def test_all_prints_every_value(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.dump(RUN))

    assert main(["config", str(tmp_path / "run.yaml"), "--all"]) == 0
    assert capsys.readouterr().out == dump_yaml(load_run(tmp_path / "run.yaml"))
    assert main(["config", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out == short(RUN)
    assert main(["config", "--json-schema", "--all"]) == 2
