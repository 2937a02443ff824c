"""What the pages say of the frontier: either outcome in its words, and that nothing was measured where nothing was."""

import re

import numpy as np
import pytest

from benchmarks.quality import frontier_verdicts
from benchmarks.quality.frontier_rows import ROWS
from benchmarks.quality.rate_trials import packed_bits
from benchmarks.report import frontier_tables, frontier_variants, frontier_words
from tests.helpers.frontier_trials import SUITE, TOKENS, made_up, write

OTHER = ("smollm2", "gsm8k", "nf4")
NO_VARIANT = "No row with another start or optimizer was run."


def diverged(rows, seed=1):
    """Yield a row's trials, one of whose seeds diverged."""
    for result in rows:
        lost = {"nll": None, "status": "diverged"} if result["seed"] == seed else {}
        yield {name: value for name, value in result.items() if not lost or name != "losses"} | lost


def only_line(folder):
    """Return the sentences of the only suite in a folder of results."""
    (line,) = frontier_words.lines(frontier_verdicts.load(folder))
    return line


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
    text, page = frontier_words.readme(tmp_path), frontier_words.guide(tmp_path)
    assert f"- {line}" in page
    assert "| trained parameters | 20k | 60k | 150k |\n| --- | :---: | :---: | :---: |\n" in text
    assert "| SmolLM2-135M, five commonsense tasks, base in nf4 | **LSR-Adapt** | LoRA | even |\n" in text
    for one in (text, page):
        assert "results/frontier/smollm2-commonsense-nf4.png" in one
    ahead, by = text.partition("\n")[0].split(" comparisons, by ")
    assert ahead.startswith("At sizes below that of LoRA of rank 1 one of the two has the lower loss ")
    assert ahead.endswith(" in 1 of 3")
    assert float(by.removesuffix(" nats a token.")) == pytest.approx(0.1, abs=0.02)
    assert "| the other |" in frontier_words.guide(tmp_path)
    assert re.search(r"\| 20k \| LSR-Adapt r=1 s=1 \([\d,]+; 3\) \| LoRA r=1 .* \([\d,]+; 3\) \|", page), (
        "with their seeds"
    )


def test_rows_without_seeds_are_named_and_those_that_a_base_does_not_take_are_not(tmp_path):
    rows = [name for name in ROWS["smollm2"]["300k"] if "+" not in name]
    write(tmp_path, *(made_up("300k", row, 0.0, seeds=1 if row == "krona" else 3) for row in rows if row != "vera"))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    tuned = "Tuned, but not run with 2 seeds: KronA at 300k"  # TinyLoRA takes no base in nf4
    assert f"Not run: VeRA at 300k. No row was run at 5k, 20k, 60k, 150k, 600k, 1.2m and 2.4m. {tuned}. No row" in line
    write(tmp_path, made_up("300k", "krona", -0.1, seeds=1))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert f"{tuned}; by the held-out part the best of the others would be KronA at 300k. " in line
    write(tmp_path, *(made_up("300k", row, 0.0) for row in ("vera", "krona")))
    (line,) = frontier_words.lines(frontier_verdicts.load(tmp_path))
    assert line.endswith("at 300k. No row was run at 5k, 20k, 60k, 150k, 600k, 1.2m and 2.4m. " + NO_VARIANT)


def test_a_method_that_takes_no_such_base_is_said_where_it_has_a_row(tmp_path):
    for base, said in (("nf4", " TinyLoRA takes no base in nf4. "), ("none", "TinyLoRA at 20k")):
        suite = ("smollm2", "commonsense", base)
        write(tmp_path / base, *(made_up("20k", row, 0.0, suite=suite) for row in ("lsr_1_1", "lora_modules")))
        line = only_line(tmp_path / base)
        assert said in line
        assert ("takes no base" in line) == (base == "nf4")


