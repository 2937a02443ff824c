"""The frontier: rows of their size, all tuned alike, trials that are kept, and verdicts that know what they can say."""

import argparse
import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import (
    frontier,
    frontier_data,
    frontier_scores,
    frontier_trials,
    frontier_verdicts,
    grpo_gsm8k,
    rate_trials,
    trials,
)
from benchmarks.quality.frontier_rows import HIDDEN_SIZE, NUM_LAYERS, ROWS, SIZES, TOLERANCE, AdapterRow, target
from benchmarks.report import frontier_tables
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.peft import METHODS
from lsr_scale.adapters.save_and_load import write_adapter
from lsr_scale.scoring.scorer import NonFiniteScoresError
from lsr_scale.sweeping.results import TrialResult
from tests.helpers.frontier_trials import made_up, write
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize
from tests.helpers.tiny_runs import save_llama

SHAPES = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3),
    "qwen": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2),
}


def linears(model):
    """Return one layer of a model's shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[model], num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("model", list(ROWS))
def test_every_row_has_its_size(model):
    assert HIDDEN_SIZE[model] == SHAPES[model]["hidden_size"]
    for size, rows in ROWS[model].items():
        for name, row in rows.items():
            section = row.section()
            layers = section.pop("layers_to_transform", range(NUM_LAYERS[model]))
            assert set(layers) <= set(range(NUM_LAYERS[model]))
            adapted = inject(linears(model), section.pop("method"), section, "causal_lm")
            count = len(layers) * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            assert abs(math.log(count / target(model, size))) < TOLERANCE, (size, name, count)


def test_a_rate_at_an_end_is_followed_by_the_next_ones_beyond_it():
    row = AdapterRow("lora", {})
    assert frontier_trials.rates_to_try(row, {2e-3: 1.0}) == (4e-3, 8e-3, 1.6e-2)
    inside = {2e-3: 2.0, 4e-3: 1.0, 8e-3: 2.0, 1.6e-2: 3.0}
    assert frontier_trials.rates_to_try(row, inside) == ()
    high = {2e-3: 4.0, 4e-3: 3.0, 8e-3: 2.0, 1.6e-2: 1.0}
    assert frontier_trials.rates_to_try(row, high) == (3.2e-2,)
    assert frontier_trials.rates_to_try(row, {**high, 3.2e-2: math.inf}) == ()  # diverged
    low = {2e-3: 1.0, 4e-3: 2.0, 8e-3: 3.0, 1.6e-2: 4.0}
    assert frontier_trials.rates_to_try(row, low) == (1e-3,)
    assert frontier_trials.rates_to_try(row, {**low, 1e-3: 0.5}) == (5e-4,)
    assert frontier_trials.rates_to_try(row, {**low, 1e-3: 0.5, 5e-4: 0.4}) == ()  # two beyond are all


@pytest.mark.parametrize(
    ("tuned", "best", "left"),
    [
        ({1.0: 0.0, 3.0: 0.0, 9.0: 0.0}, 3.0, ()),  # no reward at any rate is no reason to go lower
        ({1.0: 0.0, 3.0: 0.0, 9.0: 1.0}, 3.0, ()),  # of equals the one between two others
        ({1.0: 1.0, 3.0: 0.0, 9.0: 0.0}, 3.0, ()),
        ({1.0: 1.0, 3.0: 0.0, 9.0: 0.0, 27.0: 0.0}, 9.0, ()),  # the middle one
        ({1.0: 1.0, 3.0: 0.0, 9.0: 0.0, 27.0: 1.0}, 3.0, ()),  # of two the lower
        ({1.0: 0.0, 3.0: 1.0, 9.0: 2.0}, 1.0, (0.3333,)),
        ({1.0: 2.0, 3.0: 1.0, 9.0: 0.0}, 9.0, (27.0,)),
        (dict.fromkeys((1.0, 3.0, 9.0), math.inf), 1.0, (0.3333,)),  # below what diverged one may not
    ],
)
def test_of_rates_that_lost_equally_the_middle_is_taken(tuned, best, left):
    for order in (sorted(tuned), sorted(tuned, reverse=True)):  # whatever came first
        shuffled = {rate: tuned[rate] for rate in order}
        assert rate_trials.best_rate(shuffled) == best
        assert rate_trials.rates_left((1.0, 3.0, 9.0), shuffled, 2) == left


def test_rows_that_a_base_does_not_take_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "write_parts", lambda *_: {})
    monkeypatch.setattr(frontier.Program, "execute", lambda self: len(self.places))
    words = ["--data", str(tmp_path), "--work", str(tmp_path), "--results", str(tmp_path), "--sizes", "20k"]
    frontier.main([*words, "--rows", "tinylora", "lora_xs"])
    said = capsys.readouterr().out
    assert "not run, as PEFT's TinyLoRA takes no base in nf4" in said
    assert "20k tinylora\n1 trials left" in said
    for rows, why in (("tinylora", "takes no base in nf4"), ("tinylorra", "no size has a row of that name")):
        with pytest.raises(SystemExit):
            frontier.main([*words, "--rows", rows])
        assert why in capsys.readouterr().err
    frontier.main([*words, "--rows", "tinylora", "--base", "none"])
    assert "not run" not in capsys.readouterr().out


def test_trials_are_called_as_those_that_are_committed():
    seed, tune = frontier.Trial("20k", "lsr_1_1", 2, 4e-3), frontier.Trial("20k", "lsr_1_1", trials.TUNING_SEED, 1.6e-2)
    assert (seed.name, tune.name) == ("20k-lsr_1_1-seed2-0.004", "20k-lsr_1_1-tune-0.016")
    assert (seed.tunes, tune.tunes) == (False, True)
    assert dataclasses.asdict(seed) == {"size": "20k", "row": "lsr_1_1", "seed": 2, "rate": 4e-3}
    assert grpo_gsm8k.Trial("sft", "lora_1", 0, 5e-4).name == "sft-lora_1-seed0-0.0005"


def test_what_is_packed_comes_back():
    values = np.array([0.5, 1.25, 30.0])
    assert rate_trials.unpacked(rate_trials.packed(values)).tolist() == values.tolist()
    bits = np.array([True, False, True, True, False, False, True, False, True])
    assert rate_trials.unpacked(rate_trials.packed_bits(bits)).tolist() == bits.tolist()


def test_the_standard_error_is_that_of_a_ratio():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 9, 400)
    losses = tokens * draw.gamma(4.0, 0.5, 400)
    mean, error = frontier.mean_per_token(losses, tokens)
    assert mean == pytest.approx(losses.sum() / tokens.sum())
    index = draw.integers(0, 400, (2000, 400))
    resampled = losses[index].sum(1) / tokens[index].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.1)


def test_holm_corrects_for_the_number_of_comparisons():
    assert frontier_verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert frontier_verdicts.holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_separate_what_differs_and_nothing_else(tmp_path):
    write(
        tmp_path,
        made_up("20k", "lora_modules", 0.0),
        made_up("20k", "lora_layers", 0.2),
        made_up("20k", "lsr_1_1", -0.1),
        made_up("60k", "lora_modules", 0.0),
        made_up("60k", "lsr_2_2", 0.0),
        made_up("60k", "lsr_8_1", -0.5, seeds=1),  # of which nobody knows how its seeds spread
        made_up("150k", "lsr_2_5", 0.0),  # alone
    )
    better, same = frontier_verdicts.load(tmp_path).verdicts
    assert (better.ours.row, better.theirs.row, better.wins) == ("lsr_1_1", "lora_modules", True)
    assert better.difference == pytest.approx(-0.1, abs=0.01)
    low, high = better.estimate.interval
    assert low < better.difference < high < 0
    assert (same.ours.size, same.ours.row, same.wins) == ("60k", "lsr_2_2", False)
    assert same.corrected_p >= 0.05
    table = "\n".join(frontier_tables.sections(tmp_path))
    assert "| ours |" in table
    assert "| no separation (not compared: LSR-Adapt r=8 s=1, without 2 seeds) |" in table
    ((path, plot),) = frontier_tables.plots(tmp_path).items()
    plot.draw(path)
    assert path.is_file()


def test_a_row_is_compared_with_all_that_lost_less_and_corrected_for_all_others(tmp_path):
    rows = {"lora_modules": 0.0, "lsr_2_2": 0.0, "kron_lora": 0.1, "vera": 0.3}
    write(tmp_path, *(made_up("60k", row, shift) for row, shift in rows.items()))
    over = frontier_verdicts.over_lower(frontier_verdicts.load(tmp_path).scores)
    assert sorted(map(len, over.values())) == [0, 1, 2, 3]
    assert all(one.difference > 0 for several in over.values() for one in several)
    assert {one.theirs.row for one in over["vera"]} == {"lora_modules", "lsr_2_2", "kron_lora"}
    assert max(one.corrected_p for one in over["vera"]) < 1e-4
    (even,) = over["lora_modules"] or over["lsr_2_2"]
    assert not even.separates


def test_what_a_file_says_is_read_anew_when_it_changes(tmp_path):
    assert frontier_verdicts.load(tmp_path).scores == []
    write(tmp_path, made_up("20k", "lora_modules", 0.0))
    first = frontier_verdicts.load(tmp_path)
    assert len(first.scores) == 1
    assert frontier_verdicts.load(tmp_path) is first
    write(tmp_path, made_up("20k", "lsr_1_1", 0.0))
    assert len(frontier_verdicts.load(tmp_path).scores) == 2


def test_rows_with_carried_rates_are_counted_by_how_that_ended(tmp_path):
    write(tmp_path, made_up("20k", "lora_xs", 0.0), made_up("20k", "lsr_1_1", 0.0))
    assert frontier_verdicts.carried(trials.load(tmp_path)) == []
    first = (2e-3, 4e-3, 8e-3)
    shifts = {"lora_xs": (0.1, 0.0, 0.1), "lsr_1_1": (0.1, 0.0, -0.1, 0.0), "vera": (0.3, 0.2, 0.0)}
    for row, of_row in shifts.items():
        for rate, shift in zip((*first, 1.6e-2), of_row, strict=False):
            rates = {"first_rates": first, "carried_from": ("60k", "a row")}
            write(tmp_path, [{**r, **rates} for r in made_up("20k", row, shift, seeds=0, rate=rate)])
    found = frontier_verdicts.carried(trials.load(tmp_path))
    assert [(round(one.lost, 6), one.followed, one.is_between) for one in found] == [
        (0.0, False, True),
        (0.1, True, True),
        (0.2, False, False),
    ]
    text = "\n".join(frontier_tables.sections(tmp_path))
    assert "3 rows were tried first at the best rate of their method at a neighbouring size" in text
    assert "an end for 1, where others followed, and lies between two others for 2." in text
    assert "lost 0.1000 nats a token against the row's best in the median, 0.2000 at most." in text
    diverged = frontier_verdicts.Carried(math.inf, True, True)
    text = frontier_tables.carried_text([*found, diverged])
    assert "lost 0.1000 nats a token against the row's best in the median, 0.2000 at most; it diverged for 1." in text
    assert frontier_tables.carried_text([diverged]).endswith("The carried rate itself diverged for 1.")


def test_only_seeds_at_the_best_rate_are_counted_and_the_others_are_named(tmp_path):
    for rate, shift, seeds in ((4e-3, -0.05, 3), (8e-3, -0.25, 2), (1.6e-2, -0.1, 1)):
        write(tmp_path, made_up("60k", "lsr_2_2", shift, seeds=seeds, rate=rate))
    write(tmp_path, made_up("60k", "lora_modules", 0.0), list(made_up("60k", "lora_xs", -0.5))[1:])  # not tuned
    found = frontier_verdicts.load(tmp_path)
    assert [(score.row, score.seeds, score.rate) for score in found.scores] == [
        ("lora_modules", 3, 4e-3),
        ("lsr_2_2", 2, 8e-3),
    ]
    assert found.verdicts[0].difference == pytest.approx(-0.25, abs=0.01)
    assert len(found.at_other_rates) == 3 + 1 + 3
    text = "\n".join(frontier_tables.sections(tmp_path))
    assert "than the one that is compared, and not counted: smollm2-commonsense-nf4-60k-lora_xs-seed0-0.004, " in text
    done = {name: r for name, r in found.done.items() if r.get("row") == "lsr_2_2"}
    plan = frontier_trials.Plan(SUITE, [("60k", "lsr_2_2")], done)
    assert min(plan.tuned(("60k", "lsr_2_2")).items(), key=lambda pair: pair[1])[0] == found.scores[1].rate


@pytest.mark.parametrize("lost", [None, 3.5])
def test_a_row_whose_seed_was_lost_is_compared_at_the_best_lower_rate(tmp_path, lost):
    place = "60k", "lsr_2_2"
    *kept, last = made_up(*place, -0.25, rate=8e-3)
    losses = rate_trials.packed(np.full(len(rate_trials.unpacked(last["losses"])), 10.0))
    write(tmp_path, [*kept, {**last, "nll": lost, "losses": losses}], made_up("60k", "lora_modules", 0.0))
    for rate, shift in ((1.6e-2, -0.2), (4e-3, -0.1), (2e-3, 0.1)):
        write(tmp_path, made_up(*place, shift, seeds=0, rate=rate))

    def chosen():
        done = trials.load(tmp_path)
        plan = frontier_trials.Plan(SUITE, [place], done)
        planned = {(trial.rate, trial.seed) for trial in plan.trials(3)}
        found = frontier_verdicts.load(tmp_path)
        return planned, next((row.rate, row.seeds, row.tuned) for row in found.rows if row.row == place[1])

    assert chosen() == ({(4e-3, 0), (4e-3, 1), (4e-3, 2)}, (8e-3, 3, 1.75)), "not at the rate above"
    write(tmp_path, made_up(*place, -0.1, seeds=1))
    assert chosen() == ({(4e-3, 1), (4e-3, 2)}, (8e-3, 3, 1.75)), "one seed is not compared"
    write(tmp_path, made_up(*place, -0.1))
    assert chosen() == (set(), (4e-3, 3, 1.9))
    assert len(frontier_verdicts.load(tmp_path).at_other_rates) == 3
    assert not frontier_verdicts.load(tmp_path).diverged


def test_the_sizes_of_a_suite_are_one_family_and_suites_are_not(tmp_path):
    for suite in (("smollm2", "commonsense", "nf4"), ("smollm2", "commonsense", "none")):
        for size in ("20k", "60k"):
            write(tmp_path, *(made_up(size, row, 0.0, suite=suite) for row in ("lora_modules", "kron_lora")))
    found = frontier_verdicts.load(tmp_path).verdicts
    for of_suite in (found[:2], found[2:]):
        assert len({one.ours.suite for one in of_suite}) == 1
        assert [one.corrected_p for one in of_suite] == frontier_verdicts.holm([one.estimate.p for one in of_suite])


def test_a_row_with_a_seed_that_diverged_is_named_and_left_out(tmp_path):
    *kept, lost = made_up("20k", "lsr_1_1", 0.0)
    write(tmp_path, made_up("20k", "lora_modules", 0.0), [*kept, {**lost, "nll": None}])
    assert [score.row for score in frontier_verdicts.load(tmp_path).scores] == ["lora_modules"]
    assert "Diverged, and their rows left out: smollm2-commonsense-nf4-20k-lsr_1_1-seed2" in "\n".join(
        frontier_tables.sections(tmp_path)
    )


SUITE = frontier.Suite(Path("work"), "smollm2", "none", "commonsense", "nf4")


def tune(done, place, losses, rates, suite=SUITE):
    """Add the results of a row's rates."""
    for rate, nll in losses.items():
        name = f"{suite.prefix}-{frontier.Trial(*place, trials.TUNING_SEED, rate).name}"
        done[name] = {"rate": rate, "nll": nll, **json.loads(json.dumps(dataclasses.asdict(rates)))}


