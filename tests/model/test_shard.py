"""A model sharded in one process, its shards held aside as `offload_param` does: training/test_sharding.py has two."""

import json
import os
import time
import weakref
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, core_model_loading, modeling_utils

from lsr_scale.adapters import peft_config
from lsr_scale.adapters.save_and_load import write_adapter
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.model import gather, load_base, random_weights
from lsr_scale.model.gather import gather_on_use, replicate, reshard
from lsr_scale.model.quantize import quantization_config
from lsr_scale.model.shard import Sharding, full_numel, full_shape, is_sharded
from lsr_scale.training import assembly
from tests.adapters.test_models import ARCHITECTURES, OPTIONS, build, inputs
from tests.helpers.tiny_models import quantize, randomize, tiny_llama
from tests.helpers.tiny_runs import tiny_run

pytestmark = pytest.mark.filterwarnings("ignore")


def shard(model: nn.Module, **options) -> nn.Module:
    """Shard a model that is there already, and have it gathered on use."""
    sharding = Sharding(offload=True, **options)
    with sharding.loading() as shard_rest:
        shard_rest(model)
    gather_on_use(model, offload=True)  # pyright: ignore
    return model


def adapted(model, targets, method="lsr"):
    model = get_peft_model(model, peft_config(method, {"target_modules": targets, **OPTIONS.get(method, {})}))
    return randomize(model).train()


def loss_and_gradients(model, given):
    torch.manual_seed(1)  # for dropout
    output = model(**given)
    loss = output.loss if getattr(output, "loss", None) is not None else output[0].float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gathered_bytes(model):
    """Return the bytes of the sharded matrices, as they stand."""
    return sum(p.data.untyped_storage().nbytes() for p in model.parameters() if hasattr(p, "shard"))


