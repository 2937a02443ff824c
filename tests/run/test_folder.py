"""Where a run's files go: names, claims, refusals, and files that appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lsr_scale import UserError, files
from lsr_scale.run.folder import RunFolder, open_run
from lsr_scale.run.lock import locked
from lsr_scale.run.metrics import read_metrics, summarize_metrics
from lsr_scale.run.plots import draw_losses
from lsr_scale.run.start import claim


@pytest.fixture(autouse=True)
def _in_an_empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def choose(output_dir, name, resume, overwrite):
    with claim(output_dir, name, resume, overwrite) as folder:
        return folder


def begun(folder):
    files.write_json(folder.environment, {"lsr_scale": "1.0"})
    files.write_text(folder.config, "model: {}\nadapter: {}\ndata: {}\ntraining: {}\n")
    return folder


def test_unnamed_runs_are_numbered_and_resuming_takes_the_newest():
    first = begun(choose(None, "arc", resume=False, overwrite=False))
    second = begun(choose(None, "arc", resume=False, overwrite=False))
    assert [str(folder.path) for folder in (first, second)] == ["runs/arc", "runs/arc-2"]
    assert choose(None, "arc", resume=True, overwrite=False) == second
    assert choose(None, "arc", resume=False, overwrite=True) == second
    assert str(choose(None, "other", resume=True, overwrite=False).path) == "runs/other"


def test_two_runs_that_start_together_get_two_folders(monkeypatch):
    mkdir = Path.mkdir
    raced = []

    def another_is_faster(self, *args, **kwargs):
        if self.name == "arc" and not raced:
            raced.append(self)
            mkdir(self, parents=True)
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr("pathlib.Path.mkdir", another_is_faster)
    assert str(choose(None, "arc", resume=False, overwrite=False).path) == "runs/arc-2"


def test_a_named_folder_with_a_run_is_refused_unless_resumed_or_overwritten(tmp_path):
    begun(choose("mine", "arc", resume=False, overwrite=False))
    with pytest.raises(UserError, match=r"mine: holds a run already; --resume auto continues it, --overwrite"):
        choose("mine", "arc", resume=False, overwrite=False)
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        assert choose("mine", "arc", **how).is_run()


def test_a_folder_with_other_files_is_taken_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    choose("mine", "arc", resume=False, overwrite=False)
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_a_folder_that_was_only_claimed_is_released():
    with claim("deep/er/mine", "arc", resume=False, overwrite=False) as folder:
        assert folder.path.is_dir()
    assert not folder.path.exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: expected a folder for the run, got a file; name another"):
        choose("file", "arc", resume=False, overwrite=False)
    with pytest.raises(UserError, match="file/below: cannot be written: Not a directory; check the path"):
        choose("file/below", "arc", resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"/proc/nowhere: cannot be written: "):
        choose("/proc/nowhere", "arc", resume=False, overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_someone_elses_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied; check the path and who may write"):
        choose("locked", "arc", resume=False, overwrite=False)


def test_opening_what_is_no_run_names_the_runs_that_are_there():
    begun(choose(None, "arc", resume=False, overwrite=False))
    with pytest.raises(UserError, match=r"runs/ark: not a run folder .*; runs here: runs/arc"):
        open_run("runs/ark")
    assert open_run("runs/arc").is_run()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-100"):
        (tmp_path / name).mkdir()
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def test_tasks_with_any_name_have_a_file_of_predictions_of_their_own():
    folder = RunFolder(Path("run"))
    assert folder.predictions("arc_easy", "before") == Path("run/eval/arc_easy-before.jsonl")
    tasks = ["\xfc", "\xf6", "u\u0308", "my set", "my_set", "my/set", "A", "a", "builtin:a b/c", "x" * 300, "x" * 301]
    names = [folder.predictions(task, "before").name for task in tasks]
    assert len({name.lower() for name in names}) == len(tasks)
    assert all(name.isascii() and len(name) < 130 and "/" not in name for name in names)


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, fails):
    target = tmp_path / "results.json"
    files.write_json(target, {"good": 1})

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    if fails == "write":
        monkeypatch.setattr("pathlib.Path.open", full)
    else:
        monkeypatch.setattr("os.fsync" if fails == "fsync" else "pathlib.Path.replace", full)
    with pytest.raises(UserError, match=r"results\.json: cannot be written: No space left on device; free some space"):
        files.write_json(target, {"good": 2})
    monkeypatch.undo()
    assert json.loads(target.read_text()) == {"good": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_metrics_are_read_up_to_a_line_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0, "memory_gib": 1.5}\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 2.0, "memory_gib": 1.5}]
    assert summarize_metrics(file) == {"final_loss": 2.0, "tokens": 0, "tokens_per_s": None, "peak_memory_gib": 1.5}
    assert summarize_metrics(tmp_path / "none.jsonl") == {}


def test_results_keep_the_largest_condition_number_of_each_side(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"loss": 2.0, "memory_gib": 1.5, "condition_down_max": 1.0 + g, "condition_up_max": 9.0} for g in (0.5, 0.1)
    ]
    file.write_text("".join(json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows)))
    found = summarize_metrics(file)
    assert (found["condition_down_max"], found["condition_up_max"]) == (1.5, 9.0)


def test_results_keep_the_largest_share_of_underflow(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 2.0, "underflow_input_max": share} for i, share in enumerate((1e-5, 2.34567e-5))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize_metrics(file)["underflow_input_max"] == 2.346e-5


def test_a_record_of_errors_is_a_run_s_own_and_another_file_of_its_name_is_in_the_way(tmp_path):
    folder = begun(RunFolder(tmp_path))
    files.write_json(folder.compute_errors, {"compute": "int8", "tolerance": 0.1, "errors": {}, "kept": []})
    assert folder.compute_errors in folder.written()
    assert folder.in_the_way() == []
    files.write_json(folder.compute_errors, {"mine": 1})
    assert folder.compute_errors not in folder.written()
    assert folder.in_the_way() == [folder.compute_errors]


@pytest.mark.usefixtures("rendered")
def test_the_same_losses_draw_the_same_bytes_and_a_full_disk_keeps_the_old_curve(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": 3.0 / i} for i in range(1, 40)] + [{"step": 20, "eval_loss": 1.0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.png", "b.png"):
        draw_losses(file, tmp_path / name, "losses")
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert drawn == (tmp_path / "b.png").read_bytes()
    file.write_text(json.dumps(rows[0]) + "\n")

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: No space left"):
        draw_losses(file, tmp_path / "a.png", "losses")
    assert (tmp_path / "a.png").read_bytes() == drawn


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    words = rf"a run is under way here \(process {os.getpid()} on "
    with locked(folder.path), pytest.raises(UserError, match=words), locked(folder.path):
        pass
    with locked(folder.path):
        assert (folder.path / ".lock").is_file()
    assert not list(folder.path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_library_s_words_for_a_full_disk_are_the_system_s(number):
    found = files.system_error(SafetensorError(f"Error while serializing: IoError (os error {number})"))
    assert found is not None
    assert found.errno == number
    words = str(files.cannot_write(Path("x"), found))
    assert os.strerror(number) in words
    assert "--resume auto" in words
    assert files.system_error(SafetensorError("invalid header")) is None
