"""What the pages say of the frontier: either outcome in its words, and that nothing was measured where nothing was."""

import pytest

from benchmarks.quality import frontier_verdicts
from benchmarks.quality.frontier_rows import ROWS
from benchmarks.report import frontier_words
from tests.helpers.frontier_trials import SUITE, made_up, write

OTHER = ("smollm2", "gsm8k", "nf4")


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(frontier_verdicts, "DRAWS", 1_000)


def test_without_results_nothing_is_claimed(tmp_path):
    assert frontier_words.guide(tmp_path) == "Not run yet."
    assert "has not been measured" in frontier_words.readme(tmp_path)
    write(tmp_path, made_up("20k", "lsr_1_1", -0.1, seeds=1), made_up("20k", "lora_modules", 0.0, seeds=1))
    assert "has not been measured" in frontier_words.readme(tmp_path), "one seed separates nothing"


def test_either_outcome_is_said_by_size(tmp_path):
    shifts = {"20k": ("lsr_1_1", -0.1), "60k": ("lsr_2_2", 0.1), "150k": ("lsr_2_5", 0.0)}
    for size, (row, shift) in shifts.items():
        write(tmp_path, made_up(size, row, shift), made_up(size, "lora_modules", 0.0))
    found = frontier_verdicts.load(tmp_path)
    (line,) = frontier_words.lines(found)
    assert line.startswith(
        "SmolLM2-135M, five commonsense tasks, base in nf4: the lowest loss has LSR-Adapt at 20k; LoRA at 60k; "
        "ours and the others do not separate at 150k. Not run: "
    )
    assert "LoRA-XS at 20k, 60k and 150k; " in line
    for text in (frontier_words.readme(tmp_path), frontier_words.guide(tmp_path)):
        assert f"- {line}" in text
        assert "results/frontier/smollm2-commonsense-nf4.png" in text
    assert "| the other |" in frontier_words.guide(tmp_path)


def test_rows_without_seeds_are_named_and_those_that_a_base_does_not_take_are_not(tmp_path):
    rows = [name for name in ROWS["smollm2"]["300k"] if "+" not in name]
    write(tmp_path, *(made_up("300k", row, 0.0, seeds=1 if row == "krona" else 3) for row in rows if row != "vera"))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert line.endswith("Not run: VeRA at 300k; KronA at 300k.")  # TinyLoRA takes no base in nf4
    write(tmp_path, *(made_up("300k", row, 0.0) for row in ("vera", "krona")))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert line.endswith("All rows were run.")


def test_methods_that_win_nowhere_are_said_to(tmp_path):
    for size, row in {"20k": "lsr_1_1", "60k": "lsr_2_2"}.items():
        write(tmp_path, made_up(size, row, 0.1), made_up(size, "lora_modules", 0.0))
    text = frontier_words.readme(tmp_path)
    assert "the lowest loss has LSR-Adapt and Kron-LoRA at no size; LoRA at 20k and 60k. Not run: " in text
    assert "| ours |" not in frontier_words.guide(tmp_path)


def test_every_suite_has_its_line_and_readme_the_figure_of_the_largest(tmp_path):
    write(tmp_path, made_up("20k", "lsr_1_1", -0.1), made_up("20k", "lora_modules", 0.0))
    rows = ("lora_modules", "kron_lora")
    write(tmp_path, *(made_up(size, row, 0.0, suite=OTHER) for size in ("20k", "60k") for row in rows))
    text = frontier_words.readme(tmp_path)
    assert frontier_words.main_suite(frontier_verdicts.load(tmp_path)) == OTHER
    assert text.count("\n- ") == 2
    assert "smollm2-gsm8k-nf4.png" in text
    assert "smollm2-commonsense-nf4.png" in frontier_words.guide(tmp_path)
    assert SUITE in frontier_verdicts.load(tmp_path).suites


def test_a_quarter_of_lora_8_is_compared_with_it(tmp_path):
    write(tmp_path, made_up("600k", "lsr_16_7", 0.05), made_up("2.4m", "lora", 0.0))
    text = frontier_words.beside_lora_8(frontier_verdicts.load(tmp_path))
    assert "LSR-Adapt r=16 s=7, with 25 % of LoRA r=8's parameters, less LoRA r=8: +0.049" in text