def rates_of(place, done, **options):
    """Return a row's rates, of its trials that can be done now."""
    found = frontier_trials.Plan(SUITE, done=done, **{"places": [place], "carry": True, **options}).trials(2)
    return {trial.rate for trial in found}, {trial.tunes for trial in found}


@pytest.mark.parametrize(
    ("model", "place", "nearest"),
    [
        ("smollm2", ("20k", "lora_xs"), [("60k", "lora_xs"), ("5k", "lora_xs")]),
        ("smollm2", ("150k", "inttune"), [("300k", "inttune"), ("60k", "inttune")]),
        ("smollm2", ("600k", "lsr_16_7"), [("300k", "lsr_8_5"), ("300k", "lsr_4_7"), ("2.4m", "lsr_64_14")]),
        ("smollm2", ("1.2m", "lsr_64_7"), [("2.4m", "lsr_64_14"), ("2.4m", "lsr_16_27")]),
        ("smollm2", ("150k", "lora_modules"), [("60k", "lora_modules"), ("300k", "lora")]),
        ("smollm2", ("600k", "slora"), [("300k", "slora"), ("2.4m", "slora")]),
        ("smollm2", ("20k", "tinylora"), []),  # which no quantized base takes
        ("smollm2", ("60k", "lora_modules"), []),
        ("qwen", ("60k", "vera"), [("20k", "vera")]),
        ("qwen", ("600k", "slora"), []),
    ],
)
def test_rates_are_carried_from_the_nearest_row_of_the_method(model, place, nearest):
    suite = dataclasses.replace(SUITE, model=model)
    assert frontier_trials.neighbours(suite, place)[: len(nearest) or None] == nearest


