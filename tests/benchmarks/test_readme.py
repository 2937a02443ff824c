"""What README says in numbers that no measurement makes: parameters, as `plan` counts them."""

import re

import pytest

from benchmarks import ROOT
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


def test_a_shipped_configuration_is_smaller_than_lora_of_rank_1():
    assert len(ROWS) == 4
    rank_1 = parameters("mistral_lora", rank=1)
    assert f"{rank_1:,}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert parameters("mistral_lsr_small") < rank_1 < parameters("mistral_lsr")
