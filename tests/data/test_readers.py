"""Files as others write them: read whole, every text as it stands, or refused by line with advice that works."""

import gzip
import json
import os
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lsr_scale.data.formats import build_dataset
from lsr_scale.data.sources import load_rows
from lsr_scale.errors import UserError

PAIRS = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)


def put(folder, name, content):
    """Write a file and return its path as text."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.jsonl", LINES.rstrip("\n")),
        ("a.jsonl", "\n\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.jsonl", LINES.replace("\n", "\r")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.json", LINES),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(PAIRS, indent=2).encode()),
        ("a.json", json.dumps({"version": "1", "data": PAIRS})),
        ("a.json.gz", gzip.compress(json.dumps(PAIRS).encode())),
        ("a.csv", "prompt,completion\na, b\nc, d\n"),
        ("a.csv", "prompt,completion\r\na, b\r\n\r\nc, d\r\n"),
        ("a.csv", "\nprompt;completion\na; b\nc; d"),
        ("a.csv", "prompt\tcompletion\na\t b\nc\t d"),
        ("a.csv.gz", gzip.compress(b'"prompt","completion"\n"a"," b"\n"c"," d"\n')),
        ("a.tsv", "prompt\tcompletion\na\t b\nc\t d\n"),
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path, name, content):
    assert load_rows(put(tmp_path, name, content)).rows == PAIRS


def test_a_table_is_read_from_parquet_arrow_and_what_save_to_disk_wrote(tmp_path):
    table = pa.Table.from_pylist(PAIRS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert load_rows(str(tmp_path / name)).rows == PAIRS

    dataset = datasets.Dataset.from_list(PAIRS)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    assert load_rows(str(tmp_path / "one")).rows == PAIRS
    assert load_rows(str(tmp_path / "one"), default_split="validation").rows == PAIRS, "it is all that there is"
    with pytest.raises(UserError, match=r"no split 'test'.*set split to one of: train"):
        load_rows(str(tmp_path / "one"), split="test")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "two")).rows == PAIRS
    assert load_rows(str(tmp_path / "two"), default_split=None).rows == PAIRS[1:]


def test_a_saved_dataset_is_read_with_all_its_files_and_from_its_folder_only(tmp_path):
    dataset = datasets.Dataset.from_list(PAIRS)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "data-00001-of-00002.arrow").rename(tmp_path / "elsewhere.arrow")
    with pytest.raises(UserError, match=r"'data-00001-of-00002\.arrow' is not there; copy the whole folder"):
        load_rows(str(tmp_path / "one"))
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"][1]["filename"] = "../elsewhere.arrow"
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is no name of something in this folder"):
        load_rows(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not written by save_to_disk"):
        load_rows(str(tmp_path / "one"))


def test_numbers_in_a_csv_are_the_text_that_they_are(tmp_path):
    path = put(tmp_path, "a.csv", "prompt,completion\nzip code,00712\ntwo plus two is,4\nhalf,1e3\nnot here,NA\n")
    assert [row["completion"] for row in load_rows(path).rows] == ["00712", "4", "1e3", "NA"]
    dataset, kind = build_dataset([put(tmp_path, "qa.csv", "question,answer\ntwo plus two,4\n")])
    assert (kind, dataset[0]["completion"]) == ("prompt_completion", " 4")


def test_labels_in_a_csv_are_numbers(tmp_path):
    def labels(text):
        return list(build_dataset([put(tmp_path, "a.csv", "sentence1,label\n" + text)])[0]["label"])

    assert labels("x,1\ny,0\n") == [1, 0]
    assert labels("x,2.5\ny,0\n") == [2.5, 0.0]
    with pytest.raises(UserError, match=r"a\.csv, line 3: expected a class number"):
        labels("x,1\ny,good\n")
    with pytest.raises(UserError, match=r"a\.csv, line 2: expected a label"):
        labels("x,\n")


def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path):
    text = "one\u2028two\u2029three\u0085four\x1cfive\x0bsix"
    rows = [{"text": text}, {"text": "b"}]
    lines = "".join(json.dumps(row, ensure_ascii=False).replace("\\u001c", "\x1c") + "\n" for row in rows)
    lines = lines.replace("\x1c", "\\u001c")  # a control character has to be escaped in JSON, the others need not
    for name in ("a.jsonl", "a.json"):
        assert load_rows(put(tmp_path, name, lines)).rows == rows
    csv = load_rows(put(tmp_path, "a.csv", f"text\n{text}\nb\n"))
    assert csv.rows == rows
    assert csv.where(1).endswith("a.csv, line 3")


def test_one_line_is_one_row(tmp_path):
    for name in ("one.json", "one.jsonl"):
        assert load_rows(put(tmp_path, name, json.dumps(PAIRS[0]) + "\n")).rows == PAIRS[:1]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert load_rows(put(tmp_path, "chat.json", json.dumps(chat))).rows == [chat]
    pretty = json.dumps({"question": "a?", "choices": ["b", "c"], "answer": 0}, indent=1)
    assert load_rows(put(tmp_path, "pretty.json", pretty)).rows[0]["choices"] == ["b", "c"]


def test_a_json_object_of_splits_is_read_by_the_split_that_is_named(tmp_path):
    path = put(tmp_path, "a.json", json.dumps({"train": PAIRS, "test": PAIRS[:1]}))
    with pytest.raises(UserError, match="expected rows under 'data'; set split to one of: train, test"):
        load_rows(path)
    assert load_rows(path, split="test").rows == PAIRS[:1]
    with pytest.raises(UserError, match=r"a file has no splits; remove split \('train'\), or set path to the folder"):
        load_rows(put(tmp_path, "train.jsonl", LINES), split="train")
    (tmp_path / "a.json").unlink()
    assert load_rows(str(tmp_path / "train.jsonl")).rows == load_rows(str(tmp_path), split="train").rows == PAIRS


def test_a_field_of_several_lines_is_named_by_its_first(tmp_path):
    path = put(tmp_path, "a.csv", 'prompt,completion\n"one\ntwo, three", b\n\nc, d\nbad\n')
    with pytest.raises(UserError, match=r"a\.csv, line 6: 1 fields, but the header has 2 \(prompt, completion\)"):
        load_rows(path)
    found = load_rows(path, limit=2)
    assert found.rows[0] == {"prompt": "one\ntwo, three", "completion": " b"}
    assert [found.where(0)[-6:], found.where(1)[-6:]] == ["line 2", "line 5"]


def test_a_field_longer_than_csv_likes_is_read(tmp_path):
    assert len(load_rows(put(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")).rows[0]["text"]) == 200_000


def test_an_index_column_without_a_name_is_left_beside(tmp_path):
    path = put(tmp_path, "a.csv", ",prompt,completion\n0,a, b\n1,c, d\n")
    assert build_dataset([path])[0][1] == {"prompt": "c", "completion": " d"}


DEEP = "[" * 100_000
MALFORMED = [
    (
        "comma.csv",
        "prompt,completion\nName a city,Paris, France\n",
        r"comma\.csv, line 2: 3 fields, but the header has 2",
    ),
    ("comma.csv", "text\nThe cat sat, and slept.\n", r"line 2: 2 fields, but the header has 1 \(text\)"),
    ("short.csv", "prompt,completion\na, b\nc\n", r"short\.csv, line 3: 1 fields"),
    ("open.csv", 'prompt,completion\na, b\n"c, d\ne, f\n', r"open\.csv, line 3: not a row of a CSV"),
    ("quote.tsv", 'prompt\tcompletion\n"a" b\tc\n', r"quote\.tsv, line 2: not a row of a TSV"),
    ("twice.csv", "prompt,prompt\na,b\n", r"line 1: the column 'prompt' is there twice"),
    ("nul.csv", b"prompt,completion\na,b\0\n", r"nul\.csv, line 2: holds NUL bytes"),
    ("empty.csv", "", "no rows in it"),
    ("header.csv", "prompt,completion\n", "no rows in it"),
    ("latin.csv", "prompt,completion\na,caf\u00e9\n".encode("latin-1"), r"latin\.csv, line 2: not UTF-8"),
    ("binary.jsonl", bytes(range(128, 256)), "line 1: not UTF-8"),
    ("nul.jsonl", b'{"a": 1}\n\0\0\0\0', "line 2: holds NUL bytes"),
    ("nul.json", b'{"a": 1}\n\0\n{"a": 1}\n', r"nul\.json, line 2: holds NUL bytes"),
    ("latin.json", '[{"a": 1},\r\n{"a": "\u00fc"}]'.encode("latin-1"), r"latin\.json, line 2: .*0xfc at 7"),
    ("wide.jsonl", LINES.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("packed.jsonl", gzip.compress(LINES.encode()), "is compressed by gzip; add .gz to its name"),
    ("empty.jsonl", "", "no rows in it"),
    ("blank.json", " \n", "no rows in it"),
    (
        "surrogate.jsonl",
        '{"a": "b"}\n{"a": "cut \\ud83d"}\n',
        r"surrogate\.jsonl, line 2: \\ud83d is half of a character",
    ),
    ("surrogate.json", '[{"a": "cut \\uDE00"}]', r"surrogate\.json: \\ude00 is half of a character"),
    ("key.jsonl", '{"\\ud83d": "b"}\n', "line 1: .*half of a character"),
    ("digits.jsonl", '{"a": 1}\n{"a": ' + "7" * 5000 + "}\n", "line 2: holds a number of thousands of digits"),
    ("deep.jsonl", '{"a": 1}\n{"a": ' + DEEP + "\n", "line 2: nested too deeply"),
    ("deep.json", DEEP, "nested too deeply"),
    ("twice.jsonl", '{"a": 1, "a": 2}\n', "line 1: the key 'a' is there twice"),
    ("scalar.jsonl", "3\n", r"line 1: expected an object \{...\}, got int"),
    ("scalar.json", "3\n", "expected a list of objects, got int"),
    ("separator.jsonl", '{"a": 1}\n{"a": 2}\x1e\n', r"line 2: not valid JSON \(Extra data"),
    ("form_feed.jsonl", '{"a": 1}\n\x0c\n{"a": 2}\n', "line 2: not valid JSON"),
    ("separator.json", '[{"a": 1}]\x1f', "not valid JSON"),
    ("list.json", '[{"a": 1}, 2]', "row 2: expected an object"),
    ("comma.jsonl", '{"a": 1},\n{"a": 2}\n', r"line 1: not valid JSON \(Extra data at column 9\)"),
    ("quotes.jsonl", "{'a': 1}\n", "line 1: not valid JSON"),
    ("cut.jsonl", '{"a": 1}\n{"a": "b', "line 2: not valid JSON"),
    ("cut.jsonl", '{"a": [{"b": 1}\n{"a": 2}\n', r"line 1: not valid JSON .*delimiter at column 16\)"),
    ("cut.jsonl", '{"a": [{"b": 1}\r\n', r"line 1: not valid JSON .*delimiter at column 16\)"),
    ("cut.json", '[{"a": [{"b": 1}\n', "line 1: not valid JSON"),
    ("second.json", '{"a": 1}\n{"a": oops}\n', "line 2: not valid JSON"),
    ("cut.json", '[{"a": 1},\n{"a": ', "line 2: not valid JSON"),
    ("cut.jsonl.gz", gzip.compress(os.urandom(4000).hex().encode())[:900], "cannot be read"),
    ("plain.csv.gz", "prompt,completion\na,b\n", "cannot be read"),
    ("fake.parquet", "PAR1 no", "cannot be read as parquet"),
    ("empty.parquet", "", "cannot be read as parquet"),
    ("fake.arrow", "ARROW1\0\0", "cannot be read as Arrow"),
    ("rows.txt", "a", "expected a file that ends in"),
    ("rows.jsonl.zst", "a", "expected a file that ends in"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), MALFORMED, ids=[f"{c[0]}-{i}" for i, c in enumerate(MALFORMED)]
)
def test_a_malformed_file_is_refused_by_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        load_rows(put(tmp_path, name, content))


def test_tables_that_json_cannot_be(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="the column 'text' is there twice"):
        load_rows(str(tmp_path / "twice.parquet"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="no rows in it"):
        load_rows(str(tmp_path / "none.parquet"))
    pq.write_table(
        pa.table({"text": pa.array([b"\xff"]).view(pa.binary()).cast(pa.binary())}), tmp_path / "bytes.parquet"
    )
    with pytest.raises(UserError, match=r"bytes\.parquet, row 1: expected a text under 'text', got b"):
        build_dataset([str(tmp_path / "bytes.parquet")])


def test_the_advice_about_files_works(tmp_path):
    """Each malformed file, mended as its message says, is read."""
    mended = {
        "a.csv": 'prompt,completion\nName a city,"Paris, France"\n',  # put a field that holds the separator in quotes
        "b.csv": 'prompt,completion\nsay,"he said ""no"""\n',  # and each quote in it twice
        "c.csv": "prompt,other\na,b\n",  # rename one
        "d.jsonl": LINES.encode("utf-16").decode("utf-16").encode(),  # save it as UTF-8
        "e.jsonl.gz": gzip.compress(LINES.encode()),  # add .gz to its name
        "f.jsonl": '{"a": "whole \\ud83d\\ude00"}\n{"a": "removed "}',  # write the whole character, or remove it
        "g.jsonl": '{"a": "' + "7" * 5000 + '"}',  # write it as a text, in quotes
        "h.jsonl": '{"a": 1}\n{"a": 2}\n',  # each line must be one JSON object
    }
    found = {name: load_rows(put(tmp_path, name, content)).rows for name, content in mended.items()}
    assert found["a.csv"] == [{"prompt": "Name a city", "completion": "Paris, France"}]
    assert found["b.csv"] == [{"prompt": "say", "completion": 'he said "no"'}]
    assert found["d.jsonl"] == found["e.jsonl.gz"] == PAIRS
    assert found["f.jsonl"] == [{"a": "whole \U0001f600"}, {"a": "removed "}]
    assert found["g.jsonl"] == [{"a": "7" * 5000}]


