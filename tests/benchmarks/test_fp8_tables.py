"""RESULTS.md's tables of FP8: every row has as many cells as its head, whatever a token is called."""

import re

from benchmarks import ALL_RESULTS
from benchmarks.quality import fp8_layers
from benchmarks.report import fp8_tables
from benchmarks.report.measurements import read


def test_tables_have_as_many_cells_as_their_heads():
    text = "\n\n".join(fp8_tables.sections(ALL_RESULTS))
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"<\|im_start\|>" in text


def test_nothing_measured_is_no_section(tmp_path):
    assert fp8_tables.sections(tmp_path) == []


def test_groups_that_stand_out_are_those_over_the_limit():
    for path, run in read(ALL_RESULTS / "fp8_layers"):
        named = set(fp8_layers.exceeding(run["groups"], fp8_tables.LIMIT))
        for name, entry in run["groups"].items():
            errors = [entry[key]["rows"]["error"] for key in ("output", "input_gradient")]
            assert (name in named) == (max(errors) > fp8_tables.LIMIT), (path, name)