def same(one, other):
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys() > set()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_what_it_does_unsharded(architecture):
    base, targets, _ = build(architecture)
    expected = loss_and_gradients(adapted(base, targets), inputs(base))
    model = adapted(shard(build(architecture)[0]), targets)
    assert is_sharded(model)
    for _ in range(2):
        model.zero_grad()
        same(loss_and_gradients(model, inputs(base)), expected)
        assert gathered_bytes(model) == 0, "all is resharded at the end of a backward pass"
    with torch.no_grad():
        base.eval(), model.eval()
        assert torch.equal(model(**inputs(base))[0], base(**inputs(base))[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_recomputed_layers_are_unsharded_then(ids, kind, reentrant):
    def model():
        base = tiny_llama(torch.bfloat16, num_hidden_layers=4)
        if kind != "none":
            freeze_quantized(quantize(base, kind))
        return base

    def run(base):
        peft_model = adapted(base, ["q_proj", "down_proj"])
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
        return loss_and_gradients(peft_model, {"input_ids": ids, "labels": ids})

    sharded = shard(model())
    same(run(sharded), run(model()))
    assert gathered_bytes(sharded) == 0


def test_a_tied_matrix_is_unsharded_for_the_embedding_and_for_the_head(ids):
    model = shard(tiny_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = tiny_llama(tie_word_embeddings=True)(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, expected), "once more, without a backward pass between"


def test_the_head_is_resharded_when_scoring_is_done(ids):
    model = shard(tiny_llama())
    with torch.no_grad():
        model(input_ids=ids)
    assert gathered_bytes(model) == model.lm_head.weight.nbytes > 0
    reshard(model)
    assert gathered_bytes(model) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_all_is_held_while_processes_generate_and_resharded_then(ids, tied, fails):
    base, model = tiny_llama(tie_word_embeddings=tied), shard(tiny_llama(tie_word_embeddings=tied))
    whole = sum(full_numel(p) * p.element_size() for p in model.parameters() if hasattr(p, "shard"))
    with torch.no_grad(), suppress(MemoryError), gather.gathered(model):
        for _ in range(2):
            assert gathered_bytes(model) == whole
            assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
        if fails:
            raise MemoryError
    assert gathered_bytes(model) == 0
    given = {"input_ids": ids, "labels": ids}
    same(loss_and_gradients(adapted(model, ["q_proj"]), given), loss_and_gradients(adapted(base, ["q_proj"]), given))
    assert gathered_bytes(model) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_an_error_in_the_midst_of_a_pass_leaves_nothing_broken(ids, tied):
    model, expected = (tiny_llama(tie_word_embeddings=tied) for _ in range(2))
    shard(model)

    def fail(*_):
        raise MemoryError

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(input_ids=ids)
    hook.remove()
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_experts_are_sharded_with_their_layer():
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = Qwen3MoeConfig(**sizes, num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2)

    def model():
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config)

    sharded, given = shard(model()), {"input_ids": torch.arange(5, 14)[None]}
    assert sum(p.numel() for p in sharded.parameters()) < 0.02 * sum(p.numel() for p in model().parameters())
    same(*(loss_and_gradients(adapted(base, ["q_proj"]), given) for base in (sharded, model())))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_random_experts_are_sharded_as_soon_as_they_have_weights(tmp_path, monkeypatch, quantization):
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    Qwen3MoeConfig(**sizes, vocab_size=64, moe_intermediate_size=64, num_experts=4).save_pretrained(tmp_path)
    init, most = random_weights._init, []

    def counting(model, module):
        most.append(sum(p.numel() for p in model.parameters() if p.dim() > 1 and not p.is_meta))
        init(model, module)

    monkeypatch.setattr(random_weights, "_init", counting)
    options = dict(quantization=quantization, random_weights=True, dtype="float32")
    sharded = load_base(str(tmp_path), **options, sharding=Sharding(offload=True))
    experts = sharded.model.layers[0].mlp.experts
    assert max(most) == experts.gate_up_proj.ds_numel + experts.down_proj.ds_numel
    whole = load_base(str(tmp_path), **options)
    with gather.gathered(sharded):
        for (name, one), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(one, other), name
    assert 0.018 < whole.model.layers[2].mlp.experts.down_proj.std() < 0.022


@pytest.mark.parametrize("name", ["down_proj", "lm_head"])
def test_a_fully_trained_module_gets_its_gradient(tmp_path, ids, name):
    tiny_llama().save_pretrained(tmp_path)
    sharding = Sharding(offload=True, replicated=[name])
    base = load_base(str(tmp_path), quantization="none", dtype="float32", sharding=sharding)
    options = {"target_modules": ["q_proj"], "modules_to_save": [name], **OPTIONS["lsr"]}
    model = get_peft_model(base, peft_config("lsr", options)).train()
    _, gradients = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert any("modules_to_save" in key and gradient.abs().sum() > 0 for key, gradient in gradients.items())


@pytest.mark.parametrize("given", [None, "0"])
def test_weights_of_a_checkpoint_are_sharded_one_after_the_other(tmp_path, monkeypatch, given):
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path)
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
    read, full, most = core_model_loading._materialize_copy, [], []

    def reading(*args, **kwargs):
        tensor = read(*args, **kwargs)
        if tensor.dim() > 1:  # vectors stay, as they are replicated
            full.append(weakref.ref(tensor.untyped_storage()))
            most.append(sum(one.nbytes() for one in (ref() for ref in full) if one is not None))
        return tensor

    def shard_slowly(*args, _shard=Sharding._shard):
        time.sleep(0.05)  # threads would read on meanwhile
        return _shard(*args)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", reading)
    monkeypatch.setattr(Sharding, "_shard", shard_slowly)
    load_base(str(tmp_path), quantization="none", dtype="float32", sharding=Sharding(offload=True))
    assert len(most) == 16
    assert max(most) == 4 * 96 * 48, "that of the embedding, by itself"
    assert os.environ.get(name) == given


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("stored", "wanted"), [("float16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_a_quantized_checkpoint_in_another_dtype_is_cast_shard_by_shard(
    tmp_path, monkeypatch, world_size, stored, wanted
):
    tiny_llama(getattr(torch, stored)).save_pretrained(tmp_path / "whole")
    quantizer = quantization_config("nf4", True, getattr(torch, stored), None)
    options = {"dtype": getattr(torch, stored), "quantization_config": quantizer}
    LlamaForCausalLM.from_pretrained(tmp_path / "whole", **options).save_pretrained(tmp_path / "nf4")
    expected = load_base(str(tmp_path / "nf4"), dtype=wanted)
    cast, names = Sharding.cast, ("model.embed_tokens.weight", "lm_head.weight")
    seen = []

    def cast_a_shard(self, matrix, dtype):
        seen.append(matrix.numel())
        cast(self, matrix, dtype)

    monkeypatch.setattr(Sharding, "cast", cast_a_shard)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    shards = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        base = load_base(str(tmp_path / "nf4"), dtype=wanted, sharding=Sharding(offload=world_size == 1))
        shards.append([base.get_parameter(name).shard for name in names])
        assert [base.get_parameter(name).dtype for name in names] == [getattr(torch, wanted)] * 2
    # some releases of Transformers cast while they read
    assert seen in ([], [0] * 2 * world_size), "none is gathered"
    for name, parts in zip(names, zip(*shards, strict=True), strict=True):
        weight = expected.get_parameter(name)
        assert torch.equal(torch.cat(parts)[: weight.nbytes].view(weight.dtype).view(weight.shape), weight)


@pytest.mark.parametrize("equal", [True, False])
def test_two_matrices_that_a_checkpoint_has_are_tied_only_if_they_are_equal(tmp_path, ids, equal):
    model = tiny_llama(tie_word_embeddings=False)
    if equal:
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = load_base(str(tmp_path), quantization="none", dtype="float32", sharding=Sharding(offload=True))
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_on_the_embedding_is_saved_without_the_base(tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens"], "r": 2}
    model = get_peft_model(shard(tiny_llama()), LoraConfig(**options))  # pyright: ignore
    model.config.name_or_path = "tiny"
    write_adapter(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in name for name in names)
    assert not any("base_layer" in name for name in names)


def test_a_run_replicates_modules_to_save_of_its_own_and_of_the_adapter_it_starts_from(monkeypatch, tmp_path):
    monkeypatch.setattr(assembly, "uses_deepspeed", lambda run: True)
    zero3 = {"deepspeed": {"config": "zero3_offload"}}
    run = tiny_run(tmp_path, **zero3)
    plain = assembly._sharding(run, None)
    assert plain is not None
    assert plain.offload
    assert plain.replicated == ()
    named = tiny_run(tmp_path, adapter={"modules_to_save": ["lm_head"]}, **zero3)
    assert assembly._sharding(named, None).replicated == ("lm_head",)  # pyright: ignore
    assembly._peft_config(named).save_pretrained(tmp_path / "first")
    assert assembly._sharding(run, tmp_path / "first").replicated == ("lm_head",)  # pyright: ignore
    assert assembly._sharding(tiny_run(tmp_path), None) is None


def test_matrices_are_sharded_and_vectors_are_not(ids):
    model = shard(tiny_llama())
    norm, linear = model.model.norm.weight, model.model.layers[1].mlp.up_proj.weight
    assert not hasattr(norm, "shard")
    assert norm.shape == full_shape(norm) == (48,)
    assert linear.shape == (0,)
    assert full_shape(linear) == (80, 48)
    assert full_numel(linear) == 80 * 48
    assert linear.shard.nbytes == 4 * 80 * 48
    with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied"):
        torch.ones(1, 48) @ linear.t()


@pytest.mark.parametrize(
    ("rank", "processes", "expected"),
    [(0, 1, range(40)), (0, 2, range(32)), (1, 2, range(32, 40)), (2, 3, range(32, 40)), (3, 4, [])],
)
def test_shards_are_alike_in_size_and_the_last_ones_are_padded(monkeypatch, rank, processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", str(rank))
    layer = nn.Linear(8, 5, bias=False)
    layer.weight = nn.Parameter(torch.arange(40, dtype=torch.int8).view(5, 8), requires_grad=False)
    with Sharding(offload=True).loading() as shard_rest:
        shard_rest(layer)
    size = {1: 48, 2: 32}.get(processes, 16)
    assert layer.weight.shard.tolist() == [*expected, *[0] * (size - len(expected))]


def test_what_will_be_trained_is_replicated_again():
    model, expected = tiny_llama(), tiny_llama()
    with Sharding(offload=True).loading() as shard_rest:
        shard_rest(model)
    replicate(model.lm_head)
    replicate(model.model.norm)  # which was never sharded
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert not hasattr(model.lm_head.weight, "shard")
    assert is_sharded(model)


def test_one_process_that_holds_everything_shards_nothing():
    warm_up = modeling_utils.caching_allocator_warmup
    with Sharding().loading() as shard_rest:
        layer = nn.Linear(2, 2)
        shard_rest(layer)
        assert modeling_utils.caching_allocator_warmup is warm_up
    assert not is_sharded(layer)


class Work:
    """What a collective call leaves: it is done when it is waited for."""

    def __init__(self, full, shard):
        self.full, self.shard = full, shard

    def wait(self):
        self.full.copy_(self.shard.repeat(2))


@pytest.mark.parametrize("manager", [None, lambda group=None: None])
def test_matrices_are_gathered_one_by_one_where_pytorch_makes_no_one_call_of_them(manager, monkeypatch, caplog):
    gather._coalescing_manager.cache_clear()
    monkeypatch.setattr(gather.distributed, "_coalescing_manager", manager)
    monkeypatch.setattr(gather, "_all_gather", lambda full, shard, async_op=False: Work(full, shard))
    shards, fulls = [torch.ones(3), torch.arange(2.0)], [torch.zeros(6), torch.zeros(4)]
    for _ in range(2):
        for work in gather.start_all_gather(shards, fulls):
            work.wait()
    assert torch.equal(fulls[1], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert fulls[0].all()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "a layer's matrices are gathered one by one"
    ]
    gather._coalescing_manager.cache_clear()


def test_a_pytorch_that_tells_no_backward_pass_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(UserError, match=r"does not tell which backward pass runs.*or set deepspeed.config to zero2"):
        Sharding()
