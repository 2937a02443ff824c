"""DPO and GRPO beside TRL's trainers, on tiny models: the same rows and start, losses that agree, and the table."""

import gzip
import json
import math

import pytest

from benchmarks.report import preference as report
from benchmarks.speed import preference, preference_trainers
from benchmarks.speed.preference_trainers import Ours, OursLsr, Trl
from lsr_scale.files import write_json
from lsr_scale.model import load_tokenizer
from lsr_scale.training.assembly import build_trainer
from tests.helpers.tiny_runs import save_llama

LOSS_ERROR = 5e-3  # of bfloat16, after learning
TRAINERS = {"lsr": OursLsr, "lora": Ours, "trl_lora": Trl}


class Here:
    """A `workers.Worker` in this process, which has imported everything already."""

    def __init__(self, provider, modes, config, log):
        del log
        self.name = provider.rpartition(":")[2]
        self.config = {**config, "mode": modes[0]}
        self.broken = None

    def start(self):
        classes = {one.__name__: one for one in TRAINERS.values()}
        self.trainer = classes[self.name](self.config)
        self.trainer.build()

    def ask(self, request, limit_s):
        del limit_s
        reply = {"status": "ok", **self.trainer.measure(request)}
        self.trainer.free_memory()
        return reply

    def stop(self):
        pass


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(preference, "Worker", Here)
    monkeypatch.setattr(preference, "start_all", lambda workers, limit_s: [worker.start() for worker in workers])


def test_pairs_are_of_one_length_and_unlike(tmp_path):
    preference.write_model(tmp_path / "model", preference.model_values("tiny"))
    preference.write_pairs(tmp_path / "rows.jsonl", 3, 32)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    texts = [row["prompt"] + row[name] + tokenizer.eos_token for row in rows for name in ("chosen", "rejected")]
    assert {len(tokenizer(text)["input_ids"]) for text in texts} == {32}
    assert len(set(texts)) == 6


def test_dpo_in_turns_has_the_losses_of_trl(tmp_path, here, monkeypatch):
    monkeypatch.setattr(preference_trainers, "LEARNING_RATE", 1e-2)
    out = tmp_path / "dpo.json"
    words = ["dpo", "--model", "tiny", "--pairs", "2", "--length", "32", "--steps", "2", "--warm-up", "1"]
    words += [
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--base",
        "bf16",
        "--trainers",
        "lsr,lora,trl_lora",
        "--modes",
        "none",
    ]
    assert preference.main([*words, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["trainer"]: row for row in result["rows"]}
    for row in rows.values():
        assert [len(turn["step_s"]) for turn in row["turns"]] == [2, 2]
        assert row["turns"][0]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 32 / row["step_s"])
    for ours, theirs in zip(rows["lora"]["turns"], rows["trl_lora"]["turns"], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=LOSS_ERROR)
    assert abs(theirs["losses"][-1] - math.log(2)) > 20 * LOSS_ERROR  # so they could have differed
    assert rows["lora"]["trainable_parameters"] == rows["trl_lora"]["trainable_parameters"]
    ratio = next(one for one in result["ratios"] if one["trainer"] == "lora")
    assert ratio["speed"] == pytest.approx(rows["trl_lora"]["step_s"] / rows["lora"]["step_s"])
    assert "--out dpo.json" in result["command"]
    page = report.section(out, result)
    assert "### DPO: tiny, BF16, 2 pairs of 2 x 32 tokens a step" in page
    assert page.count("activations saved, weights cached") == 2
    assert page.count("activations saved") == 3
    result["env"]["gpus"] = ["NVIDIA H200"]
    write_json(tmp_path / "preference" / "dpo.json", result)
    lines = report.newest(tmp_path).splitlines()
    assert sum("DPO, activations saved, weights cached" in line for line in lines) == 2
    assert f"| TRL + PEFT | {rows['trl_lora']['step_s']:.2f} | {ratio['speed']:.2f} |" in lines[-1]
    del rows["lora"]["turns"][1]  # a mode that was cut off
    write_json(tmp_path / "preference" / "dpo.json", result)
    assert "DPO" not in report.newest(tmp_path)


