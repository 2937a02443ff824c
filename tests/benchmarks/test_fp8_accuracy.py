"""Trainings in 8 bits beside bf16: the same order of examples, trials that are kept, differences that are paired."""

import json

import pytest
import torch

from benchmarks.quality import fp8_accuracy as accuracy
from benchmarks.quality import trials
from lsr_scale.fused import fuse
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import save_llama


def test_batches_have_whole_examples_in_an_order_of_the_seed():
    rows = [([index + 1] * 3, [100 + index, 2]) for index in range(20)] + [([1] * accuracy.LONGEST, [2])]
    first, again, other = (list(accuracy.packed(rows, 32, 2, seed)) for seed in (0, 0, 1))
    assert [batch["input_ids"].tolist() for batch in first] == [batch["input_ids"].tolist() for batch in again]
    assert [batch["input_ids"].tolist() for batch in first] != [batch["input_ids"].tolist() for batch in other]
    assert len(first) == 2 * 20 // 6
    for batch in first:
        ids, count = batch["input_ids"][0], int(batch["weights"].sum())
        assert batch["cu_seq_lens"][:7].tolist() == list(range(0, 31, 5))
        assert count == 12
        assert batch["targets"][:count].tolist() == [v for i in range(6) for v in (int(ids[5 * i]) + 99, 2)]


def trial(compute, seed, bits, losses, model="m", method="lsr"):
    task = {"right": bits, "losses": losses}
    return {"model": model, "method": method, "compute": compute, "seed": seed, "tasks": {"arc_easy": task}}


def test_differences_are_paired():
    done = {
        "m-base": {"model": "m", "tasks": {"arc_easy": {"right": "0001", "losses": [3.0] * 4}}},
        "a": trial("bf16", 0, "0011", [1.0, 2.0, 3.0, 4.0]),
        "b": trial("fp8", 0, "1011", [1.5, 2.5, 3.5, 4.5]),
        "c": trial("bf16", 1, "0111", [1.0, 2.0, 3.0, 4.0]),
        "d": trial("fp8", 1, "0010", [1.5, 2.5, 3.5, 4.5]),
        "e": trial("bf16", 2, "0111", [1.0, 2.0, 3.0, 4.0]),  # without its pair
    }
    one, two, both = accuracy.summary(done)
    assert (one["right"].gained, one["right"].lost, one["right"].difference) == (1, 0, 0.25)
    assert (two["right"].gained, two["right"].lost, two["right"].difference) == (0, 2, -0.5)
    assert both["right"].difference == -0.125
    assert both["right"].low < -0.125 < both["right"].high
    assert (both["between_computes"], both["between_seeds"]) == (1.5, 1)
    for row in (one, two, both):
        assert row["losses"].difference == row["losses"].low == row["losses"].high == 0.5
    head, *lines = accuracy.table(done)
    assert [len(line) for line in lines] == [len(head)] * 3
    assert [line[2:4] for line in lines] == [["fp8", "0"], ["fp8", "1"], ["fp8", "all"]]


def test_each_compute_is_paired_with_bf16():
    done = {
        "a": trial("int8", 0, "0110", [1.25, 2.25, 3.25, 4.25]),
        "b": trial("bf16", 0, "0011", [1.0, 2.0, 3.0, 4.0]),
        "c": trial("fp8", 0, "1011", [1.5, 2.5, 3.5, 4.5]),
        "d": trial("int8", 0, "1111", [0.0] * 4, method="lora"),  # without its pair
    }
    rows = accuracy.summary(done)
    assert [(row["compute"], row["seed"]) for row in rows] == [("fp8", 0), ("fp8", None), ("int8", 0), ("int8", None)]
    assert [row["losses"].difference for row in rows] == [0.5, 0.5, 0.25, 0.25]
    assert (rows[2]["right"].gained, rows[2]["right"].lost) == (1, 1)


