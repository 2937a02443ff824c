"""An adapter's files, of odd kinds: every reader of them refuses the same, in message, and reads what is good."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsr_scale import AdapterBank, UserError
from lsr_scale.adapters import peft_config
from lsr_scale.adapters.identity import base_description
from lsr_scale.adapters.save_and_load import load_adapter, resolve_start_from
from lsr_scale.exporting import open_adapter
from lsr_scale.exporting.inspect import inspect_adapter
from tests.adapters.test_bank import adapted
from tests.helpers.tiny_models import tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def bank_model():
    return adapted(tiny_llama(), "lsr").eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "anna"
    model = tiny_llama()
    described = base_description(model)
    adapted(model, "lsr").save_pretrained(folder)
    (folder / "base.json").write_text(json.dumps(described))
    return folder


def spoiled(good, tmp_path, change):
    folder = tmp_path / "anna"
    shutil.copytree(good, folder)
    change(folder)
    return folder


def readers(bank_model):
    bank = AdapterBank.__new__(AdapterBank)

    def of_bank(folder):
        vars(bank).update(vars(AdapterBank(bank_model, folder.parent, 0.01)))
        try:
            return bank.load(folder.name)
        finally:
            bank_model.base_model.bank = None

    config = peft_config("lsr", {"rank": 4, "separation_rank": 2})
    return [
        open_adapter,
        inspect_adapter,
        lambda folder: load_adapter(tiny_llama(), folder),
        lambda folder: (resolve_start_from(str(folder), config), load_adapter(tiny_llama(), folder)),
        of_bank,
    ]


def configured(**changes):
    def change(folder):
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return change


def rewritten(edit):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        tensors[name] = edit(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS)

    return change


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def fifo(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def directory(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def filled(value):
    def edit(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return edit


BAD = {
    "config is a pipe": (fifo(CONFIG), "adapter"),
    "config is a folder": (directory(CONFIG), "adapter"),
    "weights are a pipe": (fifo(WEIGHTS), "adapter"),
    "weights are a folder": (directory(WEIGHTS), "adapter"),
    "config nested deeply": (text(CONFIG, b"[" * 200_000), "cannot be read|nested"),
    "config with half a pair": (configured(base_model_name_or_path="\ud83d"), "half of a surrogate pair"),
    "config with a long number": (text(CONFIG, b'{"rank": ' + b"9" * 5000 + b"}"), "cannot be read"),
    "config of 20 MB": (text(CONFIG, b" " * 20_000_000), "bytes are no"),
    "config that is text": (text(CONFIG, b'"LSR"'), "peft_type None is no adapter method"),
    "method of another kind": (configured(peft_type=["LSR"]), "no adapter method"),
    "method with prompts": (configured(peft_type="PROMPT_TUNING"), "no adapter method"),
    "rank is text": (configured(rank="4"), "rank: input should be a valid integer, got '4'"),
    "rank is true": (configured(rank=True), "rank: input should be a valid integer, got True"),
    "rank is null": (configured(rank=None), "rank: input should be a valid integer, got None"),
    "rank is huge": (configured(rank=2**70), "rank: (expected at most|input should be)"),
    "alpha is NaN": (configured(alpha=float("nan")), "alpha: expected a finite number"),
    "alpha is 1e308": (configured(alpha=1e308), "alpha: expected a finite number"),
    "alpha is a list": (configured(alpha=[8]), "alpha: input should be a valid number"),
    "use_rslora is text": (configured(use_rslora="no"), "use_rslora: input should be a valid boolean"),
    "dropout is huge": (configured(dropout=3.0), "dropout: expected 0 <= dropout < 1"),
    "targets are numbers": (configured(target_modules=[3]), "target_modules: input should be a valid string"),
    "targets match for ever": (configured(target_modules="(.*)*x"), "target_modules: .*for ever"),
    "pattern is a list": (configured(rank_pattern=[["q_proj", 4]]), "rank_pattern: input should be a valid dict"),
    "pattern matches for ever": (configured(alpha_pattern={"(a+)+$": 2.0}), "alpha_pattern: .*for ever"),
    "init is unknown": (configured(init="best"), "init: input should be 'zero', 'paper' or 'gradient'"),
    "weights with NaN": (rewritten(filled(float("nan"))), "values that are not finite"),
    "weights with inf": (rewritten(filled(-float("inf"))), "values that are not finite"),
    "weights beyond float32": (rewritten(lambda t: t.double() + 1e308), "values that are not finite in float32"),
    "weights are integers": (rewritten(lambda t: t.long()), "has no values of torch.int64"),
    "weights are booleans": (rewritten(lambda t: t.bool()), "has no values of torch.bool"),
    "weights are complex": (rewritten(lambda t: t.to(torch.complex64)), "has no values of torch.complex64"),
    "weights are empty": (rewritten(lambda t: t.reshape(-1)[:0]), "is empty"),
    "weights cut short": (lambda f: os.truncate(f / WEIGHTS, 500), "damaged or cut short"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_damaged_is_refused_in_the_same_words_by_every_reader(good, tmp_path, bank_model, kind):
    change, message = BAD[kind]
    folder = spoiled(good, tmp_path, change)
    for read in readers(bank_model):
        with pytest.raises(UserError, match=message) as told:
            read(folder)
        assert len(str(told.value)) < 700
        assert "anna" in str(told.value)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b'{"name": "x"}',
        b'{"name": 3, "architecture": "x", "quantization": "none", "config_sha256": "", "linear_shapes": {}}',
        b'{"name": "x", "architecture": "x", "quantization": "none", "config_sha256": "", "linear_shapes": [1]}',
    ],
)
def test_a_description_that_is_none_is_refused_wherever_it_is_read(good, tmp_path, content):
    folder = spoiled(good, tmp_path, text("base.json", content))
    for read in (open_adapter, lambda folder: load_adapter(tiny_llama(), folder)):
        with pytest.raises(UserError, match=r"base\.json: (not a description|the base model's description cannot)"):
            read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"a_new_option": [1], "auto_mapping": None, "peft_version": "9.9"},
        {"target_modules": r".*layers\.[0-9]+\..*(attn|mlp).*\.(q|k|v|o|gate|up|down)_proj"},
        {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None},
    ],
)
def test_what_is_good_is_read_by_every_reader(good, tmp_path, bank_model, changes):
    folder = spoiled(good, tmp_path, configured(**changes))
    for read in readers(bank_model):
        read(folder)


def test_lora_as_other_trainers_write_it_is_read(tmp_path, good):
    shutil.copytree(good, tmp_path / "a")
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 12.5, "target_modules": ["q_proj"],
        "lora_dropout": 0, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "eva_config": None,
        "init_lora_weights": "eva", "loftq_config": {}, "megatron_core": "megatron.core", "revision": None,
        "base_model_name_or_path": "x", "inference_mode": True, "layers_pattern": None, "auto_mapping": None,
    }  # fmt: skip
    (tmp_path / "a" / CONFIG).write_text(json.dumps(content))
    config = resolve_start_from(
        str(tmp_path / "a"), peft_config("lora", {"rank": 8, "alpha": 12.5, "target_modules": ["q_proj"]})
    )
    assert config == tmp_path / "a"


def test_a_bank_follows_no_link_out_of_its_folder(good, tmp_path, bank_model):
    outside, bank = tmp_path / "outside", tmp_path / "bank"
    shutil.copytree(good, outside / "anna")
    bank.mkdir()
    (bank / "linked").symlink_to(outside / "anna")
    (bank / "files").mkdir()
    for name in (CONFIG, WEIGHTS):
        (bank / "files" / name).symlink_to(outside / "anna" / name)
    of_bank = readers(bank_model)[-1]
    with pytest.raises(UserError, match="'linked' is no name of a folder in"):
        of_bank(bank / "linked")
    with pytest.raises(UserError, match="is a link out of"):
        of_bank(bank / "files")
    (bank / "files" / CONFIG).unlink()
    shutil.copy(outside / "anna" / CONFIG, bank / "files")
    with pytest.raises(UserError, match=f"{WEIGHTS}: is a link out of .*; copy the file there"):
        of_bank(bank / "files")
    (bank / "files" / WEIGHTS).unlink()
    shutil.copy(outside / "anna" / WEIGHTS, bank / "files")
    of_bank(bank / "files")
