"""Proposals by what was measured at a size: the lowest loss, or the simplest that does not separate from it."""

import json

import pytest
from peft import get_peft_model

from benchmarks.report import frontier_evidence
from lsr_scale.adapters import peft_config
from lsr_scale.cli import main
from lsr_scale.config import load_run
from lsr_scale.model import DTYPES, load_config, meta_model
from lsr_scale.planning import evidence
from lsr_scale.planning.at_size import adapted_modules, fitted
from lsr_scale.planning.budget import propose
from tests.helpers.frontier_trials import made_up, write

SMOLLM2, MISTRAL = "HuggingFaceTB/SmolLM2-135M", "mistralai/Mistral-7B-v0.1"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Return a function that takes made-up rows as all that was measured."""

    def take(*rows):
        file = tmp_path / "frontier.json"
        file.write_text(frontier_evidence.text(write(tmp_path / "results", *rows)))
        monkeypatch.setattr(evidence, "FILE", file)
        evidence._read.cache_clear()  # the same file, written again

    return take


def test_what_is_shipped_can_be_read():
    for suite in evidence.load():
        for size in suite.sizes:
            assert [row.nats for row in size.rows] == sorted(row.nats for row in size.rows)
            assert all(row.seeds >= 2 and not row.diverged for row in size.rows)


def test_what_was_measured_fits_the_model_that_it_was_measured_on():
    base = meta_model(load_config(SMOLLM2), "causal_lm", None, DTYPES["bfloat16"], "auto")  # pyright: ignore
    modules = adapted_modules(base, "all-linear", "causal_lm")
    methods = set()
    for suite in evidence.load():
        rows = [row for size in suite.sizes for row in (*size.rows, *size.not_compared)]
        for row in rows if suite.model == "SmolLM2-135M" else []:
            options, parameters = fitted(row, suite.num_layers, modules, row.parameters, "all-linear") or ({}, 0)
            assert (parameters, options) == (row.parameters, {**options, **row.options}), row.label
            methods.add(row.method)
    assert methods >= {"lora", "lora_xs", "slora", "vera", "krona", "kron_lora", "lsr"}


def test_a_size_of_which_a_side_was_only_tuned_proposes_nothing_where_another_one_can(measured):
    qwen = ("qwen", "commonsense", "nf4")
    rows = [made_up("150k", "lora_xs", 0.0, suite=qwen)]
    measured(*rows)
    assert propose(MISTRAL, 1_000_000).proposals[0].method == "lora_xs", "nothing else was measured"
    rows += [made_up("150k", "lora_xs", 0.0), made_up("150k", "lsr_2_5", -0.1)]
    measured(*rows, made_up("150k", "lsr_4_6", -0.1, suite=qwen, seeds=0))
    assert propose(MISTRAL, 1_000_000).proposals[0].method == "lsr"
    measured(made_up("150k", "lsr_4_6", 0.1, suite=qwen))
    assert propose(MISTRAL, 1_000_000).proposals[0].method == "lora_xs", "as Qwen's width is nearer"


def test_the_lowest_loss_is_proposed_with_its_rate_and_what_carries_it(measured):
    rows = {"lora_modules": 0.0, "kron_lora": 0.02, "lsr_2_2": -0.1, "lsr_8_1": 0.1}
    measured(*(made_up("60k", row, shift, rate=1.6e-2) for row, shift in rows.items()))
    result = propose(SMOLLM2, 64_000)
    first = result.proposals[0]
    assert (first.method, first.learning_rate, first.optimizer) == ("lsr", 1.6e-2, None)
    assert first.options == {"rank": 2, "separation_rank": 2, "alpha": 4.0}
    assert [p.method for p in result.proposals] == ["lsr", "lora", "kron_lora", "lsr"]
    carried = result.measured
    assert (carried.row, carried.other, carried.seeds, carried.size) == ("lsr_2_2", "lora_modules", 3, "60k")
    assert carried.difference.difference == pytest.approx(0.1, abs=0.01)
    assert carried.difference.low < carried.difference.difference < carried.difference.high
    for words in (
        "60,000 parameters on SmolLM2-135M, five commonsense tasks",
        "base in nf4",
        "LoRA r=1 on q, v",
        "3 seeds",
        "corrected p < 0.0001",
    ):
        assert words in result.reason
    assert "carried by lsr_2_2 and lora_modules at 60k in benchmarks/results/frontier" in result.notes
    assert "nats are what the measured adapters lost, on SmolLM2-135M" in result.notes
    assert not any("far from" in note for note in result.notes)


def test_of_methods_that_do_not_separate_the_simpler_is_proposed_and_that_is_said(measured):
    measured(made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", -0.0005), made_up("60k", "vera", 0.4))
    result = propose(SMOLLM2, 64_000)
    assert [p.method for p in result.proposals] == ["lora", "lsr", "vera"]
    assert result.proposals[0].options["target_modules"] == ["q_proj", "v_proj"]
    assert "not separate" in result.reason
    assert "simpler one" in result.reason


def test_a_size_that_was_not_measured_is_said_to_be_far(measured):
    measured(made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", -0.1))
    (far,) = [note for note in propose(SMOLLM2, 180_000).notes if "far from" in note]
    assert "7.4 % of LoRA r=8's parameters, the nearest size 2.5 %, a factor of 3.0" in far


def test_the_base_that_is_held_alike_carries_and_the_other_is_named(measured):
    suites = [("smollm2", "commonsense", base) for base in ("nf4", "none")]
    rows = ("lora_modules", "lsr_2_2")
    measured(
        *(made_up("60k", row, 0.1 * (i == j), suite=s) for i, s in enumerate(suites) for j, row in enumerate(rows))
    )
    quantized, plain = propose(SMOLLM2, 64_000), propose(SMOLLM2, 64_000, quantization="none")
    assert (quantized.proposals[0].method, plain.proposals[0].method) == ("lsr", "lora")
    assert "base in nf4" in quantized.measured.suite
    assert any("base in bf16" in note and "LoRA r=1 on q, v lost least" in note for note in quantized.notes)


SIZES = {
    "20k": ("lora_layers", "krona", "kron_lora", "tinylora", "lsr_1_1"),
    "300k": ("lora", "slora", "lora_xs", "inttune", "vera", "krona", "kron_lora", "lsr_4_7", "lsr_8_5+gradient_rite"),
}


@pytest.mark.parametrize(
    ("model", "budget", "least"), [(SMOLLM2, 22_000, 5), (SMOLLM2, 330_000, 8), (MISTRAL, 2_800_000, 7)]
)
def test_proposals_keep_to_the_budget_and_count_what_is_injected(measured, model, budget, least):
    suite = ("smollm2", "commonsense", "none")
    measured(*(made_up(size, row, 0.0, suite=suite) for size, rows in SIZES.items() for row in rows))
    result = propose(model, budget, quantization="none")
    assert len(result.proposals) >= least
    for proposal in result.proposals:
        assert budget / 2 <= proposal.parameters <= budget
        base = meta_model(load_config(model, None), "causal_lm", None, DTYPES["bfloat16"], "auto")
        options = {"target_modules": "all-linear", **proposal.options}
        adapted = get_peft_model(base, peft_config(proposal.method, options))
        assert adapted.get_nb_trainable_parameters()[0] == proposal.parameters, proposal


def test_tinylora_is_for_bases_that_are_not_quantized(measured):
    suite = ("smollm2", "commonsense", "none")
    measured(made_up("20k", "tinylora", -0.2, suite=suite), made_up("20k", "lsr_1_1", 0.0, suite=suite))
    assert propose(SMOLLM2, 22_000, quantization="none").proposals[0].method == "tinylora"
    assert [p.method for p in propose(SMOLLM2, 22_000).proposals] == ["lsr"]


def test_a_wide_model_s_rate_is_scaled_and_that_is_said(measured):
    measured(made_up("60k", "lsr_2_2", 0.0, rate=8e-3), made_up("60k", "lora_modules", 0.1, rate=8e-3))
    result = propose(MISTRAL, 520_000)
    assert [p.learning_rate for p in result.proposals] == [2e-3, 8e-4]  # a quarter, and a tenth
    assert any("scaled to width 4,096" in note for note in result.notes)


def test_where_nothing_measured_fits_proposals_are_by_rule(measured):
    measured(made_up("60k", "lora_modules", 0.0), made_up("60k", "vera", 0.4))  # q and v, that a run leaves out
    result = propose(SMOLLM2, 64_000, ["down_proj"])
    assert result.measured is None
    assert any("no adapter that was compared by size fits here" in note for note in result.notes)


def test_the_file_trains_with_the_measured_optimizer_and_layers(measured, tmp_path, capsys):
    measured(made_up("60k", "lsr_2_2+gradient_rite", -0.1, rate=8e-3), made_up("60k", "lora_layers", 0.0))
    assert main(["plan", "--budget", "64k", "--model", SMOLLM2]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    (tmp_path / "run.yaml").write_text(page)
    run = load_run(tmp_path / "run.yaml")
    assert (run.adapter.options["init"], run.training["optim"]) == ("gradient", "lora_rite")
    assert run.training["learning_rate"] == 8e-3
    assert "in layers 24 to 29" in " ".join(page.replace("#", " ").split())
    assert main(["plan", "--budget", "64k", "--model", SMOLLM2, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["measured"]["row"] == "lsr_2_2+gradient_rite"
    assert document["proposals"][1]["options"]["layers_to_transform"] == [24, 25, 26, 27, 28, 29]


def test_a_row_without_seeds_that_lost_less_where_rates_are_chosen_is_said(measured):
    rows = [made_up("60k", "lora_modules", 0.0), made_up("60k", "lsr_2_2", -0.05)]
    *kept, lost = made_up("60k", "kron_lora", -0.1)
    others = [made_up("60k", row, shift, seeds=0) for row, shift in {"vera": -0.2, "krona": 0.1}.items()]
    measured(*rows, *others, [*kept, {**lost, "nll": None}])
    (said,) = [note for note in propose(SMOLLM2, 64_000).notes if "where rates are chosen" in note]
    assert said.startswith("VeRA r=600 on q, v (1.8000; without two seeds) and Kron-LoRA r=1 (4, 16) (1.9000; a seed")
    assert "of it diverged) lost less than LSR-Adapt r=2 s=2 (1.9500 nats)" in said
    assert "KronA" not in said
    (size,) = evidence.load()[0].sizes
    assert [(row.row, row.seeds, row.diverged) for row in size.not_compared] == [
        ("kron_lora", 3, 1),
        ("krona", 0, 0),
        ("vera", 0, 0),
    ]


GSM8K = ("smollm2", "gsm8k", "nf4")


def test_kinds_of_text_that_disagree_are_both_named_and_near_budgets_have_one_reason(measured):
    """On one kind of text LSR-Adapt is ahead, on the other LoRA: not the number of rows decides, but that of sizes."""
    rows = [made_up(size, row, 0.0) for size in ("60k", "150k") for row in ("lora_modules",)]
    rows += [made_up("60k", "lsr_2_2", -0.1), made_up("150k", "lsr_2_5", -0.1)]
    rows += [made_up("60k", row, shift, suite=GSM8K) for row, shift in {"lora_modules": 0.0, "lsr_2_2": 0.1}.items()]
    measured(*rows, *(made_up("60k", row, 0.2, suite=GSM8K) for row in ("lora_xs", "kron_lora", "lora_output")))
    for budget in (58_000, 64_000, 90_000):
        result = propose(SMOLLM2, budget)
        assert result.proposals[0].method == "lsr"
        assert "five commonsense tasks" in result.measured.suite
        assert "kinds of text do not agree: on GSM8K's solutions LoRA r=1 on q, v would be proposed" in result.reason
        assert result.reason.endswith("and five commonsense tasks is taken as it was measured at more sizes")
    assert "do not agree" not in propose(SMOLLM2, 160_000).reason, "there one alone was measured"


def test_of_models_the_nearest_in_width_carries(measured):
    qwen = ("qwen", "commonsense", "nf4")
    rows = {"lora_modules": 0.0, "lora_layers": 0.1, "kron_lora": 0.2}
    measured(
        *(made_up(size, row, shift) for size in ("20k", "60k") for row, shift in rows.items()),
        *(made_up("60k", row, 0.0, suite=qwen) for row in ("lora_modules", "kron_lora")),
    )
    assert "Qwen2.5" in propose(MISTRAL, 520_000).measured.suite
    assert "SmolLM2" in propose(SMOLLM2, 64_000).measured.suite


def test_a_proposed_adapter_of_another_size_than_the_evidence_is_said(measured):
    measured(*(made_up(size, row, 0.1 * (row != "slora")) for size in ("300k", "600k") for row in ("slora", "lora")))
    result = propose(MISTRAL, 4_096_000)
    assert (result.measured.size, result.proposals[0].options["rank"]) == ("600k", 1)
    (said,) = [note for note in result.notes if "the evidence is of" in note]
    assert "is of 25 % of LoRA r=8's parameters; the proposed adapter has 13 % of them, nearer to 12 %" in said
    own = propose(MISTRAL, result.proposals[0].parameters)
    assert (own.measured.size, own.proposals[0].options["rank"]) == ("300k", 1)
    assert not any("the evidence is of" in note for note in own.notes)


def test_a_row_that_ended_worse_than_the_base_once_is_not_proposed_as_the_simpler_one(measured):
    *kept, lost = made_up("60k", "lora_modules", 0.0)
    (worse,) = [r for r in made_up("60k", "lora_modules", 6.0) if r["seed"] == lost["seed"]]
    measured([*kept, worse], made_up("60k", "lsr_2_2", -0.05))
    result = propose(SMOLLM2, 64_000)
    assert (result.proposals[0].method, result.measured.difference.separates) == ("lsr", False)
