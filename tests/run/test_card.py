"""What lies beside an adapter for those who come with plain PEFT: its card, whose words work, and its exact LoRA."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from lsr_scale.adapters.read import portable_base
from lsr_scale.config import declared
from lsr_scale.errors import UserError
from lsr_scale.exporting import export
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.load import load_run_model
from tests.helpers.launch import ROOT
from tests.helpers.programs import run_program
from tests.helpers.tiny_runs import do, labelled, save_classifier, save_llama, tiny_run, write_rows

# forgets this package, whatever is installed, and says so if anything imports it
WITHOUT_US = "import sys; sys.modules['lsr_scale'] = None\n"
LOGITS = "import json, torch; print(json.dumps(model(torch.tensor([[5, 6, 7, 8]])).logits.tolist()))\n"


def block(folder):
    """Return the code that a card tells."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def logits(folder):
    model, _, _ = load_run_model(folder.path)
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run on a float32 base, saved as LoRA too, and checkpoints."""
    place = tmp_path_factory.mktemp("card")
    save_llama(place / "model")
    model = {"quantization": "none", "dtype": "float32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        given = {"name": str(place / "model"), **model}
        training = {"output_dir": "runs/mine", "save_as_lora": True}
        do(tiny_run(place, model=given, training=training))
    return place, RunFolder(place / "runs" / "mine")


def test_plain_peft_ends_in_a_key_error_and_what_the_card_says_works(run):
    place, folder = run
    code = block(folder.adapter)
    assert code.startswith("import lsr_scale")
    alone = run_program(WITHOUT_US + code.partition("\n")[2], place)
    assert alone.returncode == 1
    assert alone.stderr.strip().endswith("KeyError: 'LSR'")
    assert "KeyError: 'LSR'" in (folder.adapter / "README.md").read_text()
    done = run_program(code + LOGITS, place)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), logits(folder))


def test_the_card_has_what_the_hub_reads_and_the_scores(run):
    _, folder = run
    card = ModelCard.load(folder.adapter / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lsr_scale", "lsr"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None, "a folder of this machine is no model of the hub"
    results = json.loads((folder.results).read_text())
    for words in (f"{results['trainable_parameters']:,}", "| questions | ", "| loss at the end | ", "rows.jsonl"):
        assert words in card.text


def test_a_checkpoint_has_a_card_too_and_may_lose_it(run):
    from lsr_scale.training.checkpoint.manifest import damage

    _, folder = run
    checkpoint = folder.path / "checkpoint-2"
    assert "PeftModel.from_pretrained(base, 'runs/mine/checkpoint-2')" in block(checkpoint)
    (checkpoint / "README.md").write_text("mine")
    assert damage(checkpoint) is None


def test_the_lora_beside_it_gives_the_same_logits_where_the_package_is_never_imported(run):
    place, folder = run
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(place / 'model')!r}, dtype='float32')\n"
        f"model = PeftModel.from_pretrained(base, {str(folder.lora)!r})\n"
    )
    done = run_program(WITHOUT_US + code + LOGITS, place)
    assert done.returncode == 0, done.stderr
    expected = logits(folder)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-5, atol=1e-5)
    base = run_program(
        WITHOUT_US + code.replace("PeftModel.from_pretrained(base", "(lambda base, _: base)(base") + LOGITS, place
    )
    assert not torch.allclose(torch.tensor(json.loads(base.stdout)), expected, atol=1e-4), "the adapter does something"
    assert set(folder.written()) >= set(folder.lora.iterdir()) | set(folder.adapter.iterdir())
    assert {path.name for path in (folder.lora).iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "base.json")
    }


def test_a_later_run_in_the_folder_that_is_not_saved_as_lora_leaves_none(run, tmp_path, monkeypatch):
    place, _ = run
    monkeypatch.chdir(tmp_path)
    model = {"name": str(place / "model")}
    first = do(tiny_run(place, model=model, training={"output_dir": "run", "save_as_lora": True, "max_steps": 1}))
    assert first.lora.is_dir()
    again = do(tiny_run(place, model=model, training={"output_dir": "run", "max_steps": 1}), overwrite=True)
    assert again.adapter.is_dir()
    assert not again.lora.exists()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("krona", "krona's updates are of full rank, so no LoRA holds them"),
        ("lora", "the adapter is PEFT's LoRA already"),
    ],
)
def test_what_cannot_be_saved_as_lora_or_is_one_is_refused_before_anything_is_loaded(tmp_path, method, expected):
    with pytest.raises(UserError, match=f"training.save_as_lora: {expected}"):
        tiny_run(tmp_path, adapter={"method": method}, training={"save_as_lora": True})


def test_which_methods_are_of_low_rank_is_read_off_their_files(monkeypatch):
    from lsr_scale.adapters import SAVED_METHODS

    monkeypatch.setattr(declared, "already_imported", lambda: False)
    for method, factors in SAVED_METHODS.items():
        if Path(sys.modules[factors.__module__].__file__).is_relative_to(ROOT / "lsr_scale"):
            assert declared.is_low_rank(method) == factors.is_low_rank(), method


def test_a_classifiers_card_loads_its_head_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path / "bert", "bert")
    rows = write_rows(tmp_path / "pairs.jsonl", labelled())
    model = {"name": "bert", "task": "seq_cls", "num_labels": 2, "quantization": "none", "dtype": "float32"}
    adapter = {"target_modules": ["query", "value"]}
    run = tiny_run(tmp_path, model=model, adapter=adapter, data={"train": [rows]}, eval={"tasks": []})
    folder = do(run)
    assert ModelCard.load(folder.adapter / "README.md").data.pipeline_tag == "text-classification"
    done = run_program(
        block(folder.adapter)
        + "print(model(torch.tensor([[2, 5, 6, 3]])).logits.shape)".replace("print", "import torch; print"),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 2])\n"


@pytest.mark.parametrize("kind", ["lora", "adapter", "merged"])
def test_what_the_card_of_an_export_says_runs_as_it_stands(run, monkeypatch, kind):
    place, folder = run
    monkeypatch.chdir(place)
    export(folder.path, kind, f"out-{kind}", say=lambda _: None, verify=False)
    code = block(Path(f"out-{kind}"))
    done = run_program((WITHOUT_US if kind != "adapter" else "") + code + LOGITS, place)
    assert done.returncode == 0, done.stderr
    *answer, last = done.stdout.splitlines()
    assert answer, "it generates"
    # a merged model is in bfloat16
    torch.testing.assert_close(torch.tensor(json.loads(last)), logits(folder), rtol=1e-2, atol=5e-2)


def test_the_card_of_an_export_says_how_the_base_was_held_and_numbers_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "model")
    folder = do(tiny_run(tmp_path, training={"max_steps": 1, "save_steps": 1}))
    capsys.readouterr()
    assert export(folder.path, "lora", "out", max_rank=1)["bytes of tensors"] > 0
    text, said = (tmp_path / "out" / "README.md").read_text(), capsys.readouterr().out
    assert "It was trained on the base in nf4; held otherwise, its outputs differ a little." in text
    for words in (
        "size: ",
        "KiB, ",
        "times what the trained parameters take in 16 bits",
        "time to write: ",
        "verified: ",
    ):
        assert words in said
    assert "rank of the LoRA: 1\ntruncation error: " in said
    assert "| size | " in text
    assert "bytes of" not in said + text
    assert "16-bit factors" not in said + text


@pytest.mark.parametrize("place", ["run", "checkpoint", "export"])
def test_the_embedded_base_is_named_as_the_hub_does(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    # stands in for the converted model, by its folder's name
    model = tmp_path / "cache" / "models" / "smollm2-135m-instruct-0123456789ab"
    save_llama(model)
    folder = do(tiny_run(tmp_path, model={"name": str(model)}, training={"max_steps": 1, "save_steps": 1}))
    written = {"run": folder.adapter, "checkpoint": folder.path / "checkpoint-1", "export": tmp_path / "out"}[place]
    if place == "export":
        config = folder.adapter / "adapter_config.json"  # of an earlier release
        config.write_text(config.read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)))
        export(folder.path, "lora", written, say=lambda _: None)
    content = json.loads((written / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert json.loads((written / "base.json").read_text())["name"] == "builtin:smollm2-135m-instruct"
    assert "from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct', dtype='bfloat16')" in block(written)
    load_run_model(folder.path)
    other = "some/folder/smollm2-135m-instruct-mine"
    assert portable_base(other, None) == other
