"""What README and GUIDE.md say of small adapters under GRPO: either outcome in its words, nothing without results."""

import pytest

from benchmarks.quality import trials
from benchmarks.quality.grpo_gsm8k import Suite
from benchmarks.report import grpo_words
from tests.helpers.grpo_trials import SUITE, base, seeds, tuned, write

NOT_TUNED = "- The default rate, 1e-4, was not tuned."


def write_pair(folder, accuracy, row="lsr_60k", **options):
    """Write LoRA r=8 with 40 %, and another row."""
    write(folder, base(0.2), tuned("grpo", "lora_8"), seeds("grpo", "lora_8", 0.4))
    write(folder, tuned("grpo", row), seeds("grpo", row, accuracy, **options))


def test_without_results_readme_says_nothing_and_the_guide_that_the_rate_was_not_tuned(tmp_path):
    assert grpo_words.readme(tmp_path) == ""
    assert grpo_words.guide(tmp_path) == NOT_TUNED


@pytest.mark.parametrize(
    ("accuracy", "options", "words"),
    [
        (0.4, {}, "is within a point of it: 40.0 % of the test questions are right beside 40.0 %, +0.0 (+0.0 to +0.0)"),
        (0.3, {}, "is more than a point below it: 30.0 % of the test questions are right beside 40.0 %, -10.0 ("),
        (0.5, {}, "is more than a point above it: 50.0 % of the test questions"),
        (0.4, {"noise": 0.5}, "may or may not be within a point of it: "),
        (0.4, {"number": 1}, "+0.0 (+0.0 to +0.0) points (of one seed: how far seeds spread is not in it). LoRA r=8"),
    ],
)
def test_either_outcome_has_its_words(tmp_path, accuracy, options, words):
    write_pair(tmp_path, accuracy, **options)
    text = grpo_words.readme(tmp_path)
    assert text.startswith("By GRPO on GSM8K (Qwen2.5-Coder-0.5B-Instruct, 60 steps) LSR-Adapt r=6 s=1, with 1.4 % of ")
    assert words in text
    assert "LoRA r=8 itself is +20.0 (" in text
    assert "[All sizes](GUIDE.md#1-a-run-and-its-data)" in text
    assert "By SFT" not in text
    page = grpo_words.guide(tmp_path)
    assert NOT_TUNED not in page
    assert f"(benchmarks/results/grpo/{SUITE.prefix}.png)" in page
    assert "| no adapter |" in page


def test_sft_stands_beside(tmp_path):
    write_pair(tmp_path, 0.4)
    for row, accuracy in (("lora_8", 0.35), ("lsr_60k", 0.25), ("lora_1", 0.35)):
        write(tmp_path, tuned("sft", row), seeds("sft", row, accuracy))
    assert "By SFT on the same questions it is below LoRA r=8: -10.0 (" in grpo_words.readme(tmp_path)
    page = grpo_words.guide(tmp_path)
    assert "in points (95 %): below: LSR-Adapt r=6 s=1 -10.0 (" in page
    assert "; not separated: LoRA r=1 +0.0 (+0.0 to +0.0)." in page
    assert "GRPO beside SFT of the same adapter, in points (95 %): above: LSR-Adapt r=6 s=1 +15.0 (" in page


def test_a_smaller_adapter_that_is_right_more_often_is_named(tmp_path):
    write_pair(tmp_path, 0.3)
    assert "most often" not in grpo_words.readme(tmp_path)
    write(tmp_path, tuned("grpo", "lora_xs"), seeds("grpo", "lora_xs", 0.38))
    assert "LoRA-XS r=19, with 1.4 %, is right most often: 38.0 %, -2.0 (" in grpo_words.readme(tmp_path)


def test_sft_alone_gives_readme_nothing(tmp_path):
    write(tmp_path, base(), tuned("sft", "lora_8"), seeds("sft", "lora_8", 0.3))
    assert grpo_words.readme(tmp_path) == ""
    page = grpo_words.guide(tmp_path)
    assert page.startswith(NOT_TUNED)
    assert "LoRA r=8 has no accuracy." in page
    assert ".png" in page


def test_where_all_diverged_there_is_no_table_and_no_figure(tmp_path):
    lost = {1e-4: None, 3e-4: None, 9e-4: None, 3.333e-5: None}
    write(tmp_path, tuned("grpo", "lora_8", lost), seeds("grpo", "lora_8", None, number=1))
    assert grpo_words.readme(tmp_path) == ""
    page = grpo_words.guide(tmp_path)
    assert page.startswith(NOT_TUNED)
    assert "Left out, as a seed diverged: LoRA r=8 by GRPO." in page
    assert "|" not in page
    assert ".png" not in page


