"""The commands as functions: what they take and return, and that a notebook's process is left as it was."""

import gc
import importlib
import inspect
import json
import logging
import os
import pkgutil
import shutil
import signal
import sys
import threading
import types
import weakref
from pathlib import Path

import datasets
import peft
import pytest
import torch
from transformers.utils import logging as transformers_logging

import lsr_scale
from lsr_scale import (
    UserError,
    compare,
    evaluate,
    export,
    generate,
    load_model,
    load_run,
    plan,
    train,
)
from lsr_scale.api import AnyRun
from lsr_scale.config import dump_yaml
from lsr_scale.surroundings import as_found, in_python
from lsr_scale.training.callbacks.signals import StopOnSignal
from tests.helpers.tiny_runs import TOOLS, questions, save_llama, tiny_run, write_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, its rows, and run.yaml."""
    folder = tmp_path_factory.mktemp("api")
    save_llama(folder / "model", chat=True)
    run = tiny_run(folder, training={"output_dir": None, "save_strategy": "no", "max_length": 64})
    (folder / "run.yaml").write_text(dump_yaml(run))
    return folder


@pytest.fixture(scope="module")
def result(place):
    """Return what came of a run, its model too."""
    overrides = {"training": {"output_dir": place / "done"}}
    return train(place / "run.yaml", overrides, quiet=True, return_model=True)


def test_no_package_and_no_module_has_the_name_of_a_function():
    functions = {name for name in lsr_scale.__all__ if isinstance(getattr(lsr_scale, name), types.FunctionType)}
    assert {"train", "evaluate", "export", "fuse", "plan", "generate", "compare", "load_run"} <= functions
    assert functions & {module.name for module in pkgutil.iter_modules(lsr_scale.__path__)} == set()
    for module in pkgutil.walk_packages(lsr_scale.__path__, "lsr_scale."):
        if module.name.startswith(("lsr_scale.exporting.", "lsr_scale.planning.", "lsr_scale.run.")):
            importlib.import_module(module.name)
    assert isinstance(lsr_scale.export, types.FunctionType)
    assert isinstance(lsr_scale.plan, types.FunctionType)
    assert set(lsr_scale.__all__) <= set(dir(lsr_scale))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = lsr_scale.trian


def test_a_run_is_a_file_a_name_a_mapping_or_a_run(place):
    from_file = load_run(str(place / "run.yaml"))
    sections = from_file.model_dump()
    for same in (place / "run.yaml", sections, from_file, load_run(from_file)):
        assert load_run(same) == from_file
    assert load_run("mistral_lsr").model.name == "mistralai/Mistral-7B-v0.1"
    for changed in ({"training.max_steps": 3}, {"training": {"max_steps": 3}}):
        for same in (place / "run.yaml", sections, from_file):
            run = load_run(same, changed)
            assert run.training["max_steps"] == 3
            assert run.training["max_length"] == 64, "the others stay"
    assert sections == from_file.model_dump(), "what was given is not changed"
    rows = load_run(from_file, {"data.train": (place / "rows.jsonl",)})
    assert [source.path for source in rows.data.train] == [str(place / "rows.jsonl")]
    pattern = load_run(from_file, {"adapter": {"rank_pattern": {"q_proj": 2}}})
    assert pattern.adapter.options["rank_pattern"] == {"q_proj": 2}


@pytest.mark.parametrize(
    ("run", "overrides", "words"),
    [
        ("mistral_lrs", {}, "did you mean mistral_lsr"),
        (
            "mistral_lsr",
            {"training.learning_rat": 1},
            r"overrides\['training.learning_rat'\].*did you mean 'learning_rate'",
        ),
        ("mistral_lsr", {"adapter": {"r": 8}}, r"adapter.r'\]: unknown key; here it is adapter.rank"),
        ("mistral_lsr", {"training": 3}, "training: expected mapping"),
        ("mistral_lsr", {3: 3}, "overrides: expected keys such as 'training.learning_rate', got 3"),
        ("mistral_lsr", ["training.max_steps=3"], "overrides: expected a mapping such as"),
        (3, {}, "run: expected a YAML file, a shipped run's name, a mapping or a run, got 3"),
        ({"model": {"name": "x"}}, {}, "adapter: missing"),
    ],
)
def test_a_mistake_is_a_user_error_as_in_yaml(run, overrides, words):
    with pytest.raises(UserError, match=words):
        load_run(run, overrides)


def test_train_returns_metrics_scores_paths_and_the_model(place, result):
    assert result.folder == place / "done"
    assert result.adapter == place / "done" / "adapter"
    assert [row["step"] for row in result.metrics] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss"] > 0 for row in result.metrics)
    assert result.results == json.loads((place / "done" / "results.json").read_text())
    assert result.scores["questions"]["after"]["num_examples"] == 6
    assert isinstance(result.model, peft.PeftModel)
    assert not result.model.training
    again, tokenizer = load_model(result)
    ids = tokenizer(TOOLS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(result.model(ids).logits, again(ids).logits), "what was saved is what was returned"
    assert result.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_what_trained_is_evaluated_exported_compared_and_asked(place, result, tmp_path):
    scores = evaluate(result, quiet=True)
    assert scores["questions"]["accuracy"] == result.scores["questions"]["after"]["accuracy"]
    rows = write_rows(tmp_path / "other" / "test.jsonl", questions(4))
    assert evaluate(str(result.folder), rows, limit=3, quiet=True)["test"]["num_examples"] == 3
    done = export(result, to="lora", out=tmp_path / "lora", quiet=True)
    assert done.path == tmp_path / "lora"
    assert done.report == json.loads((tmp_path / "lora" / "export.json").read_text())
    with pytest.raises(UserError, match="export: unknown option 'max_ranks'; did you mean 'max_rank'"):
        export(result, to="lora", out=tmp_path / "x", max_ranks=3)
    with pytest.raises(UserError, match=r"^bits 8: has no effect with to lora"):
        export(result, to="lora", out=tmp_path / "x", bits=8, quiet=True)
    copy = shutil.copytree(result.folder, tmp_path / "copy")
    assert [run.method for run in compare([result, copy]).runs] == ["lsr", "lsr"]
    prompts = [TOOLS[0], "a kettle", [{"role": "user", "content": "a saw?"}]]
    asked = dict(prompts=prompts, max_new_tokens=5)
    answers = generate(result.folder, **asked)
    assert len(answers) == 3
    assert answers == generate(result, **asked) == generate(result.model, **asked, tokenizer=result.tokenizer)
    assert generate(result, TOOLS[0], max_new_tokens=5) == answers[:1]
    assert generate(result, "a saw?", chat=True, max_new_tokens=5) == answers[2:]
    drawn = [generate(result, TOOLS[0], temperature=5.0, seed=seed, max_new_tokens=9) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda result: generate(result, ["a", ""]), r"^prompts\[1\]: expected some text"),
        (
            lambda result: generate(result, [{"role": "user", "content": "a"}]),
            r"^prompts\[0\]: expected a text",
        ),
        (lambda result: generate(result, "a", temperature=-1), "^temperature: expected a number from 0"),
        (lambda result: generate(result.model, "a"), "a model in memory needs its tokenizer"),
        (lambda result: generate(result.folder, "a", tokenizer=3), "tokenizer: goes with a model in memory"),
        (lambda result: generate(3, "a"), "run: expected a run's folder or what train returned, got 3"),
        (lambda result: generate("nowhere", "a"), "nowhere: not a run folder"),
        (lambda result: evaluate("nowhere"), "nowhere: not a run folder"),
        (lambda result: plan(), "plan: expected a run, or model=NAME"),
        (lambda result: plan("mistral_lsr", gpus=0), "gpus: expected a whole number from 1 on, got 0"),
        (
            lambda result: train(result.folder / "config.yaml"),
            "holds a run already; resume=.auto. continues it, over",
        ),
    ],
)
def test_mistakes_are_said_in_pythons_words(result, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(result)
    assert "--" not in str(caught.value)


def test_advice_of_the_command_line_is_told_as_arguments():
    told = {
        "the same command with --resume auto resumes it": 'the same call with resume="auto" resumes it',
        "with --set training.output_dir=...": 'with overrides={"training.output_dir": ...}',
        "leave out --no-verify": "leave out verify=False",
        "--base-only tells which": "base_only=True tells which",
        "if it lies elsewhere now: --base FOLDER": "if it lies elsewhere now: base FOLDER",
        "a -- b, a--b": "a -- b, a--b",
    }
    assert {text: in_python(text) for text in told} == told


def test_plan_has_parameters_and_memory_by_stage(place):
    found = plan(place / "run.yaml", gpus=2)
    assert (found.gpus, found.trainable_parameters) == (2, 800)
    assert {row.stage for row in found.table} == {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}
    assert all(row.memory_gib.total > 0 for row in found.table)
    of_base = plan(model=str(place / "model"), overrides={"adapter": {"rank": 4, "separation_rank": 2}})
    assert of_base.trainable_parameters == found.trainable_parameters


def state():
    """Return what a call could change of a process."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("trl", "peft", "accelerate", "deepspeed"))]
    return {
        "environment": dict(os.environ),
        "handlers": [(one.name, one.level, one.handlers[:], one.filters[:]) for one in loggers],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "verbosity": transformers_logging.get_verbosity(),
        "bars": (transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
        "streams": (sys.stdout, sys.stderr),
        "hook": (sys.excepthook, threading.excepthook),
        "folder": Path.cwd(),
        "threads": [thread for thread in threading.enumerate() if not thread.daemon],
    }


def test_a_notebooks_process_is_left_as_it_was_call_after_call(place, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    import matplotlib
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    train(place / "run.yaml", {"training": {"output_dir": tmp_path / "first", "max_steps": 1}}, quiet=True)  # imports
    capfd.readouterr()
    before = state()
    for name in ("second", "third"):
        train(place / "run.yaml", {"training": {"output_dir": tmp_path / name, "max_steps": 2}}, quiet=True)
        evaluate(tmp_path / name, quiet=True)
        export(tmp_path / name, to="adapter", out=tmp_path / f"{name}-adapter", quiet=True)
        with pytest.raises(UserError):
            train(place / "run.yaml", {"training": {"output_dir": tmp_path / name}}, quiet=True)
        assert state() == before
    assert matplotlib.get_backend() == "svg"
    assert capfd.readouterr() == ("", "")


def test_without_quiet_it_shows_what_the_command_shows_once_and_no_progress_bars(place, tmp_path, capfd):
    train(place / "run.yaml", {"training": {"output_dir": tmp_path / "run", "max_steps": 3}})
    out, err = capfd.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith("step ")] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
    ]
    assert out.count("adapter saved: ") == 1
    assert "it/s" not in out + err
    assert "Map" not in out + err
    assert err == ""


