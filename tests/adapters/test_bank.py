"""`AdapterBank`: batches whose samples use different adapters from a folder."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lsr_scale
from lsr_scale import AdapterBank, UserError
from lsr_scale.adapters import peft_config
from lsr_scale.adapters.methods import lsr
from lsr_scale.kernels.kron_sum import kron_sum_triton
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama

OPTIONS = {"lsr": {"rank": 4, "separation_rank": 2}, "kron_lora": {"rank": 2}}
NAMES = ["anna", "ben", "cleo"]


def adapted(base, method: str = "lsr", **options) -> Any:
    values = {"target_modules": SEVEN_LINEARS, **OPTIONS[method], **options}
    return get_peft_model(base, peft_config(method, values, "CAUSAL_LM"))


def write(folder: Path, base, method: str = "lsr", **options) -> None:
    """Save three adapters that differ, one of them with another scaling."""
    for seed, name in enumerate(NAMES):
        other = {"alpha": 3.0} if name == "ben" else {}
        randomize(adapted(copy.deepcopy(base), method, **other, **options), seed=seed).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def folder(request, base, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write(path, base, request.param)
    return path


def bank_of(base, folder: Path, memory_gib: float = 0.01, **options) -> tuple[Any, AdapterBank]:
    method = json.loads((folder / "anna/adapter_config.json").read_text())["peft_type"].lower()
    model = adapted(copy.deepcopy(base), method).eval()
    return model, AdapterBank(model, folder, memory_gib, **options)


def alone(base, folder: Path, name: str, ids):
    """Return the logits of one adapter, as PEFT loads it."""
    model: Any = copy.deepcopy(base)
    if name != "__base__":
        model = PeftModel.from_pretrained(model, folder / name)
    return model.eval()(input_ids=ids).logits


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_each_sample_uses_its_adapter(base, folder, ids, fused):
    model, bank = bank_of(base, folder)
    if fused:
        lsr_scale.fuse(model)
    names = ["cleo", "anna", "__base__", "cleo", "ben"]
    rows = torch.cat([ids, ids.flip(1), ids[:1].roll(1, 1)])
    actual = model(input_ids=rows, adapter_names=names).logits
    for index, name in enumerate(names):
        expected = alone(base, folder, name, rows[index : index + 1])
        torch.testing.assert_close(actual[index : index + 1], expected, rtol=1e-4, atol=1e-5)
    assert bank.loads == 3
    before = model(input_ids=rows).logits  # without names the model is what it was
    torch.testing.assert_close(before, alone(base, folder, "__base__", rows), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_and_beams(base, folder, ids):
    model, _ = bank_of(base, folder)
    names = ["ben", "anna"]
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        actual = model.generate(input_ids=ids, adapter_names=names, pad_token_id=0, **options)
        for index, name in enumerate(names):
            one = PeftModel.from_pretrained(copy.deepcopy(base), folder / name).eval()
            expected = one.generate(input_ids=ids[index : index + 1], pad_token_id=0, **options)
            assert torch.equal(actual[index : index + 1], expected)


@torch.no_grad()
def test_the_least_recently_used_one_leaves(base, folder, ids):
    model, bank = bank_of(base, folder)
    two = 2.5 * bank.adapter_bytes / 2**30
    model, bank = bank_of(base, folder, two)
    assert bank.capacity == 2
    for names, loaded in ((["anna", "ben"], ["anna", "ben"]), (["anna"] * 2, ["ben", "anna"])):
        model(input_ids=ids, adapter_names=names)
        assert list(bank.slots) == loaded
    actual = model(input_ids=ids, adapter_names=["cleo", "anna"]).logits
    assert set(bank.slots) == {"anna", "cleo"}
    assert (bank.loads, bank.evictions) == (3, 1)
    torch.testing.assert_close(actual[:1], alone(base, folder, "cleo", ids[:1]), rtol=1e-4, atol=1e-5)
    bank.evict("anna")
    assert list(bank.slots) == ["cleo"]
    rows = torch.cat([ids, ids])
    with pytest.raises(UserError, match=r"3 different adapters in one batch, but the bank has memory for 2"):
        model(input_ids=rows, adapter_names=[*NAMES, "anna"])
    with pytest.raises(UserError, match="is too little for one adapter"):
        AdapterBank(model, folder, 0.5 * bank.adapter_bytes / 2**30)


@torch.no_grad()
def test_a_quantized_base_and_half_precision_factors(ids, tmp_path):
    base = tiny_llama()
    write(tmp_path, base)
    quantized = quantize(copy.deepcopy(base), "nf4", torch.float32)
    model = adapted(quantized).eval()
    AdapterBank(model, tmp_path, 0.01, dtype=torch.bfloat16)
    actual = model(input_ids=ids, adapter_names=["anna", "ben"]).logits
    for index, name in enumerate(("anna", "ben")):
        one = PeftModel.from_pretrained(quantize(copy.deepcopy(base), "nf4", torch.float32), tmp_path / name).eval()
        expected = one(input_ids=ids[index : index + 1]).logits
        assert (actual[index : index + 1] - expected).norm() < 2e-2 * expected.norm()


def spoil(where: Path, how: str) -> None:
    """Make an adapter's folder one that must not be loaded."""
    weights = where / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "missing":
        weights.unlink()
    elif how == "config":
        (where / "adapter_config.json").write_text("{")
    elif how == "method":
        config = json.loads((where / "adapter_config.json").read_text())
        (where / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    else:
        changed = {
            "shape": {first: torch.zeros(2, 2)},
            "nan": {first: torch.full_like(tensors[first], float("nan"))},
            "more": {"base_model.model.lm_head.weight": torch.zeros(2)},
        }
        rest = {name: tensor for name, tensor in tensors.items() if how != "fewer" or name != first}
        save_file({**rest, **changed.get(how, {})}, weights)


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "damaged or cut short"),
        ("missing", "there is no adapter 'ben' in .*adapter_model"),
        ("config", "the adapter's configuration cannot be read"),
        ("method", "this bank is for lsr adapters"),
        ("shape", r"is \[2, 2\], this bank's adapters have"),
        ("nan", "values that are not finite"),
        ("more", "tensor that this bank's adapters do not have"),
        ("fewer", "is missing"),
    ],
)
def test_a_bad_adapter_is_refused_and_the_others_are_served(base, ids, tmp_path, how, message):
    write(tmp_path, base)
    spoil(tmp_path / "ben", how)
    model, bank = bank_of(base, tmp_path)
    model(input_ids=ids, adapter_names=["anna", "cleo"])
    with pytest.raises(UserError, match=message) as caught:
        model(input_ids=ids, adapter_names=["anna", "ben"])
    assert "ben" in str(caught.value)
    assert set(bank.slots) == {"anna", "cleo"}
    model(input_ids=ids, adapter_names=["anna", "cleo"])
    assert bank.loads == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["../anna", "/tmp", "", ".", "nobody", "anna/..", "anna/", "./anna", "anna/../anna", "a\0b"]
)
def test_names_stay_in_the_folder(base, ids, tmp_path, name):
    write(tmp_path / "inner", base)
    model, _ = bank_of(base, tmp_path / "inner")
    with pytest.raises(UserError, match="adapter_names: "):
        model(input_ids=ids, adapter_names=["anna", name])


