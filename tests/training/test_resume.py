"""Runs that stop and resume: the same adapter in the end, every step recorded once, and nothing good lost."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from lsr_scale import UserError, cli
from lsr_scale.run.backup import Backup
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.train import train
from lsr_scale.training.assembly import build_trainer
from lsr_scale.training.callbacks import progress
from lsr_scale.training.checkpoint.manifest import damage, write_manifest
from tests.helpers.tiny_runs import completions, do, factors, metrics, questions, same, save_llama, tiny_run, write_rows

# dropout makes the random state count
DROPOUT = {"method": "kron_lora", "rank": 4, "left_out": 4, "dropout": 0.2}


class Killed(BaseException):
    """Ends a run as a kill would, as far as files go."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_llama(folder / "model")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place):
    """Return the folder of a run that nothing stopped."""
    return do(tiny_run(place, adapter=DROPOUT, training={"output_dir": str(place / "undisturbed")}))


def run_in(place, folder, **sections):
    training = {"output_dir": str(folder), **sections.pop("training", {})}
    return tiny_run(place, adapter=sections.pop("adapter", DROPOUT), training=training, **sections)


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function that makes the next run end with an exception (or a signal) in the middle of a step's log."""
    return functools.partial(arrange_stop, monkeypatch)


def arrange_stop(patch, step, how: Any = Killed):
    on_log = progress.Progress.on_log

    def on_log_then_stop(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step:
            patch.setattr(progress.Progress, "on_log", on_log)
            if isinstance(how, type):
                raise how
            os.kill(os.getpid(), how)

    patch.setattr(progress.Progress, "on_log", on_log_then_stop)


@pytest.fixture(scope="module")
def killed(place):
    """Return the folder of a run that was killed in its fifth step, with checkpoints of its second and fourth."""
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 5)
        with pytest.raises(Killed):
            do(run_in(place, place / "killed"))
    return place / "killed"


@pytest.fixture
def stopped(killed, tmp_path):
    """Return a copy of the killed run, a test's own."""
    return RunFolder(Path(shutil.copytree(killed, tmp_path / "run")))


def test_a_killed_run_resumes_to_the_same_adapter_with_every_step_recorded_once(place, undisturbed, stopped):
    assert [path.name for path in stopped.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4, 5]
    assert not stopped.adapter.exists()
    do(run_in(place, stopped.path), resume="auto")
    assert same(factors(undisturbed), factors(stopped))
    rows, expected = metrics(stopped), metrics(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "num_tokens", "learning_rate", "epoch"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    times = [row["wall_s"] for row in rows]
    assert times == sorted(times)
    assert (
        stopped.predictions("questions", "after").read_bytes()
        == undisturbed.predictions("questions", "after").read_bytes()
    )
    accuracy = json.loads(stopped.results.read_text())["accuracy"]
    assert accuracy == json.loads(undisturbed.results.read_text())["accuracy"], "before comes from the first part"


def test_tokens_of_steps_that_were_not_logged_before_a_kill_are_counted(place, undisturbed, tmp_path, stop_at):
    run = run_in(place, tmp_path / "run", training={"logging_steps": 3})
    stop_at(3)  # after the checkpoint of the second step, whose tokens no line has yet
    with pytest.raises(Killed):
        do(run)
    last = metrics(do(run, resume="auto"))[-1]
    assert (last["step"], last["num_tokens"]) == (6, metrics(undisturbed)[-1]["num_tokens"])


def test_a_half_written_last_line_is_dropped_and_written_again(place, undisturbed, stopped):
    text = stopped.metrics.read_text()
    stopped.metrics.write_text(text[: text.rindex("{") + 20])
    do(run_in(place, stopped.path), resume="auto")
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4, 5, 6]


def test_an_earlier_checkpoint_by_its_path_takes_the_later_ones_place(place, undisturbed, stopped):
    do(run_in(place, stopped.path, training={"save_steps": 5}), resume=str(stopped.path / "checkpoint-2"))
    assert same(factors(undisturbed), factors(stopped))
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    # those of the run as it is now: its save_steps, not the first part's
    assert [path.name for path in stopped.checkpoints()] == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-30])


