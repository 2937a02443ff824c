"""A classifier's labels: their names and order, found in rows or given; what is odd is refused by file and line."""

import re

import datasets
import pytest

from lsr_scale import UserError
from lsr_scale.config import run_from_dict
from lsr_scale.data.formats import build_dataset, load_source
from lsr_scale.data.labels import find_labels
from lsr_scale.training.run_data import read_data
from lsr_scale.training.run_labels import with_labels
from tests.helpers.tiny_runs import save_llama, write_rows


def rows_of(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def sources_of(folder, *parts):
    return [load_source(write_rows(folder / f"{number}.jsonl", rows_of(*part))) for number, part in enumerate(parts)]


def found(folder, *parts, labels=None, num_labels=None):
    return find_labels(sources_of(folder, *parts), labels, num_labels)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["spam", "ham", "spam", "ham"], ("ham", "spam")),
        ([3, 1, 10, 2], ("1", "2", "3", "10")),
        (["10", 2, "1"], ("1", "2", "10")),  # a CSV file has numbers as text
        ([True, False], ("false", "true")),
        (["true", "false"], ("false", "true")),
        (["007", "agent", "7"], ("007", "7", "agent")),  # names, of which some are digits
        (["zażółć", "яблоко", "Ärger"], ("zażółć", "Ärger", "яблоко")),
        ([" spam", "ham ", "spam"], ("ham", "spam")),
        ([0.5, 1, 2.5], ()),  # scores
        (["0.5", "1"], ()),
    ],
)
def test_labels_are_found_in_the_rows_in_an_order_that_is_not_theirs(tmp_path, labels, names):
    first, turned = found(tmp_path, labels), found(tmp_path, labels[::-1])
    assert (first.names, turned.names) == (names, names)
    for label in labels:
        encoded = first.encode({"label": label})
        assert (encoded == float(label)) if not names else (names[encoded].lower() == str(label).strip().lower())


def test_the_order_is_that_of_all_sources_and_rows_are_counted(tmp_path):
    labels = found(tmp_path, ["c", "a", "a"], ["b", "c"])
    assert (labels.names, labels.counts) == (("a", "b", "c"), (2, 1, 2))
    assert labels.describe() == "labels: 3 classes: a (2), b (1), c (2)"
    assert not labels.notes


def test_given_names_fix_the_order_and_a_row_may_then_give_a_number(tmp_path):
    labels = found(tmp_path, ["b", "a", 1], labels=["b", "a", "c"])
    assert labels.names == ("b", "a", "c")
    assert [labels.encode({"label": label}) for label in ("a", "b", 2)] == [1, 0, 2]
    assert "no training row has the label c; nothing teaches it" in labels.notes
    # where the names are numbers, a number is a name
    stars = found(tmp_path, [1, 2, 5], labels=["5", "2", "1"])
    assert [stars.encode({"label": label}) for label in (5, "5", 1)] == [0, 0, 2]


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([["a", "b", None]], {}, "0.jsonl, line 3: expected a label .* under 'label', got nothing; label the row"),
        ([["a", "b", " "]], {}, "0.jsonl, line 3: expected a label .* got ' '"),
        ([["a", "NaN"]], {}, "0.jsonl, line 2: expected a label .* got 'NaN'"),
        ([[1, 0, float("nan")]], {}, "0.jsonl, line 3: expected a label that is finite .* got nan"),
        (
            [["a", "b"], ["c", ["a", "b"]]],
            {},
            r"1.jsonl, line 2: expected one label under .*multi-label classification is not",
        ),
        ([["a", {"name": "b"}]], {}, "0.jsonl, line 2: expected a class's name or number, or a score, .* got dict"),
        ([["a", "b", 1]], {}, r"0.jsonl, line 3: the label 1 \(number\) stands beside 'a' \(name; .*0.jsonl, line 1\)"),
        ([["a", "b", True]], {}, r"line 3: the label 'true' \(true or false\) stands beside 'a' \(name"),
        ([[0, 1, True]], {}, r"line 3: the label 'true' \(true or false\) stands beside 0 \(number"),
        ([[True, False], ["1"]], {}, r"1.jsonl, line 1: the label '1' \(number as text\) stands beside 'true'"),
        ([["spam", "ham", "Spam"]], {}, r"line 3: the label 'Spam' differs from 'spam' \(.*line 1\) in case or spaces"),
        ([["a b", "c", "a  b"]], {}, "line 3: the label 'a  b' differs from 'a b'"),
        ([["spam", "spam"]], {}, "data.train: every row has the label 'spam'; a classifier needs two classes"),
        ([[1, 1, 1]], {}, "every row has the label '1'"),
        ([[-1, 0, 1]], {}, "line 1: label -1 means unlabelled .*, or list it as a class: model.labels: .-1, 0, 1."),
        ([["a", "b", "c"]], {"num_labels": 2}, r"data.train: has 3 labels \(a, b, c\), but model.num_labels is 2"),
    ],
)
def test_odd_labels_are_refused_by_file_and_line(tmp_path, parts, options, message):
    with pytest.raises(UserError, match=message):
        found(tmp_path, *parts, **options)