def test_every_size_tuned_in_full_has_rows():
    for model, sizes in frontier_trials.TUNED_IN_FULL.items():
        assert set(sizes) <= set(ROWS[model])
        assert sorted(sizes, key=SIZES.__getitem__) == list(sizes)


def test_a_carried_rate_is_tried_between_two_and_at_an_end_goes_on():
    place, there, own = ("20k", "lora_xs"), ("60k", "lora_xs"), (1e-3, 2e-3, 4e-3, 8e-3)
    done: dict = {}
    assert rates_of(place, done) == (set(own), {True}), "no neighbour"
    assert rates_of(place, done, places=[place, there])[0] == set(own), "only the neighbour's: the other waits"
    assert len(frontier_trials.Plan(SUITE, [place, there], done, carry=True).trials(2)) == 4
    assert len(frontier_trials.Plan(SUITE, [place, there], done, True, [there]).trials(2)) == 8, "for none that failed"
    tune(done, there, dict.fromkeys(own), frontier_trials.Rates(own))
    assert rates_of(place, done)[0] == set(own), "a neighbour that always diverged tells nothing"
    tune(done, there, dict(zip(own, (4.0, 3.0, 2.0, 3.0), strict=True)), frontier_trials.Rates(own))
    assert rates_of(place, done) == ({2e-3, 4e-3, 8e-3}, {True})
    assert rates_of(place, done, carry=False)[0] == set(own)
    carried = frontier_trials.Rates((2e-3, 4e-3, 8e-3), there)
    assert set(frontier_trials.Plan(SUITE, [place], done, carry=True).trials(2).values()) == {carried}
    tune(done, place, {2e-3: 3.0, 4e-3: 2.0}, carried)
    for carry in (True, False):  # what was begun goes on
        assert rates_of(place, done, carry=carry)[0] == {8e-3}
    tune(done, place, {8e-3: 1.0}, carried)
    assert rates_of(place, done) == ({1.6e-2}, {True})
    tune(done, place, {1.6e-2: None}, carried)
    assert rates_of(place, done) == ({8e-3}, {False}), "between two others: its seeds"


