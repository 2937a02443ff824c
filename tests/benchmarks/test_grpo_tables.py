"""What is made of GRPO's trials: verdicts for either outcome, tables that have rows, figures of what there is."""

import numpy as np
import pytest

from benchmarks.quality import grpo_verdicts, trials
from benchmarks.quality.grpo_rows import RATES, TRAININGS
from benchmarks.report import grpo_tables
from benchmarks.report.plots import drawn_from
from tests.helpers.grpo_trials import SUITE, base, seeds, tuned, write

NAME = SUITE.prefix
BOTH = ("lora_8", "lsr_60k")


def write_rows(folder, rows=BOTH, trainings=TRAININGS, **options):
    """Write tuned rows, all as accurate."""
    for training in trainings:
        for row in rows:
            write(folder, tuned(training, row), seeds(training, row, 0.3, **options))


def page(folder):
    return "\n\n".join(grpo_tables.sections(folder))


def drawn(folder):
    """Draw every figure of a folder; return their names."""
    for path, plot in grpo_tables.plots(folder).items():
        plot.draw(path)
        assert drawn_from(path) == plot.digest
    return sorted(path.name for path in folder.glob("*.png"))


def test_without_results_there_is_nothing(tmp_path):
    assert grpo_tables.sections(tmp_path) == []
    assert grpo_tables.plots(tmp_path) == {}


@pytest.mark.parametrize(
    ("accuracy", "options", "outcome", "words"),
    [
        (0.305, {}, "within", "By GRPO it is within a point of LoRA r=8: +0.5"),
        (0.2, {}, "below", "By GRPO it is more than a point below LoRA r=8: -10.0"),
        (0.4, {}, "above", "By GRPO it is more than a point above LoRA r=8: +10.0"),
        (0.3, {"noise": 0.5}, "undecided", "By GRPO it is undecided whether it is within a point of LoRA r=8: "),
        (0.3, {"number": 1}, "within", "(of one seed: how far seeds spread is not in it)."),
    ],
)
def test_a_verdict_is_where_the_interval_lies(tmp_path, accuracy, options, outcome, words):
    write(tmp_path, base(), tuned("grpo", "lora_8"), seeds("grpo", "lora_8", 0.3))
    write(tmp_path, tuned("grpo", "lsr_60k"), seeds("grpo", "lsr_60k", accuracy, **options))
    (verdict,) = grpo_verdicts.verdicts(trials.load(tmp_path), NAME)
    assert verdict.outcome == outcome
    assert verdict.share == pytest.approx(60_000 / 4_399_104)
    assert verdict.knows_seeds == (options.get("number") != 1)
    text = page(tmp_path)
    assert words in text
    assert f"| {grpo_tables.OUTCOMES[outcome]} |" in text


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.01, 0.01, "within"),
        (-0.011, 0.0, "undecided"),
        (-0.03, -0.01, "undecided"),
        (-0.03, -0.0101, "below"),
        (0.0101, 0.02, "above"),
        (-0.02, 0.02, "undecided"),
    ],
)
def test_an_interval_across_an_end_decides_nothing(monkeypatch, low, high, outcome):
    verdict = grpo_verdicts.Verdict(None, None, 0.01)  # pyright: ignore
    monkeypatch.setattr(grpo_verdicts.Verdict, "estimate", type("Estimate", (), {"interval": (low, high)}))
    assert verdict.outcome == outcome


def test_the_answer_is_of_the_row_that_was_best_in_tuning_and_of_small_rows_alone(tmp_path):
    rows = ("lora_8", "lsr_60k", "lsr_10k", "lsr_300k", "lora_xs", "lora_1")
    for row in rows:
        best = 0.5 if row == "lsr_10k" else 0.3
        write(tmp_path, tuned("grpo", row, dict(zip(RATES["grpo"][row], (0.1, best, 0.2), strict=True))))
        write(tmp_path, seeds("grpo", row, 0.2 if row == "lsr_10k" else 0.3))
    found = grpo_verdicts.verdicts(trials.load(tmp_path), NAME)
    assert [one.ours.row for one in found] == ["lsr_10k", "lsr_60k", "lora_xs"]
    assert [one.outcome for one in found] == ["below", "within", "within"]
    answer = grpo_verdicts.answer(found)
    assert answer is not None
    assert answer.ours.row == "lsr_10k", "not the one that the test part prefers"
    assert "the row that did best in tuning is LSR-Adapt r=1 s=1 on q, v and down, with 0.2 %" in page(tmp_path)