def test_pipes_devices_and_sockets_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.jsonl"))
        for name in ("pipe.jsonl", "zero.jsonl", "s.jsonl"):
            with pytest.raises(UserError, match=rf"{name}: a pipe, device or socket, not a file; save what it gives"):
                load_rows(str(tmp_path / name))
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "s.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl: a pipe, device or socket"):
        load_rows(str(tmp_path))
    with pytest.raises(UserError, match="a pipe, device or socket"):
        load_rows("/dev/null")


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"no data file in .*a\.jsonl'; put a file named <split>\.jsonl there"):
        load_rows(str(tmp_path / "a.jsonl"))
    put(tmp_path, "a.jsonl/train.jsonl", LINES)
    assert load_rows(str(tmp_path / "a.jsonl")).rows == PAIRS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/train.jsonl", "an address, where a path on this machine is expected; copy it here"),
        ("gs://bucket/rows", "an address"),
        ("https://host/train.jsonl", "an address"),
        ("${HOME}/train.jsonl", "only a shell fills in variables"),
        ("$HOME/train.jsonl", "only a shell fills in variables"),
        ("~nosuchuser/train.jsonl", "there is no home folder for '~nosuchuser' here"),
        ("a\0b.jsonl", "no file can have this name"),
        ("/" + "a" * 5000, "cannot be looked at"),
    ],
)
def test_what_is_no_path_is_refused_in_words(path, message):
    with pytest.raises(UserError, match=message):
        load_rows(path)


