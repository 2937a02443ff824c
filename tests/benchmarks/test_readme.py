"""What README says in numbers that no measurement makes: parameters, as `plan` counts them."""

import re

import pytest

from benchmarks import ROOT
from benchmarks.speed.providers.fused import LsrAdapter
from lsr_scale.adapters.inject import inject
from lsr_scale.config import load_run
from lsr_scale.model import load_config, meta_model

ROW = re.compile(r"^\| `\w+` .*\(configs/(\w+)\.yaml\)\) \| ([\d,]+) \|", re.MULTILINE)
ROWS = ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def parameters(name: str, **changes: object) -> int:
    run = load_run(ROOT / "configs" / f"{name}.yaml")
    section = {**run.adapter.options, **changes}
    config = load_config(run.model.name)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    model = inject(meta_model(config, "causal_lm"), run.adapter.method, section, "causal_lm")
    return layers * sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "count"), ROWS)
def test_an_adapters_size_is_what_is_trained(name, count):
    assert parameters(name) == int(count.replace(",", ""))


@pytest.mark.parametrize("model", ["mistral", "llama2", "llama3"])
def test_the_shipped_lsr_is_smaller_than_lora_of_rank_1(model):
    ours, rank_1 = parameters(f"{model}_lsr"), parameters(f"{model}_lora", rank=1)
    assert ours < rank_1
    text = (ROOT / "configs" / f"{model}_lsr.yaml").read_text(encoding="utf-8")
    assert f"{ours / 1e6:.2f} M parameters" in text
    assert f"{rank_1 / 1e6:.2f} M" in text


def test_the_table_has_both_sizes_of_lsr_and_lora_s_rank_1_between_them():
    assert len(ROWS) == 4
    rank_1 = parameters("mistral_lora", rank=1)
    assert f"{rank_1:,}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert parameters("mistral_lsr") < rank_1 < parameters("mistral_lsr_large")


def test_the_speeds_are_of_the_configuration_that_readme_names():
    run = load_run(ROOT / "configs" / "mistral_lsr_large.yaml")
    assert "r=16 s=16 is [`mistral_lsr_large`]" in (ROOT / "README.md").read_text(encoding="utf-8")
    measured = LsrAdapter.options
    assert {name: run.adapter.options[name] for name in measured} == measured
