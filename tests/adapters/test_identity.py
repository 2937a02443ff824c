"""An adapter knows its base again, and says by name which layers another base has differently."""

import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import constants

from lsr_scale import LsrConfig
from lsr_scale.adapters.identity import base_description, check_base, model_description
from lsr_scale.errors import UserError
from lsr_scale.model import load_base, load_config
from lsr_scale.model.weights_digest import weights_digest
from tests.helpers.tiny_models import SEVEN_LINEARS, tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(torch.bfloat16).save_pretrained(path)
    return str(path)


def _adapted(model):
    return peft.get_peft_model(model, LsrConfig(rank=4, separation_rank=2, target_modules=SEVEN_LINEARS))


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_description_is_the_same_with_and_without_adapters(folder, quantization):
    model = load_base(folder, quantization=quantization, device=CPU)
    bare = base_description(model)
    assert bare["quantization"] == quantization
    assert bare["architecture"] == "LlamaForCausalLM"
    assert bare["num_parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert bare["linear_shapes"]["model.layers.*.mlp.up_proj"] == [80, 48]
    assert json.loads(json.dumps(bare)) == bare
    assert base_description(_adapted(model)) == bare
    assert model_description(load_config(folder)).items() <= bare.items()


def test_the_same_base_elsewhere_is_accepted_and_what_differs_is_told(folder, tmp_path):
    stored = base_description(load_base(folder, quantization="nf4", device=CPU))
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    moved = load_base(str(tmp_path), quantization="nf4", device=CPU)
    assert check_base(stored, moved, "adapter") == []
    (line,) = check_base(stored, load_base(str(tmp_path), quantization="int8", device=CPU), "adapter")
    assert line == "the base's quantization is int8; that of its training was nf4"
    tiny_llama(torch.bfloat16, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).save_pretrained(tmp_path)
    (line,) = check_base(stored, load_base(str(tmp_path), quantization="nf4", device=CPU), "adapter")
    assert "the settings of" in line


def test_other_weights_under_the_same_settings_are_told_and_other_files_of_the_same_weights_are_not(folder, tmp_path):
    stored = base_description(load_base(folder, quantization="nf4", device=CPU))
    model = tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert check_base(stored, load_base(str(tmp_path), quantization="nf4", device=CPU), "adapter") == []
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (line,) = check_base(stored, load_base(str(tmp_path), quantization="nf4", device=CPU), "adapter")
    assert line.startswith(f"the weights of {tmp_path} are not those that it was trained on ({folder}); put those back")
    del stored["weights_sha256"]  # of an earlier release
    assert check_base(stored, load_base(str(tmp_path), quantization="nf4", device=CPU), "adapter") == []


def test_another_commit_of_a_hubs_model_is_told_where_its_weights_differ(folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--someone--model"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def push(commit, model=None):
        """Have the cache hold a commit, the newest of the branch main."""
        snapshot = shutil.copytree(folder, repository / "snapshots" / commit)
        if model is not None:
            model.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return load_base("someone/model", quantization="nf4", device=CPU)

    stored = base_description(push("a" * 40))
    assert (stored["name"], stored["commit"]) == ("someone/model", "a" * 40)
    local = base_description(load_base(folder, quantization="nf4", device=CPU))
    assert (local["commit"], local["weights_sha256"]) == (None, stored["weights_sha256"])
    assert model_description(load_config("someone/model")).items() <= stored.items()
    assert check_base(stored, push("b" * 40), "adapter") == [], "another README is no other base"
    changed = tiny_llama(torch.bfloat16)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.add_(0.01)
    (line,) = check_base(stored, push("c" * 40, changed), "adapter")
    assert line.startswith("the weights of someone/model are not those that it was trained on (someone/model); set mod")
    assert f"set model.revision: {'a' * 40}, or name a folder with the files of that commit (--base): what" in line
    back = load_base("someone/model", revision="a" * 40, quantization="nf4", device=CPU)
    assert check_base(stored, back, "adapter") == []
    changed.save_pretrained(tmp_path / "local")
    (line,) = check_base(stored, load_base(str(tmp_path / "local"), quantization="nf4", device=CPU), "adapter")
    assert f"set model.name: someone/model and model.revision: {'a' * 40}, or name a folder with the files of" in line


def test_files_that_transformers_never_opens_are_no_other_weights(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copy(other / "model.safetensors", other / "consolidated.safetensors")
    assert weights_digest(other) == weights_digest(folder) is not None
    assert weights_digest("organization/model") is weights_digest("") is None


def test_a_base_with_other_shapes_is_refused_by_the_names_of_its_layers(folder):
    stored = base_description(load_base(folder, device=CPU))
    other = _adapted(tiny_llama(intermediate_size=96))
    with pytest.raises(UserError, match=r"mlp\.up_proj: \[80, 48\] -> \[96, 48\]") as caught:
        check_base(stored, other, "runs/x/adapter")
    assert str(caught.value).startswith("runs/x/adapter: this adapter was trained on")
    assert "q_proj" not in str(caught.value)
