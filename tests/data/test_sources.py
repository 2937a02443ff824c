"""Rows from files, folders, the hub's interface and the built-in set; what goes wrong names the place."""

import gzip
import hashlib
import json

import datasets
import pandas as pd
import pytest

from lsr_scale.data import sources
from lsr_scale.data.sources import BUILTIN, load_rows
from lsr_scale.data.tasks import examples
from lsr_scale.errors import UserError

ROWS = [{"question": f"Is {n} even?", "choices": ["no", "yes"], "answer": int(n % 2 == 0)} for n in range(6)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines(rows).encode()))
    elif name.endswith(".jsonl"):
        path.write_text(lines(rows), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_file_type_gives_the_same_rows_and_its_hash(tmp_path, name):
    file = write(tmp_path / name)
    found = load_rows(str(file))
    assert found.rows == ROWS
    assert found.task is None
    assert found.provenance.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.provenance.to_dict()["num_rows"] == 6
    assert len(examples(found)) == 6


@pytest.mark.parametrize("key", ["name", "revision"])
@pytest.mark.parametrize("place", ["folder", "folder/train.jsonl", BUILTIN])
def test_what_only_a_hub_dataset_has_is_refused_of_others(tmp_path, monkeypatch, key, place):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder" / "train.jsonl")
    with pytest.raises(UserError, match=rf"only a hub dataset has a {key}; remove {key} \('x'\)"):
        load_rows(place, **{key: "x"})
    assert load_rows(place).rows


def test_an_unknown_task_is_refused_of_the_built_in_rows_as_of_a_file():
    with pytest.raises(UserError, match=r"data source 'builtin:commonsense', task.*hellaswagg.*hellaswag"):
        load_rows(BUILTIN, task="hellaswagg")


def test_csv_is_text_as_it_stands(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('sentence1,sentence2,label\n"a, b",,1\nNA,d,0\n', encoding="utf-8")
    assert load_rows(str(file)).rows == [
        {"sentence1": "a, b", "sentence2": "", "label": "1"},
        {"sentence1": "NA", "sentence2": "d", "label": "0"},
    ]


def test_json_lines_under_a_json_ending_and_a_list_under_its_split_are_read(tmp_path):
    (tmp_path / "lines.json").write_text(lines(ROWS), encoding="utf-8")
    assert load_rows(str(tmp_path / "lines.json")).rows == ROWS
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    assert load_rows(str(tmp_path / "wrapped.json")).rows == ROWS


def test_limit_takes_the_first_rows(tmp_path):
    found = load_rows(str(write(tmp_path / "a.jsonl")), limit=2)
    assert found.rows == ROWS[:2]
    assert found.provenance.num_rows == 2
    with pytest.raises(UserError, match="limit of at least 1, got 0"):
        load_rows(str(tmp_path / "a.jsonl"), limit=0)


def test_a_folder_is_a_file_a_split(tmp_path):
    write(tmp_path / "mine" / "train.jsonl.gz")
    write(tmp_path / "mine" / "validation.parquet", ROWS[:3])
    folder = str(tmp_path / "mine")
    assert load_rows(folder).rows == ROWS
    assert load_rows(folder, split="validation").rows == ROWS[:3]
    scored = load_rows(folder, default_split=None)
    assert (scored.provenance.split, scored.task) == ("validation", None)
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        load_rows(folder, split="test")


def test_a_folder_of_task_folders_takes_known_and_unknown_tasks(tmp_path):
    write(tmp_path / "boolq" / "validation.jsonl")
    write(tmp_path / "parity" / "test.jsonl")
    write(tmp_path / "parity" / "validation.jsonl", ROWS[:1])
    known = load_rows(str(tmp_path), task="boolq", default_split=None)
    assert (known.task, known.provenance.split) == ("boolq", "validation")
    assert examples(known)[0].contexts[0] == "Question: Is 0 even?\nAnswer:"
    own = load_rows(str(tmp_path), task="parity", default_split=None)
    assert (own.task, own.provenance.split, len(own.rows)) == ("parity", "test", 6)
    assert len(examples(own)) == 6
    assert load_rows(str(tmp_path / "boolq"), default_split=None).task == "boolq", "the folder's name is the task"
    assert load_rows(str(tmp_path / "boolq" / "validation.jsonl")).task == "boolq"
    with pytest.raises(UserError, match="did you mean 'parity'"):
        load_rows(str(tmp_path), task="party")
    with pytest.raises(UserError, match="set task to one of its task folders: boolq, parity"):
        load_rows(str(tmp_path))


def test_a_task_that_is_neither_known_nor_the_folder_is_refused(tmp_path):
    write(tmp_path / "parity" / "train.jsonl")
    assert load_rows(str(tmp_path / "parity"), task="multiple_choice").task == "multiple_choice"
    with pytest.raises(UserError, match="did you mean 'winogrande'"):
        load_rows(str(tmp_path / "parity"), task="winogrand")


def test_shards_of_a_cloned_hub_dataset_are_one_split_in_order(tmp_path):
    for index in range(3):
        write(tmp_path / "data" / f"train-0000{index}-of-00003.parquet", ROWS[2 * index : 2 * index + 2])
    assert load_rows(str(tmp_path)).rows == ROWS
    assert load_rows(str(tmp_path), limit=3).rows == ROWS[:3]


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"more than once \(train.jsonl, train.parquet\)"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: not valid JSON"),
        ('[{"a": 1}]', r"a\.jsonl, line 1: .* got list; a file that is one list of rows ends in \.json: rename it"),
        ('{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: expected an object \{...\}, got list"),
        ("\n \n", "no rows in it"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / "a.jsonl"))


def test_a_row_that_fits_no_task_is_named_by_its_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines(ROWS[:2]) + "\n" + lines([{**ROWS[0], "answer": 5}]), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 4: expected 'answer' between 0 and 1, got 5"):
        examples(load_rows(str(file)))


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(lines(ROWS * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "fake.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "fake.parquet").write_bytes(b"plain text")
    (tmp_path / "latin.jsonl").write_bytes('{"a": "\u00e9"}'.encode("latin-1"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n1,2,3\n", encoding="utf-8")
    (tmp_path / "bad.json").write_text('[{"a": 1},\n oops]', encoding="utf-8")
    for name in ("cut.jsonl.gz", "fake.jsonl.gz", "fake.parquet", "latin.jsonl", "bad.csv", "bad.json"):
        with pytest.raises(UserError, match=name):
            load_rows(str(tmp_path / name))
    write(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="expected a file that ends in"):
        load_rows(str(tmp_path / "a.txt"))


def test_a_missing_path_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'train\.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="does not exist either"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_misspelt_task_names_the_nearest():
    with pytest.raises(UserError, match=r"'piqqa': no task of that name, and no file or folder here; .* 'piqa'"):
        load_rows("piqqa", default_split=None)


@pytest.mark.parametrize("path", ["ag_news", "race", "sciq", "me/commonsense_qa", "u/arc_challenge"])
def test_a_hub_dataset_is_not_taken_for_a_misspelt_task(monkeypatch, path):
    asked = []
    monkeypatch.setattr(sources, "_load_hub", lambda *arguments: asked.append(arguments[0]))
    load_rows(path)
    assert asked == [path]


def test_a_known_task_is_its_hub_dataset_with_subset_and_split(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_rows("arc_easy", default_split=None, limit=4)
    assert found.task == "arc_easy"
    assert found.rows == ROWS[:4]
    assert found.provenance.resolved == "hub:allenai/ai2_arc"
    assert found.provenance.fingerprint
    assert load_rows("winogrande").provenance.split == "train"
    assert load_rows("allenai/ai2_arc", name="ARC-Challenge", default_split=None).task == "arc_challenge"
    assert load_rows("some/data", split="train[:1%]").task is None
    assert calls == [
        (("allenai/ai2_arc", "ARC-Easy"), "test"),
        (("allenai/winogrande", "winogrande_xl"), "train"),
        (("allenai/ai2_arc", "ARC-Challenge"), "test"),
        (("some/data", None), "train[:1%]"),
    ]
    with pytest.raises(UserError, match="which split"):
        load_rows("some/data", default_split=None)


def test_an_unreachable_hub_is_a_message_with_a_remedy(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"neither in the local cache.*point path to a local file or folder"):
        load_rows("baber/piqa")
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        load_rows("arc_easi")


def test_what_the_hub_refuses_is_a_message(monkeypatch):
    errors = [
        datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
        ValueError("BuilderConfig 'y' not found. Available: ['main']"),
        RuntimeError("Dataset scripts are no longer supported, but found x.py"),
    ]
    for error in errors:

        def load_dataset(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError, match="data source 'some/x'"):
            load_rows("some/x")


def test_the_built_in_set_has_two_splits_in_the_generic_form():
    train, heldout = load_rows(BUILTIN), load_rows(BUILTIN, default_split=None, limit=5)
    assert train.provenance.split == "train"
    assert heldout.provenance.split == "heldout"
    assert len(heldout.rows) == 5
    assert train.provenance.fingerprint != heldout.provenance.fingerprint
    assert all(example.contexts[0].startswith("Question: ") for example in examples(train))
    with pytest.raises(UserError, match="'train' or 'heldout'"):
        load_rows(BUILTIN, split="test")
    with pytest.raises(UserError, match="did you mean 'builtin:commonsense'"):
        load_rows("builtin:comonsense")


def test_a_link_that_leads_nowhere_and_a_pattern_are_told_as_such(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"link\.jsonl': a link to 'gone\.jsonl', which leads nowhere"):
        load_rows(str(tmp_path / "link.jsonl"))
    with pytest.raises(UserError, match="no such file or folder; patterns are not filled in here; list the files"):
        load_rows(str(tmp_path / "*.jsonl"))
