"""The progress line and what is recorded of each step."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from lsr_scale import UserError, screen
from lsr_scale.run.metrics import read_metrics, summarize_metrics
from lsr_scale.screen import print_line, show_live
from lsr_scale.training.callbacks import progress
from lsr_scale.training.callbacks.progress import Progress
from lsr_scale.units import clock


@pytest.fixture
def clocked(monkeypatch):
    """Return a clock that the test moves on."""
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.value)
    return now


@pytest.fixture
def terminal(monkeypatch):
    """Make stdout a terminal of 30 columns."""
    for module in (screen, progress):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("COLUMNS", "30")


ARGUMENTS = SimpleNamespace(logging_steps=1, eval_steps=None, save_steps=500)


def state(step=0, max_steps=10, main=True):
    return TrainerState(global_step=step, max_steps=max_steps, epoch=step / max_steps, is_world_process_zero=main)


def log(callback, step, **logs):
    callback.on_log(ARGUMENTS, state(step), None, logs={"loss": 2.0, **logs})


def test_time_left_is_that_of_the_steps_left_at_the_pace_so_far(tmp_path, clocked, capsys):
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(), None)
    for step in (1, 2):
        clocked.value += 30
        log(callback, step, num_tokens=600.0 * step)
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 2/10  loss 2.0000  20 tokens/s  ")
    clocked.value += 30
    log(callback, 3, num_tokens=1800.0)
    assert (
        callback.metrics.read_text()
        .splitlines()[-1]
        .startswith('{"step": 3, "epoch": 0.3, "wall_s": 90.0, "tokens_per_s": 20.0')
    )
    assert capsys.readouterr().out.rstrip().endswith("3:30 left")


@pytest.mark.parametrize("logging_steps", [1, 2])
@pytest.mark.parametrize("at", ["step", "epoch"])
def test_saves_and_evaluations_are_in_the_wall_time_and_not_in_the_speed(tmp_path, clocked, logging_steps, at):
    callback = Progress(tmp_path / "metrics.jsonl", quiet=True)
    callback.on_train_begin(ARGUMENTS, state(), None)
    clocked.value += 7
    callback.on_evaluate(ARGUMENTS, state(), TrainerControl())  # eval_on_start
    for step in (1, 2, 3, 4):
        clocked.value += 10
        callback.on_step_end(ARGUMENTS, state(step), TrainerControl())
        if at == "epoch":
            callback.on_epoch_end(ARGUMENTS, state(step), TrainerControl())
        if step % logging_steps == 0:
            log(callback, step, num_tokens=600.0 * step)
        clocked.value += 30
        callback.on_log(ARGUMENTS, state(step), None, logs={"eval_loss": 1.5})
        callback.on_evaluate(ARGUMENTS, state(step), TrainerControl())
        clocked.value += 20
        callback.on_save(ARGUMENTS, state(step), TrainerControl())
    rows = [row for row in read_metrics(callback.metrics) if "loss" in row]
    assert [row["tokens_per_s"] for row in rows] == [60.0] * (4 // logging_steps)
    assert rows[-1]["wall_s"] == 7 + 4 * 10 + 3 * 50


def test_a_resumed_run_counts_its_own_steps_and_keeps_the_time_and_tokens_before(tmp_path, clocked, capsys):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": s, "wall_s": 10.0 * s, "loss": 3.0, "num_tokens": 100.0 * s, "memory_gib": 1.0}
        for s in (1, 2, 3, 4, 5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    callback = Progress(file)
    resumed = state(4)
    resumed.num_input_tokens_seen = 400  # the checkpoint's count, from which the trainer counts on
    callback.on_train_begin(ARGUMENTS, resumed, None)
    clocked.value += 2
    log(callback, 5, num_tokens=550.0)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert (found[-1]["wall_s"], found[-1]["num_tokens"], found[-1]["tokens_per_s"]) == (42.0, 550.0, 75.0)
    assert capsys.readouterr().out.rstrip().endswith("0:10 left")


def test_a_fresh_run_drops_what_an_older_one_recorded(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    Progress(tmp_path / "metrics.jsonl").on_train_begin(ARGUMENTS, state(), None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_on_a_terminal_one_line_is_rewritten_and_never_wraps(tmp_path, clocked, terminal, capsys):
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(), None)
    for step in (1, 2):
        clocked.value += 1
        log(callback, step, num_tokens=1e6 * step)
    callback.on_train_end(ARGUMENTS, state(2), None)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    shown = out.rstrip("\n").split("\r\x1b[2K")[1:]
    assert [line[:9] for line in shown] == ["step 1/10", "step 2/10"]
    assert all(len(line) <= 29 for line in shown)


def test_a_line_that_stays_replaces_the_live_one(terminal, capsys):
    show_live("half done")
    print_line("done")
    assert capsys.readouterr().out == "\r\x1b[2Khalf done\r\x1b[2Kdone\n"


def test_without_a_terminal_every_step_is_a_plain_line(tmp_path, clocked, capsys):
    show_live("never seen")
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(), None)
    log(callback, 1)
    callback.on_log(ARGUMENTS, state(1), None, logs={"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/10  loss 2.0000  ")
    assert lines[1] == "step 1: eval_loss 1.5000, eval_accuracy 0.7500"


def test_quiet_records_and_says_nothing(tmp_path, clocked, capsys):
    callback = Progress(tmp_path / "metrics.jsonl", quiet=True)
    callback.on_train_begin(ARGUMENTS, state(), None)
    log(callback, 1)
    callback.on_train_end(ARGUMENTS, state(1), None)
    assert capsys.readouterr().out == ""
    assert callback.metrics.read_text().count("\n") == 1


def test_other_processes_record_nothing_and_stop_at_numbers_that_are_not_finite(tmp_path, capsys):
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(main=False), None)
    callback.on_log(ARGUMENTS, state(1, main=False), None, logs={"loss": 2.0})
    assert not callback.metrics.exists()
    for logs in ({"loss": float("nan")}, {"loss": 1.0, "grad_norm": float("inf")}):
        with pytest.raises(UserError, match=r"training diverged: (loss is nan|grad_norm is inf) at step 2"):
            callback.on_log(ARGUMENTS, state(2, main=False), None, logs=logs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_durations_read_as_on_a_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("max_steps", [10, 12000])
def test_on_a_terminal_a_bar_fills_what_is_left_of_the_line(
    tmp_path, clocked, terminal, capsys, monkeypatch, columns, max_steps
):
    monkeypatch.setenv("COLUMNS", str(columns))
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(max_steps=max_steps), None)
    callback.utilization = 0.4 / 17_000
    monkeypatch.setattr(progress, "memory_gib", lambda: 28.1)
    tokens = 0
    for step in (1, max_steps // 2, max_steps):
        tokens += 17_000 * 7
        clocked.value += 7
        callback.on_log(ARGUMENTS, state(step, max_steps), None, logs={"loss": 1.2345, "num_tokens": float(tokens)})
    lines = [line for line in capsys.readouterr().out.split("\r\x1b[2K") if line]
    assert all(len(line) < columns for line in lines)
    bars = [line[1:].partition("]")[0] for line in lines if line.startswith("[")]
    if columns >= 80:
        assert len(bars) == 3 or max_steps == 12000, "a day left takes the bar's place"
        assert set(bars[-1]) == {"#"}
        assert abs(bars[-2].count("#") - bars[-2].count(".")) <= 1
        assert all(4 <= len(bar) <= 30 for bar in bars)
        assert "17,000 tok/s  MFU 40%  28.1 GiB  " in lines[-1]
        assert lines[-1].endswith("0:00 left")


def test_between_logging_steps_the_bar_moves_on(tmp_path, clocked, terminal, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(), None)
    for step in range(1, 6):
        clocked.value += 1
        callback.on_step_end(ARGUMENTS, state(step), TrainerControl())
        clocked.value += 0.01  # no terminal shows more than ten a second
        callback.on_step_end(ARGUMENTS, state(step), TrainerControl())
    lines = capsys.readouterr().out.split("\r\x1b[2K")[1:]
    assert [line.partition("] ")[2] for line in lines] == [f"{n}/10  0:{10 - n:02} left" for n in range(1, 6)]
    quiet = Progress(tmp_path / "metrics.jsonl", quiet=True)
    quiet.on_step_end(ARGUMENTS, state(1), TrainerControl())
    other = Progress(tmp_path / "metrics.jsonl")
    other.on_step_end(ARGUMENTS, state(1, main=False), TrainerControl())
    assert capsys.readouterr().out == ""


def test_mfu_is_recorded_where_it_is_known_and_in_no_other_case(tmp_path, clocked, capsys):
    callback = Progress(tmp_path / "metrics.jsonl")
    callback.on_train_begin(ARGUMENTS, state(), None)
    clocked.value += 1
    log(callback, 1, num_tokens=600.0)
    callback.utilization = 0.5 / 600
    clocked.value += 1
    log(callback, 2, num_tokens=1200.0)
    first, second = read_metrics(callback.metrics)
    assert "mfu" not in first
    assert second["mfu"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert ["MFU" in line for line in lines] == [False, True]
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert summarize_metrics(callback.metrics)["mfu"] == 0.5


def test_what_is_measured_is_in_the_logs_that_are_reported(tmp_path, clocked):
    callback, logs = Progress(tmp_path / "metrics.jsonl", quiet=True), {"loss": 2.0, "num_tokens": 600.0}
    callback.on_train_begin(ARGUMENTS, state(), None)
    clocked.value += 2
    callback.on_log(ARGUMENTS, state(1), None, logs=logs)
    (row,) = read_metrics(callback.metrics)
    assert logs == {name: value for name, value in row.items() if name not in ("step", "epoch")}
    assert {"tokens_per_s", "memory_gib", "wall_s", "loss", "num_tokens"} == set(logs)
