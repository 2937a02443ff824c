"""Every command once, what each prints, and every mistake: one screen that names the place and the remedy, status 2."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lsr_scale
from lsr_scale import cli
from lsr_scale.commands import failures
from lsr_scale.config import dump_yaml
from lsr_scale.doctor import Finding, Report
from lsr_scale.run.folder import RunFolder
from tests.helpers.tiny_runs import TOOLS, completions, do, factors, questions, save_llama, tiny_run, write_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, run.yaml, and the finished run `done`."""
    folder = tmp_path_factory.mktemp("cli")
    save_llama(folder / "model", chat=True)
    run = tiny_run(folder, training={"output_dir": str(folder / "done"), "save_strategy": "no"})
    (folder / "run.yaml").write_text(dump_yaml(run))
    do(run)
    return folder


@pytest.fixture
def done(place, tmp_path):
    """Return a copy of the finished run, a test's own."""
    return RunFolder(type(place)(shutil.copytree(place / "done", tmp_path / "done")))


@pytest.fixture
def call(capfd, monkeypatch):
    """Return a function that runs a command and returns its status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        capfd.readouterr()
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as ended:  # argparse
            status = ended.code
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


def refused(call, *words, status=2):
    """Run a command that must fail in words; return them."""
    code, out, err = call(*words)
    assert code == status, out + err
    assert "Traceback" not in out + err
    said = err[err.index("lsr-scale: ") :]
    assert len(said) < 24 * 80, "one screen"
    assert said.count("\n") < 20, "one screen"
    return said


def test_train_prints_what_happens_and_ends_with_a_table_of_80_columns(call, place, tmp_path):
    status, out, err = call("train", place / "run.yaml", "--set", f"training.output_dir={tmp_path / 'run'}")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == f"run folder: {tmp_path / 'run'}"
    assert "trainable parameters: 800 of " in out
    assert "before training: questions" in out
    assert sum(line.startswith("step ") for line in lines) == 6
    table = lines[lines.index("adapter saved: " + str(tmp_path / "run" / "adapter")) :]
    assert any("before" in line and "after" in line and "gained / lost" in line for line in table)
    assert max(len(line) for line in table if str(tmp_path) not in line) <= 80
    assert lines[-1].startswith("done in 0:")
    for name in ("adapter", "loss.png", "results.json"):
        assert str(tmp_path / "run" / name) in out
    assert "\x1b" not in out, "no terminal, no escapes"


def test_quiet_prints_results_only(call, place, tmp_path):
    status, out, _ = call(
        "train", "--quiet", "--config", place / "run.yaml", "--set", f"training.output_dir={tmp_path}/run"
    )
    assert status == 0
    assert "step " not in out
    assert out.lstrip().startswith("Accuracy")


def test_eval_reloads_the_adapter_and_gives_exactly_the_predictions_that_training_saved(call, done):
    status, out, err = call("eval", done.path)
    assert status == 0, err
    assert "adapter: questions" in err
    assert "note" not in err
    assert max(map(len, out.splitlines()[1:])) <= 80
    saved, again = (done.predictions("questions", when).read_bytes() for when in ("after", "eval-adapter"))
    assert saved == again
    assert call("eval", done.path, "--base-only")[0] == 0
    assert (
        done.predictions("questions", "eval-base").read_bytes() == done.predictions("questions", "before").read_bytes()
    )


def test_eval_takes_other_tasks_a_limit_and_prints_json(call, done, tmp_path):
    rows = write_rows(tmp_path / "other" / "test.jsonl", questions(5))
    status, out, _ = call("eval", done.path, "--json", "--limit", 3, "--tasks", tmp_path / "other", rows)
    assert status == 0
    found = json.loads(out)
    assert found["scored"] == "adapter"
    assert {name: values["adapter"]["num_examples"] for name, values in found["accuracy"].items()} == {
        "other": 3,
        "test": 3,
    }


def test_eval_scores_choices_without_their_questions(call, done):
    status, out, _ = call("eval", done.path, "--without-questions", "--json")
    assert status == 0
    assert json.loads(out)["scored"] == "adapter-without-questions"
    assert done.predictions("questions", "eval-adapter-without-questions").is_file()
    assert "after" in json.loads(done.results.read_text())["accuracy"]["questions"], "the run's own results stay"


def test_generate_continues_a_prompt_the_same_each_time(call, done):
    status, first, err = call("generate", done.path, "--prompt", TOOLS[0], "--max-new-tokens", 5)
    assert status == 0, err
    assert call("generate", done.path, "--prompt", TOOLS[0], "--max-new-tokens", 5)[1] == first
    assert call("generate", done.path, "--prompt", TOOLS[0], "--max-new-tokens", 5, "--chat")[0] == 0
    assert call("generate", done.path, "--prompt", TOOLS[0], "--max-new-tokens", 5, "--base-only")[0] == 0
    for chat in ([], ["--chat"]):  # what Python makes of an argument's byte that is no UTF-8
        status, _, err = call("generate", done.path, "--prompt", "a knife \udcff", *chat)
        assert status == 2
        assert r"--prompt: \udcff is half of a character" in err


def test_preview_shows_tokens_and_what_is_supervised(call, place):
    status, out, err = call("preview", place / "run.yaml", "--samples", 2)
    assert status == 0, err
    assert "12 rows, prompt_completion: raw text, loss on the completion" in out
    assert "\n  a knife\n>  cuts bread</s>\n" in out
    assert out.count("</s>\n") == 2


def test_plan_tells_parameters_as_words_and_as_json(call, place):
    status, out, _ = call("plan", "--config", place / "run.yaml", "--json", "--gpus", 2)
    assert status == 0
    found = json.loads(out)
    assert found["trainable_parameters"] == sum(t.numel() for t in factors(RunFolder(place / "done")).values())
    assert {"base_parameters", "adapter_bytes", "memory_gib"} <= set(found)
    status, out, _ = call("plan", place / "run.yaml")
    assert status == 0
    assert "800 parameters" in out


def test_doctor_reports_and_its_status_says_whether_something_is_bad(call):
    status, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert status in (0, 1)
    assert found


def test_doctor_takes_the_run_that_the_machine_is_to_be_fit_for(call, place, monkeypatch):
    seen = []
    report = Report([Finding("fast paths", "fused layers", "tried")])
    monkeypatch.setattr("lsr_scale.doctor.doctor", lambda run=None: (seen.append(run), report)[1])
    assert call("doctor")[0] == 0
    assert call("doctor", place / "run.yaml", "--set", "adapter.rank=3")[0] == 0
    assert seen[0] is None
    assert seen[1].adapter.options["rank"] == 3
    assert call("doctor", "--set", "adapter.rank=3")[0] == 2


def test_config_prints_the_resolved_run_and_the_schema(call, place):
    status, out, _ = call("config", place / "run.yaml", "--all", "--set", "training.learning_rate=1e-3")
    assert status == 0
    assert "learning_rate: 0.001" in out
    assert "double_quantization: true" in out
    status, out, _ = call("config", "--json-schema")
    assert status == 0
    assert "learning_rate" in json.loads(out)["properties"]["training"]["properties"]


def test_help_names_every_command(call):
    status, out, _ = call("--help")
    assert status == 0
    assert all(command in out for command in ("train", "eval", "generate", "preview", "plan", "doctor", "config"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tarin"], "invalid choice: 'tarin'; did you mean 'train'?"),
        (["zzzz"], "invalid choice: 'zzzz' (choose from"),
        (["train", "--resmue", "auto"], "unrecognized arguments: --resmue"),
        (["plan", "run.yaml", "--gpus", "0"], "argument --gpus: expected a whole number from 1 on, got '0'"),
        (["eval", "run", "--limit", "-3"], "argument --limit"),
        (["train", "run.yaml", "--o"], "unrecognized arguments: --o"),
        (["train", "run.yaml", "--res", "auto"], "unrecognized arguments: --res auto"),
        (["config", "--config", "a.yaml", "--config", "b.yaml"], "argument --config: stands twice; keep one of them"),
        (["eval", "run", "--tasks", "a", "--tasks", "b"], "argument --tasks: stands twice"),
        (
            ["export", "run", "--to", "lora", "--out", "x", "--verify", "--no-verify"],
            "--verify and --no-verify contradict each other; keep one",
        ),
        (["eval", "run", "--limit", "9" * 5000], "argument --limit: expected a whole number from 1 on, got '999"),
        (["eval", "run", "--limit", "\u0663"], "argument --limit: expected a whole number from 1 on, got"),
        (
            ["generate", "run", "--prompt", "a", "--max-new-tokens", "1" + "0" * 11],
            "expected a number up to 1,000,000,000",
        ),
        (["plan", "run.yaml", "--card-gib", "1e300"], "expected a number above 0, up to 1,000,000,000, got '1e300'"),
    ],
)
def test_wrong_words_on_the_command_line_end_with_status_2(call, words, expected):
    status, _, err = call(*words)
    assert status == 2
    assert expected in err
    assert len(err) < 24 * 80, "one screen"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", "DONE", "--to", "lora", "--out", "x", "--bits", "8"], "--bits 8: has no effect with --to lora"),
        (["export", "DONE", "--to", "adapter", "--out", "x", "--max-rank", "4"], "--max-rank 4: has no effect"),
        (["export", "DONE", "--to", "adapter", "--out", "x", "--dtype", "float16"], "--dtype float16: has no effect"),
        (["export", "DONE", "--to", "merged", "--out", "x", "--max-rank", "2"], "--max-rank 2: has no effect"),
        (["export", "DONE", "--to", "lora", "--out", "x", "--no-verify", "--accuracy"], "leave out --no-verify"),
        (["plan", "RUN", "--budget", "4k", "--gpus", "2"], "--gpus 2: has no effect with --budget"),
        (["plan", "RUN", "--budget", "4k", "--card-gib", "24"], "--card-gib 24: has no effect with --budget"),
        (["plan", "--model", "x", "--budget", "4k", "--set", "a=1"], "--set: has no effect with --model"),
        (["config", "RUN", "--json-schema"], "--json-schema: prints what any run's file may say"),
    ],
)
def test_an_option_without_effect_is_refused(call, place, words, expected):
    paths = {"DONE": place / "done", "RUN": place / "run.yaml"}
    assert expected in refused(call, *(paths.get(word, word) for word in words))


def test_a_setting_that_is_overridden_twice_is_noted(call, place):
    again = ["--set", "training.seed=1", "--set", "adapter.rank=2", "--set", "training.seed=2"]
    status, out, err = call("config", place / "run.yaml", *again)
    assert status == 0
    assert err == "note: --set training.seed=1 has no effect, as training.seed is set again\n"
    assert "seed: 2\n" in out


def test_train_without_a_configuration_or_with_two_says_so(call):
    assert "expected one configuration: a YAML file (lsr-scale init writes one), or a shipped one" in refused(
        call, "train"
    )
    assert "expected one configuration" in refused(call, "train", "a.yaml", "--config", "b.yaml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("adapter.rnak=4", "did you mean 'rank'"),
        ("training.learning_rat=4", "did you mean 'learning_rate'"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("model.name=no/such/model/anywhere", "there is no such folder"),
        ("model.name=nobody/nothing-here", "the hub cannot be reached"),
        ("data.train=[nowhere.jsonl]", "no such file or folder"),
        ("data.train=[BAD]", "bad.jsonl, line 3: expected a text under 'completion', got nothing"),
        ("eval.tasks=[nowhere.jsonl]", "no such file or folder"),
        ("eval.tasks=[BAD]", "bad.jsonl, line 1"),
        ("data.validation=[nowhere.jsonl]", "no such file or folder"),
        ("adapter.rank=1000", "rank=1000 is larger than the smaller dimension of the layer, 48 -> 48; lower rank"),
        ("adapter.target_modules=[q_porj]", "target_modules: 'q_porj' matches no module; did you mean 'q_proj'"),
        ("adapter.left_in=7", "left_in=7 must divide in_features=48"),
        ("model.chat_template=none.jinja", "model.chat_template 'none.jinja': cannot be read"),
        ("training.output_dir=/proc/nowhere", "/proc/nowhere: cannot be written"),
        ("training.assistant_only_loss=true", "training.assistant_only_loss: the data is prompt_completion"),
        ("training.optim=adamw_torchh", "training.optim"),
    ],
)
def test_a_mistake_in_a_run_is_said_with_its_place_and_leaves_nothing_behind(call, place, tmp_path, change, expected):
    rows = write_rows(tmp_path / "bad.jsonl", [*completions(2), {"prompt": "a"}])
    target = tmp_path / "run"
    words = ["--set", f"training.output_dir={target}", "--set", change.replace("BAD", rows)]
    assert expected in refused(call, "train", place / "run.yaml", *words)
    assert not target.exists()
    assert not os.path.exists("runs")


def test_a_missing_configuration_names_the_nearest(call, place):
    assert f"did you mean {place / 'run.yaml'}?" in refused(call, "train", place / "rnu.yaml")


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(call, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    config, vocabulary = tmp_path / "model" / "tokenizer_config.json", tmp_path / "model" / "tokenizer.json"
    values = json.loads(config.read_text())
    kept = {name: value for name, value in values.items() if name not in ("pad_token", "eos_token", "bos_token")}
    config.write_text(json.dumps(kept))
    vocabulary.write_text(vocabulary.read_text().replace('"<pad>"', '"<zzz>"'))
    words = (
        "train",
        place / "run.yaml",
        "--set",
        f"training.output_dir={tmp_path}/run",
        "--set",
        f"model.name={tmp_path}/model",
    )
    assert "its tokenizer has neither a padding nor an end token to pad with; set pad_token" in refused(call, *words)
    config.write_text(json.dumps({**kept, "eos_token": "</s>"}))
    assert call(*words)[0] == 0, "the end token does, if it must"


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "a"]])
def test_a_folder_without_a_run_or_adapter_is_refused(call, done, tmp_path, command):
    assert "not a run folder (there is no config.yaml in it)" in refused(call, *command, tmp_path)
    shutil.rmtree(done.adapter)
    assert "the run has no adapter yet; train it first" in refused(call, *command, done.path)
    (done.path / "checkpoint-2").mkdir()
    assert "it was interrupted: resume it with --resume auto" in refused(call, *command, done.path)


def test_a_damaged_adapter_or_run_is_refused(call, done):
    weights = done.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors: damaged or cut short" in refused(call, "eval", done.path)
    done.config.write_text("model: [")
    assert "config.yaml:1:" in refused(call, "eval", done.path)


def test_an_adapter_on_another_base_is_refused_with_the_shapes(call, done, tmp_path):
    save_llama(tmp_path / "wide", hidden_size=64)
    done.config.write_text(
        done.config.read_text().replace("model\n", "wide\n", 1).replace(str(done.path), str(tmp_path))
    )
    text = done.config.read_text()
    line = next(line for line in text.splitlines() if line.startswith("  name: "))
    done.config.write_text(text.replace(line, f"  name: {tmp_path / 'wide'}"))
    said = refused(call, "eval", done.path)
    assert "this adapter was trained on" in said
    assert "lm_head: [304, 48] -> [304, 64]" in said


def test_mistakes_after_training_are_said_too(call, done):
    assert "no such file or folder" in refused(call, "eval", done.path, "--tasks", "nowhere.jsonl")
    assert "tasks" in refused(call, "eval", done.path, "--tasks", "")
    assert "--prompt: expected some text to continue, got none" in refused(call, "generate", done.path, "--prompt", "")
    (done.path.parent / "empty.jinja").write_text("")
    model = done.path.parent / "model"
    text = done.config.read_text()
    save_llama(model)
    shutil.rmtree(done.tokenizer)  # the run's own, which would serve whatever becomes of the base
    line = next(line for line in text.splitlines() if line.startswith("  name: "))
    done.config.write_text(text.replace(line, f"  name: {model}"))
    assert "--chat: the model's tokenizer has no chat template" in refused(
        call, "generate", done.path, "--prompt", "a", "--chat"
    )


def test_debug_shows_the_traceback_beside_the_words(call, tmp_path):
    status, _, err = call("config", tmp_path / "none.yaml", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert "lsr-scale: " in err


def test_a_bug_is_no_mistake_and_keeps_its_traceback(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lsr_scale.commands.doctor.run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        (KeyboardInterrupt(), "lsr-scale: interrupted", 130),
        (OSError(28, "No space left on device"), "the disk is full; free some space", 2),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full", 2),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 600000ms for recv"), "raise training.ddp_timeout", 2),
        (PermissionError(13, "Permission denied", "/some/file"), "lsr-scale: /some/file: Permission denied", 2),
    ],
)
def test_failures_of_the_machine_are_said_in_words(call, monkeypatch, error, expected, status):
    def fail(_):
        raise error

    monkeypatch.setattr("lsr_scale.commands.doctor.run", fail)
    assert expected in refused(call, "doctor", status=status)


def test_a_gpu_without_memory_is_said_with_what_to_lower(call, monkeypatch):
    import torch

    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("lsr_scale.commands.doctor.run", fail)
    assert "lower training.per_device_train_batch_size" in refused(call, "doctor")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("eval",), "asked by those that train it: deepspeed --module lsr_scale.launch --config RUN/config.yaml"),
        (("generate", "--prompt", "a"), "--resume auto --set 'eval.prompts=[...]'"),
        (("export", "--to", "lora", "--out", "lora"), "--no-verify loads no base"),
        (("export", "--to", "merged", "--out", "merged"), "CUDA_VISIBLE_DEVICES= before the command"),
    ],
)
@pytest.mark.parametrize("when", ["loading", "computing"])
def test_a_base_that_no_gpu_holds_is_said_with_what_does_without(
    call, done, monkeypatch, tmp_path, when, words, remedy
):
    import torch
    from transformers import LlamaForCausalLM

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained" if when == "loading" else "forward", fail)
    command, *options = words
    said = " ".join(refused(call, command, done.path, *options).split())
    assert remedy in said
    assert "per_device_train_batch_size" not in said
    assert "if it lies elsewhere" not in said
    assert ("Tried to allocate 2.00 GiB" in said) == (when == "loading")


def test_another_rank_names_itself_and_waits_for_the_first_to_speak(call, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load in (0.5, 6.0, 90.0):  # longer on a busy host, where the first is longer in coming
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 1.0, 1.0))
        assert "lsr-scale: rank 1: " in refused(call, "train")
    assert waited == [failures.SECONDS_FOR_RANK_0 * times for times in (1, 3, 10)]


def program(tmp_path, start):
    """Return the words that start the command in this way."""
    if start == "module":
        return ["-m", "lsr_scale"]
    if start == "module that launchers take":
        return ["-m", "lsr_scale.launch"]
    if start == "launch/train.py":
        return [str(ROOT / "launch" / "train.py")]
    script = tmp_path / "lsr-scale"  # as pip writes it
    script.write_text("import sys\nfrom lsr_scale.cli import main\nsys.exit(main())\n")
    return [str(script)]


def imported_by(*words):
    """Run Python in a process of its own; return it and the top-level packages that it imported."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


