"""What the pages say of the frontier: either outcome in its words, and that nothing was measured where nothing was."""

import numpy as np
import pytest

from benchmarks.quality import frontier_verdicts
from benchmarks.quality.frontier_rows import ROWS
from benchmarks.quality.rate_trials import packed_bits
from benchmarks.report import frontier_tables, frontier_words
from tests.helpers.frontier_trials import SUITE, TOKENS, made_up, write

OTHER = ("smollm2", "gsm8k", "nf4")


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
        "SmolLM2-135M, five commonsense tasks, base in nf4: the lower loss has LSR-Adapt at 20k; LoRA at 60k; "
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
    tuned = "Tuned, but not run with 2 seeds: KronA at 300k"  # TinyLoRA takes no base in nf4
    assert line.endswith(f"Not run: VeRA at 300k. {tuned}.")
    write(tmp_path, made_up("300k", "krona", -0.1, seeds=1))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert line.endswith(f"{tuned}; by that the best of the others would be KronA at 300k.")
    write(tmp_path, *(made_up("300k", row, 0.0) for row in ("vera", "krona")))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert line.endswith("All rows were run.")


def test_methods_that_win_nowhere_are_said_to(tmp_path):
    for size, row in {"20k": "lsr_1_1", "60k": "lsr_2_2"}.items():
        write(tmp_path, made_up(size, row, 0.1), made_up(size, "lora_modules", 0.0))
    text = frontier_words.readme(tmp_path)
    assert "the lower loss has LSR-Adapt and Kron-LoRA at no size; LoRA at 20k and 60k. Not run: " in text
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


def test_a_row_below_both_that_are_compared_is_named(tmp_path):
    """Rows are compared that were the best where rates are chosen; another one can be lower on the test part."""
    write(tmp_path, made_up("600k", "lora", 0.0), made_up("600k", "lsr_16_7", 0.1))
    unlucky = [{**r, "nll": 2.05} if r["part"] == "dev" else r for r in made_up("600k", "slora", -0.1)]
    write(tmp_path, unlucky)
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert "at no size; LoRA at 600k; lower still is SLoRA at 600k. " in line


def test_accuracy_is_said_beside_the_loss(tmp_path):
    def rows(size, row, shift, share):
        for result in made_up(size, row, shift):
            if result["part"] == "test":
                right = np.random.default_rng([result["seed"], len(row)]).random(len(TOKENS)) < share
                result |= {"right": packed_bits(right), "tasks": {"one": {"rows": 100}, "other": {"rows": 200}}}
            yield result

    write(tmp_path, rows("20k", "lsr_1_1", -0.1, 0.5), rows("20k", "lora_modules", 0.0, 0.5))
    write(tmp_path, rows("60k", "lsr_2_2", -0.1, 0.4), rows("60k", "lora_modules", 0.0, 0.7))
    found = frontier_verdicts.load(tmp_path)
    (line,) = frontier_words.lines(found)
    assert (
        "the lower loss has LSR-Adapt at 20k and 60k. By accuracy LoRA at 60k is ahead; elsewhere they do not" in line
    )
    right = found.scores[0].right
    assert right is not None
    assert right.mean() == pytest.approx((np.sign(right[:, :100]).mean() + np.sign(right[:, 100:]).mean()) / 2)


def test_rows_whose_best_rate_is_at_an_end_are_named(tmp_path):
    for rate, shift in ((2e-3, 0.2), (4e-3, 0.1)):
        write(tmp_path, made_up("20k", "lsr_1_1", shift, seeds=3 * (rate == 4e-3), rate=rate))
    write(tmp_path, *(made_up("20k", "lora_modules", 0.2, seeds=0, rate=rate) for rate in (2e-3, 8e-3)))
    write(tmp_path, made_up("20k", "lora_modules", 0.0))
    text = frontier_words.guide(tmp_path)
    named = "Each row was tuned over 2 to 3 rates. The best is the first or the last of them, and a better one may lie "
    assert f"{named}beyond, for LSR-Adapt r=1 s=1 at 20k." in text
    assert "| 3 | 0.004 (end) |" in "\n".join(frontier_tables.sections(tmp_path))