def test_a_folder_may_have_a_dollar_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "$HOME/train.jsonl", LINES)
    assert load_rows("$HOME").rows == PAIRS


def test_missing_shards_are_named(tmp_path):
    for number in (0, 1, 3, 9):
        put(tmp_path, f"train-{number:05}-of-00010.jsonl", LINES)
    with pytest.raises(
        UserError, match=r"has 4 of 10 shards, without 00002, 00004, .* fetch the others, or set path to"
    ) as told:
        load_rows(str(tmp_path))
    path = str(told.value).rpartition("such as '")[2].rstrip("'")
    assert load_rows(path).rows == PAIRS
    put(tmp_path, "train-00000-of-00011.jsonl", LINES)
    with pytest.raises(UserError, match="is there more than once"):
        load_rows(str(tmp_path))
    put(tmp_path / "huge", "train-00000-of-99999999999999.jsonl", LINES)
    with pytest.raises(UserError, match="has 1 of 99999999999999 shards"):
        load_rows(str(tmp_path / "huge"))


def test_a_row_of_a_shard_is_named_by_its_file(tmp_path):
    put(tmp_path, "train-00000-of-00002.jsonl", LINES)
    put(tmp_path, "train-00001-of-00002.jsonl", LINES + '{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"train-00001-of-00002\.jsonl, line 3: expected a text under 'completion'"):
        build_dataset([str(tmp_path)])


def test_the_advice_about_variables_works(tmp_path):
    from lsr_scale.config import dump_yaml, load_run
    from tests.helpers.tiny_runs import tiny_run

    with pytest.raises(UserError, match="only a shell fills in variables, outside single quotes and outside files"):
        load_rows("$HOME/rows.jsonl")
    (tmp_path / "run.yaml").write_text(dump_yaml(tiny_run(tmp_path)))
    rows = put(tmp_path, "home/rows.jsonl", LINES)
    run = load_run(tmp_path / "run.yaml", [f"data.train=[{tmp_path}/home/rows.jsonl]"])  # as the shell hands it on
    assert [source.path for source in run.data.train] == [rows]


def test_a_damaged_arrow_file_ends_in_words(tmp_path):
    table = pa.table({"text": ["ab", "cd"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrow").read_bytes()
    offsets = b"".join(number.to_bytes(4, "little", signed=True) for number in (0, 2, 4))
    assert offsets in whole
    put(tmp_path, "a.arrow", whole.replace(offsets, b"\xff\xff\xff\x7f" + offsets[4:]))
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read as Arrow"):
        load_rows(str(tmp_path / "a.arrow"))
