"""What README and GUIDE.md say of small adapters under GRPO: the question's answer, SFT beside it, and the rates.

Every sentence follows from `grpo_verdicts`. Without results README says nothing, and GUIDE.md that the default rate was
not tuned.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality import trials
from benchmarks.quality.estimates import Estimate
from benchmarks.quality.frontier_rows import MODEL_NAMES
from benchmarks.quality.grpo_gsm8k import MOST_BEYOND
from benchmarks.quality.grpo_rows import RATES, REFERENCE, ROWS
from benchmarks.quality.grpo_verdicts import (
    Results,
    Score,
    Verdict,
    all_suites,
    answer,
    chosen,
    of_row,
    scores,
    suites,
    verdicts,
)
from benchmarks.quality.rate_trials import is_at_end, rates_left, tried
from benchmarks.report.frontier_names import listed
from benchmarks.report.grpo_tables import (
    OUTCOMES,
    accuracies_of,
    by_size,
    cut_text,
    fell_text,
    heading,
    label,
    learned_text,
    missing_text,
    picture,
    points,
    seeds_known,
    seeds_text,
    table,
    verdict_text,
)
from lsr_scale.config.methods import METHODS

DEFAULT = METHODS["grpo"].defaults["learning_rate"]
CLEARLY = 2  # times the default, from which a rate is another one: rates are tried three times apart


def readme(results: Path) -> str:
    """Return README's sentences: the answer of the suite tuned the longest, and SFT beside it; nothing without one."""
    done = trials.load(results)
    found = {suite: of_suite for suite in suites(done) if answer(of_suite := verdicts(done, suite)) is not None}
    if not found:
        return ""
    suite = max(found, key=lambda one: (_tuning_steps(done, one), len(scores(done, one))))
    return _short(done, suite, found[suite])


def _tuning_steps(done: Results, suite: str) -> int:
    return next(result["tuning_steps"] for result in done.values() if result["suite"] == suite)


def _short(done: Results, suite: str, of_suite: Sequence[Verdict]) -> str:
    one = answer(of_suite)
    assert one is not None
    ours, reference = one.ours, one.reference
    about = next(result for result in done.values() if result["suite"] == suite)
    model = MODEL_NAMES.get(about["model"], about["model"])
    beside = "may or may not be within a point" if one.outcome == "undecided" else f"is {OUTCOMES[one.outcome]}"
    beside += " it" if one.outcome in ("below", "above") else " of it"
    text = (
        f"By GRPO on GSM8K ({model}, {about['steps']} steps) {label(ours.row)}, with {100 * one.share:.1f} % of LoRA "
        f"r=8's parameters, {beside}: {_percent(ours)} of the test questions "
        f"are right beside {_percent(reference)}, {points(one.estimate)} points{seeds_known(one)}. "
    )
    parts = [learned_text(done, one).removesuffix(".")]
    if fallen := [label(score.row) for score in (ours, reference) if score.fell]:
        fell = f"by the end the reward of {listed(fallen)} had fallen"
        shorter = _tuning_steps(done, suite) < about["steps"]
        parts.append(f"{fell}, at rates chosen after {_tuning_steps(done, suite)} steps" if shorter else fell)
    if said := "; ".join(part for part in parts if part):
        text += f"{said[0].upper()}{said[1:]}. "
    found = accuracies_of(done, suite)
    of_sft, of_lora = (found.get(("sft", row)) for row in (ours.row, REFERENCE))
    if of_sft is not None and of_lora is not None:
        over = of_sft.over(of_lora)
        text += f"By SFT on the same questions it {_beside(over)} LoRA r=8: {points(over)} points. "
    small = max(of_suite, key=lambda other: other.ours.accuracy.value)
    if small.ours.accuracy.value > ours.accuracy.value:
        text += (
            f"By GRPO, of adapters with as few parameters {label(small.ours.row)}, with {100 * small.share:.1f} %, is "
            f"right most often: {_percent(small.ours)}, {points(small.estimate)} points beside LoRA r=8. "
        )
    return f"{text}[All sizes](GUIDE.md#1-a-run-and-its-data)."


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy.value:.1f} %"


def _beside(over: Estimate) -> str:
    return f"is {'above' if over.value > 0 else 'below'}" if over.separates else "does not separate from"


def guide(results: Path) -> str:
    """Return the end of GUIDE.md's part on reinforcement: what was found at which size, the rates, table and figure."""
    done = trials.load(results)
    parts = []
    for suite in sorted(all_suites(done), key=lambda one: -_tuning_steps(done, one)):  # README's first
        found = scores(done, suite)
        texts = [_answer(done, suite), _of_sft(found), _over_sft(found)] if found else []
        texts += [
            rates_text(done, suite),
            fell_text(found),
            seeds_text(found),
            cut_text(found),
            missing_text(done, suite),
        ]
        parts.append(f"**{heading(done, suite)}:**\n\n" + "\n".join(f"- {text}" for text in texts if text))
        if found:
            parts += [table(done, suite), f"![{heading(done, suite)}](benchmarks/results/grpo/{picture(suite)})"]
    if not any(best_rates(done, suite) for suite in all_suites(done)):
        parts.insert(0, f"- The default rate, {_rate(DEFAULT)}, was not tuned.")
    return "\n\n".join(parts)