def test_methods_that_win_nowhere_are_said_to(tmp_path):
    for size, row in {"20k": "lsr_1_1", "60k": "lsr_2_2"}.items():
        write(tmp_path, made_up(size, row, 0.1), made_up(size, "lora_modules", 0.0))
    assert "the lower loss has LSR-Adapt and Kron-LoRA at no size; LoRA at 20k and 60k. " in only_line(tmp_path)
    assert " | LoRA | LoRA |\n" in frontier_words.readme(tmp_path)
    assert "held-out answers in none of 2 comparisons.\n" in frontier_words.readme(tmp_path)
    assert "| ours |" not in frontier_words.guide(tmp_path)


def test_every_suite_has_its_line_and_readme_the_figure_of_the_largest(tmp_path):
    write(tmp_path, made_up("20k", "lsr_1_1", -0.1), made_up("20k", "lora_modules", 0.0))
    rows = ("lora_modules", "kron_lora")
    write(tmp_path, *(made_up(size, row, 0.0, suite=OTHER) for size in ("20k", "60k") for row in rows))
    text = frontier_words.readme(tmp_path)
    assert frontier_words.main_suite(frontier_verdicts.load(tmp_path)) == OTHER
    table = [line for line in text.splitlines() if line.startswith("| SmolLM2")]
    assert table == [
        "| SmolLM2-135M, GSM8K's solutions, base in nf4 | even | even |",
        "| SmolLM2-135M, five commonsense tasks, base in nf4 | **LSR-Adapt** |  |",
    ]
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
    words = "at no size; LoRA at 600k; these were chosen on the held-out part; on the test part lower still: "
    assert f"{words}SLoRA r=2 at 600k. " in line
    assert " | LoRA |\n" in frontier_words.readme(tmp_path), "another of its side"


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
    text = "By accuracy LoRA r=1 on q, v (SmolLM2-135M, five commonsense tasks, base in nf4) is ahead; elsewhere they "
    assert f"{text}separate nowhere." in frontier_words.readme(tmp_path)
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


def test_a_seed_that_diverged_is_said_and_which_row_that_would_have_been(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), diverged(made_up("60k", "lora_xs", -0.2)))
    write(tmp_path, made_up("60k", "lsr_2_2", -0.05), diverged(made_up("60k", "kron_lora", 0.1)))
    line = only_line(tmp_path)
    assert "Tuned, but not run" not in line
    words = "Not compared, as a seed diverged: Kron-LoRA at 60k; LoRA-XS at 60k; by the held-out part the best of the "
    assert f"{words}others would be LoRA-XS r=17 at 60k. " in line
    for page in (frontier_words.guide(tmp_path), "\n".join(frontier_tables.sections(tmp_path))):
        assert "| ours (not compared: LoRA-XS r=17, of which a seed diverged) |" in page
    assert "| **LSR-Adapt*** |" in frontier_words.readme(tmp_path)


def test_where_all_of_a_side_diverged_that_is_said(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), diverged(made_up("60k", "lsr_2_2", -0.05)))
    page = frontier_words.guide(tmp_path)
    assert "base in nf4: nothing is compared at 60k, where a side has no row to compare. " in page
    assert "as a seed diverged: LSR-Adapt at 60k; by the held-out part the best of ours would be LSR-Adapt" in page
    assert "has not been measured" in frontier_words.readme(tmp_path)
    write(tmp_path, made_up("20k", "lora_modules", 0.0), made_up("20k", "lsr_1_1", -0.1))
    assert "the lower loss has LSR-Adapt at 20k; nothing is compared at 60k, where" in only_line(tmp_path)
    lone = tmp_path / "lone"
    write(lone, diverged(made_up("60k", "lsr_2_2", 0.0)))
    assert "nothing is compared at 60k" in frontier_words.guide(lone)


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (-0.2, "; by the held-out part the best of ours would be LSR-Adapt r=2 s=2 at 60k."),  # below both sides
        (0.01, "; by the held-out part the best of ours would be LSR-Adapt r=2 s=2 at 60k."),  # below its own side
        (0.1, "."),
    ],
)
def test_a_row_without_seeds_is_compared_with_the_best_of_its_own_side(tmp_path, shift, words):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_8_1", 0.05))
    write(tmp_path, made_up("60k", "lsr_2_2", shift, seeds=0))
    line = only_line(tmp_path)
    assert f"Tuned, but not run with 2 seeds: LSR-Adapt in another form at 60k{words} " in line
    assert "of the others would" not in line