@torch.no_grad()
def test_an_adapter_beyond_its_dtype_harms_no_other_row(base, folder, ids):
    model, bank = bank_of(base, folder)
    bank.load("anna")
    for stack in bank._stacks:
        for stacked in stack.factors.values():
            stacked[bank.slots["anna"]].fill_(1e20)
    rows = torch.cat([ids, ids[:1]])
    actual = model(input_ids=rows, adapter_names=["ben", "anna", "__base__"]).logits
    assert not actual[1].isfinite().any()
    for row, name in ((0, "ben"), (2, "__base__")):
        expected = alone(base, folder, name, rows[row : row + 1])
        torch.testing.assert_close(actual[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pairs_of_lsr_in_one_pass(base, ids, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: kernels cannot be tested")
    write(tmp_path, base)
    model, _ = bank_of(base, tmp_path)
    rows, names = torch.cat([ids, ids]), ["cleo", "__base__", "ben", "cleo"]
    expected = model(input_ids=rows, adapter_names=names).logits
    launches = []

    def counted(*arguments):
        launches.append(arguments)
        return kron_sum_triton(*arguments)

    monkeypatch.setattr(lsr, "use_triton", lambda *arguments: True)
    monkeypatch.setattr(lsr, "kron_sum", counted)
    actual = model(input_ids=rows, adapter_names=names).logits
    assert len(launches) == 2 * 4  # sides, sets of shapes: q and o, k and v, gate and up, down
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
