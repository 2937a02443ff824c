import os

import pytest
import yaml

from lsr_scale import config
from lsr_scale.config import yaml_text
from lsr_scale.errors import UserError
from tests.helpers.run_text import MINIMAL, load, problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2.5e+3", -2500.0), ("010", 10), ("0o17", 15),
        ("0x1F", 31), ("+3", 3), ("1:30", "1:30"), ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("y", "y"),
        ("true", True), ("FALSE", False), ("null", None), ("~", None), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("'1e-3'", "1e-3"), (".inf", float("inf")), ("nf4", "nf4"), ("e5", "e5"), ("-", ["-"]),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    parsed = yaml_text.parse(f"[{text}]" if text != "-" else "['-']", "x")[0]
    assert parsed == [value] or parsed == value
    assert type(parsed[0]) is type(value) or isinstance(value, list)


def test_words_for_booleans_work_where_a_boolean_is_expected_and_stay_text_elsewhere():
    run = load(MINIMAL + "training: {packing: yes, save_strategy: no, run_name: off}\neval: {before: off}")
    assert run.training["packing"] is True
    assert run.training["save_strategy"] == "no"
    assert run.training["run_name"] == "off"
    assert run.eval.before is False


@pytest.mark.parametrize(
    "value",
    ["1e-3", "1", "no", "Off", "null", "~", "", " a ", "a: b", "# c", "0o7", "1:30", "2024-01-01", "true", ".5", "=",
     "<<", "a\nb", "- a", "'", "1_000", "%", "\u00e9t\u00e9", "\U0001f600"],
)  # fmt: skip
def test_text_survives_a_dump_whatever_it_looks_like(value):
    text = yaml_text.dump({"key": [value], value or "empty": 1})
    assert yaml_text.parse(text, "x")[0] == {"key": [value], value or "empty": 1}
    assert yaml.safe_load(text)["key"] == [value], "and means the same to YAML 1.1"


def test_numbers_survive_a_dump():
    values = [1e-5, 0.1, 2e-4, 1e16, 5e-324, 10, -3, True, None, 1.0]
    again = yaml_text.parse(yaml_text.dump(values), "x")[0]
    assert again == values
    assert [type(value) for value in again] == [type(value) for value in values]


def test_an_integer_stays_one_where_the_field_is_a_float():
    assert "logging_steps: 5\n" in config.dump_yaml(load(MINIMAL, "training.logging_steps=5"))


def test_empty_sections_and_merge_keys_and_anchors_are_taken():
    run = load(
        "x-base: &base {name: m}\n".replace("x-base", "model")
        + "adapter: {method: lsr}\ntraining:\neval:\ndata: {train: [a]}"
    )
    assert run.eval == load(MINIMAL).eval
    run = load("model: {name: m}\nadapter: {method: lsr}\ndata: {train: [&a {path: p, limit: 3}, {<<: *a, split: s}]}")
    assert (run.data.train[1].path, run.data.train[1].limit, run.data.train[1].split) == ("p", 3, "s")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n\tname: x", "run.yaml:2:1: not valid YAML"),
        ("model:\n\tname: x", "indent with spaces, not tabs"),
        ("model: a: b", "run.yaml:1:9: not valid YAML: mapping values are not allowed here; check the indentation"),
        ("model: [a\n", "run.yaml:2:1: not valid YAML"),
        ("model: {name: *x}", "put a value that begins with one of"),
        ("model: !path x", "tags (!name) have no meaning here"),
        (MINIMAL + "---\na: 1", "remove the line '---'"),
        ("model: &m {name: *m}", "model.name contains itself"),
        (MINIMAL + "model: {name: y}", "run.yaml:7: model: already set on line 1; keep one of them"),
        ("model:\n  name: x\n  name: y", "run.yaml:3: model.name: already set on line 2"),
        ("- a\n- b", "expected the sections model, adapter, data, training, deepspeed, eval, sweep at the top"),
        ("model", "expected the sections"),
        (" \n", "run.yaml: the file is empty"),
        ("# only a comment\n", "expected the sections"),
        ("model: \x01", "not text: character #x0001"),
    ],
)
def test_text_that_is_no_run_is_explained(text, expected):
    assert expected in problem(text)