def test_the_model_is_freed_where_it_is_not_asked_for(place, tmp_path, monkeypatch):
    made = []
    from lsr_scale.run import train as training

    original = training.build_trainer
    monkeypatch.setattr(training, "build_trainer", lambda *args: made.append(weakref.ref(t := original(*args))) or t)
    options = {"output_dir": tmp_path / "run", "max_steps": 1}
    train(place / "run.yaml", {"training": options}, quiet=True)
    assert [one() for one in made] == [None]

    def fail(*_):
        raise UserError("no space")

    monkeypatch.setattr(training, "_save_adapter", fail)
    with pytest.raises(UserError, match="no space") as caught:  # the error itself holds no frame with the model
        train(place / "run.yaml", {"training": {**options, "output_dir": tmp_path / "bad"}}, quiet=True)
    gc.collect()
    assert [one() for one in made] == [None, None], caught.value


def test_ctrl_c_leaves_a_run_that_resumes(place, tmp_path, monkeypatch):
    ended = StopOnSignal.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        ended(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", interrupt)
    overrides = {"training": {"output_dir": tmp_path / "run", "save_strategy": "steps", "save_steps": 100}}
    with pytest.raises(KeyboardInterrupt, match=r"after step 3, a checkpoint is saved in .*; the same call with"):
        train(place / "run.yaml", overrides, quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    done = train(place / "run.yaml", overrides, resume="auto", quiet=True)
    assert [row["step"] for row in done.metrics if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_sigterm_does_what_it_would_have_done(monkeypatch):
    received = []
    monkeypatch.setattr(signal, "raise_signal", received.append)
    from lsr_scale.training.callbacks.signals import Terminated

    with pytest.raises(Terminated), as_found():
        raise Terminated(signal.SIGTERM, "after step 3")
    assert received == [signal.SIGTERM]


def test_another_thread_can_call(place, tmp_path):
    found = []
    run = {"training": {"output_dir": tmp_path / "run", "max_steps": 1}}
    thread = threading.Thread(target=lambda: found.append(train(place / "run.yaml", run, quiet=True)))
    thread.start()
    thread.join()
    assert found[0].results["steps"] == 1


def test_a_run_without_a_folder_gets_one_by_its_files_name(place):
    run = {"training.max_steps": 1, "eval.tasks": []}
    assert train(place / "run.yaml", run, quiet=True).folder == Path("runs/run")
    assert train(load_run(place / "run.yaml", run), quiet=True).folder == Path("runs/run-2")
    again = train(Path("runs/run/config.yaml"), overwrite=True, quiet=True)
    assert again.folder == Path("runs/run"), "a run's own file means that run"


def test_the_functions_are_typed():
    assert AnyRun
    for name in ("train", "evaluate", "export", "plan", "generate", "compare", "load_run", "load_model"):
        function = getattr(lsr_scale, name)
        parameters = inspect.signature(function).parameters.values()
        assert all(parameter.annotation is not parameter.empty for parameter in parameters)
        assert "return" in function.__annotations__
        assert "Args:" in function.__doc__
        assert "Raises:" in function.__doc__