def alter(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_is_few_files_unsharded_by_parameter_name(undisturbed):
    folder = undisturbed.path / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base.json", "manifest.json", "README.md"),
        *("trainer_state.json", "training_state.json", "training_state.safetensors"),
    }
    state = load_file(folder / "training_state.safetensors")
    adapter = {name.removeprefix("base_model."): tensor for name, tensor in factors(undisturbed, folder.name).items()}
    for name, tensor in adapter.items():
        stem, _, leaf = name.rpartition(".")
        found = [key for key in state if key.startswith(f"parameter/base_model.{stem}") and leaf in key]
        assert len(found) == 1, name
        assert torch.equal(state[found[0]], tensor)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[found[0].replace("parameter/", "optimizer/") + f"/{moment}"].shape == tensor.shape
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert len(state) == 4 * len(adapter), "a parameter, two moments and a step each"


@pytest.mark.parametrize("harm", [cut, alter, Path.unlink])
@pytest.mark.parametrize(
    "name", ["training_state.safetensors", "training_state.json", "trainer_state.json", "manifest.json"]
)
def test_damage_to_any_file_is_recognized(undisturbed, tmp_path, name, harm):
    checkpoint = Path(shutil.copytree(undisturbed.path / "checkpoint-4", tmp_path / "checkpoint-4"))
    assert damage(checkpoint) is None
    harm(checkpoint / name)
    words = {cut: f"{name} is cut short", alter: f"{name} is altered", Path.unlink: f"there is no {name}"}
    assert (words[harm] if name != "manifest.json" else name) in (damage(checkpoint) or "")


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_damaged_checkpoint_is_skipped(place, undisturbed, stopped, harm, capsys):
    harm(stopped.path / "checkpoint-4" / "training_state.safetensors")
    from lsr_scale.run.train import train

    train(run_in(place, stopped.path), resume="auto")
    said = capsys.readouterr().out
    words = {cut: "training_state.safetensors is cut short", Path.unlink: "there is no training_state.safetensors"}
    assert f"checkpoint-4 is skipped: {words[harm]}" in said
    assert f"resuming from {stopped.path}/checkpoint-2" in said
    assert same(factors(undisturbed), factors(stopped))


def test_a_manifest_without_the_adapter_is_damage(stopped, tmp_path):
    checkpoint = Path(shutil.copytree(stopped.path / "checkpoint-2", tmp_path / "checkpoint-2"))
    listed = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("adapter_model.safetensors", "adapter_config.json", "base.json"):
        kept = {"files": {key: value for key, value in listed["files"].items() if key != name}}
        (checkpoint / "manifest.json").write_text(json.dumps(kept))
        assert damage(checkpoint) == f"manifest.json does not list {name}"


def test_a_run_whose_checkpoints_are_all_damaged_is_not_restarted(place, stopped):
    for step in (2, 4):
        cut(stopped.path / f"checkpoint-{step}" / "training_state.json")
    with pytest.raises(UserError, match=r"no checkpoint is complete; .* remove them, or --overwrite .*\n.*is cut"):
        do(run_in(place, stopped.path), resume="auto")
    assert len(stopped.checkpoints()) == 2


