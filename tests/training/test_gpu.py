"""What only a GPU can show; skipped, loudly, without one."""

import pytest
import torch
from peft import get_peft_model

from lsr_scale.adapters import METHODS, peft_config
from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama
from tests.helpers.tiny_runs import do, factors, metrics, same, save_llama, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
def test_four_bits_are_bit_equal_to_bitsandbytes_forward_and_backward(kind):
    results = []
    for frozen in (False, True):
        torch.manual_seed(0)
        layer = quantize(torch.nn.Sequential(torch.nn.Linear(576, 1536, bias=False)), kind).cuda()
        if frozen:
            freeze_quantized(layer)
        # above the rows that bitsandbytes' fused small-batch kernel takes
        x = torch.randn(2048, 576, device="cuda", dtype=torch.bfloat16).requires_grad_()
        out = layer(x)
        out.float().square().sum().backward()
        results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_int8_dequantizes_on_the_gpu_to_codes_times_row_scales():
    torch.manual_seed(0)
    layer = quantize(torch.nn.Sequential(torch.nn.Linear(576, 1536, bias=False)), "int8").cuda()
    freeze_quantized(layer)
    found = dequantize(layer[0], torch.float64)
    weight = layer[0].weight
    assert weight.SCB.is_cuda
    expected = weight.data.double() * weight.SCB.double()[:, None] / 127
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_training_on_a_quantized_base_follows_the_cpu(name, kind):
    options = {
        "lsr": {"rank": 4, "separation_rank": 3},
        "kron_lora": {"rank": 4, "left_out": 4, "dropout": 0.0},
        "kadaptation": {"rank": 2, "phm_dim": 4},
    }
    ids = torch.randint(1, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = {}
    for device in ("cpu", "cuda"):
        base = quantize(tiny_llama(), kind).to(device)
        torch.manual_seed(0)
        model = get_peft_model(base, peft_config(name, {"target_modules": SEVEN_LINEARS, **options.get(name, {})}))
        randomize(model, scale=0.05)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trainable} == {torch.float32}
        assert {p.device.type for p in trainable} == {device}
        optimizer = torch.optim.AdamW(trainable, lr=5e-3)
        losses[device] = []
        for _ in range(10):
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["cuda"][-1] < losses["cuda"][0]
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=2e-2, atol=2e-2)


def test_fused_runs_that_add_in_a_fixed_order_are_equal_bit_for_bit(tmp_path, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # full_determinism sets them; put back as they were, after it
    save_llama(tmp_path / "model", num_hidden_layers=2)
    found = []
    try:
        for name in ("first", "second"):
            training = {"output_dir": str(tmp_path / name), "full_determinism": True, "fused": "on"}
            found.append(factors(do(tiny_run(tmp_path, training=training, eval={"tasks": []}))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*found)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_preferences_are_learned_fused_as_by_trl(tmp_path, method):
    save_llama(tmp_path / "model", num_hidden_layers=2)
    found = {}
    for fused in ("on", "off"):
        training = {"method": method, "fused": fused, "output_dir": str(tmp_path / fused), "save_strategy": "no"}
        run = tiny_run(tmp_path, training=training, data={"train": [str(tmp_path / "questions.jsonl")]})
        found[fused] = [row for row in metrics(do(run)) if "loss" in row]
    assert len(found["on"]) == len(found["off"]) > 0
    for ours, trls in zip(found["on"], found["off"], strict=True):
        assert ours["loss"] == pytest.approx(trls["loss"], rel=2e-2)
        assert ours["logps/rejected"] == pytest.approx(trls["logps/rejected"], rel=2e-2)
