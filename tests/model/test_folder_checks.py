"""What a base's folder may hold: plain files in it, safetensors, a configuration of a model that a machine holds."""

import json
import os
import shlex
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from lsr_scale.errors import UserError
from lsr_scale.model import load_base, load_config, load_tokenizer, meta_model
from lsr_scale.model.folder_checks import read_json
from tests.helpers.programs import run_program
from tests.helpers.tiny_models import tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a tiny LLaMA in one file."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """Return a copy of that folder that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    """Return the folder of a tiny LLaMA in several files."""
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def load(folder, **options):
    return load_base(str(folder), device=CPU, **{"quantization": "none", "dtype": "float32", **options})


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def point_to(folder, name):
    """Have one shard's name in the index be another."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"].values()))
    content["weight_map"] = {k: name if v == first else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return folder / first


def test_pickled_weights_are_refused_and_the_command_converts_them(copied, saved):
    tensors = load(saved).state_dict()
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its weights are a pickle \(pytorch_model\.bin\)") as error:
        load(copied)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    assert run_program(command[2], copied, *command[3:]).returncode == 0
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(copied).state_dict().items())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "sub/a.safetensors", "a.bin"])
def test_an_index_that_names_files_elsewhere_is_refused(sharded, name):
    point_to(sharded, name)
    with pytest.raises(UserError, match=r"index\.json: names .*expected safetensors files beside it"):
        load(sharded)


def test_weights_behind_a_link_out_of_the_folder_are_refused_but_for_the_hubs_cache(sharded, tmp_path):
    shard = point_to(sharded, "linked.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(shard, elsewhere / "blob")
    (sharded / "linked.safetensors").symlink_to(elsewhere / "blob")
    with pytest.raises(UserError, match=r"linked\.safetensors: is a link out of the model's folder"):
        load(sharded)
    # as the hub's cache lays a model out
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.copytree(sharded, snapshot, symlinks=True)
    (snapshot / "linked.safetensors").unlink()
    shutil.copy(elsewhere / "blob", repository / "blobs" / "ffff")
    (snapshot / "linked.safetensors").symlink_to("../../blobs/ffff")
    assert load(snapshot).num_parameters() == tiny_llama().num_parameters()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON"),
        ("[1]", "expected an object, got list"),
        ("[" * 100_000, "not a readable JSON"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "expected a weight_map"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "names model-9.safetensors, which is not there"),
    ],
)
def test_a_broken_index_is_named(sharded, content, message):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=rf"index\.json: .*{message}"):
        load(sharded)


def test_a_shard_cut_short_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{shard.name}: a weight file is damaged or cut short"):
        load(sharded)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_unopened(copied, name):
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    with pytest.raises(UserError, match=rf"{name} in this folder is no file"):
        load_config(str(copied))


def test_an_adapter_beside_a_base_is_not_loaded_in_its_place(copied):
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(UserError, match="Transformers would load that adapter and its base instead"):
        load(copied)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 100_000),
        ("num_hidden_layers", 10**30),
        ("num_labels", 10**12),
        ("hidden_size", 10**9),
        ("vocab_size", 10**12),
        ("vocab_size", 10**30),
        ("intermediate_size", 10**15),
        ("num_local_experts", 10**9),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(copied, field, value):
    set_config(copied, **{field: value})
    with pytest.raises(UserError, match=r"fetch"):
        meta_model(load_config(str(copied)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "many"),
        ("hidden_size", None),
        ("hidden_size", -48),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("num_attention_heads", [4]),
        ("hidden_act", "no_such"),
        ("hidden_act", 3),
        ("rms_norm_eps", "small"),
        ("rope_parameters", "none"),
        ("rope_parameters", {"rope_type": "no_such"}),
        ("pad_token_id", 10**6),
        ("dtype", "bfloat17"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [1]),
        ("vocab_size", 1.5),
        ("tie_word_embeddings", "perhaps"),
        ("model_type", 7),
        ("quantization_config", [1]),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_words_or_change_nothing(copied, field, value):
    set_config(copied, **{field: value})
    try:
        model = load(copied)
    except UserError as error:
        message = str(error)
    else:
        message = str(copied)
        assert torch.isfinite(model(torch.zeros(1, 3, dtype=torch.long)).logits).all()
    assert str(copied) in message
    assert len(message) < 800


def test_code_from_the_hub_is_not_fetched_for_attention(copied):
    set_config(copied, attn_implementation="someone/kernels")
    with pytest.raises(UserError, match="attn_implementation names code from the hub"):
        load(copied)


@pytest.mark.parametrize(
    ("checkpoint", "asked", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "nf4", "quantized already, by gptq.*unquantized weights"),
        ({"quant_method": "awq", "bits": 4}, "none", "quantized already, by awq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "int8", "quantized already, by fp8"),
        ({"load_in_8bit": True}, "nf4", r"model\.quantization: nf4, but .*in int8; set it to int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8", r"in nf4; set it to nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "none", r"in nf4; set it to nf4"),
    ],
)
def test_weights_quantized_in_another_way_are_refused(copied, checkpoint, asked, message):
    set_config(copied, quantization_config=checkpoint)
    with pytest.raises(UserError, match=message):
        load(copied, quantization=asked)


def test_weights_quantized_already_as_asked_compute_in_the_runs_dtype(copied, tmp_path):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    model = type(tiny_llama()).from_pretrained(copied, quantization_config=options, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "nf4")
    loaded = load(tmp_path / "nf4", quantization="nf4", dtype="float32")
    assert loaded.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    with pytest.raises(UserError, match="set it to nf4"):
        load(tmp_path / "nf4", quantization="int8")


def test_missing_and_unexpected_weights_are_named(copied):
    set_config(copied, num_hidden_layers=1)
    said = []
    load(copied, task="seq_cls", num_labels=2, say=said.append)
    assert any("has no weights for score.weight: they start at random" in line for line in said)
    assert any("does not take: model.layers.1." in line for line in said)


def test_a_tokenizer_is_not_blamed_for_its_models_configuration(copied):
    set_config(copied, hidden_act=3)
    with pytest.raises(UserError, match=r"its config\.json cannot be used"):
        load_tokenizer(str(copied))


@pytest.mark.parametrize("content", ["null", "[]", "{", "{}", '{"model": 3}', "\x00", "[" * 100_000])
def test_a_broken_tokenizer_is_refused(copied, content):
    (copied / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer") as error:
        load_tokenizer(str(copied))
    assert str(copied) in str(error.value)
    assert len(str(error.value)) < 800


def test_a_model_in_the_hubs_cache_is_looked_at_alike(copied, tmp_path, monkeypatch):
    set_config(copied, num_hidden_layers=100_000)
    snapshot = tmp_path / "hub" / "models--someone--deep" / "snapshots" / "0123"
    shutil.copytree(copied, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"num_hidden_layers is 100000; no model has more than 1,000 layers"):
        load_config("someone/deep")


def test_the_index_of_the_largest_models_is_read(tmp_path):
    names = {
        f"model.layers.{n}.mlp.experts.gate_proj.weight": "model-00001-of-00001.safetensors" for n in range(200_000)
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}, indent=2))
    assert index.stat().st_size > 16 * 2**20
    assert len(read_json(index)["weight_map"]) == 200_000
    with index.open("ab") as stream:
        stream.truncate(2**30)  # a hole of a GiB
    with pytest.raises(UserError, match=r"not a readable JSON configuration \(it has 1,073,741,824 bytes\)"):
        read_json(index)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *(("attention_dropout", value, "from 0 to 1") for value in (-1, 1.5, 10**12, None)),
        ("hidden_dropout_prob", -0.1, "from 0 to 1"),
        ("resid_pdrop", 2, "from 0 to 1"),
        ("rms_norm_eps", -1, "finite number that is not negative"),
        ("layer_norm_epsilon", float("inf"), "finite number that is not negative"),
        ("rms_norm_eps", float("nan"), "a number"),
        ("logit_scale", float("nan"), "a number"),
    ],
)
def test_numbers_that_would_end_training_at_its_first_step_are_refused_before(copied, field, value, expected):
    set_config(copied, **{field: value})
    with pytest.raises(UserError, match=rf"config\.json: {field} is .*; expected .*{expected}"):
        load_config(str(copied))


def test_numbers_that_published_models_have_are_taken(copied):
    set_config(
        copied, attention_dropout=1, classifier_dropout=None, dropout=False, rms_norm_eps=0.0, time_step_limit=[0, 1]
    )
    assert load_config(str(copied)).attention_dropout == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**400}, r"num_hidden_layers is 10+ \.\.\. 0+; no model has more than 1,000 layers"),
        ({"vocab_size": -(10**400)}, r"vocab_size is -10+ \.\.\. 0+; a model has at least one"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_key_value_heads is 3; expected a divisor of .*4"),
        ({"num_attention_heads": 4, "num_key_value_heads": 0}, r"num_key_value_heads is 0; expected a divisor of .*4"),
    ],
)
def test_numbers_that_no_model_has_are_refused_however_long(copied, changes, message):
    set_config(copied, **changes)
    with pytest.raises(UserError, match=message):
        load_config(str(copied))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integer_weights_without_a_quantization_config_are_refused(copied, dtype):
    weights = load_file(copied / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.safetensors: '{name}' has integers"):
        load(copied)
