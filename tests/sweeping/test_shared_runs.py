"""Runs that share a base and their training steps, through the whole of `train`: each is what it is alone."""

import functools
import re

import pytest
import torch

from lsr_scale.model import load_base_for
from lsr_scale.model.share import share_base
from lsr_scale.run.train import train
from lsr_scale.sweeping.places import Places
from lsr_scale.training.callbacks.signals import Signals
from lsr_scale.training.shared import Shared
from tests.conftest import SEVEN_LINEARS
from tests.helpers.tiny_runs import completions, do, factors, metrics, results, save_llama, tiny_run, write_rows

# differ from run to run
MEASURED = re.compile(r"wall_s|training_s|.*tokens_per_s|mfu|.*memory_gib|.*_runtime|.*_per_second")


def separately(members):
    """Stand in for a joint step: each member's own model computes its loss."""
    losses = []
    for member in members:
        inputs = {name: value for name, value in member.inputs.items() if name != "head"}
        loss = member.model(**inputs, use_cache=False, num_items_in_batch=member.divisor).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def flatly(members):
    """Do the same, with each member's gradients as one vector, which is written over in the next step."""
    losses = separately(members)
    for member in members:
        trained = [parameter for parameter in member.model.parameters() if parameter.requires_grad]
        member.gradient = torch.cat([parameter.grad.reshape(-1) for parameter in trained])
        for parameter in trained:
            parameter.grad = None
    return losses


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_llama(folder / "model")
    write_rows(folder / "long.jsonl", completions(40))
    write_rows(folder / "held-out.jsonl", completions(4))
    tiny_run(folder)
    return folder


def trial(place, folder, adapter, **training):
    """Return a run of float32, with one kind of validation."""
    training = {"output_dir": str(folder), "fused": "off", "eval_strategy": "steps", "eval_steps": 5, **training}
    data = {"train": [str(place / "long.jsonl")], "validation": [str(place / "held-out.jsonl")]}
    model = {"name": str(place / "model"), "quantization": "none", "dtype": "float32"}
    adapter = {"target_modules": SEVEN_LINEARS, **adapter}
    return tiny_run(place, model=model, data=data, adapter=adapter, training=training, eval={"tasks": []})


TRIALS = {
    "lsr": ({"method": "lsr", "rank": 4, "separation_rank": 2}, {"max_steps": 20, "seed": 1}),
    "lora": (
        {"method": "lora", "rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"max_steps": 12, "learning_rate": 1e-2, "seed": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    ),
    "kron": (
        {"method": "kron_lora", "rank": 2, "left_out": 4, "dropout": 0.0},
        {"max_steps": 20, "seed": 3, "data_seed": 7, "warmup_steps": 3, "max_grad_norm": 0.0, "logging_steps": 3},
    ),
}


def trials(place, folder, **more):
    return {
        name: trial(place, folder / name, adapter, **{**training, **more})
        for name, (adapter, training) in TRIALS.items()
    }


def together(runs, size=3, step=separately, signals=None, before=lambda meet: None, **options):
    """Do runs that share; return how they ended by their names, and what each said."""
    first = next(iter(runs.values()))
    base, signals = load_base_for(first.model, 0), signals or Signals()
    ended, said = {}, {name: [] for name in runs}

    def start(name, meet):
        def meet_others(member):
            before(name)
            return meet(member)

        shared = Shared(lambda run: share_base(base), meet_others, signals, said[name].append)
        return train(runs[name], quiet=True, shared=shared, **options)

    def took(end):
        ended[end.start.args[0]] = end.error or end.value

    starts = iter([functools.partial(start, name) for name in runs])
    with signals.listening():
        Places(step, size, signals).work(functools.partial(next, starts, None), took)
    return ended, said


def without_measured(row):
    return {name: value for name, value in row.items() if not MEASURED.fullmatch(name)}


def assert_equal(folder, alone):
    """Check that two runs trained on the same rows and came to the same."""
    of_trl = {"entropy", "mean_token_accuracy"}  # TRL's loss logs them in training
    for row, expected in zip(metrics(folder), metrics(alone), strict=True):
        assert set(expected) - set(row) <= of_trl
        for name in without_measured(row):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (name, row["step"])
    for name, factor in factors(folder).items():
        torch.testing.assert_close(factor, factors(alone)[name], rtol=0, atol=1e-6)
    found, expected = results(folder), results(alone)
    assert found.keys() == expected.keys()
    for name, value in without_measured(found).items():
        close = pytest.approx(expected[name], rel=1e-5, abs=1e-6) if isinstance(value, float) else expected[name]
        assert value == close, name


@pytest.fixture(scope="module")
def alone(place):
    return {name: do(run) for name, run in trials(place, place / "alone").items()}


@pytest.mark.parametrize("step", [separately, flatly])
@pytest.mark.parametrize("size", [3, 2])
def test_each_is_what_it_is_alone(place, tmp_path, alone, step, size, capsys):
    ended, said = together(trials(place, tmp_path), size, step)
    assert capsys.readouterr().out == ""
    for name, folder in ended.items():
        assert_equal(folder, alone[name])
        assert f"run folder: {folder.path}" in said[name]
        assert any(line.startswith("done in") for line in said[name])
