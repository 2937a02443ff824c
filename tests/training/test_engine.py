"""The patched engine of DeepSpeed: two processes step as one does, and a release that lacks something is refused.

`make test` runs this with the release that is installed and with the newest.
"""

import json
import os
import re
from types import SimpleNamespace

import pytest
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from lsr_scale import distributed
from lsr_scale.config import dump_yaml, load_run
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import arguments, assembly
from lsr_scale.training.steps import deepspeed_api
from tests.helpers.launch import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import two_processes
from tests.helpers.tiny_runs import completions, save_llama, tiny_run, write_rows
from tests.ranks.run_after_run import EXACT, logged
from tests.ranks.two_ranks_engine import CLIPPED, RUNS
from tests.ranks.two_ranks_sharding import DEFAULT, first_trainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    save_llama(folder / "model")
    write_rows(folder / "rows.jsonl", completions(8))
    tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def seen(place):
    """Run two_ranks_engine.py once for all tests."""
    status, out, err = run_ranks("tests.ranks.two_ranks_engine", place)
    assert status == 0, out + err
    return [json.loads((place / f"engine-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(place):
    """Return the losses and norms of one process without DeepSpeed, which sees the same rows in each step."""
    training = {**CLIPPED, "gradient_accumulation_steps": 2}
    return logged(first_trainer(place, "none", "lsr", DEFAULT, training=training, model=EXACT))


@pytest.mark.slow
@two_processes
@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_summed_and_clipped_as_one_vector(seen, alone, name):
    assert all(norm > 0.2 for _, norm in alone), "far above what it is clipped to"
    assert alone[2][0] < alone[0][0] * (1 - 1e-3)
    for row, expected in zip(seen[0][name]["logged"], alone, strict=True):
        assert row == pytest.approx(expected, rel=2e-5)
    assert seen[1][name]["logged"] == seen[0][name]["logged"]


@pytest.mark.slow
@two_processes
@pytest.mark.parametrize("name", RUNS)
def test_deepspeed_hooks_no_parameter(seen, name):
    run = seen[0][name]
    assert run["hooks"] == 0
    assert run["optimizer"] == ("SGD" if name.startswith("zero0/") else "FlatZeroOptimizer")


def test_this_release_has_all_that_is_relied_on():
    deepspeed_api.check_release()


def test_the_release_that_is_advised_is_the_one_that_is_installed():
    assert f"deepspeed=={deepspeed_api.TESTED} " in (ROOT / "Makefile").read_text()


def lacking(monkeypatch, path):
    """Take from DeepSpeed what is relied on, by the name that it has in the list."""
    module, _, name = path.partition(":")
    monkeypatch.delattr(f"{module}.{name}")


@pytest.mark.parametrize("path", deepspeed_api.SIGNATURES)
def test_a_release_that_lacks_a_function_is_refused_before_anything_is_loaded(place, monkeypatch, path):
    lacking(monkeypatch, path)
    monkeypatch.setattr(arguments, "uses_deepspeed", lambda run: True)
    monkeypatch.setattr(assembly, "load_base_for", None)
    with pytest.raises(UserError, match=rf"^deepspeed\.config: DeepSpeed \d[\w.+]* has no {path.replace(':', '.')}, "):
        assembly.build_trainer(tiny_run(place), RunFolder(place / "unused"))


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda self: None, "self"),
        (lambda self, pipeline_parallel, stream: None, "self, pipeline_parallel, stream"),
        (lambda self, pipeline_parallel=False, stream=None: None, None),
        (lambda self, pipeline_parallel=False, **options: None, None),
    ],
)
def test_a_release_whose_function_takes_something_else_is_refused(monkeypatch, function, takes):
    zero = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
    monkeypatch.setattr(f"{zero}.reduce_gradients", function)
    if takes is None:
        deepspeed_api.check_release()
        return
    said = f"has no {zero}.reduce_gradients(self, pipeline_parallel): it takes ({takes}), which training under it"
    with pytest.raises(UserError, match=re.escape(said)):
        deepspeed_api.check_release()


def test_a_release_that_lacks_a_setting_is_refused(monkeypatch):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monkeypatch.delitem(DeepSpeedZeroConfig.model_fields, "compute_grad_norm")
    with pytest.raises(UserError, match=r"has no zero_optimization\.compute_grad_norm, which"):
        deepspeed_api.check_release()


def engine_without(name):
    """Return an engine with all attributes that are relied on but one, its own or its optimizer's."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    optimizer: object = object.__new__(type("Zero", (ZeROOptimizer,), {}))
    vars(optimizer).update({each: None for each in deepspeed_api.OPTIMIZER_ATTRIBUTES if each != name})
    values = {each: None for each in deepspeed_api.ENGINE_ATTRIBUTES}
    return SimpleNamespace(**values | {"optimizer": optimizer})


@pytest.mark.parametrize("name", deepspeed_api.OPTIMIZER_ATTRIBUTES)
def test_an_optimizer_that_lacks_an_attribute_is_refused(name):
    deepspeed_api.check_engine(engine_without(None))
    with pytest.raises(UserError, match=rf"has no Zero\.{name}, which training under it relies on; pip install"):
        deepspeed_api.check_engine(engine_without(name))


def test_a_run_without_deepspeed_knows_nothing_of_one_before_it(place, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # of a trainer that lives on
    assert is_deepspeed_zero3_enabled()
    run = tiny_run(place, training={"output_dir": str(place / "unused")}, deepspeed={"config": None})
    assert arguments.trainer_arguments(run, RunFolder(place / "unused")).deepspeed_plugin is None
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert not is_deepspeed_zero3_enabled()
    del kept


def test_a_run_that_is_refused_trains_without_the_engine_as_advised(place, monkeypatch):
    training = {"max_steps": 1, "output_dir": str(place / "advised"), "save_strategy": "no"}
    (place / "run.yaml").write_text(dump_yaml(tiny_run(place, training=training, eval={"tasks": []})))
    lacking(monkeypatch, next(iter(deepspeed_api.SIGNATURES)))
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    with pytest.raises(UserError) as refused:
        assembly.build_trainer(load_run(place / "run.yaml"), RunFolder(place / "advised"))
    advice = re.search(r"--set (deepspeed\.config=\w+)$", str(refused.value))
    assert advice
    trainer = assembly.build_trainer(load_run(place / "run.yaml", [advice[1]]), RunFolder(place / "advised"))
    assert trainer.train().global_step == 1