@pytest.mark.parametrize(
    "name",
    ["eval/my_code.py", "adapter/mine.bin", "checkpoint-500/model.bin", "results.json", "config.yaml", "env.json"],
)
def test_a_folder_that_no_run_wrote_is_left_alone(place, undisturbed, tmp_path, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    first = name.split("/")[0]
    for how in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(
            UserError, match=rf"is no run's folder, but holds {first}, which no run wrote .* move it away"
        ):
            do(run_in(place, tmp_path / "run"), **how)
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"
    if first == "eval":
        (tmp_path / "run" / first).rename(tmp_path / "away")
        do(run_in(place, tmp_path / "run"), overwrite=True)
        assert same(factors(undisturbed), factors(RunFolder(tmp_path / "run")))


def test_a_damaged_checkpoint_by_its_path_is_refused(place, stopped):
    cut(stopped.path / "checkpoint-4" / "training_state.json")
    with pytest.raises(UserError, match=r"checkpoint-4: not a checkpoint to resume from: training_state\.json is cut"):
        do(run_in(place, stopped.path), resume=str(stopped.path / "checkpoint-4"))
    assert damage(stopped.path / "checkpoint-2") is None


@pytest.mark.parametrize("path", ["nowhere/checkpoint-3", "."])
def test_a_path_that_is_no_checkpoint_is_refused_and_nothing_is_made(place, tmp_path, path):
    with pytest.raises(UserError, match="not a checkpoint to resume from: there is no"):
        do(run_in(place, tmp_path / "run"), resume=str(tmp_path / path))
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_resume_is_a_start_from_the_beginning(place, undisturbed, tmp_path):
    done = do(run_in(place, tmp_path / "run"), resume="auto")
    assert same(factors(undisturbed), factors(done))


def test_a_finished_run_resumes_to_itself(place, stopped, undisturbed, capsys):
    do(run_in(place, stopped.path), resume="auto")
    before = metrics(stopped)
    train(run_in(place, stopped.path), resume="auto")
    assert same(factors(undisturbed), factors(stopped))
    assert metrics(stopped) == before
    assert "nothing was left to train: the checkpoint is of the last step" in capsys.readouterr().out


def test_the_checkpoint_that_a_run_resumes_from_is_rotated_away(place, stopped, undisturbed, capsys):
    train(run_in(place, stopped.path, training={"save_total_limit": 1}), resume="auto")
    assert f"resuming from {stopped.path}/checkpoint-4" in capsys.readouterr().out
    assert [path.name for path in stopped.checkpoints()] == ["checkpoint-6"]
    assert same(factors(undisturbed), factors(stopped))


def test_a_finished_run_without_checkpoints_is_not_thrown_away_by_resume(place, tmp_path):
    run = run_in(place, tmp_path / "run", training={"save_strategy": "no"}, eval={"tasks": []})
    done = do(run)
    kept = factors(done)
    with pytest.raises(UserError, match="the run is finished, and no complete checkpoint is left"):
        do(run, resume="auto")
    assert same(kept, factors(done))


def test_more_steps_can_be_added_and_changes_are_noted(place, stopped, capsys):
    from lsr_scale.run.train import train

    train(run_in(place, stopped.path, training={"num_train_epochs": 2}), resume="auto")
    assert "note: changed since the run began: training.num_train_epochs: 1 -> 2" in capsys.readouterr().out
    assert [row["step"] for row in metrics(stopped)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"adapter": {**DROPOUT, "rank": 2}}, r"adapter\.rank: 4 -> 2"),
        ({"adapter": {"method": "lsr", "rank": 4}}, r"adapter\.method: 'kron_lora' -> 'lsr'"),
        ({"model": {"quantization": "int8"}}, r"model\.quantization: 'nf4' -> 'int8'"),
        ({"training": {"learning_rate": 1e-9}}, r"training\.learning_rate: 0\.005 -> 1e-09"),
    ],
)
def test_another_adapter_or_base_is_refused_and_the_run_left_as_it_was(place, stopped, sections, words):
    before = stopped.config.read_text()
    with pytest.raises(UserError, match=rf"saved by a run with another .*{words}.*resume with its own configuration"):
        do(run_in(place, stopped.path, **sections), resume="auto")
    assert stopped.config.read_text() == before
    assert len(stopped.checkpoints()) == 2


def test_a_checkpoint_of_other_shapes_is_refused_with_them(place, stopped, tmp_path):
    stopped.config.unlink()
    run = run_in(place, stopped.path, adapter={**DROPOUT, "rank": 2})
    with pytest.raises(UserError, match=r"kron_right_up: \[12, 4\] in the file, \[12, 2\] in the model"):
        do(run, resume=str(stopped.path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adam_beta1", 0.8),
        ("adam_beta2", 0.9),
        ("adam_epsilon", 1e-3),
        ("weight_decay", 0.1),
    ],
)
def test_an_optimizers_setting_that_the_checkpoint_holds_cannot_be_changed(place, stopped, field, value):
    with pytest.raises(
        UserError, match=rf"saved by a run with another training\.{field}: .* -> .*; resume with its own"
    ):
        do(run_in(place, stopped.path, training={field: value}), resume="auto")


def test_arguments_of_an_optimizer_that_the_checkpoint_holds_cannot_be_changed(place, tmp_path, stop_at):
    stop_at(3)
    with pytest.raises(Killed):
        do(run_in(place, tmp_path, training={"optim": "sgd"}))
    with pytest.raises(
        UserError, match=r"saved by a run with another training\.optim_args: .* -> .*; resume with its own"
    ):
        do(run_in(place, tmp_path, training={"optim": "sgd", "optim_args": "momentum=0.5"}), resume="auto")


