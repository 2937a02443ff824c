"""Comparing runs: what differs, paired scores, and folders that are no runs, not ended, damaged or of another kind."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsr_scale import cli
from lsr_scale.errors import UserError
from lsr_scale.files import is_own_page, is_own_picture
from lsr_scale.run.compare import ABSENT, compare
from lsr_scale.run.compare_tables import MAX_KEYS
from lsr_scale.run.folder import RunFolder
from lsr_scale.scoring.classification import measure
from lsr_scale.scoring.paired import paired_accuracy
from tests.helpers.run_folders import CONFIG, choice_rows, class_rows, rewards, write_lines, write_run

FIRST, SECOND = [True] * 4 + [False] * 6, [True] * 3 + [False] + [True] * 4 + [False] * 2


LOOKS_AT_PICTURES = True


@pytest.fixture
def two(tmp_path):
    for name, right, changes in (
        ("a", FIRST, {}),
        ("b", SECOND, {"adapter": {"rank": 8}, "training": {"output_dir": "b"}}),
    ):
        answers = {"arc-before": choice_rows([False] * 10), "arc-after": choice_rows(right)}
        write_run(tmp_path / name, changes, answers=answers)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def call(capfd):
    def run(*words):
        capfd.readouterr()
        status = cli.main(["compare", *map(str, words)])
        said = capfd.readouterr()
        return status, said.out, said.err

    return run


def test_only_what_differs_in_the_configuration_is_told(two):
    assert compare(two).config == {"adapter.rank": [16, 8]}
    shutil.copytree(two[0], two[0].parent / "same")
    assert compare([two[0], two[0].parent / "same"]).config == {}


def test_keys_that_one_run_lacks_are_told_as_absent(two, tmp_path):
    write_run(tmp_path / "c", {"adapter": {"method": "lora", "rank": 16}, "eval": {"limit": 5}})
    differing = compare([two[0], tmp_path / "c"]).config
    assert differing == {"adapter.method": ["lsr", "lora"], "eval.limit": [ABSENT, 5]}


def test_parameters_losses_speed_memory_and_time(two):
    run = compare(two).runs[0]
    assert (run.parameters, run.adapter_bytes, run.steps) == (4_096_000, 16_400_000, 40)
    assert run.loss.train == 1.2345
    assert run.loss.best_step == 30
    assert run.loss.best < run.loss.evaluation
    assert (run.tokens_per_s, run.memory_gib, run.wall_s) == (17_719.0, 28.1, 4000.0)
    assert run.machine == "H100 80GB HBM3"


def test_runs_that_compute_otherwise_are_told_apart(two, tmp_path):
    for name, compute, kept in (("x", "fp8", ["1.down"]), ("y", "fp8", []), ("z", "int8", [])):
        write_run(tmp_path / name, {"training": {"compute": compute}})
        content = {"compute": compute, "tolerance": 0.1, "errors": {"1.down": 0.2}, "kept": kept}
        (tmp_path / name / "compute.json").write_text(json.dumps(content))
    x, y, z = (tmp_path / name for name in "xyz")
    found = compare([two[0], x, z])
    assert [run.compute for run in found.runs] == ["bf16", "fp8", "int8"]
    assert found.config["training.compute"] == [ABSENT, "fp8", "int8"]
    assert any("not computed alike, but in bf16 and fp8 and int8" in note for note in found.notes)
    kept_otherwise = "not the same groups of linears stayed in bfloat16"
    assert not any(note.startswith(kept_otherwise) for note in found.notes)
    assert any(note.startswith(kept_otherwise) for note in compare([x, y]).notes)
    assert not any("computed" in note or kept_otherwise in note for note in compare(two).notes)


def write_grpo(folder, offset=0.0, reward="exact_answer", **changes):
    """Write a run of GRPO, whose losses say nothing."""
    training = {"method": "grpo", "reward": [reward]}
    results = {"final_loss": 0.0123, "final_reward": 0.5 + offset}
    return write_run(folder, {"training": training}, results, rewards(offset=offset), **changes)


def test_runs_of_grpo_are_compared_by_their_rewards(tmp_path, call):
    pair = [write_grpo(tmp_path / name, offset) for name, offset in (("a", 0.0), ("b", 0.25))]
    found = compare(pair)
    assert found.objectives == ["reward"]
    judged = found.runs[1].judged
    assert (judged.train, judged.best_step) == (0.75, 30)
    assert judged.best > judged.evaluation
    assert [set(curves) for curves in found.curves().values()] == [{"reward", "eval_reward"}] * 2
    page = tmp_path / "c.html"
    status, out, _ = call(*pair, "--html", page)
    assert status == 0
    assert re.search(r"^Reward, speed", out, re.MULTILINE)
    assert re.search(r"^B +0\.7500 +0\.7317 +1\.2002 +30 ", out, re.MULTILINE)
    text = page.read_text()
    for words in (
        "training reward",
        "eval reward",
        "best reward, at step",
        "Reward over the steps of 2 runs",
        "0.7500",
    ):
        assert words in text
    assert "loss" not in out.lower() + text.lower()


def test_of_runs_of_grpo_notes_speak_of_rewards(tmp_path):
    data = {"train": [{"path": "mine.jsonl", "sha256": "cd" * 32, "num_rows": 5}], "validation": []}
    pair = [write_grpo(tmp_path / "a"), write_grpo(tmp_path / "b", reward="length", data=data)]
    config = (pair[1] / "config.yaml").read_text().replace("some/base-7b", "some/other")
    (pair[1] / "config.yaml").write_text(config)
    notes = compare(pair).notes
    assert "runs of grpo differ in training.reward: their rewards are not defined alike" in notes
    assert any("rewards of training are of different rows" in note for note in notes)
    assert not any("loss" in note for note in notes)


def test_beside_others_runs_of_grpo_have_rewards_and_the_others_losses(two, tmp_path, call):
    prompts = {"train": [{"path": "prompts.jsonl", "sha256": "cd" * 32, "num_rows": 5}], "validation": []}
    runs = [*two, write_grpo(tmp_path / "c", data=prompts)]
    found = compare(runs)
    assert [run.judged for run in found.runs] == [found.runs[0].loss, found.runs[1].loss, found.runs[2].reward]
    assert [set(curves) for curves in found.curves().values()] == [{"loss", "eval_loss"}] * 2 + [
        {"reward", "eval_reward"}
    ]
    assert found.notes[0].startswith("runs of grpo are shown by their rewards, the highest best, the others by their ")
    assert sum("do not compare" in note for note in found.notes) == 1
    assert not any("different rows" in note for note in found.notes)
    page = tmp_path / "c.html"
    status, out, _ = call(*runs, "--html", page)
    assert status == 0
    told, page_line = out.rstrip("\n").rsplit("\n", 1)
    assert page_line == f"page  {page}", "as long as the path is"
    assert max(map(len, told.split("\n"))) <= 80
    assert re.search(r"^Loss or reward, speed", out, re.MULTILINE)
    assert re.search(r"^A +loss +1\.2345 ", out, re.MULTILINE)
    assert re.search(r"^C +reward +0\.5000 +0\.4817 +0\.9502 +30 ", out, re.MULTILINE)
    text = page.read_text()
    for words in ("training loss", "best loss, at step", "training reward", "best reward, at step", "do not compare"):
        assert words in text
    assert "0.0123" not in out + text


def test_without_a_method_that_can_be_read_a_run_is_judged_by_its_loss(two):
    for method in ("[grpo]", "none-such", "{a: 1}"):
        text = (two[1] / "config.yaml").read_text()
        (two[1] / "config.yaml").write_text(f"{text.partition('training:')[0]}training: {{method: {method}}}\n")
        assert compare(two).runs[1].objective == "loss"


def test_scores_are_paired_with_the_first_run_s_and_with_those_before(two):
    first, second = compare(two).runs
    assert first.scores["arc"]["accuracy"].over_first is None
    score = second.scores["arc"]["accuracy"]
    assert score.value == 0.7
    assert score.low < 0.7 < score.high
    assert score.over_first == paired_accuracy(FIRST, SECOND)
    assert (score.over_first.gained, score.over_first.lost) == (4, 1)
    assert score.before == 0
    assert score.gain.gained == 7


def test_questions_are_matched_by_what_they_are_and_not_by_their_order(two):
    rows = choice_rows(SECOND)[::-1]
    write_lines(two[1] / "eval" / "arc-after.jsonl", rows)
    assert compare(two).runs[1].scores["arc"]["accuracy"].over_first == paired_accuracy(FIRST, SECOND)


def test_of_different_questions_only_the_common_ones_are_compared_and_that_is_said(two):
    write_lines(two[1] / "eval" / "arc-after.jsonl", choice_rows([True] * 10, first=6))
    found = compare(two)
    paired = found.runs[1].scores["arc"]["accuracy"].over_first
    assert paired == paired_accuracy(FIRST[6:], [True] * 4)
    assert any("of 10 questions" in note and "4 are common" in note for note in found.notes)
    write_lines(two[1] / "eval" / "arc-after.jsonl", choice_rows([True] * 10, first=50))
    found = compare(two)
    assert found.runs[1].scores["arc"]["accuracy"].over_first is None
    assert any("other questions" in note for note in found.notes)


def test_a_question_that_stands_twice_is_two_questions(two):
    rows = [{**row, "question_sha256": "0" * 64} for row in choice_rows(FIRST)]
    write_lines(two[0] / "eval" / "arc-after.jsonl", rows)
    assert compare(two).runs[0].scores["arc"]["accuracy"].num_examples == 10


def test_a_task_is_called_as_the_results_call_it(two):
    for folder in two:
        rows = (folder / "eval" / "arc-after.jsonl").read_text()
        RunFolder(folder).predictions("Builtin:Arc", "after").write_text(rows)
        changed = json.loads((folder / "results.json").read_text()) | {"accuracy": {"Builtin:Arc": {}}}
        (folder / "results.json").write_text(json.dumps(changed))
    assert "Builtin:Arc" in compare(two).runs[0].scores


def test_what_eval_scored_later_is_compared_too(two):
    write_lines(two[0] / "eval" / "piqa-eval-adapter.jsonl", choice_rows([True] * 4))
    write_lines(two[1] / "eval" / "piqa-eval-adapter.jsonl", choice_rows([False] * 4))
    assert compare(two).runs[1].scores["piqa"]["accuracy"].over_first.difference == -1


def test_classifiers_are_compared_by_every_score(tmp_path):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60)
    outputs = [np.eye(3)[labels] + draw.normal(0, spread, (60, 3)) for spread in (1.5, 0.3)]
    for name, values in zip("ab", outputs, strict=True):
        rows = class_rows(values.tolist(), labels.tolist())
        write_run(tmp_path / name, {"model": {"task": "seq_cls"}}, answers={"validation-eval-adapter": rows})
    scores = compare([tmp_path / "a", tmp_path / "b"]).runs[1].scores["validation"]
    expected = [measure(values, labels) for values in outputs]
    for name, score in scores.items():
        assert score.value == pytest.approx(expected[1][name])
        assert score.over_first.difference == pytest.approx(expected[1][name] - expected[0][name])
        assert score.over_first.low < score.over_first.difference < score.over_first.high
    assert scores["accuracy"].over_first.p < 0.01
    assert scores["f1_macro"].over_first.p is None


def test_a_classifier_s_rows_with_names_of_classes_are_matched_by_their_texts(tmp_path):
    def rows(predicted, texts):
        gold = ["no", "yes", "yes"]
        return [
            {"row": number, "text": text, "gold": label, "predicted": "?", "outputs": [0.0, value]}
            for number, (text, label, value) in enumerate(zip(texts, gold, predicted, strict=True), 1)
        ]

    for name, predicted, texts in (("a", (-1, -1, 1), "xyz"), ("b", (-1, 1, 1), "xyw")):
        config = {"model": {"task": "seq_cls", "labels": ["no", "yes"]}}
        write_run(tmp_path / name, config, answers={"validation-after": rows(predicted, texts)})
    first, second = (run.scores["validation"]["accuracy"] for run in compare([tmp_path / "a", tmp_path / "b"]).runs)
    assert (first.value, second.value) == (pytest.approx(2 / 3), 1)
    assert (second.over_first.common, second.over_first.gained) == (2, 1)


def test_a_regression_is_compared_by_its_correlations(tmp_path):
    draw = np.random.default_rng(0)
    labels = draw.normal(0, 1, 50)
    for name, spread in (("a", 2.0), ("b", 0.2)):
        rows = class_rows([[value] for value in labels + draw.normal(0, spread, 50)], labels.tolist())
        write_run(tmp_path / name, {"model": {"task": "seq_cls"}}, answers={"validation-after": rows})
    score = compare([tmp_path / "a", tmp_path / "b"]).runs[1].scores["validation"]["pearson"]
    assert score.low is None
    assert score.over_first.low > 0


def test_a_classifier_beside_a_language_model_and_another_base_is_said(two, tmp_path):
    rows = class_rows([[0.0, 1.0]] * 4, [1, 1, 0, 1])
    write_run(tmp_path / "c", {"model": {"task": "seq_cls", "name": "some/bert"}}, answers={"arc-after": rows})
    found = compare([*two, tmp_path / "c"])
    assert any("a classifier stands beside a language model" in note for note in found.notes)
    assert found.runs[2].scores["arc"]["accuracy"].over_first is None
    write_run(tmp_path / "d", {"model": {"name": "some/other"}})
    assert any("the base models differ" in note for note in compare([two[0], tmp_path / "d"]).notes)


def test_other_rows_and_another_machine_are_said(two, tmp_path):
    data = {"train": [{"path": "mine.jsonl", "sha256": "cd" * 32, "num_rows": 5}], "validation": []}
    write_run(tmp_path / "c", data=data, environment={"gpus": ["NVIDIA H200"] * 2})
    found = compare([two[0], tmp_path / "c"])
    assert any(note.startswith("data.train: the rows are not the same") for note in found.notes)
    assert any("the machines differ" in note for note in found.notes)
    assert found.runs[1].machine == "2 x H200"


def test_a_run_that_has_not_ended_is_compared_as_far_as_it_is(two, tmp_path):
    write_run(tmp_path / "c", finished=False)
    found = compare([two[0], tmp_path / "c"])
    run = found.runs[1]
    assert not run.is_finished
    assert run.steps == 40
    assert run.loss.train is not None
    assert run.parameters is None
    assert any("has not ended (step 40)" in note for note in found.notes)


def test_a_run_that_has_only_begun_is_compared_too(two, tmp_path):
    write_run(tmp_path / "c", metrics=[], finished=False)
    assert compare([two[0], tmp_path / "c"]).runs[1].loss.train is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("results.json", "{"),
        ("results.json", "[]"),
        ("results.json", '{"trainable_parameters": "many", "final_loss": NaN, "tokens_per_s": [1], "notes": 3}'),
        ("env.json", '{"lsr_scale": 1, "gpus": "H100"}'),
        ("data.json", '{"train": {"a": 1}}'),
        ("data.json", '{"train": [1, null]}'),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n{"step": 2, "eval_loss": null}\n{"ste'),
        ("config.yaml", "model: 1\nadapter:\ndata:\ntraining:\n"),
        ("config.yaml", "model: {\nadapter:\ndata:\ntraining:\n"),
        ("eval/arc-after.jsonl", '{"id": 1}\n[]\nnothing\n'),
        ("eval/arc-after.jsonl", '{"label": 9, "outputs": [0.1, 0.2]}\n'),
        ("eval/arc-after.jsonl", '{"label": 0, "outputs": [NaN]}\n'),
        (
            "eval/arc-after.jsonl",
            '{"label": 0, "outputs": [1, 2]}\n{"log_likelihoods": [1], "choice": 0, "answer": 0}\n',
        ),
    ],
)
def test_a_damaged_file_takes_away_what_it_would_have_said_and_nothing_else(two, call, file, content):
    (two[1] / file).write_text(content)
    status, out, _ = call(*two)
    assert status == 0
    assert "b" in out
    assert call(*two, "--json")[0] == 0


def test_a_folder_that_is_no_run_is_refused(two, tmp_path, call):
    (tmp_path / "none").mkdir()
    assert call(two[0], tmp_path / "none")[0] == 2
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("mine: 1\n")
    status, _, err = call(two[0], tmp_path / "project")
    assert status == 2
    assert "no run's of lsr-scale" in err


def test_one_run_is_refused_with_what_shows_it(two, call):
    status, _, err = call(two[0])
    assert status == 2
    assert f"expected two runs or more to compare; for one run: lsr-scale report {two[0]}" in err
    with pytest.raises(UserError, match="the same one was named several times"):
        compare([two[0], f"{two[0]}/", two[0].parent / "b" / ".." / "a"])
    with pytest.raises(UserError, match="two runs or more"):
        compare([])


def test_a_run_that_is_named_twice_counts_once(two):
    found = compare([two[0], two[1], two[0]])
    assert len(found.runs) == 2
    assert any("compared once" in note for note in found.notes)


def test_a_screen_of_80_columns_holds_two_runs_and_twelve(two, tmp_path, call):
    status, out, _ = call(*two)
    assert status == 0
    assert "adapter.rank" in out
    assert "+30.0" in out
    many = []
    for number in range(12):
        long = tmp_path / ("a-rather-long-name-of-a-run-" * 3 + str(number))
        training = {f"option_{index}": number for index in range(30)}
        answers = {f"task-{index}-after": choice_rows(FIRST) for index in range(4)}
        many.append(write_run(long, {"training": training, "adapter": {"rank": number}}, answers=answers))
    status, out, _ = call(*many)
    assert status == 0
    assert max(map(len, out.split("\n"))) <= 80
    assert f"... and {31 - MAX_KEYS} more: --all" in out
    assert "0 (A); 1 (B)" in out
    assert "option_29" not in out
    whole = call(*many, "--all")[1]
    assert "option_29" in whole
    assert max(map(len, whole.split("\n"))) <= 80


def test_json_has_all_of_it(two, call):
    status, out, _ = call(*two, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["config"] == {"adapter.rank": [16, 8]}
    assert found["runs"][1]["scores"]["arc"]["accuracy"]["over_first"]["gained"] == 4


def test_the_figure_and_the_page_are_written_and_write_over_nothing_of_somebody_s(two, call, tmp_path):
    picture, page = tmp_path / "c.png", tmp_path / "c.html"
    for _ in range(2):
        assert call(*two, "--plot", picture, "--html", page)[0] == 0
        assert is_own_picture(picture)
        assert is_own_page(page)
    assert Image.open(picture).size[0] > 500
    for option, file in (("--plot", picture), ("--html", page)):
        file.write_text("mine")
        status, out, err = call(*two, option, file)
        assert status == 2
        assert "not written" in err
        assert out == ""
        assert file.read_text() == "mine"


def test_hostile_names_and_values_stay_text(tmp_path, call):
    bad = "\x1b[2J[bold]x"
    for name in ("a [red]", "b"):
        write_run(tmp_path / name, {"adapter": {"note": bad + name}, "training": {"x$y": "$\\frac{$" + name}})
    status, out, _ = call(
        tmp_path / "a [red]", tmp_path / "b", "--plot", tmp_path / "c.png", "--html", tmp_path / "c.html"
    )
    assert status == 0
    assert "\x1b" not in out
    assert "[bold]x" in out
    assert "\x1b" not in (tmp_path / "c.html").read_text()


def test_the_guide_s_commands_do_what_it_says(tmp_path, monkeypatch, capfd):
    guide = (Path(__file__).parents[2] / "GUIDE.md").read_text(encoding="utf-8")
    commands = re.findall(r"^lsr-scale ((?:compare|report) .*?)(?:  +#.*)?$", guide, re.MULTILINE)
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "kron_lora"):
        write_run(tmp_path / "runs" / name, {"adapter": {"method": name}}, answers={"arc-after": choice_rows(FIRST)})
    for command in commands:
        assert cli.main(command.split()) == 0, capfd.readouterr().err
    assert is_own_picture(tmp_path / "curves.png")
    assert is_own_page(tmp_path / "comparison.html")
    assert is_own_page(tmp_path / "runs/lora/report.html")


def test_comparing_changes_nothing(two, call):
    before = {path: path.stat().st_mtime_ns for folder in two for path in folder.rglob("*")}
    call(*two)
    assert {path: path.stat().st_mtime_ns for folder in two for path in folder.rglob("*")} == before
    assert CONFIG["adapter"]["rank"] == 16