def test_a_file_that_cannot_be_read_is_explained(tmp_path):
    (tmp_path / "mistral_lsr.yaml").write_text(MINIMAL)
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x81\x00")
    for name, expected in {
        "mistral_lrs.yaml": f"no such file; did you mean {tmp_path / 'mistral_lsr.yaml'}",
        "mistral_lsr": f"no such file; did you mean {tmp_path / 'mistral_lsr.yaml'}",
        "missing/x.yaml": "no such file; there are no YAML files in",
        "": "expected a file, got a folder",
        "binary.yaml": "expected UTF-8 text",
    }.items():
        with pytest.raises(UserError, match="^" + str(tmp_path / name).rstrip("/")) as caught:
            config.load_run(tmp_path / name)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("!!int foo", "run.yaml:2:9: not valid YAML: expected a value of the kind int, got 'foo'"),
        ("!!float 1.2.3", "expected a value of the kind float, got '1.2.3'"),
        ("!!bool maybe", "expected a value of the kind bool, got 'maybe'"),
        ("!!int ''", "expected a value of the kind int, got ''"),
        ("!!int [1]", "expected a scalar node, but found sequence"),
        ("!!binary aGk=", "tags (!name) have no meaning here, but for !!str"),
        ("!!timestamp 2024-01-01", "tags (!name) have no meaning here"),
        ("!!set {a}", "tags (!name) have no meaning here"),
        ("!!python/object/apply:os.getcwd []", "tags (!name) have no meaning here"),
        ("9" * 5000, "expected a value of the kind int, got '9999"),
        ("0x" + "f" * 5000, "model.name: expected a number between -1e15 and 1e15, got one of 20,000 bits"),
        ("[" * 5000, "more than 64 values stand in each other"),
        ("{a: " * 5000, "more than 64 values stand in each other"),
        ('"\\ud800"', "model.name: expected text, got one with the character '\\ud800' in it"),
        ('"a\\0b"', "model.name: expected text, got one with the character '\\x00' in it"),
        ("x" * 10_001, "model.name: a text of 10,001 characters; 10,000 are the most"),
    ],
)
def test_values_that_are_no_plain_data_or_of_no_sane_size_are_refused_by_line(value, expected):
    message = problem(f"model:\n  name: {value}\nadapter: {{method: lsr}}\ndata: {{train: [a]}}\n")
    assert expected in message
    assert message.startswith("run.yaml:2")
    assert len(message) < 700


def test_tags_of_plain_values_are_taken():
    assert yaml_text.parse("[!!str 3, !!int '3', !!float 1, !!bool 'true', !!null '']", "x")[0] == [
        "3",
        3,
        1.0,
        True,
        None,
    ]


@pytest.mark.parametrize(
    "line", ["x{n}: &x{n} [{many}]", "x{n}: &x{n} {{<<: [{many}]}}", "x{n}: &x{n} {{k: {one}, <<: [{many}]}}"]
)
def test_aliases_and_merges_that_stand_for_more_than_memory_holds_are_refused(line):
    lines = ["x0: &x0 {a: 1}"]
    lines += [line.format(n=n, one=f"*x{n - 1}", many=", ".join([f"*x{n - 1}"] * 9)) for n in range(1, 30)]
    assert "more than 20,000 values, aliases (*name) and merges (<<) counted each time" in problem("\n".join(lines))


def test_a_pipe_a_device_and_a_large_file_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_text("#" * 2**20 + "\n")
    for name, expected in {
        "pipe.yaml": "expected a file, got a pipe or a device",
        "zero.yaml": "expected a file, got a pipe or a device",
        "large.yaml": "expected a few lines of text, got more than a MiB",
    }.items():
        with pytest.raises(UserError, match=expected):
            config.load_run(tmp_path / name)
