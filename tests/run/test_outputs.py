"""What eval, inspect and export write beside their answers: whatever happens to the file, the answer is given."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lsr_scale import cli, files
from lsr_scale.config import dump_yaml
from lsr_scale.run.folder import RunFolder
from tests.helpers.tiny_runs import TOOLS, do, save_llama, tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    save_llama(folder / "model", chat=True)
    run = tiny_run(folder, training={"output_dir": str(folder / "done"), "save_strategy": "no"})
    (folder / "run.yaml").write_text(dump_yaml(run))
    do(run)
    return folder


@pytest.fixture
def done(place, tmp_path):
    return RunFolder(Path(shutil.copytree(place / "done", tmp_path / "done")))


@pytest.fixture
def call(capfd):
    def run(*words):
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture(params=[28, 30, 13])
def unwritable(request, monkeypatch):
    """Make every write of a file fail as on a full, a read-only, or somebody else's disk; return the system's words."""

    def fails(path, content):
        raise files.cannot_write(path, OSError(request.param, os.strerror(request.param)))

    monkeypatch.setattr(files, "write_bytes", fails)
    return os.strerror(request.param)


def test_eval_prints_its_table_where_nothing_can_be_written(call, done, unwritable):
    status, out, err = call("eval", done.path)
    assert status == 0
    assert "questions" in out
    assert f"note: the predictions are not written: {done.path}/eval/" in err
    assert unwritable in err
    status, out, _ = call("eval", done.path, "--json")
    assert status == 0
    assert json.loads(out)["accuracy"]["questions"]


@pytest.mark.parametrize("odd", ["file", "pipe", "link"])
def test_eval_prints_its_table_where_eval_is_no_folder(call, done, odd):
    shutil.rmtree(done.path / "eval")
    (done.path / "mine").mkdir()
    if odd == "link":
        (done.path / "eval").symlink_to("mine")
    elif odd == "pipe":
        os.mkfifo(done.path / "eval")
    else:
        (done.path / "eval").write_text("mine")
    status, out, err = call("eval", done.path)
    assert status == 0
    assert "questions" in out
    assert "not written" in err
    assert list((done.path / "mine").iterdir()) == []


def test_inspect_prints_its_table_where_nothing_can_be_written(call, done, unwritable):
    status, out, err = call("inspect", done.path)
    assert status == 0
    assert "q_proj" in out
    assert "spectra  " not in out
    assert f"note: the spectra are not drawn: {done.path}/spectra.png: cannot be written: {unwritable}" in err
    status, out, err = call("inspect", done.path, "--png", done.path / "other.png")
    assert status == 2, "that file was asked for"
    assert "q_proj" in out
    assert "cannot be written" in err


@pytest.mark.parametrize("content", [b"mine", b"\x89PNG\r\n\x1a\nmine", b""])
def test_inspect_draws_over_its_own_pictures_only(call, done, content):
    mine = done.path / "mine.png"
    mine.write_bytes(content)
    status, out, err = call("inspect", done.path, "--png", mine)
    assert status == 2
    assert f"{mine}: not written: what lies there is no picture that lsr-scale drew; name another" in err
    assert mine.read_bytes() == content
    for _ in range(2):
        assert call("inspect", done.path, "--png", done.path / "own.png")[0] == 0
    assert files.is_own_picture(done.path / "own.png")
    (done.path / "spectra.png").write_bytes(content)
    status, out, err = call("inspect", done.path)
    assert status == 0
    assert "q_proj" in out
    assert "spectra.png: not written" in err
    assert (done.path / "spectra.png").read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a file of somebody's"])
def test_inspect_leaves_odd_things_in_its_picture_s_place(call, done, tmp_path, kind):
    picture, kept = tmp_path / "p.png", tmp_path / "kept"
    kept.write_text("mine")
    if kind == "folder":
        picture.mkdir()
    elif kind == "pipe":
        os.mkfifo(picture)
    else:
        picture.symlink_to("/dev/full" if kind == "device" else kept)
    status, _, err = call("inspect", done.path, "--png", picture)
    assert status == 2
    assert "not written" in err
    assert kept.read_text() == "mine"
    assert os.path.lexists(picture)


@pytest.mark.parametrize(
    "content", ["[]", "1", '"x"', '{"accuracy": 1}', '{"accuracy": {"a": {"before": {}}}}', "{", "[" * 9**5]
)
def test_odd_results_are_refused_by_export_and_the_advice_works(call, done, tmp_path, content):
    done.results.write_text(content)
    words = ("export", done.path, "--to", "adapter", "--out", tmp_path / "out", "--no-verify")
    status, _, err = call(*words)
    assert status == 2
    assert "results.json: " in err
    assert not (tmp_path / "out").exists()
    done.results.unlink()
    assert call(*words)[0] == 0


def test_the_next_export_removes_what_killed_ones_left(call, done, tmp_path):
    gone = 2**22 + 7
    for name in (f".out.{gone}.part", f".out.{gone}.part.x1"):
        (tmp_path / name).mkdir()
    (tmp_path / f".mine.{gone}.part").mkdir()
    assert call("export", done.path, "--to", "adapter", "--out", tmp_path / "out", "--no-verify")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"done", "out", f".mine.{gone}.part"}


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "DONE"),
        ("generate", "DONE", "--prompt", TOOLS[0], "--max-new-tokens", "2"),
        ("export", "DONE", "--to", "lora", "--out", "OUT"),
        ("export", "DONE", "--to", "merged", "--out", "OUT"),
        ("export", "DONE/adapter", "--to", "lora", "--out", "OUT"),
    ],
)
def test_a_base_that_was_moved_is_named_with_base(call, place, done, tmp_path, words):
    where = {"DONE": str(done.path), "DONE/adapter": str(done.adapter), "OUT": str(tmp_path / "out")}
    command = [where.get(word, word) for word in words]
    (place / "model").rename(place / "moved")
    try:
        status, _, err = call(*command)
        assert status == 2
        assert f"'{place}/model'" in err
        assert "if it lies elsewhere now: --base FOLDER" in err
        status, _, err = call(*command, "--base", place / "moved")
        assert status == 0, err
    finally:
        (place / "moved").rename(place / "model")


def test_a_base_of_another_shape_is_refused_under_base(call, done, tmp_path):
    save_llama(tmp_path / "wide", hidden_size=64)
    status, _, err = call("eval", done.path, "--base", tmp_path / "wide")
    assert status == 2
    assert "this adapter was trained on" in err