def test_a_start_or_optimizer_is_named_where_its_row_wins(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", 0.05))
    write(tmp_path, made_up("60k", "lsr_2_2+rite", -0.1), made_up("300k", "lsr_8_5", 0.0))
    write(tmp_path, made_up("300k", "lora+gradient", -0.1), made_up("300k", "lsr_8_5+pro", -0.2, seeds=1))
    line = only_line(tmp_path)
    assert "the lower loss has LSR-Adapt by LoRA-RITE at 60k; LoRA from the gradient at 300k. Not run: " in line
    assert (
        "2 seeds: LSR-Adapt by LoRA-Pro at 300k; by the held-out part the best of ours would be LSR-Adapt r=8" in line
    )
    assert line.endswith("Of 26 rows with another start or optimizer 2 were run.")


def test_that_all_rows_were_run_is_said_only_if_they_were(tmp_path):
    qwen = ("qwen", "gsm8k", "nf4")
    write(tmp_path, *(made_up(size, row, 0.0, suite=qwen) for size, rows in ROWS["qwen"].items() for row in rows))
    assert only_line(tmp_path).endswith(" All rows were run.")
    plain = tmp_path / "plain"
    for size, rows in ROWS["smollm2"].items():
        write(plain, *(made_up(size, row, 0.0) for row in rows if "+" not in row and row != "tinylora"))
    assert only_line(plain).endswith(f" All rows with the plain start and AdamW were run. {NO_VARIANT}")


def test_a_lower_row_of_ours_contradicts_nothing(tmp_path):
    unlucky = [{**r, "nll": 2.05} if r["part"] == "dev" else r for r in made_up("60k", "lsr_8_1", -0.2)]
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", 0.04), unlucky)
    words = "LSR-Adapt and Kron-LoRA at no size; LoRA at 60k; these were chosen on the held-out part; on the test part "
    assert f"{words}lower still: LSR-Adapt r=8 s=1 at 60k. " in only_line(tmp_path)
    assert "| LoRA* |" in frontier_words.readme(tmp_path)


def test_seeds_at_other_rates_are_named(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", -0.05))
    write(tmp_path, made_up("60k", "lsr_2_2", -0.25, rate=8e-3))
    assert "Seeds at another rate than the one that is compared are not counted: LSR-Adapt at 60k." in only_line(
        tmp_path
    )


def test_sizes_of_another_model_are_said_to_be_shares(tmp_path):
    qwen = ("qwen", "commonsense", "nf4")
    write(tmp_path, *(made_up(size, "lora_modules", 0.0, suite=qwen) for size in ("20k", "60k")))
    write(tmp_path, *(made_up(size, "kron_lora", 0.0, suite=qwen) for size in ("20k", "60k")))
    shares = ". Sizes are SmolLM2-135M's, on Qwen2.5-Coder-0.5B-Instruct the same shares of LoRA r=8's: 20k is 36,025:"
    assert shares in frontier_words.readme(tmp_path)


def test_whether_lora_of_rank_1_is_the_better_choice_follows_from_the_results(tmp_path):
    write(tmp_path, made_up("300k", "lora", 0.0), made_up("300k", "lsr_8_5", 0.1))
    assert "from 300k on, neither of the two was better at any size: take LoRA" in frontier_words.readme(tmp_path)
    write(tmp_path, made_up("600k", "lora", 0.0), made_up("600k", "lsr_16_7", -0.1))
    words = (
        "from 300k on, the lower loss has LSR-Adapt r=16 s=7 at 600k (SmolLM2-135M, five commonsense tasks, base in "
    )
    assert f"{words}nf4); elsewhere take LoRA" in frontier_words.readme(tmp_path)


def test_rows_of_one_rate_are_said_to_be(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", -0.05))
    assert "Each row was tuned over one rate. " in frontier_words.guide(tmp_path)
    assert "differ in their parameters by up to 0 %" in frontier_words.guide(tmp_path)


def test_what_a_start_or_optimizer_brought_is_its_row_less_the_same_row_without(tmp_path):
    assert frontier_variants.guide(tmp_path) == ""
    rows = {
        "lsr_2_2": 0.0,
        "lsr_2_2+rite": -0.1,
        "lsr_2_2+gradient": 0.0,
        "lora_modules": 0.0,
        "lora_modules+plus": 0.1,
    }
    write(tmp_path, *(made_up("60k", row, shift) for row, shift in rows.items()))
    write(tmp_path, made_up("60k", "kron_lora+pro", -0.1))  # without the same row without it
    write(tmp_path, diverged(made_up("60k", "lora_modules+pro", 0.0)), made_up("300k", "lsr_8_5+rite", 0.0, seeds=1))
    found = frontier_verdicts.load(tmp_path)
    verdicts = frontier_verdicts.variants(found.scores)
    assert [(one.ours.row, one.theirs.row, one.separates) for one in verdicts] == [
        ("lora_modules+plus", "lora_modules", True),
        ("lsr_2_2+gradient", "lsr_2_2", False),
        ("lsr_2_2+rite", "lsr_2_2", True),
    ]
    assert [one.corrected_p for one in verdicts] == frontier_verdicts.holm([one.estimate.p for one in verdicts])
    assert verdicts[2].difference == pytest.approx(-0.1, abs=0.01)
    page = "\n".join(frontier_variants.section(tmp_path))
    assert "| 60k | LSR-Adapt r=2 s=2 | by LoRA-RITE | -0." in page
    assert "| < 0.0001 | better |" in page
    assert "| worse |" in page
    assert "not compared: LoRA r=1 on q, v by LoRA-Pro at 60k (SmolLM2-135M, five commonsense tasks" in page
    text = frontier_variants.guide(tmp_path)
    assert "|  | from the gradient | by LoRA-RITE | by LoRA+ |" in text
    assert (
        f"| LSR-Adapt r=2 s=2 at 60k | {verdicts[1].difference:+.4f} | **{verdicts[2].difference:+.4f}** |  |" in text
    )
    assert "Tuned alone" not in text, "without the same row without it there is nothing to compare"
    write(tmp_path, made_up("300k", "lsr_8_5", 0.1))
    tuned = {row.row: row.tuned for row in frontier_verdicts.load(tmp_path).rows if row.size == "300k"}
    alone = f"LSR-Adapt r=8 s=5 by LoRA-RITE at 300k {tuned['lsr_8_5+rite']:.4f}, plain {tuned['lsr_8_5']:.4f}."
    assert frontier_variants.guide(tmp_path).endswith(f"{alone} Tried with no row: from the gradient, by LoRA-RITE.")


def test_there_is_no_table_of_starts_and_optimizers_without_any(tmp_path):
    write(tmp_path, made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", 0.0))
    assert frontier_variants.guide(tmp_path) == ""
    assert frontier_variants.section(tmp_path) == []


def test_a_seed_that_ended_worse_than_the_base_is_said(tmp_path):
    """Its row separates from nothing, as its seeds spread: that alone would hide what happened."""
    *kept, lost = made_up("60k", "lsr_2_2", -0.05)
    (worse,) = [r for r in made_up("60k", "lsr_2_2", 6.0) if r["seed"] == lost["seed"]]
    write(tmp_path, made_up("60k", "lora_modules", 0.0), [*kept, worse])
    line = only_line(tmp_path)
    assert "do not separate at 60k" in line
    assert "Compared, though a seed ended with more loss than the base alone has: LSR-Adapt at 60k." in line
    assert "| 3, 1 of them with more loss than the base |" in "\n".join(frontier_tables.sections(tmp_path))
    write(tmp_path, made_up("60k", "lsr_2_2", -0.04, rate=2e-3))
    line = only_line(tmp_path)
    assert "the lower loss has LSR-Adapt at 60k" in line or "LSR-Adapt and Kron-LoRA at 60k" in line
    assert "more loss than the base" not in line
    assert "Seeds at another rate than the one that is compared are not counted: LSR-Adapt at 60k." in line
