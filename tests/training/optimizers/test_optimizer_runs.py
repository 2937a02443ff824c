"""Runs with LoRA-RITE, LoRA-Pro and LoRA+: wired, resumed to the same bits, shared steps, what is refused."""

import pytest
import torch

from lsr_scale import UserError, adapters
from lsr_scale.adapters import METHODS
from lsr_scale.config.optimizers import OWN_OPTIMIZERS
from lsr_scale.training.arguments import trainer_arguments
from lsr_scale.training.optimizers.lora_pro import LoraPro
from lsr_scale.training.optimizers.lora_rite import LoraRite
from tests.helpers.tiny_runs import do, factors, metrics, same, save_llama, tiny_run
from tests.sweeping.test_shared_runs import assert_equal, flatly, together

QUICK = {"model": {"quantization": "none"}, "eval": {"tasks": []}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    save_llama(folder / "model", num_hidden_layers=2)
    tiny_run(folder)
    return folder


def run_in(place, folder, optim, method="lora", adapter=(), **training):
    training = {"output_dir": str(folder), "optim": optim, "max_steps": 4, "save_steps": 2, **training}
    return tiny_run(place, adapter={"method": method, **dict(adapter)}, training=training, **QUICK)


@pytest.mark.parametrize(
    ("optim", "method"),
    [("lora_rite", "lsr"), ("lora_pro", "kron_lora"), ("lora_plus", "lora")],
)
def test_a_run_ends_lower_and_resumes_to_the_same_bits(place, tmp_path, optim, method):
    rate = 1e-2 if optim == "lora_rite" else 1e-3
    adapter = {"dropout": 0.0} if method == "kron_lora" else {}
    given = {"learning_rate": rate, "max_grad_norm": 1.0, "weight_decay": 0.01}
    taken = []
    whole = do(run_in(place, tmp_path / "whole", optim, method, adapter, **given), take=taken.append)
    kinds = {"lora_rite": LoraRite, "lora_pro": LoraPro, "lora_plus": torch.optim.AdamW}
    optimizer = taken[0].optimizer.optimizer
    assert type(optimizer) is kinds[optim]
    if optim == "lora_plus":
        assert sorted({group["initial_lr"] for group in optimizer.param_groups}) == [rate, 16 * rate]
    losses = [row["loss"] for row in metrics(whole) if "loss" in row]
    assert losses[-1] < losses[0]
    do(run_in(place, tmp_path / "half", optim, method, adapter, **given), stop_after_step=2)
    continued = do(run_in(place, tmp_path / "half", optim, method, adapter, **given), resume="auto")
    assert same(factors(whole), factors(continued))


@pytest.mark.parametrize("optim", ["lora_rite", "lora_plus"])
def test_in_a_joint_step_each_has_its_own(place, tmp_path, optim):
    expected = do(run_in(place, tmp_path / "alone", optim))
    ended, _ = together({"lora": run_in(place, tmp_path / "shared", optim)}, 1, flatly)
    assert_equal(ended["lora"], expected)


def test_optimizers_of_pairs_take_the_methods_whose_sides_are_sums():
    small = {"kadaptation": {"phm_dim": 4, "rank": 2}}
    with_sides = {"lora"}
    for name, method in METHODS.items():
        if not hasattr(method, "kron_sides"):
            continue
        config = adapters.peft_config(name, small.get(name, {"rank": 1}))
        shapes = method.parameter_shapes(48, 24, config)
        if method.kron_sides({key: torch.empty(shape) for key, shape in shapes.items()}):
            with_sides.add(name)
    assert with_sides == {*OWN_OPTIMIZERS["lora_rite"].methods}


@pytest.mark.parametrize(
    ("optim", "method", "more", "expected"),
    [
        (
            "lora_plus",
            "lsr",
            {},
            "training.optim: lora_plus is for adapter.method: lora, and this is lsr; set it to adamw_torch_fused",
        ),
        ("lora_rite", "krona", {}, "lora_rite is for adapter.method: lora or lsr or kron_lora, and this is krona"),
        (
            "lora_pro",
            "lora",
            {"optim_args": "x=1"},
            "training.optim_args: 'x' is no argument of lora_pro; it takes none",
        ),
        ("lora_rite", "lora", {"optim_args": "escaped_mas=false"}, "did you mean 'escaped_mass'"),
        ("lora_rite", "lora", {"optim_args": "escaped_mass=1"}, "escaped_mass: expected true or false, got '1'"),
        (
            "lora_plus",
            "lora",
            {"optim_args": "lr_ratio=-1"},
            "lr_ratio: expected a number above 0, at most 1e6, got -1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(place, tmp_path, optim, method, more, expected):
    with pytest.raises(UserError) as error:
        run_in(place, tmp_path, optim, method, {"rank": 1}, **more)
    assert expected in str(error.value)


def test_weighted_terms_and_shards_are_refused(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="term_weights: lora_pro takes each side's terms as products of two factors"):
        run_in(place, tmp_path, "lora_pro", "lsr", {"term_weights": True})
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"ZeRO-2 cuts all parameters into shards.*set deepspeed.config to zero0"):
        trainer_arguments(run_in(place, tmp_path, "lora_rite"), None)  # the default is zero2