def test_a_carried_row_may_try_as_many_rates_as_the_others():
    place, there = ("20k", "lora_xs"), ("60k", "lora_xs")
    carried, done = frontier_trials.Rates((2e-3, 4e-3, 8e-3), there), {}
    tune(done, place, {2e-3: 3.0, 4e-3: 4.0, 8e-3: 5.0, 1e-3: 2.0, 5e-4: 1.0}, carried)
    assert rates_of(place, done) == ({2.5e-4}, {True})
    tune(done, place, {2.5e-4: 0.5}, carried)
    assert rates_of(place, done) == ({2.5e-4}, {False})


def test_rates_of_another_suite_are_tried_first():
    suite = dataclasses.replace(SUITE, model="qwen", regime="gsm8k")
    other, done = dataclasses.replace(SUITE, regime="commonsense"), {}
    elsewhere = frontier_trials.Elsewhere(other, done)
    place, there, own = ("60k", "lsr_2_3"), ("60k", "lsr_2_2"), ROWS["smollm2"]["60k"]["lsr_2_2"].rates

    def rates(place=place, carry=False):
        return frontier_trials.Plan(suite, [place], {}, carry, elsewhere=elsewhere).rates(place)

    assert rates() == frontier_trials.Rates(own), "there are no results"
    tune(done, there, dict(zip(own, (4.0, 3.0, 2.0, 1.0), strict=True)), frontier_trials.Rates(own), other)
    assert rates() == frontier_trials.Rates(own), "its best is not found yet"
    tune(done, there, {3.2e-2: 2.0}, frontier_trials.Rates(own), other)
    assert rates() == frontier_trials.Rates((8e-3, 1.6e-2, 3.2e-2), there, other.prefix), "the row most like it"
    assert rates(("60k", "lora_modules")) == frontier_trials.Rates(ROWS["qwen"]["60k"]["lora_modules"].rates)
    stored = {"first_rates": [8e-3, 1.6e-2, 3.2e-2], "carried_from": list(there), "carried_suite": other.prefix}
    assert frontier_trials.Rates.stored(stored) == rates()


