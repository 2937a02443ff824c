"""README's figures are the committed measurements'."""

import json

import pytest

from benchmarks.report import readme


def test_readme_and_plots_are_what_the_measurements_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, capsys):
    results = tmp_path / "throughput"
    results.mkdir()
    for path in readme.RESULTS.glob("mistral-7b-nf4-*.json"):
        run = json.loads(path.read_text())
        next(row for row in run["rows"] if row["status"] == "ok")["tokens_per_s"] += 100
        (results / path.name).write_text(json.dumps(run))
    monkeypatch.setattr(readme, "RESULTS", results)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[0] for line in lines) == [
        "README.md",
        "benchmarks/LEADERBOARD.md",
        "benchmarks/RESULTS.md",
        "throughput/mistral-7b-nf4-sweep-h200-2.png",
        "throughput/mistral-7b-nf4-sweep-h200.png",
        "throughput/mistral-7b-nf4.png",
    ]


def test_the_leaderboard_gives_ratios_of_one_run_with_card_commit_and_date():
    (file,) = readme.RESULTS.glob("mistral-7b-nf4-h200-2.json")
    run = json.loads(file.read_text())
    rows = {
        (row["provider"], row["checkpointing"]): row["tokens_per_s"] for row in run["rows"] if row["status"] == "ok"
    }
    ratios = [rows["lsr", "full"] / rows[peer, "full"] for peer in ("unsloth_lora", "peft_lora_liger")]
    lines = readme.LEADERBOARD.read_text().splitlines()
    line = next(line for line in lines if f"{rows['lsr', 'full']:,.0f}" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:2] == ["LSR-Adapt r=16 s=16, mistral-7b, nf4", "recomputed"]
    assert cells[4:] == [*(f"{ratio:.2f}" for ratio in ratios), "H200", "`8275f84f`+", "2026-11-23"]


def test_a_readme_without_the_place_is_said():
    with pytest.raises(SystemExit, match=r"README.md has no place for throughput: put <!-- throughput"):
        readme.with_table("nothing here", "throughput", "table")


def test_a_sweep_has_a_plot_and_is_no_headline(tmp_path, monkeypatch):
    (headline,) = readme.RESULTS.glob("mistral-7b-nf4-h200-2.json")
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
    monkeypatch.setattr(readme, "RESULTS", results)
    assert readme.newest("mistral-7b", "nf4")["env"]["date"] == run["env"]["date"]
    readme.sweep_plot(sweep, results / "mistral-7b-nf4-sweep.png")
    assert readme.drawn_from(results / "mistral-7b-nf4-sweep.png") == readme.digest(sweep) != readme.digest(run)
    assert "mistral-7b-nf4-sweep.png" in readme.results_page.page(tmp_path)
