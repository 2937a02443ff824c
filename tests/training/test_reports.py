"""`training.report_to`: TensorBoard's file read back, W&B by a stand-in that records calls, and refusals in time."""

import importlib.machinery
import importlib.util
import math
import sys
import types

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lsr_scale import UserError
from lsr_scale.config.reporters import REPORTERS
from lsr_scale.run.folder import RunFolder
from lsr_scale.training.callbacks import reports
from tests.helpers.run_text import MINIMAL, load, problem
from tests.helpers.tiny_runs import (
    completions,
    do,
    labelled,
    metrics,
    results,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)
from tests.training.test_resume import Killed, arrange_stop

TENSORBOARD = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
NOT_REPORTED = ("step", "epoch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    save_llama(folder / "model", chat=True)
    write_rows(folder / "held.jsonl", completions(5))
    return folder


def reporting(place, folder, to, **training):
    values = {"output_dir": str(folder), "report_to": to, "eval_strategy": "steps", "eval_steps": 3, **training}
    prompts = ["a saw", [{"role": "user", "content": "Which tool?"}]]
    return tiny_run(
        place,
        data={"validation": [str(place / "held.jsonl")]},
        training=values,
        eval={"prompts": prompts, "max_new_tokens": 4},
    )


def events(folder):
    """Return what TensorBoard shows of a run: scalars and texts by tag, as (step, value), in the order of steps.

    A run's files are read by their names, which begin with the second in which each was opened.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    seen = EventAccumulator(str(folder.tensorboard), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    tags = seen.Tags()
    scalars = {
        tag: sorted(((e.step, e.value) for e in seen.Scalars(tag)), key=lambda shown: shown[0])
        for tag in tags["scalars"]
    }
    texts = {
        tag.removesuffix("/text_summary"): [
            (e.step, make_ndarray(e.tensor_proto).item().decode()) for e in seen.Tensors(tag)
        ]
        for tag in tags["tensors"]
    }
    return scalars, texts


def reported_name(name):
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


@TENSORBOARD
def test_tensorboard_has_all_of_the_metrics_and_scores_before_and_after_and_samples(place, tmp_path):
    folder = do(reporting(place, tmp_path / "run", "tensorboard"))
    scalars, texts = events(folder)
    rows = metrics(folder)
    for row in rows:
        for name, value in row.items():
            if name in NOT_REPORTED or ("loss" not in row and name in ("wall_s", "memory_gib")):
                continue
            found = [v for step, v in scalars[reported_name(name)] if step == row["step"]]
            assert any(math.isclose(v, value, rel_tol=1e-6) for v in found), (row["step"], name)
    for name in ("loss", "tokens_per_s", "memory_gib", "wall_s", "num_tokens", "condition_down_max", "grad_norm"):
        assert [step for step, _ in scalars[f"train/{name}"]] == [1, 2, 3, 4, 5, 6], name
    of_task = results(folder)["accuracy"]["questions"]
    expected = [(0, of_task["before"]["accuracy"]), (6, of_task["after"]["accuracy"])]
    assert scalars["eval/questions_accuracy"] == [(step, pytest.approx(v, abs=1e-6)) for step, v in expected]
    assert [step for step, _ in texts["samples/1"]] == [0, 3, 6, 6]
    assert texts["samples/1"][0][1].startswith("> a saw\n\n    ")
    assert texts["samples/2"][0][1].startswith("> user: Which tool?\n\n    ")
    assert not (folder.path / "runs").exists()


@TENSORBOARD
def test_a_run_that_resumes_shows_each_step_once_and_one_that_starts_over_its_own(place, tmp_path):
    run = reporting(place, tmp_path / "run", ["tensorboard"])
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 4)
        with pytest.raises(Killed):
            do(run)
    folder = do(run, resume="auto")
    scalars, _ = events(folder)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert len(scalars["eval/questions_accuracy"]) == 2, "scored before training once"
    files = set(folder.tensorboard.iterdir())
    do(reporting(place, tmp_path / "run", "tensorboard", max_steps=2), overwrite=True)
    assert not files & set(folder.tensorboard.iterdir())
    assert [step for step, _ in events(folder)[0]["train/loss"]] == [1, 2]


@TENSORBOARD
def test_a_classifiers_scores_are_reported(tmp_path):
    save_classifier(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "pairs.jsonl", labelled())
    folder = do(
        tiny_run(
            tmp_path,
            model={"task": "seq_cls", "num_labels": 2, "quantization": "none"},
            adapter={"target_modules": ["query", "value"]},
            data={"train": [rows], "validation": [rows]},
            training={"report_to": "tensorboard"},
            eval={"tasks": []},
        )
    )
    scalars, _ = events(folder)
    assert [step for step, _ in scalars["eval/accuracy"]] == [0, 8, 8]
    assert len(scalars["train/tokens_per_s"]) == 8


class Calls:
    """A stand-in for the module wandb, which records what transformers and we call."""

    def __init__(self, monkeypatch):
        self.logged, self.finished, self.inits = [], 0, []
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        module.__path__ = []
        module.run = None
        module.config = types.SimpleNamespace(update=lambda *args, **kwargs: None)
        module.config = type("Config", (dict,), {"update": lambda self, *args, **kwargs: None})()
        module.Table = lambda columns, data: {"columns": columns, "data": data}
        module.define_metric = module.termwarn = module.watch = lambda *args, **kwargs: None
        module.api = types.SimpleNamespace(api_key=None)
        module.login = lambda anonymous=None, key=None: pytest.fail("it would ask for a key")

        def init(**options):
            self.inits.append(options)
            module.run = types.SimpleNamespace(summary={}, _label=lambda **_: None, id="x", name="x", url="x")

        def finish():
            self.finished += 1
            module.run = None

        module.init, module.finish, module.log = init, finish, self.logged.append
        for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
            part = types.ModuleType(name)
            part.ConfigError = type("ConfigError", (Exception,), {})
            part.__path__ = []
            monkeypatch.setitem(sys.modules, name, part)
        monkeypatch.setitem(sys.modules, "wandb", module)
        self.module = module


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_LOG_MODEL", "WANDB_WATCH"):
        monkeypatch.delenv(name, raising=False)
    return Calls(monkeypatch)


def test_wandb_has_all_of_the_metrics_and_scores_and_samples(place, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = do(reporting(place, tmp_path / "my-run", "wandb"))
    assert [call["name"] for call in wandb.inits] == ["my-run"]
    assert wandb.finished == 1
    for row in metrics(folder):
        expected = {
            reported_name(name): value
            for name, value in row.items()
            if name not in NOT_REPORTED and ("loss" in row or name not in ("wall_s", "memory_gib"))
        }
        found = [
            call
            for call in wandb.logged
            if call["train/global_step"] == row["step"] and expected.items() <= call.items()
        ]
        assert len(found) == 1, row
    scores = [call for call in wandb.logged if "eval/questions_accuracy" in call]
    assert [call["train/global_step"] for call in scores] == [0, 6]
    tables = [call["samples"] for call in wandb.logged if "samples" in call]
    assert [[row[:2] for row in table["data"]] for table in tables] == [
        [[0, "before"]] * 2,
        [[3, "evaluation"]] * 2,
        [[6, "evaluation"]] * 2,
        [[6, "after"]] * 2,
    ]
    assert [row[2] for row in tables[0]["data"]] == ["a saw", "user: Which tool?"]


def test_a_run_of_wandb_that_the_caller_began_is_the_callers_to_end(place, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.module.init()
    do(reporting(place, tmp_path / "run", "wandb", max_steps=1))
    assert (len(wandb.inits), wandb.finished) == (1, 0)


def refusal(place, folder, monkeypatch, to):
    monkeypatch.setattr("lsr_scale.training.assembly.load_base_for", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(UserError) as caught:
        do(reporting(place, folder, to))
    assert not RunFolder(folder).config.exists()
    return str(caught.value)


def test_wandb_that_is_not_logged_in_is_refused_before_the_model_is_loaded(place, tmp_path, wandb, monkeypatch):
    said = refusal(place, tmp_path / "run", monkeypatch, "wandb")
    assert (
        "training.report_to: wandb: not logged in; run wandb login (or set WANDB_API_KEY), set WANDB_MODE=off" in said
    )


@pytest.mark.parametrize("how", ["key", "netrc", "netrc-by-login", "offline", "disabled"])
def test_wandb_is_taken_where_it_can_log(wandb, monkeypatch, how):
    if how == "key":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif how == "netrc":
        wandb.module.api.api_key = "x" * 40
    elif how == "netrc-by-login":
        wandb.module.login = lambda verify=True, prompt=True: not (prompt or verify)
    else:
        monkeypatch.setenv("WANDB_MODE", how)
    reports.check_reporters("wandb")


@pytest.mark.parametrize("name", [name for name in REPORTERS if name not in ("tensorboard", "wandb")])
def test_what_is_not_installed_is_refused_with_the_command_that_installs_it(place, tmp_path, monkeypatch, name):
    module, package = REPORTERS[name]
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        pytest.skip(f"{module} is installed")
    with pytest.raises(UserError, match=f"training.report_to: {name}: {module} cannot be imported"):
        reports.check_reporters(name)
    if name == "mlflow":
        said = refusal(place, tmp_path / "run", monkeypatch, ["tensorboard", name])
        assert f"pip install '{package}', or set it to none" in said


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_the_extras_are_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(UserError, match=rf"pip install 'lsr_scale\[{name}\]', or set it to none"):
        reports.check_reporters([name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", "training.report_to: 'tensorbord': did you mean 'tensorboard'?"),
        ("[wandb, tensorboad]", "training.report_to: 'tensorboad': did you mean 'tensorboard'?"),
        ("[none, wandb]", "training.report_to: 'none': "),
        ("weights_and_biases", "training.report_to: 'weights_and_biases': valid: all, azure_ml, "),
    ],
)
def test_an_unknown_name_is_refused_where_it_stands(given, message):
    assert message in problem(MINIMAL, f"training.report_to={given}")


def test_every_name_of_transformers_is_known():
    assert set(INTEGRATION_TO_CALLBACK) <= set(REPORTERS)
    for name in (*REPORTERS, "all", "none"):
        load(MINIMAL, f"training.report_to={name}")


def test_a_run_that_reports_to_nothing_makes_no_folder(place, tmp_path):
    folder = do(reporting(place, tmp_path / "run", "none", max_steps=1))
    assert not folder.tensorboard.exists()