class NoModel:
    """Scores that need no model; what it is asked is noted."""

    def __init__(self, suite):
        pass

    def part(self, name):
        return {}, {"arc_easy": np.array([2, 3])}

    def score(self, adapter, part, choices=True):
        return {"nll": 3.0, "accuracy": 0.3 if choices else None, "score_s": 0.0}


@pytest.fixture
def program(one_row, monkeypatch, tmp_path):
    """Return what makes a program of one row whose trials are not trained, and the rates of those that were asked."""
    suite = frontier.Suite(tmp_path, "smollm2", "none", "commonsense", "none")
    given = argparse.Namespace(results=tmp_path / "r", sizes=["20k"], rows=None, seeds=1, time_limit=math.inf)
    given.trials_a_sweep, given.together, given.command, given.carry_rates = 1, "auto", "words", False
    given.rates_from = None
    tried = []

    def train(suite, chosen, together):
        tried.extend(trial.rate for trial in chosen)
        return [TrialResult(trial.name, {}, tmp_path, "finished") for trial in chosen]

    monkeypatch.setattr(frontier, "train", train)
    monkeypatch.setattr(frontier, "Scorer", NoModel)

    def made(described=None, **options):
        return frontier.Program(suite, argparse.Namespace(**{**vars(given), **options}), described or {})

    return made, tried


