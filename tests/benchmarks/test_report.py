"""README, GUIDE.md and the pages of results say what the committed measurements say."""

import importlib.util
import json
import re

import pytest

from benchmarks import ALL_RESULTS, ROOT
from benchmarks.command_line import current
from benchmarks.report import markdown, measurements, pages, plots, results_page

THROUGHPUT = ALL_RESULTS / "throughput"


def results_without(suite, folder):
    """Return a folder of all results but a suite's, whose folder is empty."""
    for path in ALL_RESULTS.iterdir():
        if path.name != suite:
            (folder / path.name).symlink_to(path)
    (folder / suite).mkdir()
    return folder


def stale(results, capsys):
    """Return what `--check` says is not up to date."""
    assert pages.main(["--check"], results) == 1
    return sorted(line.split()[0] for line in capsys.readouterr().err.splitlines())


def test_pages_and_plots_are_what_the_measurements_say(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_speed_is_noticed(tmp_path, capsys):
    results = results_without("throughput", tmp_path)
    for path in THROUGHPUT.glob("mistral-7b-nf4-*.json"):
        run = json.loads(path.read_text())
        next(row for row in run["rows"] if row["status"] == "ok")["tokens_per_s"] += 100
        (results / "throughput" / path.name).write_text(json.dumps(run))
    assert stale(results, capsys) == [
        "README.md",
        "benchmarks/LEADERBOARD.md",
        "benchmarks/RESULTS.md",
        "throughput/mistral-7b-nf4-sweep-h200-2.png",
        "throughput/mistral-7b-nf4-sweep-h200.png",
        "throughput/mistral-7b-nf4.png",
    ]


def test_a_changed_loss_is_noticed(tmp_path, capsys):
    results = results_without("parametrization", tmp_path)
    for path in (ALL_RESULTS / "parametrization").glob("*.json"):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            if "held_out_loss" in row:
                row["held_out_loss"] += 0.5
        (results / "parametrization" / path.name).write_text(json.dumps(content))
    plots_of_the_guide = [f"parametrization/{name}.png" for name in ("ablations", "terms", "width")]
    assert stale(results, capsys) == ["GUIDE.md", *plots_of_the_guide]


COMMAND = re.compile(r"python -m (benchmarks(?:\.[a-z]\w*)+)")
WITH_COMMANDS = ("README.md", "GUIDE.md", "AGENTS.md", "CONTRIBUTING.md", "Makefile", "benchmarks/README.md")


@pytest.mark.parametrize("page", [*WITH_COMMANDS, "benchmarks/RESULTS.md", "benchmarks/LOG.md"])
def test_commands_and_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(COMMAND.findall(text)):
        assert importlib.util.find_spec(name) is not None, name
    for path in set(re.findall(r"benchmarks/(?:\w+/)*\w+\.py", text)):
        assert (ROOT / path).is_file(), path


def test_the_page_of_benchmarks_has_every_script():
    listed = re.findall(r"`(\w+/\w+\.py)`", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"))
    folders = [ROOT / "benchmarks" / name for name in ("speed", "quality", "robustness", "interop")]
    scripts = [path for folder in folders for path in folder.glob("*.py") if "__main__" in path.read_text()]
    assert sorted(listed) == sorted(f"{path.parent.name}/{path.name}" for path in scripts)


def test_a_command_recorded_before_the_scripts_moved_is_shown_as_it_is_typed_now():
    recorded = "python benchmarks/throughput.py --tokens 8192 --out a.json"
    assert current(recorded) == "python -m benchmarks.speed.throughput --tokens 8192 --out a.json"
    assert current(current(recorded)) == current(recorded)


def test_the_leaderboard_gives_ratios_of_one_run_with_card_commit_and_date():
    (file,) = THROUGHPUT.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(file.read_text())
    rows = {
        (row["provider"], row["checkpointing"]): row["tokens_per_s"] for row in run["rows"] if row["status"] == "ok"
    }
    ratios = [rows["lsr", "full"] / rows[peer, "full"] for peer in ("unsloth_lora", "peft_lora_liger")]
    lines = (ROOT / "benchmarks/LEADERBOARD.md").read_text().splitlines()
    line = next(line for line in lines if f"{rows['lsr', 'full']:,.0f}" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:2] == ["LSR-Adapt r=16 s=16, mistral-7b, nf4", "recomputed"]
    assert cells[4:] == [*(f"{ratio:.2f}" for ratio in ratios), "H200", "`8275f84f`+", "2026-11-23"]


def test_a_readme_without_the_place_is_said():
    with pytest.raises(SystemExit, match=r"README.md has no place for throughput: put <!-- throughput"):
        markdown.with_table("nothing here", "throughput", "table")


def test_a_sweep_has_a_plot_and_is_no_headline(tmp_path):
    (headline,) = THROUGHPUT.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(headline.read_text())
    (row,) = [r for r in run["rows"] if (r["provider"], r["checkpointing"]) == ("lsr", "none")]
    points = [[1024, 512], [1024, 1024], [8192, 512], [8192, 1024]]
    rows = [row | {"tokens": tokens, "seq_len": length} for tokens, length in points]
    sweep = run | {"rows": rows, "config": run["config"] | {"points": points}}
    sweep["env"] = run["env"] | {"date": "2999-01-01"}
    results = tmp_path / "throughput"
    results.mkdir()
    for name, content in (("mistral-7b-nf4-a.json", run), ("mistral-7b-nf4-sweep.json", sweep)):
        (results / name).write_text(json.dumps(content))
    assert measurements.newest_headline(results)["env"]["date"] == run["env"]["date"]
    plots.sweep_plot(sweep, results / "mistral-7b-nf4-sweep.png")
    assert plots.drawn_from(results / "mistral-7b-nf4-sweep.png") == plots.digest(sweep) != plots.digest(run)
    assert "mistral-7b-nf4-sweep.png" in results_page.page(tmp_path)
