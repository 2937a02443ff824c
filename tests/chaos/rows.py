"""Data: lines, tables, labels, choices, files and folders of rows, chat templates."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

from tests.chaos.place import NASTY, damage, odd_file, pick, shape, try_set
from tests.chaos.runner import PLANTED, Case
from tests.helpers.tiny_runs import completions, labelled, questions, write_rows

ROW = {"prompt": "a knife", "completion": " cuts"}


def _preview(path: str, **options: Any) -> Case:
    return try_set("preview", f"data.train=[{json.dumps(path)}]", **options)


@shape(8)
def data_lines(place: Path, chance: random.Random) -> Case:
    """JSON lines of which one is wrong: refused by its line; or right though odd: read."""
    good = json.dumps(ROW)
    bad = pick(
        chance, "[1]", "3", "null", '"x"', "{", good[:-1], good + ",", "{'prompt': 'a'}",
        '{"prompt": NaN, "completion": "a"}',
        '{"prompt": "\\ud800", "completion": " a"}', '{"prompt": "a", "completion": "\\udfff x"}',
        '{"prompt": "a", "completion": ' + "9" * 5000 + "}",
        '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}", "{" * 50_000, '{"prompt": "a"}',
        '{"completion": "a"}',
        '{"prompt": "a", "completion": null}', '{"prompt": 3, "completion": "a"}',
        '{"prompt": "a", "completion": ["b"]}', "\0", good + good,
        '{"prompt": "a", "completion": ""}', '{"prompt": "a", "completion": {"[/x]": 1}}',
        '{"x": "' + "y" * 100_000 + '"}', "# comment",
        '{"prompt": "a", "completion": Infinity}', '{"prompt": "a", "completion": 1e999}', good + "\x1e", "---",
        '{"prompt": "a" "completion": "b"}',
    )  # fmt: skip
    number = chance.randrange(1, 9)
    lines = [good] * 9
    lines[number] = bad
    file = place / f"odd.{pick(chance, 'jsonl', 'json')}"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _preview(file.name, says=(f"line {number + 1}", f"row {number + 1}"))


@shape(4)
def data_odd_lines(place: Path, chance: random.Random) -> Case:
    """Lines that are right, though not everybody reads them."""
    good = json.dumps(ROW)
    text, num = pick(
        chance, (good + "\r\n" + good, 2), ("\ufeff" + good, 1), (good, 1), ("\n\n" + good + "\n\n\n" + good, 2),
        ('{"prompt": "a\u2028b", "completion": " c\u2029d\u0085e"}\n' + good, 2), (" " * 5000 + good, 1),
        ('{"prompt": "\\u0000", "completion": " a"}', 1),
        ('{"prompt": "a", "completion": " \\ud83d\\ude00"}', 1), ('{"prompt": "", "completion": "a"}', 1),
        (good + "\n" + good, 2),
        ('{"prompt": "[/x]", "completion": " [bold]"}', 1),
        ('{"prompt": "a", "completion": " b", "extra": ' + "[" * 50 + "]" * 50 + "}", 1),
    )  # fmt: skip
    file = place / f"odd.{pick(chance, 'jsonl', 'jsonl', 'json')}"
    file.write_bytes(text.encode())
    return _preview(file.name, expect="answered", says=(f"{num} row{'s' * (num > 1)}",))


@shape(6)
def data_tables(place: Path, chance: random.Random) -> Case:
    """CSV: text stays as it stands; what has no one reading is refused by its line."""
    header = "prompt,completion\n"
    text, says = pick(
        chance, (header + "a,b\nc,d,e\n", "3"), (header + "a,b\nc\n", "3"), (header + 'a,b\n"c,d\n', ""),
        ("prompt,prompt\na,b\n", ""),
        ("prompt,completion,completion\na,b,c\n", ""), (header, ""), ("\n\n", ""), 
        (",\na,b\n", ""),
        (header + "a,b\n\0,\0\n", ""), ("x" * 200_000, ""), (header + 'a,"b"c"\n', ""), ("a,b\n1,2\n", ""),
        (header + "a,b,\n", "2"),
    )  # fmt: skip
    (place / "odd.csv").write_text(text, encoding="utf-8")
    return _preview("odd.csv", says=(f"line {says}",) if says else ())


@shape(4)
def data_cells(place: Path, chance: random.Random) -> Case:
    """What a cell of a CSV file looks like does not matter: it is text."""
    cell = pick(
        chance,
        "00712",
        "1e5",
        "NA",
        "null",
        "nan",
        "True",
        "1.0",
        "0x10",
        "-0",
        "2024-01-01",
        "+3",
        "1_000",
        "inf",
        "1e999",
        "9" * 40,
        "'x'",
        "N/A",
        "[/x]",
    )
    text = (
        f"prompt,completion\nq,{cell}\nq,5\n"
        if chance.random() < 0.5
        else f'\ufeffprompt,completion\r\n"q","{cell}"\r\n'
    )
    (place / "odd.csv").write_text(text, encoding="utf-8")
    return _preview("odd.csv", expect="answered", says=(f"> {cell}</s>",))


@shape(6)
def data_kinds(place: Path, chance: random.Random) -> Case:
    """Files that are none, or not what their names say."""
    name = pick(chance, "odd.jsonl", "odd.json", "odd.csv", "odd.parquet", "odd.jsonl.gz", "odd.csv.gz")
    file = place / name
    kind = pick(chance, "odd", "odd", "damaged", "text", "folder of odd")
    if kind == "odd":
        odd_file(file, chance)
    elif kind == "damaged":
        file.write_bytes(gzip.compress((json.dumps(ROW) + "\n").encode() * 50)[: chance.randrange(5, 60)])
    elif kind == "text":
        file.write_bytes(
            pick(
                chance,
                b"\xff\xfe\0x",
                b"PAR1" + b"\0" * 80 + b"PAR1",
                b"\x1f\x8b",
                "\u00fc".encode("latin-1"),
                b"PK\x03\x04",
                b"\x80" * 40,
            )
        )
    else:
        (place / "folder").mkdir()
        odd_file(
            place
            / "folder"
            / pick(chance, "train.jsonl", "train.parquet", "train.csv", "dataset_info.json", "state.json"),
            chance,
        )
        name = "folder"
    return _preview(name)


@shape(4)
def data_columns(place: Path, chance: random.Random) -> Case:
    """Rows whose columns say nothing, or change on the way."""
    first, second = pick(
        chance, (ROW, {"text": "a b"}), (ROW, {"messages": [{"role": "user", "content": "a"}]}), ({"x": 1}, {"x": 2}),
        ({}, {}), (ROW, {}),
        ({"messages": []}, {"messages": []}), ({"messages": "x"}, ROW),
        ({"messages": [{"role": "king", "content": "a"}]}, ROW),
        ({"messages": [{"role": "user", "content": "a"}]}, ROW),
        ({"messages": [{"role": "assistant", "content": None}]}, ROW), ({"text": ""}, {"text": " "}),
        ({"conversations": [{"from": "alien", "value": "x"}]}, ROW), ({"instruction": "a"}, {"instruction": "b"}),
        ({"text": ["a"]}, {"text": 3}),
        ({"instruction": "a", "output": 3}, ROW), ({"prompt": [], "completion": []}, ROW),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, ROW),
        ({"messages": [[]]}, ROW), ({"messages": {"role": "user"}}, ROW), ({"label": 1}, ROW),
        ({"k" * 5000: 1}, {"[/x]": 2}),
    )  # fmt: skip
    write_rows(place / "odd.jsonl", [first, second])
    return _preview("odd.jsonl")


@shape(4)
def data_labels(place: Path, chance: random.Random) -> Case:
    rows = labelled(8)
    label = pick(
        chance,
        float("inf"),
        float("nan"),
        2**70,
        -1,
        -5,
        0.9,
        2,
        1.5,
        "1",
        "x",
        None,
        [1],
        {},
        1e300,
        10**400,
        -0.5,
        2**31,
    )
    rows[chance.randrange(8)]["label"] = label
    write_rows(place / "labelled.jsonl", rows)
    command = pick(chance, "preview", "train")
    # a class number as text is what every label of a CSV file is
    return try_set(command, base="classifier.yaml", expect="answered" if label == "1" else "refused")


@shape(5)
def data_choices(place: Path, chance: random.Random) -> Case:
    """Multiple-choice questions that have no one right answer: refused by row, to train on or to score."""
    rows: list[dict[str, Any]] = questions(4)
    choices = rows[2]["choices"]
    wrong = pick(
        chance, {"answer": 3}, {"answer": -1}, {"answer": 0.9}, {"answer": 1.5}, {"answer": None}, {"answer": "x"},
        {"answer": [0]}, {"answer": 2**70},
        {"answer": True}, {"answer": float("nan")}, {"answer": float("inf")}, {"choices": []},
        {"choices": [choices[0]] * 3}, {"choices": "abc"}, {"choices": [1, 2, 3]},
        {"choices": ["", "a", "b"]}, {"choices": [choices[0]]}, {"choices": {"text": choices, "label": ["A", "B"]}},
        {"choices": None}, {"question": ""},
        {"choices": {"text": choices[:2], "label": ["A", "B", "C"]}},
        {"choices": {"text": choices, "label": ["A", "A", "B"]}}, {"question": 3}, {"choices": [choices]},
    )  # fmt: skip
    rows[2] |= wrong
    write_rows(place / "odd.jsonl", rows)
    # no question is right, as no prompt is: the choices are endings that stand by themselves
    promise: dict[str, Any] = {"says": ("line 3", "row 3")} if wrong != {"question": ""} else {"expect": "answered"}
    if chance.random() < 0.5:
        return _preview("odd.jsonl", **promise)
    return Case(
        ["eval", "done", "--tasks", "odd.jsonl"],
        writes=("done/eval", "done/.lock", "done/results.json"),
        kept=("done/eval/questions-after.jsonl",),
        **promise,
    )


@shape(4)
def data_shards(place: Path, chance: random.Random) -> Case:
    """Folders of which shards are missing, or of which a split is there twice."""
    folder, total = place / "shards", pick(chance, 2, 5, 10)
    there = sorted(chance.sample(range(total), chance.randrange(1, total)))
    for index in there:
        write_rows(folder / f"train-{index:05d}-of-{total:05d}.jsonl", completions(2))
    if chance.random() < 0.3:  # all of them, and one more that is of another count
        for index in range(total):
            write_rows(folder / f"train-{index:05d}-of-{total:05d}.jsonl", completions(2))
        write_rows(folder / f"train-00000-of-{total + 1:05d}.jsonl", completions(2))
    return _preview("shards")


@shape(3)
def data_names(place: Path, chance: random.Random) -> Case:
    """Two tasks whose names differ a little have a file of predictions each."""
    first, second = pick(
        chance,
        ("\u00fc", "\u00f6"),
        ("my set", "my_set"),
        ("a:b", "a b"),
        ("[x]", "(x)"),
        ("\u4f60", "\u597d"),
        ("a\nb", "a\tb"),
        ("e\u0301", "\u00e9"),
        ("A", "a"),
    )
    for name in (first, second):
        write_rows(place / f"{name}.jsonl", questions(3))

    def check(out: str, err: str) -> str:
        files = [file for file in (place / "done/eval").iterdir() if "eval-adapter" in file.name]
        return "" if len(files) == 2 else f"{len(files)} files of predictions"

    if "\n" in first:  # no path of ours has control characters, though a file system takes them
        return Case(["eval", "done", "--tasks", f"{first}.jsonl", f"{second}.jsonl"])
    return Case(["eval", "done", "--tasks", f"{first}.jsonl", f"{second}.jsonl"], expect="answered",
        writes=("done/eval", "done/.lock", "done/results.json"),
                kept=("done/eval/questions-after.jsonl", "done/eval/questions-before.jsonl"), check=check)  # fmt: skip


@shape(3)
def data_selection(place: Path, chance: random.Random) -> Case:
    """Splits, subsets, tasks and formats that the rows do not have."""
    source = pick(
        chance, {"path": "builtin:commonsense", "split": "test"}, {"path": "builtin:nothing"},
        {"path": "rows.jsonl", "task": "nothing"}, {"path": "rows.jsonl", "format": "messages"},
        {"path": "rows.jsonl", "format": "multiple_choice"}, {"path": "project"}, {"path": "model"},
        {"path": "rows.jsonl", "format": "classification"}, {"path": "rows.txt"},
        {"path": "questions.jsonl", "format": "alpaca"}, {"path": "labelled.jsonl", "format": "sharegpt"},
        {"path": ".."}, {"path": "builtin:"}, {"path": "builtin:commonsense", "task": "x"},
        {"path": "notes.txt"}, {"path": "run.yaml"}, {"path": "done"}, {"path": "./no/such/thing.jsonl"},
        {"path": "rows.json"}, {"path": "row.jsonl"}, {"path": "x/y"},
        {"path": "rows.jsonl", "split": "test"}, {"path": "rows.jsonl", "name": "subset"},
        {"path": "rows.jsonl", "revision": "main"},
    )  # fmt: skip
    return try_set("preview", f"data.train=[{json.dumps(source)}]")


@shape(5)
def data_templates(place: Path, chance: random.Random) -> Case:
    """Chat templates that raise, never end, or would run code."""
    template = pick(
        chance, "{{ raise_exception('no [/x]') }}", "{{ nothing.at.all }}", "{% for %}", "{{ messages[99].content }}",
        "{{ 1 / 0 }}", "{{ '', }}{% endfor %}",
        "{{ messages | nothing }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch " + PLANTED + "') }}",
        "{{ self.__init__.__globals__['__builtins__']['open']('" + PLANTED + "', 'w') }}", "{{ strftime_now(3) }}",
        "{{ messages.append(1) }}", "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[0].content + 1 }}", "{{ '%' % (1, 2) }}",
        "{% import 'os' as os %}", "{{ undefined_function() }}",
        "{% extends 'x' %}", "{{ messages | tojson(indent='x') }}", "{{ messages[0]['role']['x']['y'] }}", "\ud800",
        "{{ range(10**12) | list }}",
    )  # fmt: skip
    (place / "odd.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    turns = [{"role": "user", "content": "a knife"}, {"role": "assistant", "content": "cuts"}]
    write_rows(place / "chat.jsonl", [{"messages": turns}] * 2)
    return try_set(
        pick(chance, "preview", "preview", "train"),
        "model.chat_template=odd.jinja",
        "data.train=[chat.jsonl]",
        "eval.tasks=[]",
        expect="refused",
    )


@shape(2)
def data_text(place: Path, chance: random.Random) -> Case:
    """Texts that would steer a terminal are shown so that they do not."""
    text = pick(
        chance,
        "\x1b[2J",
        "\x07\x08",
        "[bold]x[/bold]",
        "\r\x1b[A",
        "\x9b2J",
        "\u202ex",
        "[/x]",
        "\\x1b",
        "a\0b",
        "\x1b]0;x\x07",
    )
    write_rows(place / "odd.jsonl", [{"prompt": text, "completion": text}])
    return _preview("odd.jsonl", expect="answered")


@shape(2)
def data_values(place: Path, chance: random.Random) -> Case:
    """Any value under any column, in rows to train on or to score."""
    maker = pick(chance, completions, questions, labelled)
    rows = maker(5)
    row = chance.choice(rows)
    row[chance.choice(list(row))] = chance.choice([value for value in NASTY if value != "\ud800"])
    write_rows(place / "odd.jsonl", rows)
    return _preview("odd.jsonl", expect="either")


@shape(1)
def data_damaged(place: Path, chance: random.Random) -> Case:
    damage(place / "rows.jsonl", chance)
    return try_set("preview", expect="either")


@shape(1)
def data_links(place: Path, chance: random.Random) -> Case:
    """Folders of links in a circle, and folders in folders."""
    (place / "circle").mkdir()
    os.symlink("../circle", place / "circle" / pick(chance, "train", "data", "train.jsonl"))
    return _preview("circle")
