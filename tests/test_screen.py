"""Whatever stands in a file or a name: a message fits one screen, and nothing steers the terminal."""

import io
import logging
import os
import subprocess
import sys
import textwrap

import pytest
from rich.table import Table
from rich.text import Text

from lsr_scale import UserError
from lsr_scale.errors import first_line, one_screen, printable, shortened
from lsr_scale.screen import Progress, Screen, keeping_live_line, leave_live, open_streams, print_line, show_live
from tests.helpers.programs import run_program


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc \u00fc \u4f60 \U0001f600", "a\nb\tc \u00fc \u4f60 \U0001f600"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\0\r\x07\x9b", "a\\x00\\r\\x07\\x9b"),
        ("\u202etxt\u2028", "\\u202etxt\\u2028"),
        ("\ud800", "\\ud800"),
        ("[bold]x[/] \\x1b", "[bold]x[/] \\x1b"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_its_escape(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, "a: " + "9" * 10**6, "word " * 5000, "\n".join(f"line {i}" for i in range(500)), "\x1b" * 3000,
     "\n".join("w " * 500 for _ in range(30)), "a\n" + "b" * 300 + "\n" + "c " * 900],
)  # fmt: skip
def test_a_message_of_any_length_fits_one_screen(text):
    said = one_screen(text)
    assert sum(max(1, -(-len(line) // 80)) for line in said.split("\n")) <= 21
    assert said.startswith(printable(text)[:1])
    assert one_screen(said) == said
    assert str(UserError(text)) == said


def test_a_message_keeps_both_its_ends_and_counts_what_is_left_out():
    assert shortened("a" * 50 + "b" * 50, 30) == "a" * 15 + " ... " + "b" * 10
    said = one_screen("rank: expected a number, got " + "9" * 5000 + "; remove it")
    assert said.startswith("rank: expected a number, got 999")
    assert said.endswith("999; remove it")
    assert "..." in said
    assert one_screen("\n".join(f"line {i}" for i in range(500))).endswith("line 18\n... and 481 more lines")
    path = "/tmp/" + "folder/" * 30 + "file"
    assert path in one_screen(f"{path}: no such file")


def screen(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    return Screen(), stream


def test_tables_and_texts_show_markup_emoji_codes_and_control_characters_as_they_stand(monkeypatch):
    shown, stream = screen(monkeypatch)
    table = Table("[bold]head", title="[/x] :smile:")
    table.add_row("[/] \x1b[2J")
    shown.print(table)
    shown.print("[link=x]y[/link]")
    shown.print(Text("[red]\u202e"))
    for text in ("[bold]head", "[/x] :smile:", "[/] \\x1b[2J", "[red]\\u202e", "[link=x]y[/link]"):
        assert text in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("columns", ["0", "-3", "x", "1", "", "9" * 30])
def test_columns_of_any_kind_give_a_table_that_can_be_read(monkeypatch, columns):
    with monkeypatch.context() as patch:  # pytest itself does not read every kind
        patch.setenv("COLUMNS", columns)
        shown, stream = screen(patch)
        shown.print(Table("head"))
    assert "head" in stream.getvalue()


def test_a_stream_of_ascii_takes_everything_and_a_closed_one_too(monkeypatch):
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii", errors="strict", write_through=True))
    monkeypatch.setattr(sys, "stderr", None)
    open_streams()
    print("\u4f60")
    print("nowhere", file=sys.stderr, flush=True)
    assert held.getvalue() == b"\\u4f60\n"


def test_commands_answer_with_every_stream_closed():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m lsr_scale config none.yaml >&- 2>&- <&-"], check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("module", ["lsr_scale.adapters", "transformers.utils.logging"])
def test_ctrl_c_while_importing_ends_in_words(module, tmp_path):
    program = (
        "import sys\n"
        "sys.argv[0] = 'lsr-scale'\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from lsr_scale.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    if module.startswith("lsr_scale"):  # the libraries are imported before
        done = run_program(program, tmp_path)
    else:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (130, "lsr-scale: interrupted")


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def rows(self):
        """Return what is seen: each row's text as the terminal leaves it."""
        seen = []
        for line in self.getvalue().split("\n"):
            *_, last = line.split("\r\x1b[2K")
            seen.append(last)
        return seen


def test_what_others_write_goes_above_the_live_line(monkeypatch):
    terminal = Terminal()
    for name in ("stdout", "stderr"):  # here: pytest takes both back between a fixture and its test
        monkeypatch.setattr(sys, name, terminal)
    logger = logging.Logger("a library")
    handler = logging.StreamHandler(sys.stderr)  # holds the stream of before
    logging.root.manager.loggerDict["a library"] = logger
    logger.addHandler(handler)
    try:
        with keeping_live_line():
            show_live("step 1")
            print("UserWarning: odd", file=sys.stderr)
            assert terminal.rows()[-2:] == ["UserWarning: odd", "step 1"]
            show_live("step 2")
            logger.warning("strange")
            print("said", "in parts")
            assert terminal.rows()[-3:] == ["strange", "said in parts", "step 2"]
            sys.stderr.write("half ")
            assert terminal.rows()[-1] == "half "
            sys.stderr.write("a line\n")
            print_line("ours")
            print("others")
            assert terminal.rows()[-4:] == ["half a line", "ours", "others", ""]
            show_live("step 3")
            leave_live()
            print("below")
        assert terminal.rows()[-3:] == ["step 3", "below", ""]
        assert (sys.stdout, sys.stderr, handler.stream) == (terminal,) * 3
    finally:
        del logging.root.manager.loggerDict["a library"]


def test_streams_that_are_no_terminal_stay_as_they_are(capsys):
    before = sys.stdout, sys.stderr
    with keeping_live_line():
        assert (sys.stdout, sys.stderr) == before
        show_live("never seen")
    assert capsys.readouterr().out == ""


def test_progress_in_a_pipe_is_a_line_a_stage_and_quarters_within_it(capsys):
    with Progress() as progress:
        progress.stage("writing \x1b[2J")
        assert list(progress.over(range(100), 100, "tensor")) == list(range(100))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "writing \\x1b[2J",
        *(f"writing \\x1b[2J: tensor {number} of 100" for number in (25, 50, 75, 100)),
    ]
    with Progress(quiet=True) as progress:
        progress.stage("writing")
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_one_line_that_goes(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress() as progress:
        progress.stage("writing")
        list(progress.over("ab", 2, "tensor"))
    parts = capsys.readouterr().err.split("\r\x1b[2K")
    assert parts == ["", "writing", "writing: tensor 1 of 2", "writing: tensor 2 of 2", ""]


def test_an_error_that_says_nothing_is_named():
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("\n")) == "RuntimeError"


def test_progress_bars_of_libraries_that_are_there_already_are_left_out(tmp_path):
    """As of a process that is forked off one that has imported them, which read their variables then."""
    code = """
        import datasets
        from lsr_scale import cli

        for debug in (True, False):
            cli.quiet_libraries(debug)
            print(datasets.are_progress_bars_disabled())
        """
    ended = run_program(textwrap.dedent(code), tmp_path)
    assert ended.stdout.split() == ["False", "True"], ended.stderr


@pytest.mark.parametrize("imported", ["before", "after"])
def test_what_the_hub_is_asked_again_is_not_said(tmp_path, imported):
    lines = ["import huggingface_hub.utils", "from lsr_scale import cli", "cli.quiet_libraries()"]
    lines = lines if imported == "before" else [*lines[1:], lines[0]]
    code = "\n".join([*lines, "import logging", "logging.getLogger('huggingface_hub.utils._http').warning('Retrying')"])
    assert run_program(code, tmp_path).stderr == ""


def test_a_warning_is_a_note_without_the_line_of_a_library_that_it_was_raised_in(tmp_path):
    code = (
        "import warnings\nfrom lsr_scale import cli\ncli.quiet_libraries()\nwarnings.warn('mind this', stacklevel=1)\n"
    )
    again = "with warnings.catch_warnings():\n    warnings.warn('mind this', stacklevel=1)\n"
    assert run_program(code + again, tmp_path).stderr == "note: mind this\n", "once, also within filters of its own"