def test_grpo_is_compared_with_sft_of_the_same_row(tmp_path):
    write(tmp_path, base(0.2))
    for row, (rl, sft) in {"lora_8": (0.4, 0.35), "lsr_60k": (0.4, 0.25)}.items():
        for training, accuracy in (("grpo", rl), ("sft", sft)):
            write(tmp_path, tuned(training, row), seeds(training, row, accuracy))
    (line,) = (line for line in page(tmp_path).splitlines() if line.startswith("| **LSR-Adapt r=6 s=1** |"))
    cells = [cell.strip().split(" (")[0] for cell in line.strip("|").split("|")]
    assert cells[1:] == ["60,000", "1.4", "40.0", "+0.0", "25.0", "-10.0", "+15.0", "within a point"]
    assert drawn(tmp_path) == [f"{NAME}.png"]


def test_a_row_of_which_a_seed_diverged_is_left_out(tmp_path):
    write_rows(tmp_path)
    write(tmp_path, tuned("grpo", "lora_1"), seeds("grpo", "lora_1", None))
    text = page(tmp_path)
    assert f"Diverged, and their rows left out: {NAME}-grpo-lora_1-seed1-0.0006." in text
    assert "Left out, as a seed diverged: LoRA r=1 by GRPO." in text
    assert "| LoRA r=1 | 549" not in text
    drawn(tmp_path)


def test_where_every_row_diverged_there_is_no_picture_and_no_table_without_rows(tmp_path):
    for row in BOTH:
        write(tmp_path, tuned("grpo", row), seeds("grpo", row, None, number=1))
    text = page(tmp_path)
    assert grpo_tables.plots(tmp_path) == {}
    assert ".png" not in text
    assert "| no adapter |" not in text
    assert "Left out, as a seed diverged: LoRA r=8 by GRPO; LSR-Adapt r=6 s=1 by GRPO." in text
    assert "tuning, by rate" in text


def test_of_rows_that_were_tuned_alone_that_is_said(tmp_path):
    write(tmp_path, base(), tuned("grpo", "lora_8"), tuned("grpo", "lora_1", {2e-4: 0.1}))
    write(tmp_path, tuned("grpo", "lsr_60k", dict.fromkeys((8e-4, 2.4e-3, 7.2e-3, 2.667e-4))))
    text = page(tmp_path)
    assert "Tuned, but no seed was run: LoRA r=8 by GRPO." in text
    assert "Diverged at every rate: LSR-Adapt r=6 s=1 by GRPO." in text
    assert "Not tuned to the end: LoRA r=1 by GRPO." in text
    assert "Not run, as PEFT's TinyLoRA takes no base in NF4: TinyLoRA r=8 u=60." in text
    assert "Not run: LoRA r=8 by SFT; LSR-Adapt r=6 s=1 by SFT; LoRA r=1 by SFT; LSR-Adapt r=1 s=1 on " in text
    assert ".png" not in text
    assert grpo_tables.plots(tmp_path) == {}


def test_sft_alone_has_its_table_and_its_figure(tmp_path):
    write(tmp_path, base())
    write_rows(tmp_path, trainings=("sft",))
    text = page(tmp_path)
    assert "LoRA r=8 has no accuracy." in text
    assert "| LoRA r=8 | 4,399,104 | 100.0 |  |  | 30.0 (30.0, 30.0) |  |  |  |" in text
    assert drawn(tmp_path) == [f"{NAME}.png"]


def test_grpo_without_the_reference_has_no_verdict(tmp_path):
    write(tmp_path, tuned("grpo", "lsr_60k"), seeds("grpo", "lsr_60k", 0.3))
    text = page(tmp_path)
    assert "LoRA r=8 has no accuracy." in text
    assert "| **LSR-Adapt r=6 s=1** | 60,000 |  | 30.0 (30.0, 30.0) |" in text
    assert drawn(tmp_path) == [f"{NAME}.png"]


