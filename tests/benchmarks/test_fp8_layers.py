"""What FP8 loses by layer: outliers and underflow are counted, padding is not, errors add up over the layers."""

import gzip
import json

import pytest
import torch

from benchmarks.quality import fp8_layers as layers
from benchmarks.quality.fp8_recipes import RECIPES, Recipe, blocks, exactly, rows, rows_amax, rows_e5m2, tensor
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_runs import save_llama


def test_rounding_keeps_what_e4m3_has_and_scales_by_rows_or_blocks():
    x = torch.tensor([[1.0, -0.4375, 448.0], [2.0**-20, 3 * 2.0**-20, 0.0]])
    assert torch.equal(rows(x), x)
    assert torch.equal(tensor(x)[1], torch.zeros(3))  # the first row's scale has no room for the second
    assert torch.equal(rows_e5m2(torch.tensor([[1.0, 1.1, 2.0**-14]])), torch.tensor([[1.0, 1.0, 2.0**-14]]))
    peak = torch.tensor([[1.3, 0.4], [0.0, 0.0]])
    assert torch.equal(rows_amax(peak)[:, 0], peak[:, 0])
    assert rows(peak)[0, 0] == 1.25
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(130, 300, generator=generator)
    y[:128, :128] *= 1e-6
    for height in (1, 128):
        assert (blocks(y, height) - y).abs().div(y.abs().clamp_min(1e-9)).median() < 0.04
    assert (tensor(y)[:128, :128] == 0).all()
    assert (blocks(y, 128)[:128, :128] != 0).float().mean() > 0.99


def test_a_token_that_stands_out_is_found_with_its_channel():
    x = torch.ones(3, 100)
    x[1, 7] = 1000.0
    x[1, 8] = 2.0**-10  # below the smallest normal of its row's scale, and below half the smallest code
    places = [(0, 0, "a"), (0, 1, "b"), (2, 0, "c")]
    found = layers.describe(x, rows(x), layers.Tokens(torch.ones(3, dtype=torch.bool), places))
    assert found["reach"]["worst"] == pytest.approx(1000 / (1_000_098.0 / 100) ** 0.5, rel=1e-3)
    assert {key: found["reach"][key] for key in ("conversation", "position", "token", "channel")} == {
        "conversation": 0, "position": 1, "token": "b", "channel": 7
    }  # fmt: skip
    assert found["underflow"] == found["zeroed"] == 1 / 300
    assert found["token_error"]["median"] == 0


def test_tokens_without_a_value_are_left_out_of_the_spread():
    places = [(0, 0, "a"), (0, 1, "b")]
    tokens = layers.Tokens(torch.ones(2, dtype=torch.bool), places)
    assert tokens.spread(torch.tensor([float("nan"), 2.0])) == {
        "median": 2.0, "worst": 2.0, "conversation": 0, "position": 1, "token": "b"
    }  # fmt: skip
    assert tokens.spread(torch.tensor([float("nan")] * 2)) == {"median": None, "worst": None}


def batch_of(sizes, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (len(sizes), length), generator=generator)
    mask = torch.tensor([[1] * size + [0] * (length - size) for size in sizes])
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) < 3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_gradient_of_an_adapter_is_that_of_the_weights_projected():
    model = tiny_llama(vocab_size=304).float()
    batches = [batch_of([12, 7], 12)]
    found = layers.all_together(model, batches, None)["gradients"]
    linear = model.model.layers[1].mlp.down_proj
    down = torch.randn(layers.RANK, linear.in_features, generator=torch.Generator().manual_seed(linear.in_features))
    torch.testing.assert_close(found["1.down.down_proj"], linear.weight.grad @ down.t(), rtol=1e-4, atol=1e-6)
    # the hooks are gone, and a recipe that rounds nothing but the weights to bfloat16 computes almost the same
    assert not linear._forward_hooks
    again = layers.all_together(model, batches, Recipe(exactly, exactly, lambda x: x))
    key = "0.qkv.q_proj"
    assert 0 < layers.relative(again["gradients"][key], found[key]) < 0.02
    in_e4m3 = layers.all_together(model, batches, RECIPES["rows"])["gradients"][key]
    assert layers.relative(in_e4m3, found[key]) > 3 * layers.relative(again["gradients"][key], found[key])


def test_padding_is_no_token(tmp_path):
    model = tiny_llama(vocab_size=304).float()
    measured = []
    for batch in (batch_of([12, 7], 12), {k: v[:, :7] for k, v in batch_of([7, 7], 12).items()}):
        places = [(int(i), int(j), "") for i, j in batch["attention_mask"].nonzero()]
        observer = layers.Observer(model, layers.Tokens(batch["attention_mask"].bool(), places))
        layers.losses_of(model, batch)[0].backward()
        observer.close()
        measured.append(observer.measured)
        assert not observer.gradients
    entry = measured[0]["1.gate_up"]
    assert entry["output"].keys() == RECIPES.keys() - {"e5m2"}
    assert entry["input_gradient"].keys() == RECIPES.keys()
    for part in ("output", "input_gradient"):
        assert 0.01 < entry[part]["rows"]["error"] < 0.08
        assert entry[part]["bf16"]["error"] < 0.005
    assert entry["input_gradient"]["e5m2"]["error"] > 1.3 * entry["input_gradient"]["rows"]["error"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_data", [True, False])
def test_a_model_leaves_a_file_and_a_picture(tmp_path, capsys, with_data):
    folder = save_llama(tmp_path / "tiny", num_hidden_layers=2, chat=True, max_position_embeddings=2048)
    options = ["--model", str(folder), "--base", "none", "--conversations", "2", "--longest", "1500"]
    if with_data:
        (tmp_path / "gsm8k").mkdir()
        with gzip.open(tmp_path / "gsm8k" / "train.jsonl.gz", "wt") as stream:
            for number in range(3):
                stream.write(json.dumps({"question": f"a knife cuts {number}", "answer": "bread #### 1"}) + "\n")
        options += ["--data", str(tmp_path / "gsm8k")]
    assert layers.main([*options, "--out", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content["groups"]) == [f"{layer}.{group}" for layer in (0, 1) for group in layers.GROUPS]
    assert content["config"]["data"] == ("gsm8k" if with_data else "builtin:chat")
    assert str(tmp_path) not in content["command"]
    assert content["losses"].keys() == layers.TOGETHER.keys()
    assert 0 < content["up_gradient"]["bf16"] < content["up_gradient"]["rows"]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert "more than 10%" in capsys.readouterr().out