def test_a_trial_that_fails_has_no_result_and_is_not_tried_twice(program, monkeypatch, tmp_path, capsys):
    made, tried = program

    def train(suite, chosen, together):
        tried.extend(trial.rate for trial in chosen)
        return [TrialResult(trial.name, {}, tmp_path, "failed", error="no memory") for trial in chosen]

    monkeypatch.setattr(frontier, "train", train)
    assert made().execute() == 2
    assert sorted(tried) == [1e-3, 4e-3]
    assert all(result["row"] == "base" for result in trials.load(tmp_path / "r").values())
    assert "failed: no memory" in capsys.readouterr().out


def test_scores_that_fail_are_no_result_and_those_that_are_not_finite_are_one(program, monkeypatch, tmp_path, capsys):
    made, _ = program
    raised = iter([RuntimeError("out of memory"), NonFiniteScoresError("not finite")])
    bases = []

    class Scorer(NoModel):
        def __init__(self, suite):
            bases.append(suite)

        def score(self, adapter, part, choices=True):
            if adapter is None:
                return super().score(adapter, part)
            raise next(raised)

    monkeypatch.setattr(frontier, "Scorer", Scorer)
    assert made(trials_a_sweep=2).execute() == 1
    rates = [r for r in trials.load(tmp_path / "r").values() if r["row"] != "base"]
    assert [(r["rate"], r["nll"], r["status"], r["error"]) for r in rates] == [(4e-3, None, "diverged", "not finite")]
    assert "0.001: failed: RuntimeError: out of memory" in capsys.readouterr().out
    assert len(bases) == 2, "the failed one's adapter may be on the first"


def test_a_program_that_is_ended_while_it_scores_goes_on_with_that_sweep(program, monkeypatch, tmp_path):
    made, tried = program
    scored = []

    class Scorer(NoModel):
        def score(self, adapter, part, choices=True):
            if adapter is not None and len(scored) == 1:
                scored.append("ended")
                raise KeyboardInterrupt
            scored.extend([part] if adapter is not None else [])
            return super().score(adapter, part, choices)

    monkeypatch.setattr(frontier, "Scorer", Scorer)
    with pytest.raises(KeyboardInterrupt):
        made(trials_a_sweep=2).execute()
    assert tried == [1e-3, 4e-3]
    assert made(trials_a_sweep=2, time_limit=0).execute() == 1, "no time for it"
    assert made(trials_a_sweep=2).execute() == 0
    assert tried == [1e-3, 4e-3, 1e-3, 4e-3, 1e-3], "the same sweep, which is not trained again; then a seed"
    assert scored == ["dev", "ended", "dev", "test"], "what had a result is not scored again"
    assert not list((tmp_path / "sweeps").iterdir())


def test_no_sweep_begins_that_would_end_after_the_limit(program):
    made, _ = program
    one = made(trials_a_sweep=3)
    rates = frontier_trials.Rates((1e-3,))
    ready = {frontier.Trial("20k", "lora", seed, 1e-3): rates for seed in (trials.TUNING_SEED, 0, 1, 2)}
    seeds = lambda seconds: [trial.seed for trial in one.fitting(ready, seconds)]  # noqa: E731
    assert seeds(0.5) == [0, 1, trials.TUNING_SEED], "of the first, nobody knows how long it takes"
    one.pace = {True: 10.0}
    assert frontier_data.EPOCHS["commonsense"] == 2
    assert seeds(9) == []
    assert seeds(29) == [trials.TUNING_SEED], "which others wait for"
    assert (seeds(30), seeds(50)) == ([0, trials.TUNING_SEED], [0, 1, trials.TUNING_SEED])