def test_one_seed_is_said_where_there_is_one(tmp_path):
    write_rows(tmp_path, number=1)
    assert "Every row has one seed: how far seeds spread is not in those intervals" in page(tmp_path)
    write(tmp_path, seeds("grpo", "lora_8", 0.3))
    text = page(tmp_path)
    assert "Of LSR-Adapt r=6 s=1 by GRPO; LoRA r=8 by SFT; LSR-Adapt r=6 s=1 by SFT there is one seed: how far" in text
    write_rows(tmp_path)
    assert "how far seeds spread" not in page(tmp_path)


def test_rates_at_an_end_are_marked(tmp_path):
    write_rows(tmp_path)
    assert "Every best rate lies between two others." in page(tmp_path)
    write(tmp_path, tuned("grpo", "lora_8", {1e-4: 0.1, 3e-4: 0.3, 9e-4: None}))
    assert "| LoRA r=8 | 0.0001: 0.100, **0.0003: 0.300**, 0.0009: diverged |" in page(tmp_path)
    write(tmp_path, tuned("grpo", "lora_8", {1e-4: 0.5}), tuned("sft", "lsr_60k", {3e-2: -0.5}))
    write(tmp_path, seeds("grpo", "lora_8", 0.3))
    text = page(tmp_path)
    assert "| **0.0001: 0.500** (end), 0.0003: 0.300, 0.0009: diverged |" in text
    assert "0.01: 1.000, **0.03: 0.500** (end) |" in text


def test_an_end_that_seeds_were_trained_at_is_marked(tmp_path):
    write_rows(tmp_path, trainings=("grpo",))
    done = trials.load(tmp_path)
    first = RATES["grpo"]["lora_8"][1]
    left = {name: r for name, r in done.items() if not (r["row"] == "lora_8" and r["rate"] < first)}
    (score,) = (s for s in grpo_verdicts.scores(left, NAME) if s.row == "lora_8")
    assert score.is_at_end
    assert grpo_tables.rate_cell(score) == "0.0003 (end)"
    assert "for LoRA r=8 by GRPO." in grpo_tables.ends_text([score])


def test_the_share_that_was_cut_is_shown_or_said_not_to_be_known(tmp_path):
    write_rows(tmp_path)
    assert "| LoRA r=8 | 2 | 2 | 0.0003 | 0.0015 | 2.0 | 0.200, 0.200 | 95 to 95 of 256 | 10.0 |" in page(tmp_path)
    assert "was not kept" not in page(tmp_path)
    write(tmp_path, seeds("grpo", "lora_8", 0.3, cut=None))
    assert "cut at the longest length was not kept for LoRA r=8." in page(tmp_path)
    write(tmp_path, seeds("grpo", "lsr_60k", 0.3, cut=None))
    assert "cut at the longest length was not kept." in page(tmp_path)


def test_a_figure_is_known_by_all_that_it_shows(tmp_path):
    write_rows(tmp_path)
    ((_, before),) = grpo_tables.plots(tmp_path).items()
    write(tmp_path, tuned("grpo", "lora_8", {2.7e-3: 0.9}))
    ((_, after),) = grpo_tables.plots(tmp_path).items()
    assert before.digest != after.digest


def test_intervals_are_of_questions_and_seeds(tmp_path):
    write(tmp_path, tuned("grpo", "lora_8"), seeds("grpo", "lora_8", 0.3, noise=0.5, number=3))
    (score,) = grpo_verdicts.scores(trials.load(tmp_path), NAME)
    one = grpo_verdicts.Score(score.training, score.row, score.right[:1], score.results[:1], score.tried)
    of_seeds = score.right.mean(1).var(ddof=1) / 3
    of_questions = score.right.mean(0).var() / score.right.shape[1]
    assert score.accuracy.error == pytest.approx(np.sqrt(of_seeds + of_questions), rel=0.01)
    assert one.accuracy.freedom == np.inf