@pytest.mark.parametrize("change", [{"lr_scheduler_kwargs": {"factor": 0.5}}, {"lr_scheduler_type": "linear"}])
def test_a_schedules_setting_that_the_checkpoint_holds_cannot_be_changed(place, tmp_path, stop_at, change):
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    schedule |= {"metric_for_best_model": "eval_loss", "logging_steps": 1}
    data = {"train": [str(place / "rows.jsonl")], "validation": [str(place / "rows.jsonl")]}
    stop_at(3)
    with pytest.raises(Killed):
        do(run_in(place, tmp_path, training=schedule, data=data))
    with pytest.raises(UserError, match=f"saved by a run with another training.{next(iter(change))}"):
        do(run_in(place, tmp_path, training={**schedule, **change}, data=data), resume="auto")
    do(run_in(place, tmp_path, training=schedule, data=data), resume="auto")


def test_added_epochs_have_the_rate_of_a_run_that_was_longer_from_the_beginning(place, tmp_path):
    rates = {}
    for name, lengths in (("longer", [2]), ("added", [1, 2])):
        for epochs in lengths:
            training = {"num_train_epochs": epochs, "warmup_steps": 0}
            folder = do(
                run_in(place, tmp_path / name, training=training), resume="auto" if epochs != lengths[0] else None
            )
        rates[name] = [row["learning_rate"] for row in metrics(folder) if "loss" in row]
    assert rates["added"][6:] == rates["longer"][6:]
    assert rates["added"][5] < rates["added"][6], "the first run was to end at 0"


def test_other_rows_a_step_are_refused_with_the_remedy(place, stopped):
    run = run_in(place, stopped.path, training={"per_device_train_batch_size": 1})
    words = r"its steps had 2 rows .*, these would have 1, so .* set training\.gradient_accumulation_steps=2"
    with pytest.raises(UserError, match=words):
        do(run, resume="auto")
    run = run_in(place, stopped.path, training={"per_device_train_batch_size": 3})
    with pytest.raises(UserError, match=r"these would have 3, .* whose product is 2"):
        do(run, resume="auto")


def test_the_same_rows_in_smaller_batches_resume(place, stopped, capsys):
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    do(run_in(place, stopped.path, training=training), resume="auto")
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused", "paged_adamw_8bit", "lion_32bit"])
def test_any_optimizer_resumes_bit_for_bit(place, tmp_path, stop_at, optim):
    settings = {"training": {"optim": optim}, "eval": {"tasks": []}}
    whole = do(run_in(place, tmp_path / "whole", **settings))
    stop_at(5)
    with pytest.raises(Killed):
        do(run_in(place, tmp_path / "run", **settings))
    continued = do(run_in(place, tmp_path / "run", **settings), resume="auto")
    assert same(factors(whole), factors(continued))