def test_what_runs_unfused_comes_last_and_alone(program, monkeypatch):
    made, _ = program
    one = made(trials_a_sweep=3)
    others = {"krona": AdapterRow("krona", {}), "vera": AdapterRow("vera", {"rank": 8})}
    monkeypatch.setitem(ROWS["smollm2"], "20k", {**ROWS["smollm2"]["20k"], **others})
    ready = {frontier.Trial("20k", row, 0, 1e-3): frontier_trials.Rates((1e-3,)) for row in ("krona", "lora", "vera")}
    rows = lambda: [trial.row for trial in one.fitting(ready, math.inf)]  # noqa: E731
    assert rows() == ["lora"]
    del ready[frontier.Trial("20k", "lora", 0, 1e-3)]
    assert rows() == ["krona", "vera"]
    one.pace = {True: 1e9}
    assert rows() == ["krona", "vera"], "their time is not that of others"


def test_rows_that_are_said_to_run_unfused_do():
    methods = {row.method: row.is_fused for sizes in ROWS.values() for rows in sizes.values() for row in rows.values()}
    ours = {name: METHODS[name].is_low_rank() for name in methods if name not in ("lora", "vera", "tinylora")}
    assert methods == {**ours, "lora": True, "vera": False, "tinylora": False}


def test_results_of_other_data_are_not_mixed(program):
    made, _ = program
    assert made({"arc_easy": "one"}).execute() == 0
    with pytest.raises(SystemExit, match="is of other rows than --data has"):
        made({"arc_easy": "another"}, seeds=2).execute()


@pytest.fixture
def one_row(monkeypatch):
    """One row on the tiny model, two rates, and packs of which attention takes a sixteenth."""
    rows = {"lora": AdapterRow("lora", {"rank": 1, "alpha": 2.0})}
    monkeypatch.setitem(ROWS, "smollm2", {"20k": rows})
    monkeypatch.setattr(AdapterRow, "rates", (1e-3, 4e-3))
    monkeypatch.setattr(frontier_trials, "MOST_BEYOND", 0)
    monkeypatch.setitem(frontier.REGIMES, "commonsense", ("arc_easy", "openbookqa"))
    monkeypatch.setattr(frontier, "PACKS", 2)
    monkeypatch.setattr(frontier, "LONGEST", 256)


