"""The frontier: rows of their size, all tuned alike, trials that are kept, and verdicts that know what they can say."""

import argparse
import dataclasses
import math

import numpy as np
import pytest
import torch

from benchmarks.quality import frontier, frontier_verdicts, grpo_gsm8k, rate_trials, trials
from benchmarks.quality.frontier_rows import HIDDEN_SIZE, NUM_LAYERS, ROWS, TOLERANCE, AdapterRow, target
from benchmarks.report import frontier_tables
from lsr_scale.adapters.inject import inject
from lsr_scale.sweeping.results import TrialResult
from tests.helpers.frontier_trials import made_up, write
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
    assert frontier.rates_to_try(row, {2e-3: 1.0}) == (4e-3, 8e-3, 1.6e-2)
    inside = {2e-3: 2.0, 4e-3: 1.0, 8e-3: 2.0, 1.6e-2: 3.0}
    assert frontier.rates_to_try(row, inside) == ()
    high = {2e-3: 4.0, 4e-3: 3.0, 8e-3: 2.0, 1.6e-2: 1.0}
    assert frontier.rates_to_try(row, high) == (3.2e-2,)
    assert frontier.rates_to_try(row, {**high, 3.2e-2: math.inf}) == ()  # diverged
    low = {2e-3: 1.0, 4e-3: 2.0, 8e-3: 3.0, 1.6e-2: 4.0}
    assert frontier.rates_to_try(row, low) == (1e-3,)
    assert frontier.rates_to_try(row, {**low, 1e-3: 0.5}) == (5e-4,)
    assert frontier.rates_to_try(row, {**low, 1e-3: 0.5, 5e-4: 0.4}) == ()  # two beyond are all


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


def test_verdicts_separate_what_differs_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier_verdicts, "DRAWS", 1_000)
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
    assert better.low < better.difference < better.high < 0
    assert (same.ours.size, same.ours.row, same.wins) == ("60k", "lsr_2_2", False)
    assert same.corrected_p >= 0.05
    table = "\n".join(frontier_tables.sections(tmp_path))
    assert "| ours |" in table
    assert "| no separation |" in table
    ((path, plot),) = frontier_tables.plots(tmp_path).items()
    plot.draw(path)
    assert path.is_file()


def test_questions_are_drawn_alike_for_all_rows_and_seeds_of_each():
    draw = np.random.default_rng(0)
    tokens, common = draw.integers(1, 9, 300), draw.gamma(4.0, 1.0, 300)
    one, other = common + draw.normal(0, 0.1, (3, 300)), common + 0.5 + draw.normal(0, 0.1, (2, 300))
    first, second = frontier_verdicts.drawn([one, other], tokens).T
    assert first.mean() == pytest.approx(one.mean(0).sum() / tokens.sum(), rel=0.01)
    paired, apart = (second - first).std(), math.hypot(first.std(), second.std())
    assert paired < apart / 3, "what is common to both rows is none of their difference"
    lone = frontier_verdicts.drawn([common[None]], tokens)[:, 0].std()
    assert lone == pytest.approx(frontier.mean_per_token(common, tokens)[1], rel=0.1)
    far = np.stack([common, common + 4.0])  # seeds that spread are drawn too
    assert frontier_verdicts.drawn([far], tokens)[:, 0].std() > 2 * lone


def test_a_row_is_compared_with_all_that_lost_less_and_corrected_for_all_others(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier_verdicts, "DRAWS", 1_000)
    rows = {"lora_modules": 0.0, "lsr_2_2": 0.0, "kron_lora": 0.1, "vera": 0.3}
    write(tmp_path, *(made_up("60k", row, shift) for row, shift in rows.items()))
    over = frontier_verdicts.over_lower(frontier_verdicts.load(tmp_path).scores)
    assert sorted(map(len, over.values())) == [0, 1, 2, 3]
    assert all(one.difference > 0 for several in over.values() for one in several)
    assert {one.theirs.row for one in over["vera"]} == {"lora_modules", "lsr_2_2", "kron_lora"}
    assert [one.corrected_p for one in over["vera"]] == pytest.approx([3 * 2 / 1001] * 3)
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