@pytest.mark.filterwarnings("ignore")
def test_trainings_are_kept_and_not_done_again(tmp_path, data, monkeypatch, capsys):
    computed = []

    def fuse_in(model, compute="bf16"):
        computed.append(compute)
        return fuse(model)  # 8 bits take a GPU

    monkeypatch.setattr(accuracy, "fuse", fuse_in)
    model = save_llama(tmp_path / "tiny", num_hidden_layers=2)
    options = ["--model", str(model), "--base", "none", "--data", str(data), "--limit", "6"]
    options += ["--epochs", "1", "--tokens", "300", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert accuracy.main([*options, "--methods", "lora", "--computes", "fp8"]) == 0
    assert computed == ["bf16", "fp8"]
    done = trials.load(tmp_path / "out")
    assert list(done) == ["tiny-base", *(f"tiny-lora-{c}-seed{s}" for c in ("bf16", "fp8") for s in (0, 1))]
    # here both compute the same, from the same factors in the same order
    for seed in (0, 1):
        one, two = (done[f"tiny-lora-{compute}-seed{seed}"] for compute in ("bf16", "fp8"))
        assert one["curve"] == two["curve"]
        assert one["tasks"] == two["tasks"]
    assert done["tiny-lora-bf16-seed0"]["curve"][0] != done["tiny-lora-bf16-seed1"]["curve"][0]
    assert done["tiny-lora-bf16-seed0"]["tasks"] != done["tiny-base"]["tasks"]
    assert str(tmp_path) not in json.dumps(done)
    assert accuracy.main([*options, "--methods", "lora", "--computes", "fp8"]) == 0
    assert len(computed) == 2
    assert accuracy.main([*options, "--methods", "lora,lsr", "--seeds", "1"]) == 0
    assert computed[2:] == ["int8", "bf16", "fp8", "int8"]
    assert len(trials.load(tmp_path / "out")) == 9
    capsys.readouterr()
    assert accuracy.main(["--table", "--out", str(tmp_path / "out")]) == 0
    assert "+0.00" in capsys.readouterr().out
    assert (tmp_path / "out" / "differences.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        accuracy.main([*options, "--computes", "fp4"])


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_a_training_computes_in_8_bits(compute, monkeypatch):
    from lsr_scale.fused import eight_bit

    monkeypatch.setattr(eight_bit, "fp8_fallback_reason", lambda device: None)
    model = tiny_llama(torch.bfloat16, vocab_size=304, hidden_size=64, intermediate_size=128)
    trainer = accuracy.Trainer(model.requires_grad_(False), "lora", 1)
    rows = [([index + 1] * 3, [100 + index, 2]) for index in range(20)]
    batches = list(accuracy.packed(rows, 32, 1, 0))
    losses = {}
    for each in ("bf16", compute):
        report = trainer.fuse(each)
        losses[each] = trainer.train(0, batches)
    assert "8 of 8 groups of linears compute in 8 bits" in report
    assert losses[compute] != losses["bf16"]
    assert losses[compute] == pytest.approx(losses["bf16"], abs=0.05)


def test_layers_that_fall_back_are_no_comparison(monkeypatch):
    model = tiny_llama(vocab_size=304)
    model.requires_grad_(False)
    trainer = accuracy.Trainer(model, "lora", 1)

    def fuse_in(model, compute):
        report = fuse(model)
        report.not_eight_bit["1.down"] = "40 inputs, no multiple of 16"
        return report

    monkeypatch.setattr(accuracy, "fuse", fuse_in)
    with pytest.raises(RuntimeError, match="no multiple of 16"):
        trainer.fuse("fp8")


def test_first_factors_are_a_seeds():
    model = tiny_llama(vocab_size=304)
    model.requires_grad_(False)
    for method in accuracy.METHODS:
        trainer = accuracy.Trainer(model, method, 2)
        one, two = trainer.starts
        assert any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))
        model = trainer.model.unload()
        again = accuracy.Trainer(model, method, 1)
        assert all(torch.equal(a, b) for a, b in zip(one, again.starts[0], strict=True))
        model = again.model.unload()
