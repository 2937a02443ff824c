"""Reinforcement by small adapters: rows of their size, tuned alike, kept, right answers, and the tables."""

import functools
import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.quality import generated_answers, grpo_gsm8k, trials
from benchmarks.quality.frontier_rows import NUM_LAYERS, AdapterRow
from benchmarks.quality.grpo_gsm8k import Suite, Trial
from benchmarks.quality.grpo_rows import RATES, ROWS, SIZES, TOLERANCE, TRAININGS
from benchmarks.quality.rate_trials import unpacked
from benchmarks.quality.trials import TUNING_SEED
from lsr_scale import api
from lsr_scale.adapters.inject import inject
from lsr_scale.config import run_from_dict
from lsr_scale.errors import UserError
from lsr_scale.run.folder import RunFolder
from tests.benchmarks.test_frontier import linears
from tests.helpers.tiny_runs import do_all_here, save_llama


def test_every_row_has_its_size_and_a_factor_between_its_rates():
    for name, row in ROWS.items():
        adapted = inject(
            linears("qwen"), row.method, {k: v for k, v in row.section().items() if k != "method"}, "causal_lm"
        )
        count = NUM_LAYERS["qwen"] * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert abs(math.log(count / SIZES[name])) < TOLERANCE, (name, count)
        for training in TRAININGS:
            low, middle, high = RATES[training][name]
            assert middle / low == pytest.approx(high / middle, rel=1e-3)


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [
        {"question": f"What\u2028is {i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(9)
    ]
    for name, part in (("train", rows), ("test", rows[:5])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().rstrip().split("\n")]


def test_both_trainings_have_the_same_questions_in_the_same_steps(tmp_path, gsm8k):
    described = grpo_gsm8k.write_rows(gsm8k, tmp_path / "work")
    assert {name: one["rows"] for name, one in described.items()} == {"grpo": 9, "sft": 9, "test": 5}
    suite = Suite(tmp_path / "work", "tiny", "model", prompts=3, steps=2, tuning_steps=1)
    rl, sft = (lines(grpo_gsm8k.drawn_rows(suite, Trial(name, "lora_8", 1, 1e-3))) for name in TRAININGS)
    assert [row["prompt"] for row in rl] == [row["prompt"] for row in sft]
    assert len(rl) == 6
    for asked, solved in zip(rl, sft, strict=True):
        (turn,) = solved["completion"]
        assert "<<" not in turn["content"]
        assert turn["content"].endswith(asked["answer"])
    other = lines(grpo_gsm8k.drawn_rows(suite, Trial("grpo", "lora_8", 2, 1e-3)))
    assert [row["prompt"] for row in other] != [row["prompt"] for row in rl]
    assert len(lines(grpo_gsm8k.drawn_rows(suite, Trial("grpo", "lora_8", TUNING_SEED, 1e-3)))) == 3


@pytest.mark.parametrize("training", TRAININGS)
def test_a_trial_is_a_valid_run(tmp_path, training):
    suite = Suite(tmp_path, "qwen", "folder")
    for row in ROWS:
        if ROWS[row].takes(suite.base):
            run = run_from_dict(grpo_gsm8k.run_of(suite, Trial(training, row, 0, 1e-3), tmp_path / "rows.jsonl"))
            rows = run.training["per_device_train_batch_size"] * run.training["gradient_accumulation_steps"]
            assert rows == (256 if training == "grpo" else 32)
            assert run.training["max_steps"] == suite.steps


def tuned(suite, training, row, scores):
    return {
        f"{suite.prefix}-{Trial(training, row, TUNING_SEED, rate).name}": {"rate": rate, "score": score}
        for rate, score in scores.items()
    }


def test_rates_come_first_then_the_first_seed_of_every_row(tmp_path):
    suite, rows = Suite(tmp_path, "qwen", "folder"), ["lora_8", "lsr_60k", "tinylora"]
    todo = functools.partial(grpo_gsm8k.next_trials, suite, ["grpo"], rows, 2)
    first = todo({})
    assert [(t.row, t.rate) for t in first] == [(r, x) for r in rows[:2] for x in RATES["grpo"][r]]
    assert all(t.tunes for t in first)
    # the best in the middle; none is better beyond the end; TinyLoRA is not for a quantized base
    done = tuned(suite, "grpo", "lora_8", {1e-4: 0.3, 3e-4: 0.5, 9e-4: 0.4})
    done |= tuned(suite, "grpo", "lsr_60k", {8e-4: 0.3, 2.4e-3: 0.4, 7.2e-3: 0.5, 2.16e-2: None})
    chosen = {"lora_8": 3e-4, "lsr_60k": 7.2e-3}
    assert [(t.row, t.seed, t.rate) for t in todo(done)] == [(r, s, chosen[r]) for s in (0, 1) for r in rows[:2]]
    # at an end one more is tried, and a row of which every rate diverged is left
    done |= tuned(suite, "grpo", "lora_8", {1e-4: 0.6})
    assert [(t.row, t.rate) for t in todo(done) if t.tunes] == [("lora_8", pytest.approx(3.333e-5))]
    equal = tuned(suite, "grpo", "lora_8", {9e-4: 0.5, 3e-4: 0.5, 1e-4: 0.1, 2.7e-3: 0.5})
    assert (
        next(t for t in todo(done | equal) if t.row == "lora_8").rate == 9e-4
    )  # of equals the middle, whatever came first
    none_right = tuned(suite, "grpo", "lora_8", dict.fromkeys((1e-4, 3e-4, 9e-4), 0.0))
    first = next(t for t in todo({**none_right}) if t.row == "lora_8")
    assert (first.seed, first.rate) == (0, 3e-4), "no reward at any rate: the middle one, and none beyond"
    lost = tuned(suite, "grpo", "lora_8", dict.fromkeys((3.333e-5, 1e-4, 3e-4, 9e-4)))
    assert {t.row for t in todo(done | lost)} == {"lsr_60k"}


def test_a_rate_is_judged_by_its_last_steps():
    rows = [{"step": i, "loss": 2.0 - i / 10, "reward": i / 10, "wall_s": 2.0 * i} for i in range(1, 9)]
    rows.append({"step": 8, "eval_loss": 1.0})
    found = grpo_gsm8k.curve_of("grpo", rows)
    assert found["score"] == pytest.approx(0.6)
    assert found["curve"]["s"] == [2.0 * i for i in range(1, 9)]
    assert grpo_gsm8k.curve_of("sft", rows)["score"] == pytest.approx(-1.4)


def test_the_share_of_completions_that_were_cut_is_kept():
    row = {"step": 1, "loss": 0.0, "reward": 0.5, "wall_s": 1.0, "completions/clipped_ratio": 0.25}
    assert grpo_gsm8k.curve_of("grpo", [row])["curve"]["cut"] == [0.25]


def test_a_row_that_the_base_does_not_take_is_said(tmp_path, gsm8k, monkeypatch, capsys):
    monkeypatch.setattr(grpo_gsm8k, "execute", lambda *_: 0)
    monkeypatch.setattr(grpo_gsm8k, "check_ends", lambda *_: None)
    words = ["--data", str(gsm8k), "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--model", "q=folder"]
    assert grpo_gsm8k.main([*words, "--rows", "lora_8", "tinylora"]) == 0
    assert "not run, as PEFT's TinyLoRA takes no base in nf4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        grpo_gsm8k.main([*words, "--rows", "tinylora"])
    assert "none of them can be run: not run, as PEFT's TinyLoRA" in capsys.readouterr().err
    assert grpo_gsm8k.main([*words, "--rows", "tinylora", "--base", "none"]) == 0
    assert "not run" not in capsys.readouterr().out


def test_answers_are_those_of_each_prompt_by_itself(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [[{"role": "user", "content": text}] for text in ("a knife", "a broom sweeps floors", "a saw")]
    together = generated_answers.generated(model, tokenizer, prompts, 2, 12)
    alone = [generated_answers.generated(model, tokenizer, [prompt], 1, 12)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


def test_a_model_that_does_not_end_where_its_template_does_is_refused(tmp_path):
    folder = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True)
    generated_answers.check_ends(str(folder))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("</s>", "<|user|>"))
    with pytest.raises(UserError, match=r"ends at \['</s>'\].*<\|user\|>"):
        generated_answers.check_ends(str(folder))


def test_right_answers_are_judged_as_the_reward_does(monkeypatch):
    monkeypatch.setattr(generated_answers, "generated", lambda *_: ["so #### 1,000", "7", "no idea"])
    rows = [{"prompt": "", "answer": f"#### {n}"} for n in (1000, 8, 3)]
    assert generated_answers.right_answers(None, None, rows, 8, 8) == [True, False, False]


def test_trials_are_trained_answered_and_kept(tmp_path, gsm8k, monkeypatch, capsys):
    monkeypatch.setattr(grpo_gsm8k, "do_all", do_all_here)
    monkeypatch.setattr(grpo_gsm8k, "ROWS", {"lora_8": AdapterRow("lora", {"rank": 1, "alpha": 2.0})})
    monkeypatch.setattr(grpo_gsm8k, "RATES", {name: dict.fromkeys(ROWS, (1e-3,)) for name in TRAININGS})
    monkeypatch.setattr(grpo_gsm8k, "MOST_BEYOND", 0)
    model = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True)
    words = ["--data", str(gsm8k), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    words += ["--model", f"tiny={model}", "--base", "none", "--rows", "lora_8", "--seeds", "1", "--prompts", "2"]
    words += ["--completions", "2", "--new-tokens", "4", "--tuning-steps", "1", "--steps", "2", "--limit", "3"]
    assert grpo_gsm8k.main(words) == 0
    done = trials.load(tmp_path / "results")
    assert len(done) == 5  # the base; a rate and a seed of either training
    seeds = {r["training"]: r for r in done.values() if r.get("seed") == 0}
    for training, result in seeds.items():
        assert result["training"] == training
        assert len(unpacked(result["right"])) == 3
        assert len(result["curve"]["loss"]) == result["trained_steps"] == 2
    assert len(seeds["grpo"]["curve"]["reward"]) == 2
    assert "reward" not in seeds["sft"]["curve"]
    assert str(tmp_path) not in seeds["sft"]["command"]
    assert "all trials are done" in capsys.readouterr().out
    assert grpo_gsm8k.main(words) == 0  # nothing is done again
    assert trials.load(tmp_path / "results") == done


def test_a_trial_that_diverged_has_a_result_and_another_failure_has_none(tmp_path, gsm8k, monkeypatch):
    grpo_gsm8k.write_rows(gsm8k, tmp_path)
    suite, trial = Suite(tmp_path, "tiny", "none"), Trial("grpo", "lora_8", 0, 1.0)

    def diverge(*_, **__):
        raise UserError("training diverged: loss is nan at step 3")

    monkeypatch.setattr(api, "train", diverge)
    result = grpo_gsm8k.measure(suite, trial)
    assert result["score"] is None
    assert "diverged" in result["error"]
    monkeypatch.setattr(api, "train", lambda *_, **__: (_ for _ in ()).throw(UserError("no such model")))
    with pytest.raises(UserError):
        grpo_gsm8k.measure(suite, trial)


def test_a_trial_that_was_stopped_goes_on(tmp_path, gsm8k, monkeypatch):
    grpo_gsm8k.write_rows(gsm8k, tmp_path)
    suite, trial, calls = Suite(tmp_path, "tiny", "none"), Trial("grpo", "lora_8", TUNING_SEED, 1e-3), []

    def train(run, resume, quiet):
        calls.append(resume)
        folder = RunFolder(Path(run["training"]["output_dir"]))
        folder.path.mkdir(parents=True, exist_ok=True)
        if len(calls) == 1:
            raise KeyboardInterrupt
        folder.metrics.write_text(json.dumps({"step": 1, "loss": 1.0, "reward": 0.5, "wall_s": 1.0}) + "\n")
        folder.results.write_text(json.dumps({"steps": 1}))

    monkeypatch.setattr(api, "train", train)
    with pytest.raises(KeyboardInterrupt):
        grpo_gsm8k.measure(suite, trial)
    assert grpo_gsm8k.measure(suite, trial)["score"] == 0.5
    assert grpo_gsm8k.measure(suite, trial)["score"] == 0.5  # trained already
    assert calls == [None, "auto"]
