"""GUIDE.md says what the committed measurements say."""

import json

import pytest

from benchmarks.report import guidelines


def test_tables_and_plots_are_what_the_measurements_say(capsys):
    assert guidelines.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, capsys):
    content = json.loads(guidelines.SWEEP.read_text())
    for row in content["rows"]:
        row["held_out_loss"] += 0.5
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    monkeypatch.setattr(guidelines, "SWEEP", tmp_path / "sweep.json")
    assert guidelines.main(["--check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["GUIDE.md", "terms.png", "width.png", "ablations.png"]


def test_a_page_without_a_place_is_said():
    with pytest.raises(SystemExit, match=r"no place for accuracy: put <!-- accuracy"):
        guidelines.filled("nothing")


def test_what_was_not_run_is_said(tmp_path):
    assert guidelines.trial_table(tmp_path / "none", {}) == "Not run yet."


def test_plots_carry_their_rows(tmp_path):
    for name, (draw, rows) in guidelines.PLOTS.items():
        draw(tmp_path / name)
        assert guidelines.drawn_from(tmp_path / name) == guidelines.digest(rows())


def test_what_is_said_of_the_image_runs_is_in_their_results():
    done = guidelines.trials.load(guidelines.vision.RESULTS)
    adapted = [result for result in done.values() if result["method"] is not None]
    assert adapted
    # a run that diverged has no logits to compare
    assert all(result["reload_max_difference"] == 0 for result in adapted if result["score"] is not None)
    assert {result["steps"] for result in done.values()} == {120}
