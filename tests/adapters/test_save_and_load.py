"""The adapter on disk: whole or not at all, and only ever onto the base that it belongs to."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lsr_scale import UserError
from lsr_scale.adapters import METHODS, PEFT_METHODS, peft_config
from lsr_scale.adapters.save_and_load import load_adapter, load_in_place, save_adapter, write_adapter
from lsr_scale.layers.frozen_linear import freeze_quantized
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama

OPTIONS = {
    "lsr": {"rank": 4, "separation_rank": 3},
    "kron_lora": {"rank": 4, "left_out": 4},
    "krona": {},
    "kadaptation": {"rank": 2, "phm_dim": 4},
    "lora_xs": {"rank": 4, "alpha": 160.0},
    "slora": {"rank": 4, "init": "nystrom"},
    "lora": {"rank": 4},
    "lokr": {"rank": 4},
    "vera": {"rank": 4},
    "tinylora": {"rank": 2, "u": 4},
}
UNQUANTIZED = ("lokr", "tinylora")  # take no quantized base


class StandInTrainer:
    """As much of a trainer as saving needs, on one process."""

    def __init__(self, model):
        self.model = self.model_wrapped = model
        self.accelerator = self

    @staticmethod
    def unwrap_model(model):
        return model


def adapted(method="lsr", seed=1, kind="nf4", **changes):
    config = peft_config(method, {"target_modules": SEVEN_LINEARS, **OPTIONS[method], **changes}, "CAUSAL_LM")
    return randomize(get_peft_model(base(kind), config), seed=seed).eval()


def base(kind="nf4"):
    if kind == "none":
        return tiny_llama()
    model = quantize(tiny_llama(), kind)
    freeze_quantized(model)
    return model


@pytest.fixture
def saved(tmp_path):
    """Return a folder with a saved LSR adapter."""
    save_adapter(StandInTrainer(adapted()), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("method", [*sorted(METHODS), "lora"])
def test_a_saved_adapter_loads_bit_equal_and_gives_the_same_logits(tmp_path, method, ids):
    model = adapted(method)
    save_adapter(StandInTrainer(model), tmp_path / "adapter")
    loaded, notes = load_adapter(base(), tmp_path / "adapter")
    assert notes == []
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    after = dict(loaded.named_parameters())
    assert before
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)


@pytest.mark.parametrize("method", [*sorted(METHODS), *sorted(PEFT_METHODS), "lora with a trained head"])
def test_the_weights_are_saved_as_peft_saves_them(tmp_path, method):
    method, _, head = method.partition(" ")
    options = {"modules_to_save": ["lm_head"]} if head else {}
    model = adapted(method, kind="none" if method in UNQUANTIZED else "nf4", **options)
    model.save_pretrained(tmp_path / "peft")
    write_adapter(model, tmp_path / "ours")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "ours"))
    assert one == other


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("method", [*sorted(METHODS), *sorted(PEFT_METHODS)])
def test_an_adapter_loaded_in_place_of_another_gives_the_logits_of_one_that_is_injected(tmp_path, method, ids):
    kind = "none" if method in UNQUANTIZED else "nf4"
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        save_adapter(StandInTrainer(adapted(method, seed, kind)), folder)
    injected = [logits(load_adapter(base(kind), folder)[0].eval(), ids) for folder in folders]
    assert not torch.equal(*injected)
    model = load_adapter(base(kind), folders[0])[0].eval()
    assert torch.equal(logits(model, ids), injected[0])
    for place in (1, 0):
        assert load_in_place(model, folders[place]) == []
        assert torch.equal(logits(model, ids), injected[place])


OTHERWISE = {
    "another method": lambda: adapted("kron_lora", 2),
    "another rank": lambda: adapted(seed=2, rank=8),
    "another alpha": lambda: adapted(seed=2, alpha=3.0),
    "other modules": lambda: adapted(seed=2, target_modules=["q_proj", "down_proj"]),
    "dropout": lambda: adapted(seed=2, dropout=0.1),
    "fully trained modules": lambda: adapted(seed=2, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("what", list(OTHERWISE))
def test_an_adapter_of_another_configuration_is_not_loaded_in_place(saved, tmp_path, what, ids):
    save_adapter(StandInTrainer(OTHERWISE[what]()), tmp_path / "other")
    model = load_adapter(base(), saved)[0].eval()
    before = logits(model, ids)
    assert load_in_place(model, tmp_path / "other") is None
    assert torch.equal(logits(model, ids), before)
    assert load_in_place(model, saved) == [], "what was refused has changed nothing"


def test_nothing_is_loaded_in_place_of_what_is_not_one_adapter_alone(saved):
    model = load_adapter(base("none"), saved)[0]
    model.merge_adapter()
    assert load_in_place(model, saved) is None, "the base's weights have the adapter in them"
    model.unmerge_adapter()
    model.load_adapter(saved, "second")
    assert load_in_place(model, saved) is None
    with_head = saved.parent / "with_head"
    save_adapter(StandInTrainer(adapted(modules_to_save=["lm_head"])), with_head)
    assert load_in_place(load_adapter(base(), with_head)[0], with_head) is None
    model = load_adapter(base(), saved)[0]
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), saved / "adapter_model.safetensors")
    assert load_in_place(model, saved) is None, "load_adapter names the tensor that is missing"
    (saved / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        load_in_place(model, saved)


def test_an_adapter_of_another_base_is_not_loaded_in_place(saved, tmp_path):
    model = load_adapter(base(), saved)[0]
    described = json.loads((saved / "base.json").read_text())
    described["linear_shapes"]["lm_head"] = [7, 7]
    (saved / "base.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="other shapes"):
        load_in_place(model, saved)


def test_only_the_finished_folder_is_left_beside_nothing_else(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
    described = json.loads((saved / "base.json").read_text())
    assert described["quantization"] == "nf4"
    assert described["linear_shapes"]["model.layers.*.mlp.up_proj"] == [80, 48]


@pytest.mark.parametrize("when", ["weights", "weights (safetensors)", "description", "rename"])
def test_a_full_disk_leaves_the_adapter_that_was_there(saved, monkeypatch, when):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(*_, **__):
        if when == "weights (safetensors)":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(28, os.strerror(28))

    if when.startswith("weights"):
        monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    elif when == "description":
        monkeypatch.setattr("lsr_scale.adapters.save_and_load.base_description", full)
    else:
        rename = type(saved).rename
        monkeypatch.setattr(type(saved), "rename", lambda self, to: full() if "part" in self.name else rename(self, to))
    with pytest.raises(UserError, match=r"adapter: cannot be written: No space left on device; free some space"):
        save_adapter(StandInTrainer(adapted(seed=2)), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_what_a_kill_left_half_written_is_replaced(saved):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = saved.parent / f".adapter.{ended.pid}.part"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    save_adapter(StandInTrainer(adapted(seed=2)), saved)
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_empty_tensors_are_never_saved(tmp_path, monkeypatch):
    def save_empty(tensors, path, **kwargs):
        safetensors.torch.save_file({name: torch.empty(0) for name in tensors}, path, **kwargs)

    monkeypatch.setattr("peft.peft_model.safe_save_file", save_empty)
    with pytest.raises(RuntimeError, match="empty tensors in the adapter"):
        save_adapter(StandInTrainer(adapted()), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused_with_the_shapes(saved):
    with pytest.raises(UserError, match=r"layers \[out, in\] have other shapes") as caught:
        load_adapter(quantize(tiny_llama(hidden_size=64, intermediate_size=96), "nf4"), saved)
    assert "model.layers.*.mlp.up_proj: [80, 48] -> [96, 64]" in str(caught.value)


def test_another_quantization_of_the_same_base_is_said_and_allowed(saved):
    _, notes = load_adapter(tiny_llama(), saved)
    assert notes == ["the base's quantization is none; that of its training was nf4"]


def test_an_adapter_of_another_base_is_refused_without_its_description_too(saved):
    (saved / "base.json").unlink()
    with pytest.raises(
        UserError, match=r"does not fit the base model:\n.*q_proj.*: \[3, 2, 6\] in the file, \[3, 2, 8\] in the model"
    ):
        load_adapter(tiny_llama(hidden_size=64), saved)
    _, notes = load_adapter(base(), saved)
    assert notes == ["there is no base.json beside the adapter, so its base model could not be checked"]


@pytest.mark.parametrize("left", [0, 7, 200, -1])
def test_weights_that_were_cut_short_are_refused(saved, left):
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors: damaged or cut short .* restore it or train again"
    ):
        load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"adapter_config\.json: the adapter's configuration cannot be read"),
        ("[]", "peft_type None is no adapter method"),
        ("{}", "peft_type None is no adapter method"),
        ('{"peft_type": "LRS"}', r"peft_type 'LRS' is no adapter method that is known here; did you mean .*'LSR'"),
        (None, r"there is no adapter in this folder \(adapter_config\.json is missing\)"),
    ],
)
def test_a_broken_configuration_is_refused(saved, config, message):
    file = saved / "adapter_config.json"
    file.unlink() if config is None else file.write_text(config)
    with pytest.raises(UserError, match=message):
        load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank: expected an integer >= 1"),
        ({"rank": 2}, r"does not fit the base model:\n.*: \[3, 2, 8\] in the file, \[3, 1, 8\] in the model"),
        ({"target_modules": ["q_proj", "no_such"]}, "'no_such' matches no module"),
        ({"target_modules": ["q_proj"]}, r"down_proj\.lsr_down_left.*\] in the file, missing in the model"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(saved, changes, message):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=r"(?s)" + message):
        load_adapter(base(), saved)


def test_weights_with_a_tensor_too_few_are_refused_by_its_name(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError, match=rf"{name}: missing in the file, \["):
        load_adapter(base(), saved)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_a_broken_description_of_the_base_is_refused(saved, content):
    (saved / "base.json").write_text(content)
    with pytest.raises(
        UserError, match=r"base\.json: (the base model's description cannot|not a description of a base)"
    ):
        load_adapter(tiny_llama(), saved)


def test_missing_weights_and_a_missing_folder_are_refused(saved, tmp_path):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        load_adapter(tiny_llama(), saved)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="there is no adapter in this folder"):
        load_adapter(tiny_llama(), saved)