def test_a_row_with_a_seed_that_diverged_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier_verdicts, "DRAWS", 500)
    *kept, lost = made_up("20k", "lsr_1_1", 0.0)
    write(tmp_path, made_up("20k", "lora_modules", 0.0), [*kept, {**lost, "nll": None}])
    assert [score.row for score in frontier_verdicts.load(tmp_path).scores] == ["lora_modules"]
    assert "Diverged, and their rows left out: smollm2-commonsense-nf4-20k-lsr_1_1-seed2" in "\n".join(
        frontier_tables.sections(tmp_path)
    )


def test_a_trial_that_fails_has_no_result_and_is_not_tried_twice(one_row, monkeypatch, tmp_path, capsys):
    suite = frontier.Suite(tmp_path, "smollm2", "none", "commonsense", "none")
    tried = []

    def train(suite, chosen, together):
        tried.extend(trial.rate for trial in chosen)
        return [TrialResult(trial.name, {}, tmp_path, "failed", error="no memory") for trial in chosen]

    class Scorer:
        def __init__(self, suite):
            pass

        def part(self, name):
            return {}, {"arc_easy": np.array([2, 3])}

        def score(self, adapter, part, choices=True):
            return {"nll": 3.0, "accuracy": 0.3}

    monkeypatch.setattr(frontier, "train", train)
    monkeypatch.setattr(frontier, "Scorer", Scorer)
    given = argparse.Namespace(results=tmp_path / "r", sizes=["20k"], rows=None, seeds=1, time_limit=math.inf)
    given.trials_a_sweep, given.together, given.command = 1, "auto", "words"
    assert frontier.execute(suite, given, {}) == 2
    assert sorted(tried) == [1e-3, 4e-3]
    assert all(result["row"] == "base" for result in trials.load(tmp_path / "r").values())
    assert "failed: no memory" in capsys.readouterr().out


@pytest.fixture
def one_row(monkeypatch):
    """One row on the tiny model, and two rates."""
    rows = {"lora": AdapterRow("lora", {"rank": 1, "alpha": 2.0})}
    monkeypatch.setitem(ROWS, "smollm2", {"20k": rows})
    monkeypatch.setattr(frontier.AdapterRow, "rates", (1e-3, 4e-3))
    monkeypatch.setattr(frontier, "MOST_BEYOND", 0)
    monkeypatch.setitem(frontier.REGIMES, "commonsense", ("arc_easy", "openbookqa"))


def test_trials_are_trained_together_scored_and_kept(one_row, data, tmp_path, capsys):
    model = save_llama(tmp_path / "model")
    words = ["--data", str(data), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    words += ["--model", f"smollm2={model}", "--base", "none", "--sizes", "20k", "--seeds", "2", "--smoke"]
    assert frontier.main([*words, "--together", "2"]) == 0
    done = trials.load(tmp_path / "results")
    tests = [r for r in done.values() if r["part"] == "test" and r["row"] != "base"]
    assert sorted((r["row"], r["seed"]) for r in tests) == [("lora", 0), ("lora", 1)]
    for result in tests:
        tried = {r["rate"]: r["nll"] for r in done.values() if r["row"] == result["row"] and r["part"] == "dev"}
        assert result["rate"] == min(tried, key=tried.get)
        tokens = frontier_verdicts.answer_tokens(done, ("smollm2", "commonsense", "none"))
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
    suite = frontier.Suite(tmp_path, "smollm2", str(save_llama(tmp_path / "model")), "commonsense", "none", limit=16)
    frontier.write_parts(data, tmp_path, "commonsense")
    scorer = frontier.Scorer(suite)
    among, alone = (scorer.score(None, "dev", choices=choices) for choices in (True, False))
    assert alone["nll"] == pytest.approx(among["nll"], rel=1e-2)
    assert (among["accuracy"] is None, alone["accuracy"]) == (False, None)
    tasks = [{task: of_task["nll"] for task, of_task in one["tasks"].items()} for one in (among, alone)]
    assert tasks[1] == pytest.approx(tasks[0], rel=1e-2)