def test_trials_are_trained_together_scored_and_kept(one_row, data, tmp_path, capsys):
    model = save_llama(tmp_path / "model", num_hidden_layers=2)
    words = ["--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    words += ["--model", f"smollm2={model}", "--base", "none", "--sizes", "20k", "--seeds", "2", "--smoke"]
    assert frontier.main([*words, "--together", "2"]) == 0
    done = trials.load(tmp_path / "results")
    tests = [r for r in done.values() if r["part"] == "test" and r["row"] != "base"]
    assert sorted((r["row"], r["seed"]) for r in tests) == [("lora", 0), ("lora", 1)]
    for result in tests:
        tried = {r["rate"]: r["nll"] for r in done.values() if r["row"] == result["row"] and r["part"] == "dev"}
        assert result["rate"] == min(tried, key=tried.get)
        tokens = frontier_scores.answer_tokens(done, ("smollm2", "commonsense", "none"))
        losses = rate_trials.unpacked(result["losses"])
        assert losses.sum() / tokens.sum() == pytest.approx(result["nll"], rel=1e-3)
        assert 0 <= result["accuracy"] <= 1
    rates = [r for r in done.values() if r["part"] == "dev" and r["row"] != "base"]
    assert {r["accuracy"] for r in rates} == {None}, "rates are chosen by the right answers alone"
    assert all("score_s" in r for r in done.values())
    assert "all trials are done" in capsys.readouterr().out
    assert frontier.main(words) == 0  # nothing is done again
    assert trials.load(tmp_path / "results") == done
    assert "trials can be done" not in capsys.readouterr().out


def test_right_answers_alone_have_the_nats_that_they_have_among_all_choices(one_row, data, tmp_path):
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    suite = frontier.Suite(tmp_path, "smollm2", model, "commonsense", "none", limit=16)
    frontier.write_parts(data, tmp_path, "commonsense")
    scorer = frontier.Scorer(suite)
    among, alone = (scorer.score(None, "dev", choices=choices) for choices in (True, False))
    assert alone["nll"] == pytest.approx(among["nll"], rel=1e-2)
    assert (among["accuracy"] is None, alone["accuracy"]) == (False, None)
    tasks = [{task: of_task["nll"] for task, of_task in one["tasks"].items()} for one in (among, alone)]
    assert tasks[1] == pytest.approx(tasks[0], rel=1e-2)


def test_questions_of_gsm8k_are_answered_by_the_adapter_that_is_scored(one_row, tmp_path, monkeypatch):
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is\u2028 {2 * n}.\n#### {2 * n}"} for n in range(40)]
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for part in ("train", "test"):
        with gzip.open(folder / f"{part}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    asked = []

    def answers(model, tokenizer, rows, batch, longest):
        asked.append((getattr(model, "peft_config", None) is not None, model.training, rows[3]))
        return [row["answer"] == "#### 6" for row in rows]

    monkeypatch.setattr(frontier, "right_answers", answers)
    words = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r"), "--answers"]
    words += ["--model", f"smollm2={model}", "--regime", "gsm8k", "--base", "none", "--sizes", "20k", "--seeds", "1"]
    assert frontier.main([*words, "--smoke"]) == 0
    done = trials.load(tmp_path / "r")
    accuracies = {(r["row"], r["part"], r.get("seed") == trials.TUNING_SEED): r["accuracy"] for r in done.values()}
    tests = {key: value for key, value in accuracies.items() if key[1] == "test"}
    assert set(tests.values()) == {1 / 16}, "one of 16 questions, of the base and of a seed"
    assert {value for key, value in accuracies.items() if key not in tests} == {None}
    question = {"prompt": "Question: What is 3 and 3?\nAnswer:", "answer": "#### 6"}
    assert asked == [(False, False, question), (True, False, question)]
    (score,) = frontier_scores.rows(done)
    assert score.accuracy == 1 / 16
    assert score.right.tolist() == [[n == 3 for n in range(16)]]
    with pytest.raises(SystemExit):
        frontier.main([word for word in words if word not in ("--regime", "gsm8k")])


SMALL_ROWS = {
    "lsr": {"rank": 2, "separation_rank": 2},
    "lora": {"rank": 2},
    "lora_xs": {"rank": 4},
    "vera": {"rank": 4},
    "krona": {},
}


def test_adapters_scored_one_after_the_other_have_the_scores_that_each_has_alone(data, tmp_path, monkeypatch):
    model = str(save_llama(tmp_path / "model", num_hidden_layers=2))
    suite = frontier.Suite(tmp_path, "smollm2", model, "commonsense", "nf4", limit=4)
    monkeypatch.setitem(frontier.REGIMES, "commonsense", ("arc_easy",))
    frontier.write_parts(data, tmp_path, "commonsense")
    folders = {}
    for method, options in SMALL_ROWS.items():
        for seed in (1, 2):
            base = frontier.Scorer(suite).base
            adapted = inject(base, method, {"target_modules": SEVEN_LINEARS, **options}, "causal_lm")
            write_adapter(randomize(adapted, seed=seed), tmp_path / f"{method}-{seed}")
            folders[method, seed] = tmp_path / f"{method}-{seed}"
    injected, load = [], frontier.load_adapter
    monkeypatch.setattr(frontier, "load_adapter", lambda base, folder: injected.append(folder) or load(base, folder))

    def scores(scorer, folder):
        return {name: value for name, value in scorer.score(folder, "dev").items() if name != "score_s"}

    alone = {place: scores(frontier.Scorer(suite), folder) for place, folder in folders.items()}
    assert len({one["nll"] for one in alone.values()}) == len(folders)
    of_base = scores(frontier.Scorer(suite), None)
    injected.clear()
    scorer = frontier.Scorer(suite)
    for place, folder in folders.items():
        assert scores(scorer, folder) == alone[place], place
    assert injected == [folder for (_, seed), folder in folders.items() if seed == 1], "one of each method"
    for place in (("lsr", 2), ("lsr", 1), ("krona", 2), ("lsr", 2)):
        assert scores(scorer, folders[place]) == alone[place], place
    assert scores(scorer, None) == of_base
