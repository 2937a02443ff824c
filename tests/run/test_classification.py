"""A classifier's scores: GLUE's, equal to scikit-learn's and SciPy's, in training, in `eval`, and by hand."""

import json

import numpy as np
import pytest

from lsr_scale import UserError, cli
from lsr_scale.config.training import EVALUATED, evaluated
from lsr_scale.run.evaluate import evaluate_run
from lsr_scale.scoring.classification import measure
from tests.helpers.tiny_runs import do, labelled, metrics, results, save_classifier, tiny_run, write_rows


def one_hot(answers, num_labels):
    return np.eye(num_labels)[answers] + 0.1


def test_scores_by_hand():
    labels, answers = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    # 4 true positives, 2 false ones, 1 false negative, 3 true negatives
    assert measure(one_hot(answers, 2), labels) == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": 8 / 11,
            "f1_macro": (8 / 11 + 6 / 9) / 2,
            "matthews_correlation": (4 * 3 - 2 * 1) / np.sqrt(6 * 5 * 5 * 4),
        }
    )
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    found = measure(np.array([[0.0], [1.0], [1.0], [9.0]]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert found["spearmanr"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert found["pearson"] == pytest.approx(13.5 / np.sqrt(52.75 * 5))


def test_a_constant_answer_is_accurate_and_worth_nothing():
    labels = (np.arange(1000) >= 315).astype(int)  # CoLA's 68.5 %
    found = measure(one_hot(np.ones(1000, dtype=int), 2), labels)
    assert found["accuracy"] == pytest.approx(0.685)
    assert found["matthews_correlation"] == 0
    assert found["f1_macro"] == pytest.approx(found["f1"] / 2)
    assert measure(np.full((9, 1), 0.1), np.arange(9.0)) == {"pearson": 0, "spearmanr": 0}


@pytest.mark.parametrize("num_labels", [2, 3, 7])
@pytest.mark.parametrize("seen", [2, 7])
def test_classes_are_scored_as_by_scikit_learn(num_labels, seen):
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(seen)
    labels = draw.integers(0, min(seen, num_labels), 200)
    answers = np.where(draw.random(200) < 0.6, labels, draw.integers(0, min(seen, num_labels), 200))
    found = measure(one_hot(answers, num_labels), labels)
    assert set(found) == {*evaluated("seq_cls", num_labels)} - {"loss"}
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, answers))
    assert found["f1_macro"] == pytest.approx(sklearn.f1_score(labels, answers, average="macro"))
    assert found["matthews_correlation"] == pytest.approx(sklearn.matthews_corrcoef(labels, answers))
    if num_labels == 2:
        assert found["f1"] == pytest.approx(sklearn.f1_score(labels, answers))


def test_values_are_scored_as_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 6, 200) / 2  # many equal ones
    outputs = np.round(labels + draw.normal(size=200), 1).astype(np.float32)
    found = measure(outputs[:, None], labels)
    assert set(found) == {*evaluated("seq_cls", 1)} - {"loss"}
    assert found["pearson"] == pytest.approx(stats.pearsonr(outputs, labels).statistic)
    assert found["spearmanr"] == pytest.approx(stats.spearmanr(outputs, labels).statistic)


def test_nothing_is_said_of_outputs_that_are_not_finite():
    with pytest.raises(UserError, match="not finite on 1 of 3 rows: training diverged"):
        measure(np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, 1.0]]), np.array([0, 1, 1]))


def run_of(folder, num_labels, rows, **training):
    """Return a run of a small BERT that is evaluated on five of its rows, and how good it is by which it chooses."""
    save_classifier(folder / "model", "bert")
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "held-out.jsonl", rows[:5])
    return tiny_run(
        folder,
        model={"task": "seq_cls", "num_labels": num_labels, "quantization": "none", "dtype": "float32"},
        adapter={"target_modules": ["query", "value"]},
        data={"train": [str(folder / "pairs.jsonl")], "validation": [str(folder / "held-out.jsonl")]},
        training={"per_device_eval_batch_size": 2, "learning_rate": 2e-2, **training},
        eval={"tasks": []},
    )


