"""A folder is a run's by what only a run writes; an earlier run goes once a new one has saved a checkpoint."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lsr_scale import UserError, cli, files
from lsr_scale.config import load_run
from lsr_scale.run import lock
from lsr_scale.run.backup import Backup, restore
from lsr_scale.run.folder import MANIFEST, RunFolder
from lsr_scale.run.start import claim, named_by_file

CONFIG = "model: {}\nadapter: {}\ndata: {}\ntraining: {}\n"
SCORED = '{"id": "a", "log_likelihoods": [0.0]}\n'


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def a_run(path, steps=(2, 4)):
    """Write what a finished run leaves, without its tensors."""
    folder = RunFolder(path)
    write(folder.environment, '{"lsr_scale": "1"}')
    write(folder.config, CONFIG)
    write(folder.data, '{"train": [], "validation": []}')
    write(folder.metrics, '{"step": 1}\n')
    write(folder.results, '{"method": "lsr", "steps": 4}')
    write(folder.curve, "")
    folder.curve.write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        write(folder.adapter / name, "{}")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        write(folder.tokenizer / name, "{}")
    for when in ("before", "after", "eval-adapter"):
        write(folder.predictions("My Set", when), SCORED)
    for step in steps:
        write(path / f"checkpoint-{step}" / MANIFEST, "{}")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def take(path, resume=False, overwrite=False):
    with claim(str(path), "name", resume, overwrite) as folder:
        return folder


def test_all_that_a_run_leaves_is_known_as_its_own_and_nothing_else(tmp_path):
    folder = a_run(tmp_path / "run")
    ours = {*folder.written(), *folder.own_checkpoints()}
    everything = {path for path in folder.path.iterdir() if path.name not in ("adapter", "eval", "tokenizer")}
    inside = [path for name in ("adapter", "eval", "tokenizer") for path in (folder.path / name).iterdir()]
    assert ours == everything | {*inside}
    mine = "notes.txt", "vocab.txt", "eval/my_code.py", "eval/mine.jsonl", "adapter/mine.bin", "checkpoint-9/model.bin"
    for name in (*mine, "tokenizer/tokenizer.notes"):
        write(folder.path / name, '{"mine": 1}\n')
    write(folder.path / "eval" / "mine-before.jsonl", '{"mine": 1}\n')
    (folder.path / "spectra.png").write_bytes(b"\x89PNG\r\n\x1a\nmine")
    assert {*folder.written(), *folder.own_checkpoints()} == ours


def own_project(path):
    """Write what somebody's project may have at a run's names."""
    write(path / "config.yaml", CONFIG)
    write(path / "results.json", '{"mine": 1}')
    write(path / "metrics.jsonl", '{"step": 1}\n')
    write(path / "eval" / "arc-before.jsonl", SCORED)
    write(path / "eval" / "code.py", "mine")
    write(path / "checkpoint-10" / "trainer_state.json", "{}")
    return path


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("where", [".", "there", "link"])
def test_a_project_of_somebody_s_is_no_run_and_stays_as_it_is(tmp_path, monkeypatch, how, where):
    project = own_project(tmp_path / "project" / "there")
    (tmp_path / "project" / "link").symlink_to("there")
    monkeypatch.chdir(project if where == "." else project.parent)
    before = contents(project)
    with pytest.raises(UserError, match=r"is no run's folder, but holds config\.yaml, .*; move them away, or go else"):
        take(where, **how)
    assert contents(project) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", '{"mine": 1}'),
        ("results.json", "[1]"),
        ("results.json", "[" * 100_000),
        ("metrics.jsonl", "mine\n"),
        ("config.yaml", "mine: 1\n"),
        ("loss.png", "mine"),
        ("env.json", '{"mine": 1}'),
        ("data.json", "1" * 5000),
    ],
)
@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_a_file_with_a_run_s_name_and_other_content_is_in_the_way(tmp_path, name, content, how):
    folder = a_run(tmp_path / "run")
    write(folder.path / name, content)
    before = contents(folder.path)
    with pytest.raises(UserError, match=f"holds {name}, which no run wrote and this one would write over; move it"):
        take(folder.path, **how)
    assert contents(folder.path) == before
    (folder.path / name).rename(tmp_path / "away")  # the advice
    if name != "config.yaml":
        take(folder.path, **how)


def test_a_link_in_place_of_the_predictions_folder_is_refused(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder.path / "eval").rename(tmp_path / "mine")
    (folder.path / "eval").symlink_to(tmp_path / "mine")
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="holds eval, which no run wrote and this one would write over; move it"):
            take(folder.path, **how)


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "loss.png", "nonfinite.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "broken link"])
def test_odd_things_at_a_run_s_names_are_refused_and_not_opened(tmp_path, name, kind):
    folder = a_run(tmp_path / "run")
    path = folder.path / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        write(path / "mine")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(UserError, match=f"holds {name}, which no run wrote"):
        take(folder.path, resume=True)
    assert os.path.lexists(path)


def test_an_earlier_run_is_set_aside_and_removed_once_a_checkpoint_is_saved(tmp_path):
    folder = a_run(tmp_path / "run")
    mine = [write(folder.path / name, "mine") for name in ("notes.txt", "adapter/mine.bin", "eval/code.py")]
    earlier = Backup(folder)
    earlier.set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    assert sorted(p for p in folder.path.rglob("*") if p.is_file() and ".earlier-run" not in str(p)) == sorted(mine)
    write(folder.path / "checkpoint-1" / MANIFEST, "{}")
    earlier.settle()
    assert not folder.earlier.exists()
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_a_backup_is_restored_bit_for_bit_and_the_new_run_s_files_are_removed(tmp_path, capsys):
    folder = a_run(tmp_path / "run")
    write(folder.adapter / "mine.bin", "mine")
    before = contents(folder.path)
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    write(folder.environment, '{"lsr_scale": "2"}')
    write(folder.config, CONFIG + "eval: {}\n")
    write(folder.metrics, '{"step": 1, "loss": 3.0}\n')
    write(folder.predictions("other", "before"), SCORED)
    with pytest.raises(UserError, match="holds a run already"):
        take(folder.path)
    assert contents(folder.path) == before
    assert f"{folder.path}: the run that began here ended before it saved a checkpoint" in capsys.readouterr().err
    assert not folder.earlier.exists()


def test_batches_that_ended_the_new_run_stay_where_its_last_words_say(tmp_path):
    folder = a_run(tmp_path / "run")
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    write(folder.environment, '{"lsr_scale": "2"}')
    write(folder.nonfinite, '{"step": 1, "rows": [3]}\n')
    Backup(folder).settle()
    assert json.loads(folder.nonfinite.read_text())["rows"] == [3]


def test_a_resumed_run_has_its_later_checkpoints_and_configuration_restored(tmp_path):
    folder = a_run(tmp_path / "run", steps=(2, 4, 6))
    before = contents(folder.path)
    Backup(folder).set_aside(folder.checkpoints()[1:], [folder.config, folder.metrics, folder.nonfinite], 2)
    write(folder.config, "another: 1")
    write(folder.metrics, "")
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2"]
    restore(folder)
    assert contents(folder.path) == before
    Backup(folder).set_aside(folder.checkpoints()[1:], [folder.config], 2)
    write(folder.path / "checkpoint-3" / MANIFEST, "{}")
    restore(folder)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-2", "checkpoint-3"]


def test_what_lies_in_the_way_of_coming_back_is_not_written_over(tmp_path, capsys):
    folder = a_run(tmp_path / "run")
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    write(folder.results, "mine")
    restore(folder)
    assert folder.results.read_text() == "mine"
    assert json.loads((folder.path / "earlier-run" / "results.json").read_text())["steps"] == 4
    assert f"but for results.json, in {folder.path}/earlier-run" in capsys.readouterr().err
    assert not folder.earlier.exists()


def test_a_disk_that_is_full_at_a_run_s_end_leaves_it_to_the_next(tmp_path, monkeypatch, capsys):
    folder = a_run(tmp_path / "run")
    before = contents(folder.path)
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)

    def full(*_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        Backup(folder).settle_or_leave()
    assert f"what the earlier run left is in {folder.earlier} until the next run starts" in capsys.readouterr().err
    restore(folder)
    assert contents(folder.path) == before


@pytest.mark.parametrize("how", [["--overwrite"], ["--resume", "auto"], []])
def test_a_project_s_own_config_yaml_is_no_run(tmp_path, monkeypatch, capsys, how):
    project = own_project(tmp_path / "project")
    own = "model: {name: nothing}\nadapter: {method: lsr}\ndata: {train: [./a.jsonl]}\ntraining: {}\n"
    write(project / "config.yaml", own)
    monkeypatch.chdir(project)
    before = contents(project)
    assert cli.main(["train", "config.yaml", *how, "--set", "training.output_dir=."]) == 2
    assert ".: is no run's folder, but holds config.yaml" in capsys.readouterr().err
    assert cli.main(["train", "config.yaml", *how]) == 2, "into runs/config, where the rows are looked for first"
    assert "a.jsonl" in capsys.readouterr().err
    assert contents(project) == before


@pytest.mark.parametrize("notes", [None, "[]", "{", '{"whole": true}'])
def test_notes_that_cannot_be_read_remove_nothing(tmp_path, notes):
    folder = a_run(tmp_path / "run")
    before = contents(folder.path)
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    (folder.earlier / "state.json").unlink()
    if notes is not None:
        write(folder.earlier / "state.json", notes)
    restore(folder)
    assert contents(folder.path) == before


def test_linked_parts_of_a_run_go_as_links_and_what_they_point_to_stays(tmp_path):
    folder = a_run(tmp_path / "run")
    for name in ("adapter", "checkpoint-4", "eval"):
        (folder.path / name).rename(tmp_path / name)
        (folder.path / name).symlink_to(tmp_path / name)
    before = contents(tmp_path / "adapter") | contents(tmp_path / "eval") | contents(tmp_path / "checkpoint-4")
    Backup(folder).set_aside([*folder.written(), *folder.own_checkpoints()], (), -1)
    assert not os.path.lexists(folder.adapter)
    write(folder.path / "checkpoint-1" / MANIFEST, "{}")
    restore(folder)
    after = contents(tmp_path / "adapter") | contents(tmp_path / "eval") | contents(tmp_path / "checkpoint-4")
    assert after == before


def test_a_full_disk_while_setting_aside_is_reported_and_everything_is_restored(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run")
    before = contents(folder.path)
    rename, number = Path.rename, 0

    def full(self, target):
        nonlocal number
        number += 1
        if number == 5:
            raise OSError(28, os.strerror(28))
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        Backup(folder).set_aside(folder.written(), (), -1)
    restore(folder)
    assert contents(folder.path) == before


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file of somebody's"])
def test_a_lock_that_is_none_is_refused_and_stays_as_it_is(tmp_path, kind):
    folder = a_run(tmp_path / "run")
    file, kept = folder.path / ".lock", write(tmp_path / "precious", "mine")
    if kind == "link":
        file.symlink_to(kept)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        write(file, "mine")
    with pytest.raises(UserError, match=r"\.lock: a run's lock belongs here, but this is none; move it away"):
        take(folder.path, overwrite=True)
    assert os.path.lexists(file)
    assert kept.read_text() == "mine"
    file.rename(tmp_path / "away")
    take(folder.path, overwrite=True)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_storage_has_no_locks_a_run_does_without(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    folder = a_run(tmp_path / "run")
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert take(folder.path, overwrite=True) == folder


def test_a_lock_that_its_holder_removes_meanwhile_is_taken(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "run")
    acquire, tries = lock.FileLock.acquire, []

    def just_too_early(self, *args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise lock.Timeout(self.lock_file)
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(lock.FileLock, "acquire", just_too_early)
    assert take(folder.path, overwrite=True) == folder
    assert len(tries) == 2


def test_a_lock_that_a_kill_left_is_taken(tmp_path):
    folder = a_run(tmp_path / "run")
    write(folder.path / ".lock", "process 4711 on elsewhere\n")
    take(folder.path, overwrite=True)
    assert not (folder.path / ".lock").exists()


def test_a_kill_in_the_midst_of_replacing_leaves_a_folder_that_is_put_back(tmp_path):
    folder = a_run(tmp_path / "run")
    before = contents(folder.path)
    folder.adapter.rename(folder.path / ".adapter.old")
    (folder.path / "checkpoint-4").rename(folder.path / ".checkpoint-4.old")
    take(folder.path, resume=True)
    assert contents(folder.path) == before


def test_a_folder_takes_another_s_place_and_what_others_put_there_stays(tmp_path):
    target, aside = tmp_path / "adapter", tmp_path / ".adapter.part"
    write(target / "adapter_config.json", "old")
    write(target / "README.md", "mine")
    write(aside / "adapter_config.json", "new")
    files.replace_folder(aside, target, {"adapter_config.json"})
    assert contents(target) == {"README.md": b"mine", "adapter_config.json": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_left_overs_of_processes_that_are_gone_are_removed_and_others_stay(tmp_path):
    gone = 2**22 + 7  # beyond Linux's largest process number
    for name in (f".out.{gone}.part", f".out.{gone}.part.abc", f".out.{os.getpid()}.part"):
        write(tmp_path / name / "file")
    for name in (f".out.{os.getppid()}.part", f".other.{gone}.part", ".out.mine.part"):
        write(tmp_path / name / "file")
    write(tmp_path / f".out.{gone}0.part")
    (tmp_path / f".out.{gone + 1}.part").symlink_to(tmp_path / ".out.mine.part")
    files.write_text(tmp_path / "out", "x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", f".out.{os.getppid()}.part", f".other.{gone}.part", ".out.mine.part"}
    assert (tmp_path / ".out.mine.part" / "file").exists()


def test_what_another_host_writes_stays_until_nothing_was_written_for_a_day(tmp_path, monkeypatch):
    gone = 2**22 + 7
    mine = files.temporary_path(tmp_path / "out").name
    monkeypatch.setattr(files, "_HOST", "0" * 8)
    other = files.temporary_path(tmp_path / "out").name
    monkeypatch.undo()
    assert other != mine
    other = other.replace(str(os.getpid()), str(gone))
    write(tmp_path / other / "file")
    files.write_text(tmp_path / "out", "x")
    assert (tmp_path / other / "file").exists()
    for path in (tmp_path / other / "file", tmp_path / other):
        os.utime(path, (0, time.time() - 25 * 3600))
    files.write_text(tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("again", [True, False])
def test_a_run_that_was_moved_from_the_folder_that_it_names_is_the_one_whose_file_is_given(tmp_path, again):
    folder = a_run(tmp_path / "moved")
    named = str(tmp_path / "first")
    sections = "model: {name: a/b}\nadapter: {method: lsr}\ndata: {train: [a.jsonl]}\n"
    write(folder.config, f"{sections}training: {{output_dir: {named}}}\n")

    def goes_to(*changes):
        return named_by_file(load_run(folder.config, changes), folder.config, again)[0].training["output_dir"]

    assert goes_to("training.save_steps=5") == str(folder.path)
    assert goes_to(f"training.output_dir={tmp_path}/another") == f"{tmp_path}/another"
    write(folder.config, f"{sections}training: {{}}\n")
    assert goes_to() == (str(folder.path) if again else None)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_told_alike_whoever_writes(error):
    assert str(files.cannot_write(Path("a"), error)).endswith(
        "free some space (or raise the limit), then repeat the command, a training run with --resume auto"
    )


def test_unnamed_runs_resume_in_the_newest_folder_that_holds_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(Path("runs/arc"))
    shutil.copytree("runs/arc", "runs/arc-2")
    write(Path("runs/arc-3/notes.txt"))
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with claim(None, "arc", **how) as folder:
            assert folder.path == Path("runs/arc-2")