def test_a_folder_with_a_run_is_refused_and_overwrite_begins_it_again(place, stopped, undisturbed):
    with pytest.raises(
        UserError, match=r"holds a run already; --resume auto continues it, --overwrite starts it again"
    ):
        do(run_in(place, stopped.path))
    (stopped.path / "notes.txt").write_text("mine")
    do(run_in(place, stopped.path), overwrite=True)
    assert same(factors(undisturbed), factors(stopped))
    assert [row["step"] for row in metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    assert (stopped.path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="give one of them"):
        do(run_in(place, stopped.path), overwrite=True, resume="auto")


def contents(folder):
    """Return every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_overwritten_run_is_back_where_the_new_one_ends_before_its_first_checkpoint(
    place, undisturbed, tmp_path, stop_at, capsys
):
    folder = RunFolder(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    before = contents(folder.path)
    stop_at(1)
    with pytest.raises(Killed):
        do(run_in(place, folder.path), overwrite=True)
    assert contents(folder.path) == before
    assert "ended before it saved a checkpoint; the earlier run is restored" in capsys.readouterr().err


def test_an_overwritten_run_leaves_no_results_beside_a_new_one_that_has_saved_a_step(
    place, undisturbed, tmp_path, stop_at
):
    folder = RunFolder(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    stop_at(3)
    with pytest.raises(Killed):
        do(run_in(place, folder.path, eval={"tasks": []}), overwrite=True)
    assert {path.name for path in folder.path.iterdir()} == {
        *("config.yaml", "data.json", "env.json", "metrics.jsonl", "checkpoint-2", "tokenizer")
    }


@pytest.mark.parametrize("moment", ["while moving", "moved", "while returning"])
def test_a_kill_in_an_overwriting_run_loses_nothing(place, undisturbed, tmp_path, monkeypatch, moment, capsys):
    folder = RunFolder(Path(shutil.copytree(undisturbed.path, tmp_path / "run")))
    before = contents(folder.path)
    number = 0

    def killed_at_the_third(method):
        def moves(self, *args):
            nonlocal number
            number += self.suffix != ".part"
            if number == 3:
                raise Killed
            return method(self, *args)

        return moves

    with monkeypatch.context() as patch:
        patch.setattr(Backup, "settle", lambda self: None)
        if moment == "while moving":
            patch.setattr("pathlib.Path.rename", killed_at_the_third(Path.rename))
        arrange_stop(patch, 1)
        with pytest.raises(Killed):
            do(run_in(place, folder.path), overwrite=True)
    if moment == "while returning":
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.replace", killed_at_the_third(Path.replace))
            with pytest.raises(Killed):
                Backup(folder).settle()
    assert contents(folder.path) != before
    capsys.readouterr()
    with pytest.raises(UserError, match="holds a run already"):
        do(run_in(place, folder.path))
    assert contents(folder.path) == before
    assert "the earlier run is restored" in capsys.readouterr().err


def test_overwriting_with_a_run_that_cannot_begin_loses_nothing(place, undisturbed, tmp_path):
    shutil.copytree(undisturbed.path, tmp_path / "run")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    rows = write_rows(tmp_path / "bad.jsonl", [*completions(2), {"prompt": "a"}])
    for sections, words in (
        ({"model": {"name": str(place / "modle")}}, "modle"),
        ({"data": {"train": [rows]}}, r"bad\.jsonl, line 3"),
        ({"adapter": {"rank": 1000}}, "rank=1000 is larger"),
    ):
        with pytest.raises(UserError, match=words):
            do(run_in(place, tmp_path / "run", **sections), overwrite=True)
    after = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


def config_file(place, tmp_path):
    values = run_in(place, tmp_path / "run").model_dump(exclude={"deepspeed"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def test_ctrl_c_gives_one_message_and_status_130_and_the_run_resumes(place, undisturbed, tmp_path, stop_at, capfd):
    file = config_file(place, tmp_path)
    stop_at(3, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["train", file]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    said = capfd.readouterr().err
    assert "lsr-scale: ended by Ctrl-C after step 4, a checkpoint is saved in" in said
    assert "Traceback" not in said
    folder = RunFolder(tmp_path / "run")
    assert not folder.adapter.exists()
    assert not folder.results.exists()
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert cli.main(["train", file, "--resume", "auto", "--quiet"]) == 0
    assert same(factors(undisturbed), factors(folder))


def test_a_full_disk_in_a_checkpoint_leaves_the_one_before_to_resume_from(
    place, undisturbed, tmp_path, monkeypatch, capfd
):
    from lsr_scale.training.checkpoint import resumable

    file = config_file(place, tmp_path)
    save, num_saved = resumable.save_file, 0

    def full(tensors, target):
        nonlocal num_saved
        num_saved += 1
        save(tensors, target)
        if num_saved == 2:
            cut(target)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(resumable, "save_file", full)
    assert cli.main(["train", file]) == 2
    assert "checkpoint-4: cannot be written: No space left on device; free some space" in capfd.readouterr().err
    monkeypatch.setattr(resumable, "save_file", save)
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in folder.path.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert cli.main(["train", file, "--resume", "auto"]) == 0
    assert same(factors(undisturbed), factors(folder))


def test_a_full_disk_under_the_metrics_ends_the_run_in_words(place, tmp_path, monkeypatch, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    file = config_file(place, tmp_path)

    class FillMetrics(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            metrics_file = tmp_path / "run" / "metrics.jsonl"
            if state.global_step == 3:
                metrics_file.rename(tmp_path / "kept.jsonl")
                metrics_file.symlink_to("/dev/full")

    from lsr_scale.run import train as module

    original = module.build_trainer
    monkeypatch.setattr(
        module,
        "build_trainer",
        lambda run, folder, callbacks, *rest: original(run, folder, [FillMetrics(), *callbacks], *rest),
    )
    assert cli.main(["train", file]) == 2
    assert "lsr-scale: the disk is full; free some space" in capfd.readouterr().err


def rename(folder, old, new):
    (folder / f"checkpoint-{old}").rename(folder / f"checkpoint-{new}")


@pytest.mark.parametrize("change", ["copied", "exchanged", "dated in the future", "linked"])
def test_checkpoints_are_known_by_the_step_in_their_state(place, undisturbed, stopped, tmp_path, change, capsys):
    folder = stopped.path
    expected = folder / "checkpoint-4"
    if change == "copied":
        shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-6")
    elif change == "exchanged":
        shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
        shutil.rmtree(folder / "checkpoint-4")
        rename(folder, 2, 4)
        shutil.copytree(tmp_path / "checkpoint-4", folder / "checkpoint-2")
    elif change == "dated in the future":
        os.utime(folder / "checkpoint-2", (4e9, 4e9))
    else:
        (folder / "checkpoint-4").rename(tmp_path / "checkpoint-4")
        (folder / "checkpoint-4").symlink_to(tmp_path / "checkpoint-4")
    before = contents(folder)
    run = run_in(place, folder, training={"save_total_limit": 1})
    if change == "exchanged":
        with pytest.raises(
            UserError, match=r"checkpoint-4 is skipped: it was saved after step 2, .*checkpoint-2 to resume"
        ):
            train(run, resume="auto")
        assert contents(folder) == before
        return
    train(run, resume="auto")
    said = capsys.readouterr().out
    assert f"resuming from {expected}" in said
    assert same(factors(undisturbed), factors(stopped))
    names = {path.name for path in stopped.checkpoints()}
    if change == "copied":
        assert f"{folder}/checkpoint-6 is skipped: it was saved after step 2, which its name should say" in said
        assert "checkpoint-6 was no checkpoint of that step: it is renamed to checkpoint-6.kept" in said
        assert contents(folder / "checkpoint-6.kept") == contents(folder / "checkpoint-2") or names == {"checkpoint-6"}
    assert names == {"checkpoint-6"}
    if change == "linked":
        assert damage(tmp_path / "checkpoint-4") is None, "a link goes, not what it points to"


def test_a_misnamed_checkpoint_by_its_path_is_refused_and_the_advice_works(place, undisturbed, stopped):
    rename(stopped.path, 4, 7)
    with pytest.raises(
        UserError, match=r"checkpoint-7: not .*: it was saved after step 4, .* name it checkpoint-4 to resume"
    ):
        do(run_in(place, stopped.path), resume=str(stopped.path / "checkpoint-7"))
    rename(stopped.path, 7, 4)
    do(run_in(place, stopped.path), resume=str(stopped.path / "checkpoint-4"))
    assert same(factors(undisturbed), factors(stopped))


def altered(checkpoint, name, content):
    """Write a checkpoint's file anew, and its manifest with it, as a script of somebody's would."""
    (checkpoint / name).write_text(content if isinstance(content, str) else json.dumps(content))
    write_manifest(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("training_state.json", {"step": "4"}, "training_state.json: step: Input should be a valid integer"),
        ("training_state.json", {"rows_per_step": 0}, "training_state.json: rows_per_step: Input should be greater"),
        ("training_state.json", {"groups": 1}, "training_state.json: groups: Input should be a valid array"),
        ("training_state.json", "[]", "training_state.json: content: Input should be an object"),
        ("training_state.json", "", "training_state.json: content: Invalid JSON"),
        ("trainer_state.json", {"global_step": 5}, "trainer_state.json is of step 5, training_state.json of step 4"),
        ("trainer_state.json", {"odd": 1}, "trainer_state.json cannot be read"),
        ("trainer_state.json", "[]", "trainer_state.json cannot be read"),
        ("trainer_state.json", "[" * 100_000, "trainer_state.json cannot be read"),
    ],
)
def test_a_state_of_odd_content_is_damage(stopped, name, change, words):
    checkpoint = stopped.path / "checkpoint-4"
    content = json.loads((checkpoint / name).read_text())
    altered(checkpoint, name, {**content, **change} if isinstance(change, dict) else change)
    assert words in (damage(checkpoint) or "")


@pytest.mark.parametrize(
    "change", [{"scheduler": {}}, {"groups": []}, {"groups": [{"lr": "x"}]}, {"scalars": {"optimizer/x/step": 1}}]
)
def test_a_state_of_another_optimizer_is_refused_in_words(place, stopped, change):
    checkpoint = stopped.path / "checkpoint-4"
    content = json.loads((checkpoint / "training_state.json").read_text())
    altered(checkpoint, "training_state.json", {**content, **change})
    before = contents(stopped.path)
    with pytest.raises(UserError, match="do not hold the state of this run's optimizer and schedule"):
        do(run_in(place, stopped.path), resume="auto")
    assert contents(stopped.path) == before


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a\0b"])
def test_a_manifest_that_leads_out_of_its_folder_is_damage(stopped, name):
    file = stopped.path / "checkpoint-4" / "manifest.json"
    content = json.loads(file.read_text())
    content["files"][name] = {"bytes": 1, "sha256": ""}
    file.write_text(json.dumps(content))
    assert repr(name)[1:-1] in (damage(file.parent) or "").replace("\0", r"\x00")


def test_a_refusal_to_resume_leaves_every_file_as_it_was(place, stopped):
    before = contents(stopped.path)
    run = run_in(place, stopped.path, training={"lr_scheduler_kwargs": {"nonsense": 1}})
    for how in ("auto", str(stopped.path / "checkpoint-2")):
        with pytest.raises((UserError, TypeError)):
            do(run, resume=how)
        assert contents(stopped.path) == before


def test_an_overwritten_run_is_back_where_the_new_one_s_schedule_is_refused(place, undisturbed, tmp_path):
    shutil.copytree(undisturbed.path, tmp_path / "run")
    before = contents(tmp_path / "run")
    for training in ({"lr_scheduler_kwargs": {"nonsense": 1}}, {"optim": "galore_adamw"}):
        with pytest.raises((UserError, TypeError, ValueError, ImportError)):
            do(run_in(place, tmp_path / "run", training=training), overwrite=True)
        assert contents(tmp_path / "run") == before


def with_rows_of_its_own(place, tmp_path, **sections):
    rows = write_rows(tmp_path / "grow.jsonl", completions())
    return run_in(place, tmp_path / "run", data={"train": [rows], **sections.pop("data", {})}, **sections)


def test_other_training_rows_are_refused_by_source_and_the_advice_works(place, tmp_path, stop_at):
    run = with_rows_of_its_own(place, tmp_path)
    stop_at(5)
    with pytest.raises(Killed):
        do(run)
    folder = RunFolder(tmp_path / "run")
    saved = json.loads(folder.data.read_text())["train"]
    assert [(row["path"], row["num_rows"], len(row["sha256"])) for row in saved] == [
        (str(tmp_path / "grow.jsonl"), 12, 64)
    ]
    before = contents(folder.path)
    write_rows(tmp_path / "grow.jsonl", completions(14))
    words = (
        rf"the training data changed.*\n.*grow\.jsonl with 12 rows \(hash {saved[0]['sha256'][:12]}\) when the run "
        r"began, \S*grow\.jsonl with 14 rows"
    )
    for how in ("auto", str(folder.path / "checkpoint-2")):
        with pytest.raises(UserError, match=words):
            do(run, resume=how)
        assert contents(folder.path) == before
    start = {**DROPOUT, "start_from": str(folder.path / "checkpoint-4")}
    anew = do(run_in(place, tmp_path / "anew", adapter=start, data={"train": [str(tmp_path / "grow.jsonl")]}))
    assert anew.has_adapter()
    write_rows(tmp_path / "grow.jsonl", completions())
    do(run, resume="auto")
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_rows_that_were_moved_are_the_same_rows(place, tmp_path, stop_at, capsys):
    run = with_rows_of_its_own(place, tmp_path)
    stop_at(5)
    with pytest.raises(Killed):
        do(run)
    (tmp_path / "grow.jsonl").rename(tmp_path / "moved.jsonl")
    train(run_in(place, tmp_path / "run", data={"train": [str(tmp_path / "moved.jsonl")]}), resume="auto")
    assert "note: changed since the run began: data.train" in capsys.readouterr().out


def test_other_validation_rows_and_questions_are_said_and_scores_left_to_their_questions(
    place, tmp_path, stop_at, capsys
):
    files = [write_rows(tmp_path / "check.jsonl", completions(4)), write_rows(tmp_path / "asked.jsonl", questions())]
    run = with_rows_of_its_own(place, tmp_path, data={"validation": [files[0]]}, eval={"tasks": [files[1]]})
    stop_at(5)
    with pytest.raises(Killed):
        do(run)
    write_rows(tmp_path / "check.jsonl", completions(5))
    write_rows(tmp_path / "asked.jsonl", [{**row, "question": row["question"] + "?"} for row in questions()])
    train(run, resume="auto")
    said = capsys.readouterr().out
    assert "note: data changed since the run began: validation: " in said
    assert "check.jsonl with 4 rows" in said
    assert "asked-before.jsonl is left out: it is not of the questions that asked has now" in said
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]
    assert list(accuracy["asked"]) == ["after"]


def test_a_run_without_a_record_of_its_data_resumes_with_a_note(place, undisturbed, stopped, capsys):
    stopped.data.unlink()
    train(run_in(place, stopped.path), resume="auto")
    assert (
        "data.json says what data checkpoint-4 was trained on, so it could not be compared" in capsys.readouterr().out
    )
    assert same(factors(undisturbed), factors(stopped))


def test_odd_lines_of_metrics_are_skipped(place, stopped):
    lines = stopped.metrics.read_text().splitlines()
    odd = ['{"step', "[1]", '{"step": "2"}', '{"loss": 1}', "9" * 5000, '{"step": 3, "wall_s": "x", "loss": []}']
    stopped.metrics.write_text("\n".join([odd[0], lines[0], *odd[1:], *lines[1:3], '{"step": 4}', *lines[4:]]) + "\n")
    do(run_in(place, stopped.path), resume="auto")
    assert [row["step"] for row in metrics(stopped)] == [1, 3, 2, 3, 4, 5, 6]
    assert json.loads(stopped.results.read_text())["peak_memory_gib"] > 0


def test_a_moved_base_is_named_when_a_run_resumes(place, stopped, tmp_path, capsys):
    run = run_in(place, stopped.path, model={"name": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"no such folder; .*if it lies elsewhere now: --set model\.name=FOLDER"):
        do(run, resume="auto")
    shutil.copytree(place / "model", tmp_path / "gone")
    train(run, resume="auto")
    assert "note: changed since the run began: model.name: " in capsys.readouterr().out


def test_a_moved_run_resumes_where_it_lies_now(place, undisturbed, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        arrange_stop(patch, 5)
        with pytest.raises(Killed):
            do(run_in(place, tmp_path / "first"))
    (tmp_path / "first").rename(tmp_path / "second")
    assert cli.main(["train", str(tmp_path / "second" / "config.yaml"), "--resume", "auto", "--quiet"]) == 0
    assert same(factors(undisturbed), factors(RunFolder(tmp_path / "second")))
    assert not (tmp_path / "first").exists()


def test_a_step_has_its_rows_however_many_micro_batches_share_them(place, tmp_path):
    runs = {}
    for batch, accumulation in ((5, 1), (1, 5)):
        training = {"output_dir": str(tmp_path / str(batch)), "per_device_train_batch_size": batch, "save_steps": 1}
        training |= {"gradient_accumulation_steps": accumulation, "fused": "off"}
        runs[batch] = do(tiny_run(place, training=training, eval={"tasks": []}))
    # twelve rows in steps of five: the third repeats three of them
    tokens = {batch: [row["num_tokens"] for row in metrics(folder)] for batch, folder in runs.items()}
    assert len(tokens[5]) == 3
    assert tokens[1] == tokens[5]
    for folder in runs.values():
        state = json.loads((folder.checkpoints()[-1] / "training_state.json").read_text())
        assert (state["step"], state["rows_per_step"]) == (3, 5)


def test_nothing_is_left_of_a_checkpoint_beyond_the_limit(place, tmp_path):
    folder = do(run_in(place, tmp_path, training={"save_total_limit": 1}, eval={"tasks": []}))
    assert [path.name for path in folder.path.glob("*checkpoint*")] == ["checkpoint-6"]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_the_order_is_that_of_the_epoch_that_a_run_resumes_in(place, tmp_path, strategy):
    """By the sampler itself: on several processes the loader that skips an epoch's first batches does not tell it."""
    run = run_in(place, tmp_path / "run", training={"train_sampling_strategy": strategy})
    trainer: Any = build_trainer(run, RunFolder(tmp_path / "run"))
    trainer.get_train_dataloader()
    TrainerState(global_step=9, train_batch_size=2).save_to_json(str(tmp_path / "trainer_state.json"))
    assert trainer._init_training_state(12, 4, 3, str(tmp_path), None) == (2, 1)
    assert trainer._order.epoch == 2