def test_other_small_rows_have_their_verdicts_too(tmp_path):
    write_pair(tmp_path, 0.4)
    write(tmp_path, tuned("grpo", "lora_xs"), seeds("grpo", "lora_xs", 0.3))
    assert "Others with as few: LoRA-XS r=19 more than a point below, -10.0 (" in grpo_words.guide(tmp_path)


def test_where_lora_8_learned_nothing_being_near_it_says_little(tmp_path):
    write(tmp_path, base(0.4), tuned("grpo", "lora_8"), seeds("grpo", "lora_8", 0.4))
    write(tmp_path, tuned("grpo", "lsr_60k"), seeds("grpo", "lsr_60k", 0.4))
    words = "over no adapter, which does not separate, so that being near LoRA r=8 says little."
    assert words in grpo_words.readme(tmp_path)
    write(tmp_path, seeds("grpo", "lsr_60k", 0.2))
    assert "which does not separate. " in grpo_words.readme(tmp_path)


def test_a_reward_that_fell_is_said(tmp_path):
    write_pair(tmp_path, 0.3)
    assert "had fallen" not in grpo_words.readme(tmp_path)
    fell = seeds("grpo", "lsr_60k", 0.3)
    for result in fell.values():
        result["curve"]["reward"] = [0.1] * 5 + [0.2] * 5 + [0.1] * 5
    write(tmp_path, fell)
    words = "by more than 25 % of its highest for LSR-Adapt r=6 s=1 (from 0.20 to 0.10): a rate chosen after 20 steps"
    said = "; by the end the reward of LSR-Adapt r=6 s=1 had fallen, at rates chosen after 20 steps. "
    assert said in grpo_words.readme(tmp_path)
    page = grpo_words.guide(tmp_path)
    assert words in page
    assert "LoRA r=8 3e-4; LSR-Adapt r=6 s=1 2.4e-3 (fell later)." in page


def test_the_default_rate_is_beside_the_best_ones(tmp_path):
    write(tmp_path, tuned("grpo", "lora_8"), tuned("grpo", "lora_1"), tuned("grpo", "lsr_60k"))
    text = grpo_words.rates_text(trials.load(tmp_path), SUITE.prefix)
    assert "after 20 steps: LoRA r=8 3e-4; LoRA r=1 6e-4; LSR-Adapt r=6 s=1 2.4e-3. They are 3 to 24 times" in text
    assert text.endswith("the default, 1e-4: set `learning_rate`, higher the smaller the adapter.")
    write(tmp_path, tuned("grpo", "lora_8", {1e-4: 0.9, 3.333e-5: 0.1}))
    text = grpo_words.rates_text(trials.load(tmp_path), SUITE.prefix)
    assert "They are 1 to 24 times the default, 1e-4: it fits LoRA r=8; for others set `learning_rate`" in text
    write(tmp_path, tuned("grpo", "lora_8", {1e-4: 0.1, 3e-4: 0.1, 9e-4: 0.1, 3.333e-5: 0.9}))
    text = grpo_words.rates_text(trials.load(tmp_path), SUITE.prefix)
    assert "LoRA r=8 3.333e-5 (end); " in text
    assert "at an end of those tried one beyond may be better" in text


def test_rates_that_do_not_rise_are_not_said_to(tmp_path):
    write(
        tmp_path, tuned("grpo", "lora_8"), tuned("grpo", "lora_1", {2e-4: 0.9, 6e-4: 0.5, 1.8e-3: 0.1, 6.667e-5: 0.1})
    )
    text = grpo_words.rates_text(trials.load(tmp_path), SUITE.prefix)
    assert text.endswith("They are 2 to 3 times the default, 1e-4: set `learning_rate`.")
    assert grpo_words.rates_text(trials.load(tmp_path / "none"), SUITE.prefix) == ""


def test_readme_has_the_suite_that_was_tuned_the_longest(tmp_path):
    write_pair(tmp_path, 0.3)
    longer = Suite(SUITE.work, "qwen", "folder", tuning_steps=60)
    write(tmp_path, base(0.2, longer), tuned("grpo", "lora_8", suite=longer), tuned("grpo", "lsr_60k", suite=longer))
    write(tmp_path, seeds("grpo", "lora_8", 0.4, suite=longer), seeds("grpo", "lsr_60k", 0.4, suite=longer))
    assert "is within a point of it" in grpo_words.readme(tmp_path)
    page = grpo_words.guide(tmp_path)
    assert "more than a point below" in page
    assert page.count(".png") == 2