HEAVY = {"torch", "transformers", "peft", "trl", "deepspeed", "datasets", "numpy", "pydantic"}


@pytest.mark.parametrize("start", ["script", "module", "module that launchers take", "launch/train.py"])
@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--nope"], 2)])
def test_options_are_parsed_before_torch_is_imported(tmp_path, start, words, status):
    done, imported = imported_by(*program(tmp_path, start), *words)
    assert done.returncode == status, done.stderr
    assert "usage: lsr-scale" in (done.stderr if status else done.stdout)
    assert "lsr_scale" in imported
    assert not imported & HEAVY


def test_no_commands_options_import_torch():
    code = (
        "import sys\nsys.argv[0] = 'lsr-scale'\nfrom lsr_scale import cli\n"
        "for words in [['--version'], *([name, '--help'] for name in cli.COMMANDS)]:\n"
        "    try:\n        cli.main(words)\n    except SystemExit as ended:\n        assert ended.code == 0\n"
    )
    done, imported = imported_by("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"lsr-scale {lsr_scale.__version__}\nusage: lsr-scale init")
    assert not imported & HEAVY


def test_a_program_run_as_a_module_has_the_methods_registered_by_the_import_alone_and_no_trainer(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(
        "import sys, lsr_scale, peft\nprint(peft.PeftType('LSR').value)\n"
        "print([name for name in ('trl', 'datasets', 'lsr_scale.api') if name in sys.modules])\n"
    )
    (tmp_path / "mine" / "__main__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "mine", "lsr_scale"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "LSR\n[]\n"


OUT_OF_MEMORY = [
    MemoryError("Unable to allocate 7.45 GiB for an array"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    ),
    RuntimeError("std::bad_alloc"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_of_the_machine_that_is_out_is_said(monkeypatch, capsys, error):
    def out_of_memory(args):
        raise RuntimeError("while loading") from error

    monkeypatch.setattr("lsr_scale.commands.config.run", out_of_memory)
    assert cli.main(["config", "x.yaml"]) == 2
    assert "this machine's memory (not the GPU's) ran out; lower training.per_device_train" in capsys.readouterr().err


def test_every_option_says_what_it_is():
    commands = next(one for one in cli.parser()._actions if one.dest == "command")
    silent = [
        f"{name} {option.dest}"
        for name, of_it in commands.choices.items()
        for option in of_it._actions
        if not option.help
    ]
    assert not silent


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if hasattr(command, "EXAMPLES")])
def test_the_examples_of_a_command_s_help_are_ones_that_it_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.parser().parse_args([name, "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    lines = [line.strip() for line in shown.partition("examples:\n")[2].splitlines()]
    assert lines == list(cli.COMMANDS[name].EXAMPLES)
    for line in lines:
        program, *words = shlex.split(line.partition(" > ")[0])
        assert program == "lsr-scale"
        assert cli.parser().parse_args(words).command == name