def test_a_grpo_step_is_split_into_its_parts(tmp_path, here):
    data = tmp_path / "gsm8k"
    data.mkdir()
    with gzip.open(data / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"question": f"{i} and 1?", "answer": f"So.\n#### {i + 1}"}) + "\n" for i in range(6)
        )
    model, out = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True), tmp_path / "grpo.json"
    words = ["grpo", "--model", str(model), "--data", str(data), "--prompts", "2", "--completions", "2"]
    words += ["--new-tokens", "6", "--micro-batch", "2", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    words += ["--base", "bf16", "--trainers", "lora,trl_lora", "--out", str(out)]
    assert preference.main(words) == 0
    result = json.loads(out.read_text())
    for row in result["rows"]:
        (turn,) = row["turns"]
        for whole, generation, scoring in zip(turn["step_s"], turn["generation_s"], turn["scoring_s"], strict=True):
            assert 0 < generation + scoring < whole
        assert 0 < row["completion_tokens"] <= 6
        assert row["training_s"] > 0
    assert {*result["ratios"][0]} >= {"speed", "generation", "training"}
    assert str(tmp_path) not in result["command"]
    assert "2 prompts x 2 completions" in report.section(out, result)
    for option in ("--data", "--model"):
        with pytest.raises(SystemExit):
            preference.main(["grpo", option, str(data), "--out", str(tmp_path / "other.json")])


@pytest.mark.parametrize(("mode", "memory"), [("none", "speed"), ("saved", "speed"), ("full", "save")])
def test_a_mode_recomputes_activations_or_saves_them(tmp_path, here, monkeypatch, mode, memory):
    runs = []

    def build(run, *given, **options):
        runs.append(run)
        return build_trainer(run, *given, **options)

    monkeypatch.setattr("lsr_scale.training.assembly.build_trainer", build)
    words = ["dpo", "--model", "tiny", "--pairs", "2", "--length", "16", "--steps", "1", "--warm-up", "0"]
    words += ["--rounds", "1", "--device", "cpu", "--base", "bf16", "--trainers", "lora", "--modes", mode]
    assert preference.main([*words, "--out", str(tmp_path / "dpo.json")]) == 0
    assert [run.training["memory"] for run in runs] == [memory]


def test_a_trainer_that_breaks_has_a_row_that_says_so(tmp_path, here, monkeypatch):
    def ask(self, request, limit_s):
        return {"status": "oom", "detail": "no memory"} if self.name == "Trl" else old(self, request, limit_s)

    old = Here.ask
    monkeypatch.setattr(Here, "ask", ask)
    out = tmp_path / "dpo.json"
    words = ["dpo", "--model", "tiny", "--pairs", "2", "--length", "16", "--steps", "1", "--warm-up", "0"]
    words += ["--rounds", "1", "--device", "cpu", "--base", "bf16", "--trainers", "lora,trl_lora", "--modes", "full"]
    assert preference.main([*words, "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [row["status"] for row in result["rows"]] == ["ok", "oom"]
    assert result["ratios"] == []
    assert "| oom |" in report.table(result)


def test_a_measurement_that_is_cut_off_keeps_its_turns(tmp_path, here, monkeypatch):
    def ask(self, request, limit_s):
        if self.name == "Trl":
            raise KeyboardInterrupt
        return {"status": "ok", "step_s": [1.0], "peak_memory_gib": None, "trainable_parameters": 1, "notes": []}

    monkeypatch.setattr(Here, "ask", ask)
    out = tmp_path / "dpo.json"
    words = ["dpo", "--model", "tiny", "--pairs", "1", "--length", "16", "--steps", "1", "--warm-up", "0"]
    words += ["--device", "cpu", "--base", "bf16", "--trainers", "lora,trl_lora", "--modes", "none", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        preference.main(words)
    assert [row["trainer"] for row in json.loads(out.read_text())["rows"]] == ["lora"]