def _answer(done: Results, suite: str) -> str:
    """Return LSR-Adapt's verdict, and then those of the other small rows."""
    found = verdicts(done, suite)
    first = answer(found)
    others = [one for one in found if first is None or one.ours.row != first.ours.row]
    if not others:
        return verdict_text(done, suite)
    words = [f"{label(one.ours.row)} {OUTCOMES[one.outcome]}, {points(one.estimate)}" for one in others]
    return f"{verdict_text(done, suite)} Others with as few: {'; '.join(words)}."


def _of_sft(found: Sequence[Score]) -> str:
    """Return how far each size is from LoRA r=8 by SFT; nothing without that."""
    of_sft = {(score.training, score.row): score for score in found if score.training == "sft"}
    reference = of_sft.get(("sft", REFERENCE))
    pairs = [(row, of_sft["sft", row]) for row in by_size(of_sft) if row != REFERENCE]
    if reference is None or not pairs:
        return ""
    words = _by_side([(row, score.over(reference)) for row, score in pairs])
    return f"By SFT on the same questions, beside LoRA r=8 by SFT, in points (95 %): {words}."


def _over_sft(found: Sequence[Score]) -> str:
    """Return for which rows GRPO is above SFT, and by how much; nothing without both."""
    both = {(score.training, score.row): score for score in found}
    rows = [row for row in by_size(both) if ("grpo", row) in both and ("sft", row) in both]
    if not rows:
        return ""
    words = _by_side([(row, both["grpo", row].over(both["sft", row])) for row in rows])
    return f"GRPO beside SFT of the same adapter, in points (95 %): {words}."


def _by_side(differences: Iterable[tuple[str, Estimate]]) -> str:
    """Return rows by where they are beside another: below, above, or not separated."""
    sides: dict[str, list[str]] = {}
    for row, over in differences:
        side = "not separated" if not over.separates else "above" if over.value > 0 else "below"
        sides.setdefault(side, []).append(f"{label(row)} {points(over)}")
    return "; ".join(f"{side}: {', '.join(rows)}" for side, rows in sides.items())


def best_rates(done: Results, suite: str) -> dict[str, tuple[float, bool]]:
    """Return GRPO's best rate of each row that was tuned to the end, and whether it is an end; the largest first."""
    found, parameters = {}, {}
    for row in ROWS:
        tuning, _ = of_row(done, suite, "grpo", row)
        of_rates = tried(tuning)
        best = None if rates_left(RATES["grpo"][row], of_rates, MOST_BEYOND) else chosen(of_rates)
        if best is not None:
            found[row] = best, is_at_end(best, of_rates)
            parameters[row] = next(r["trainable_parameters"] for r in tuning if "trainable_parameters" in r)
    return {row: found[row] for row in sorted(found, key=lambda row: -parameters[row])}


def rates_text(done: Results, suite: str) -> str:
    """Return GRPO's best rates, and what they mean for the default; nothing where no row was tuned to the end."""
    found = best_rates(done, suite)
    if not found:
        return ""
    steps = _tuning_steps(done, suite)
    trained = {score.row: score.fell for score in scores(done, suite) if score.training == "grpo"}
    fell = {row for row, has_fallen in trained.items() if has_fallen}
    later = "fell later" if any(r["suite"] == suite and r["steps"] > steps for r in done.values()) else "fell"
    words = []
    for row, (rate, end) in found.items():
        notes = [note for note, holds in (("end", end), (later, row in fell)) if holds]
        words.append(f"{label(row)} {_rate(rate)}{f' ({listed(notes)})' if notes else ''}")
    text = f"The rates that were best by GRPO, by the reward after {steps} steps: {'; '.join(words)}"
    if any(end for _, end in found.values()):
        text += " (at an end of those tried one beyond may be better)"
    text += "."
    held = {row: rate for row, rate in found.items() if (row in trained if fell else True) and row not in fell}
    if held:
        times = sorted(rate / DEFAULT for rate, _ in held.values())
        spread = " to ".join(dict.fromkeys(f"{one:.2g}" for one in (times[0], times[-1])))
        those = "Those that held" if fell else "They"
        text += f" {those} are {spread} times the default, {_rate(DEFAULT)}: "
        near = [label(row) for row, (rate, _) in held.items() if 1 / CLEARLY < rate / DEFAULT < CLEARLY]
        text += f"it fits {listed(near)}; for others set" if near else "set"
        text += f" `learning_rate`{_by_size_text(held)}."
    if fell & found.keys():
        text += " Where the reward fell the rate is too high for a run as long: begin with a third of it."
    return text


def _by_size_text(found: dict[str, tuple[float, bool]]) -> str:
    """Return that smaller adapters want higher rates, where that is so of each method that has several sizes."""
    methods: dict[str, list[float]] = {}
    for row, (rate, _) in found.items():  # the largest first
        methods.setdefault(ROWS[row].method, []).append(rate)
    several = [rates for rates in methods.values() if len(rates) > 1]
    rises = several and all(one < other for rates in several for one, other in itertools.pairwise(rates))
    return ", higher the smaller the adapter" if rises else ""


def _rate(rate: float) -> str:
    """Return a rate as YAML's readers write it: 2.4e-3."""
    digits, _, power = f"{rate:e}".partition("e")
    return f"{float(digits):.4g}e{int(power)}"
