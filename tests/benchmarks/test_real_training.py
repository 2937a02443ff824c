"""A real model's training beside its peers, on a tiny one: everyone sees the same batches and starts alike."""

import gzip
import json

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
    model = save_llama(tmp_path / "model", chat=True)
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


def test_a_speed_counts_neither_padding_nor_the_first_steps_of_a_turn():
    turn = {
        **{"losses": [1.0] * 7, "step_ms": [900.0] * 5 + [10.0, 20.0], "tokens": [50] * 5 + [100, 400]},
        **{"peak_memory_gib": 1.0, "trainable_parameters": 3, "notes": []},
    }
    row = real_training.summary([turn], [2.0, 1.5])
    assert row["tokens_per_s"] == torch.tensor([10_000.0, 20_000.0]).mean().item()
    assert row["held_out_loss_after"] == 1.5