def test_what_is_odd_but_may_be_meant_is_said(tmp_path):
    (note,) = found(tmp_path, ["a ", "b", " a"]).notes
    assert re.fullmatch(r"spaces at the ends of 2 labels are left out here; the first: .*0\.jsonl, line 1", note)
    (note,) = found(tmp_path, [str(number) + "x" for number in range(30)]).notes
    assert note.startswith("30 classes for 30 rows: is label the right column?")
    (note,) = found(tmp_path, [1.0, 2.0]).notes
    assert note.endswith("scores (a regression); for classes set model.num_labels")
    assert found(tmp_path, [1.0, 0.0], num_labels=2).names == ("0", "1")  # as a table may write classes
    # each of them listed is each of them meant
    assert found(tmp_path, ["Spam", "spam"], labels=["spam", "Spam"]).encode({"label": "Spam"}) == 1
    assert found(tmp_path, [-1, 1], labels=["-1", "1"]).encode({"label": -1}) == 0


def run_of(folder, **model):
    save_llama(folder / "model")
    data = {"train": [str(folder / "train.jsonl")], "validation": [str(folder / "held.jsonl")]}
    return run_from_dict(
        {
            "model": {"name": str(folder / "model"), "task": "seq_cls", **model},
            "adapter": {"method": "lora", "target_modules": ["q_proj"]},
            "data": data,
        }
    )


def test_a_label_that_training_does_not_have_is_refused_and_naming_all_of_them_mends_it(tmp_path):
    write_rows(tmp_path / "train.jsonl", rows_of("refund", "delivery"))
    write_rows(tmp_path / "held.jsonl", rows_of("refund", "refnd"))
    with pytest.raises(
        UserError,
        match=r"held\.jsonl, line 2: the label 'refnd' is none of data\.train's; there are: delivery, refund; "
        r"correct it, or list all labels in model\.labels",
    ):
        read_data(run_of(tmp_path))
    said = []
    data = read_data(run_of(tmp_path, labels=["delivery", "refund", "refnd"]), say=said.append)
    assert data.validation is not None
    assert list(data.validation["label"]) == [1, 2]
    assert "labels: 3 classes: delivery (1), refund (1), refnd (0)" in said


def test_a_run_knows_its_labels_once_its_rows_are_read(tmp_path):
    write_rows(tmp_path / "train.jsonl", rows_of("refund", "delivery", "refund"))
    write_rows(tmp_path / "held.jsonl", rows_of("refund"))
    run = run_of(tmp_path)
    assert (run.model.labels, run.model.num_labels) == (None, None)
    for known in (with_labels(run), with_labels(run, read_data(run).labels)):
        assert (known.model.labels, known.model.num_labels) == (["delivery", "refund"], 2)
    write_rows(tmp_path / "train.jsonl", rows_of(1.5, 2))
    assert (with_labels(run).model.labels, with_labels(run).model.num_labels) == (None, 1)


def test_a_metric_that_the_labels_do_not_have_is_refused_once_they_are_known(tmp_path):
    write_rows(tmp_path / "train.jsonl", rows_of("a", "b", "c"))
    write_rows(tmp_path / "held.jsonl", rows_of("a"))
    run = run_of(tmp_path)
    run.training["metric_for_best_model"] = "eval_f1"  # of class 1, of two
    with pytest.raises(UserError, match=r"training\.metric_for_best_model: 'eval_f1': did you mean 'eval_f1_macro'"):
        with_labels(run)


def test_a_table_of_text_and_label_needs_no_format(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\n"late, again",delivery\nmoney back,refund\n')
    source = str(tmp_path / "train.csv")
    rows, kind = build_dataset([source], model_task="seq_cls", labels=find_labels([load_source(source)], None, None))
    assert kind == "classification"
    assert list(rows) == [
        {"sentence1": "late, again", "sentence2": "", "label": 0},
        {"sentence1": "money back", "sentence2": "", "label": 1},
    ]
    (tmp_path / "wrong.csv").write_text("text,intent\na,b\n")
    with pytest.raises(UserError, match="columns text, intent are not classification rows, which have a column label"):
        build_dataset([str(tmp_path / "wrong.csv")], model_task="seq_cls")


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_a_class_label_feature_gives_names_and_order(tmp_path, form):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "sports", "business"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 1]}, features=features)
    path = tmp_path / ("rows.parquet" if form == "parquet" else "saved")
    dataset.to_parquet(str(path)) if form == "parquet" else dataset.save_to_disk(str(path))
    source = load_source(str(path))
    labels = find_labels([source], None, None)
    assert labels.names == ("world", "sports", "business")
    assert list(build_dataset([str(path)], model_task="seq_cls", labels=labels)[0]["label"]) == [2, 0, 1]
    # beside rows that have the names themselves the order is that of the names
    both = find_labels([source, *sources_of(tmp_path, ["sports", "arts"])], None, None)
    assert both.names == ("arts", "business", "sports", "world")
    unlabelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, 0]}, features=features)
    unlabelled.to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(UserError, match=r"test\.parquet, row 1: label -1 means unlabelled"):
        find_labels([load_source(str(tmp_path / "test.parquet"))], None, None)
