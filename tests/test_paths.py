"""What a user writes as a path is read, or refused in words, before anything is opened."""

import os

import pytest

from lsr_scale import UserError, cli
from lsr_scale.model import builtin
from lsr_scale.paths import is_special_file, user_path


def test_a_home_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(text):
    with pytest.raises(UserError, match=r"training\.output_dir: 'a\S+b': no file can have this name"):
        user_path(text, "training.output_dir")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x7fb", "no file can have this name"),
        ("s3://bucket/run", "an address, where a path on this machine is expected"),
        ("file:///tmp/x", "an address, where a path on this machine is expected"),
        ("${HOME}/x", r"'\$\{HOME\}' stands there as it is: only a shell fills in variables"),
        ("$HOME/x", r"'\$HOME' stands there as it is"),
        ("$(pwd)/x", r"'\$\(pwd\)' stands there as it is"),
        ("%USERPROFILE%/x", "'%USERPROFILE%' stands there as it is"),
        ("a\nb", "no file can have this name"),
        ("a\x1b[2J", "no file can have this name"),
    ],
)
def test_what_is_no_path_of_this_machine_is_refused(text, expected):
    with pytest.raises(UserError, match=r"training\.output_dir: '.*': " + expected):
        user_path(text, "training.output_dir")


def test_a_folder_that_is_there_may_have_a_dollar_in_its_name(tmp_path):
    (tmp_path / "cost_$year").mkdir()
    assert user_path(tmp_path / "cost_$year") == tmp_path / "cost_$year"


def test_a_user_who_is_not_there_is_refused():
    with pytest.raises(UserError, match="there is no home folder for '~nosuchuser' here; write the whole path"):
        user_path("~nosuchuser/runs")


def test_without_a_home_the_cache_is_refused_in_words_with_the_way_out(monkeypatch, tmp_path):
    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", nobody)
    for name in ("LSR_SCALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"model cache, LSR_SCALE_CACHE: .* no home folder for '~'"):
        builtin.cache_folder()
    monkeypatch.undo()
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path))
    assert builtin.cache_folder() == tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["train", "~nosuchuser/run.yaml"],
        ["config", "~nosuchuser/run.yaml"],
        ["eval", "~nosuchuser/run"],
        ["generate", "~nosuchuser/run", "--prompt", "a"],
        ["inspect", "~nosuchuser/run"],
        ["export", "~nosuchuser/run", "--to", "lora", "--out", "x"],
        ["merge", "~nosuchuser/a", "~nosuchuser/b", "--out", "x"],
    ],
)
@pytest.mark.parametrize("user", ["~nosuchuser", "a\0b"])
def test_every_command_refuses_such_a_path_in_words(command, user, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.replace("~nosuchuser", user) for word in command]) == 2
    said = capsys.readouterr().err
    assert "there is no home folder for" in said or "no file can have this name" in said


@pytest.mark.parametrize("target", ["nowhere", "link"])
@pytest.mark.parametrize("name", ["link", "link/beyond"])
@pytest.mark.parametrize(
    "words", ["train", "config", "eval", "generate --prompt a", "inspect", "export --to lora --out x"]
)
def test_every_command_says_that_a_link_leads_nowhere(words, name, target, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(target, "link")
    command, *options = words.split()
    assert cli.main([command, name, *options]) == 2
    assert f"a link to '{target}', which leads nowhere; mend it, or name another" in capsys.readouterr().err


def test_a_pipe_is_told_from_a_file_and_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    names = ("pipe", "file", ".", "nothing")
    assert [is_special_file(tmp_path / name) for name in names] == [True, False, False, False]
