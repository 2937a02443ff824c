"""A real model's training beside its peers, on a tiny one: everyone sees the same batches and starts alike."""

import gzip
import json
from argparse import Namespace

import pytest
import torch

from benchmarks.speed import real_training
from tests.helpers.tiny_runs import save_llama


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "sums"
    folder.mkdir()
    rows = [
        {"question": f"What is {i} and {i % 7}?", "answer": f"It is {i + i % 7}." + "!" * (i % 5)} for i in range(24)
    ]
    for name, part in (("train", rows), ("test", rows[:6])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


def test_only_the_answer_is_supervised_and_padding_is_not():
    rows = [([5, 6, 7, 8], 2), ([5, 9], 1), ([1, 2, 3], 1)]
    (batch,) = real_training.padded_batches(rows, 2, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_packed_blocks_hold_everything_and_their_labels_are_the_answers():
    rows = [([5, 6, 7, 8], 2), ([5, 9], 1), ([1, 2, 3], 1)]
    (batch,) = real_training.packed_batches(rows, 2, length=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, 2]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_providers_train_on_the_same_batches_from_the_same_start(tmp_path, data, layout):
    model = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True)
    out = tmp_path / "results" / "tiny.json"
    options = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", "--base", "bf16"]
    sizes = ["--steps", "4", "--turn", "2", "--rows", "3", "--length", "48", "--layout", layout]
    providers = ["--providers", "lora,peft_lora,peft_lora_float32,lsr"]
    assert real_training.main([*options, *sizes, *providers]) == 0
    rows = json.loads(out.read_text())["rows"]
    ours, unfused, lsr = rows["lora"], rows["peft_lora"], rows["lsr"]
    assert ours["trainable_parameters"] == unfused["trainable_parameters"] != lsr["trainable_parameters"]
    assert ours["held_out_loss_before"] == pytest.approx(lsr["held_out_loss_before"], abs=2e-3)
    assert len(ours["losses"]) == 4
    assert ours["losses"] == pytest.approx(unfused["losses"], abs=5e-3)
    assert ours["loss_rms_from_float32"] < 5e-3
    assert ours["held_out_loss_after"] != ours["held_out_loss_before"]


def test_a_second_epoch_has_the_rows_in_another_order(tmp_path, data, monkeypatch):
    model = save_llama(tmp_path / "model", num_hidden_layers=2, chat=True)
    given = Namespace(model=str(model), data=data, length=48, seed=0, layout="padded", rows=12, steps=4, held_out=1)
    real_training.write_batches(given, tmp_path / "batches.pt")
    batches = torch.load(tmp_path / "batches.pt", weights_only=True)["train"]
    assert len(batches) == 4
    rows = [
        row.tolist()[: int(mask.sum())]
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert rows[:24] != rows[24:]
    assert sorted(rows[:24]) == sorted(rows[24:])


def row(losses, **values):
    return {"status": "ok", "losses": losses, "tokens_per_s": 100.0, "held_out_loss_after": 1.0, **values}


def test_losses_in_8_bits_are_compared_with_the_same_method_in_bf16():
    rows = {
        "peft_lora_float32": row([2.0] * 60),
        "lora_graphs": row([2.0] * 60),
        "lora_graphs_fp8": row([2.3] * 10 + [2.1] * 50, tokens_per_s=150.0, held_out_loss_after=1.25),
        "lora_graphs_int8": row([2.0] * 60, held_out_loss_after=1.125),
        "lsr_graphs_fp8": row([1.0] * 60),
        "lora_fp8": {"status": "error", "detail": "broke"},
    }
    real_training.add_differences(rows)
    in_fp8 = rows["lora_graphs_fp8"]
    assert in_fp8["loss_rms_from_bf16"] == pytest.approx(((10 * 0.09 + 50 * 0.01) / 60) ** 0.5)
    assert in_fp8["loss_mean_from_bf16_last_50"] == pytest.approx(0.1)
    assert in_fp8["held_out_from_bf16"] == 0.25
    assert in_fp8["speed_over_bf16"] == 1.5
    assert in_fp8["loss_rms_from_float32"] == in_fp8["loss_rms_from_bf16"]
    in_int8 = rows["lora_graphs_int8"]
    assert (in_int8["loss_rms_from_bf16"], in_int8["held_out_from_bf16"]) == (0.0, 0.125)
    assert "loss_rms_from_bf16" not in rows["lsr_graphs_fp8"], "the same method in bf16 did not train"
    assert "loss_rms_from_bf16" not in rows["lora_graphs"]
    assert "+0.1000" in real_training.table(rows)


def test_a_method_has_one_rate_however_it_computes():
    endings = ("", "_fp8", "_int8", "_graphs", "_graphs_fp8", "_graphs_int8")
    for method, rate in (("lsr", 2e-3), ("kron_lora", 1e-3), ("lora", 2e-4)):
        assert {real_training.rate_of(method + rest) for rest in endings} == {rate}


def test_a_speed_counts_neither_padding_nor_the_first_steps_of_a_turn():
    turn = {
        **{"losses": [1.0] * 7, "step_ms": [900.0] * 5 + [10.0, 20.0], "tokens": [50] * 5 + [100, 400]},
        **{"peak_memory_gib": 1.0, "trainable_parameters": 3, "notes": []},
    }
    row = real_training.summary([turn], [2.0, 1.5])
    assert row["tokens_per_s"] == torch.tensor([10_000.0, 20_000.0]).mean().item()
    assert row["held_out_loss_after"] == 1.5
