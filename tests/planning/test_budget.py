"""Proposals for a budget: never over it, counted as the model itself would be, and usable as they stand."""

import functools
import json
import statistics

import pytest
from peft import get_peft_model

from benchmarks.quality import ablations, trials
from benchmarks.report import commonsense_tables
from lsr_scale import UserError
from lsr_scale.adapters import peft_config
from lsr_scale.cli import main
from lsr_scale.config import load_run
from lsr_scale.model import DTYPES, load_config, meta_model
from lsr_scale.planning import evidence
from lsr_scale.planning.budget import propose
from lsr_scale.units import parse_count

SMOLLM2, MISTRAL = "HuggingFaceTB/SmolLM2-135M", "mistralai/Mistral-7B-v0.1"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path_factory, monkeypatch):
    """No results by size, so that proposals are by rule; test_evidence.py has those by results."""
    file = tmp_path_factory.mktemp("evidence") / "frontier.json"
    file.write_text('{"suites": []}')
    monkeypatch.setattr(evidence, "FILE", file)


@pytest.mark.parametrize(
    ("text", "count"), [("4M", 4_000_000), ("1.5m", 1_500_000), ("500k", 500_000), ("2,500", 2500), ("1_000", 1000)]
)
def test_a_budget_is_read(text, count):
    assert parse_count(text, "--budget") == count


@pytest.mark.parametrize("text", ["", "M", "-4M", "0", "nan", "inf", "4 apples"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError, match="such as 4M"):
        parse_count(text, "--budget")


@pytest.mark.parametrize("budget", [22_000, 349_440, 1_400_000, 20_000_000])
def test_proposals_keep_to_the_budget_and_count_what_is_injected(budget):
    result = propose(SMOLLM2, budget)
    assert result.adapted_modules == 210
    for proposal in result.proposals:
        assert proposal.parameters <= budget
        base = meta_model(load_config(SMOLLM2, None), "causal_lm", None, DTYPES["bfloat16"], "auto")
        options = {"target_modules": "all-linear", **proposal.options}
        model = get_peft_model(base, peft_config(proposal.method, options))
        assert model.get_nb_trainable_parameters()[0] == proposal.parameters


def test_more_parameters_never_propose_a_smaller_adapter():
    grown = [
        {p.method: p.parameters for p in propose(SMOLLM2, 2**power * 10_000).proposals} for power in range(2, 11, 2)
    ]
    for method in ("lsr", "kron_lora", "lora", "lora_xs"):
        counts = [found.get(method, 0) for found in grown]
        assert counts == sorted(counts)


def test_lora_comes_first_where_it_was_measured_ahead_and_not_where_it_does_not_fit():
    small, large = propose(SMOLLM2, 300_000), propose(SMOLLM2, 1_400_000)
    assert [proposal.method for proposal in small.proposals] == ["lsr", "kron_lora", "lora_xs"]
    assert small.proposals[0].options == {"rank": 4, "separation_rank": 6, "alpha": 8.0}  # not 16 with 3
    assert large.proposals[0].method == "lora"
    assert large.proposals[1].options == {"rank": 16, "separation_rank": 16, "alpha": 32.0}
    (said,) = small.notes
    assert "there is no evidence which method is best" in said
    assert "hidden size 576 only" in propose(MISTRAL, 4_000_000).notes[1]


def test_what_the_proposals_claim_stands_in_the_committed_results():
    results = commonsense_tables.load(commonsense_tables.RESULTS)
    row = functools.partial(commonsense_tables.seeds_of, results, "joint", "bf16")
    for lora, others in {"lora_1": ("lsr_4_7",), "lora_2": ("lsr_4_14", "lsr_16_7", "kron_lora_7")}.items():
        for other in others:
            found = commonsense_tables.compare(row(other), row(lora))
            assert found.value < 0, f"{other} is more accurate than {lora}"
    # few terms of a high rank are worse than many of a low one, of the same size
    assert commonsense_tables.compare(row("lsr_4"), row("lsr_64_4")).interval[0] > 0
    tested = [r for r in trials.load(ablations.RESULTS).values() if r["seed"] != trials.TUNING_SEED]
    mean = {n: statistics.fmean(r["score"] for r in tested if r["provider"] == n) for n in ("r16_s4", "r16_s8")}
    assert mean["r16_s8"] > mean["r16_s4"] + 0.02


def test_a_budget_that_nothing_fits_says_what_would():
    with pytest.raises(UserError, match=r"smallest LoRA-XS has 210 parameters, LoRA of rank 1 305,280"):
        propose(SMOLLM2, 200)
    assert [proposal.method for proposal in propose(SMOLLM2, 5000).proposals] == ["lora_xs"]


def test_the_command_prints_a_run_s_file_of_80_columns(tmp_path, capsys, monkeypatch):
    for columns in ("80", "200"):  # the same, wherever it is read or piped to
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["plan", "--budget", "260k", "--model", SMOLLM2]) == 0
        page = capsys.readouterr().out
        assert max(map(len, page.splitlines())) <= 80
    (tmp_path / "run.yaml").write_text(page)
    assert main(["config", str(tmp_path / "run.yaml")]) == 0
    run = load_run(tmp_path / "run.yaml")
    assert (run.model.name, run.adapter.method, run.adapter.options["rank"]) == (SMOLLM2, "lsr", 4)
    capsys.readouterr()
    assert main(["plan", "--budget", "260k", "--model", SMOLLM2, "--json"]) == 0
    proposal = json.loads(capsys.readouterr().out)["proposals"][0]
    assert proposal["parameters"] == 218_400
    assert run.training["learning_rate"] == proposal["learning_rate"]
    assert "218,400" in page


def test_the_file_that_is_proposed_keeps_the_rest_of_the_configuration(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"model: {{name: {SMOLLM2}, quantization: none}}\nadapter: {{method: kron_lora, target_modules: [q_proj]}}\n"
        "data: {train: [x]}\ntraining: {seed: 7, learning_rate: 1}\n"
    )
    assert main(["plan", str(tmp_path / "run.yaml"), "--budget", "100k"]) == 0
    (tmp_path / "proposed.yaml").write_text(capsys.readouterr().out)
    run = load_run(tmp_path / "proposed.yaml")
    assert (run.model.quantization, run.training["seed"], run.data.train[0].path) == ("none", 7, "x")
    assert (run.adapter.method, run.adapter.options["target_modules"]) == ("lora", ["q_proj"])
    assert run.training["learning_rate"] == 2e-3


def test_a_configuration_gives_model_and_targets(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{name: {SMOLLM2}}}\nadapter: {{method: lora, target_modules: [q_proj, v_proj]}}\n"
        "data: {train: [x]}\n"
    )
    assert main(["plan", str(path), "--budget", "100k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapted_modules"] == 60
    assert main(["plan", str(path), "--budget", "100k", "--model", SMOLLM2]) == 2
    assert main(["plan", "--model", SMOLLM2]) == 2
    assert "--model goes with --budget" in capsys.readouterr().err