@pytest.mark.parametrize(
    ("num_labels", "best"), [(2, "matthews_correlation"), (3, "eval_f1_macro"), (1, "eval_spearmanr")]
)
def test_training_and_eval_find_the_same(tmp_path, capsys, caplog, num_labels, best):
    rows = [{**row, "label": float(i) if num_labels == 1 else i % num_labels} for i, row in enumerate(labelled())]
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": best, "save_strategy": "epoch"}
    folder = do(run_of(tmp_path, num_labels, rows, num_train_epochs=2, **chosen))
    measured = [f"eval_{name}" for name in evaluated("seq_cls", num_labels)]
    evaluations = [row for row in metrics(folder) if "eval_loss" in row]
    assert [set(row) & set(EVALUATED) for row in evaluations] == [set(measured)] * 2
    name = f"eval_{best.removeprefix('eval_')}"
    (taken,) = [row for row in evaluations if row["step"] == results(folder)["best_step"]]
    assert taken[name] == max(row[name] for row in evaluations)
    rounded = {key: pytest.approx(taken[key], abs=1e-6) for key in measured}  # to six digits
    assert {key: results(folder)[key] for key in measured} == rounded
    capsys.readouterr()
    caplog.clear()
    assert cli.main(["eval", str(folder.path), "--json"]) == 0
    said = capsys.readouterr()
    assert "start at random" not in said.err + caplog.text, "the head is the adapter's"
    (name, found), *others = json.loads(said.out)["classification"].items()
    assert (name, others, found.pop("num_examples")) == ("validation", [], 5)
    assert {f"eval_{key}": value for key, value in found.items()} == {
        key: pytest.approx(taken[key], abs=1e-6) for key in measured
    }
    predictions = [
        json.loads(line) for line in folder.predictions("validation", "eval-adapter").read_text().splitlines()
    ]
    golds = [row["label"] if num_labels == 1 else str(row["label"]) for row in rows[:5]]
    assert [(p["row"], p["text"], p["gold"]) for p in predictions] == [
        (i + 1, row["sentence1"], gold) for i, (row, gold) in enumerate(zip(rows[:5], golds, strict=True))
    ]
    labels = np.array([row["label"] for row in rows[:5]])
    again = measure(np.array([p["outputs"] for p in predictions]), labels)
    assert again == pytest.approx({key: found[key] for key in again}, abs=1e-6)
    after = results(folder)["classification"]["validation"]["after"]
    assert after == pytest.approx({"num_examples": 5, **found}, abs=1e-6)
    for row in evaluations:
        checkpoint = f"checkpoint-{row['step']}"
        scored = evaluate_run(folder.path / checkpoint)
        assert scored["scored"] == checkpoint
        of_step = {key: row[f"eval_{key}"] for key in found}
        assert {key: scored["classification"]["validation"][key] for key in found} == pytest.approx(of_step, abs=1e-6)
        assert folder.predictions("validation", f"eval-{checkpoint}") in folder.written()


def test_other_rows_are_scored_and_the_table_names_every_score(tmp_path, capsys):
    folder = do(run_of(tmp_path, 2, labelled(), max_steps=1))
    assert "validation  loss 0." in (said := capsys.readouterr().out)
    assert "matthews_correlation" in said
    assert cli.main(["eval", str(folder.path), "--tasks", str(tmp_path / "pairs.jsonl"), "--limit", "7"]) == 0
    title, column, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert (title, column.split(), lines[0].split()) == (f"{folder.path}: adapter", ["pairs"], ["num_examples", "7"])
    assert [line.split()[0] for line in lines[1:]] == [*evaluated("seq_cls", 2)]
    assert len(folder.predictions("pairs", "eval-adapter").read_text().splitlines()) == 7


@pytest.fixture(scope="module")
def unheld(tmp_path_factory):
    """Return the folder of a run that holds no rows back."""
    folder = tmp_path_factory.mktemp("unheld")
    run = run_of(folder, 2, labelled(), max_steps=1, eval_strategy="no")
    return do(run.model_copy(update={"data": run.data.model_copy(update={"validation": []})})).path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-only"], "a classifier's run; --base-only and --without-questions are for language models"),
        (["--without-questions"], "a classifier's run; --base-only and --without-questions are for language models"),
        (
            ["--tasks", "{}/three.jsonl"],
            "three.jsonl, line 3: has the label 2, but model.num_labels is 2: labels go from 0 to 1",
        ),
        ([], "has no held-out rows (data.validation); give some: lsr-scale eval {run} --data FILE"),
    ],
)
def test_what_cannot_be_scored_is_said(unheld, tmp_path, capsys, words, message):
    write_rows(tmp_path / "three.jsonl", [{**row, "label": i} for i, row in enumerate(labelled(3))])
    assert cli.main(["eval", str(unheld), *(word.format(tmp_path) for word in words)]) == 2
    assert message.format(run=unheld) in capsys.readouterr().err


def test_rows_held_out_by_hash_are_those_that_are_scored_again(tmp_path, capsys):
    run = run_of(tmp_path, 2, labelled(), max_steps=1)
    data = run.data.model_copy(update={"validation": [], "validation_split": 0.3})
    folder = do(run.model_copy(update={"data": data}))
    capsys.readouterr()
    assert cli.main(["eval", str(folder.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["classification"]["validation"]
    assert found["loss"] == pytest.approx(results(folder)["eval_loss"], abs=1e-6)
    assert found["num_examples"] == len(labelled()) - results(folder)["train_rows"]
