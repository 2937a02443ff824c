"""The memory of a step, counted without running it, against what running it saves."""

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, RobertaConfig

from lsr_scale import adapters
from lsr_scale.model import load_base, meta_model
from lsr_scale.planning import memory
from tests.helpers.tiny_models import SEVEN_LINEARS

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    pad_token_id=0,
)
ROBERTA = RobertaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    vocab_size=97,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
ONE_LAYER = LlamaConfig(**{**LLAMA.to_diff_dict(), "num_hidden_layers": 1})
METHODS = [
    ("lsr", {"rank": 4, "separation_rank": 2, "target_modules": "all-linear"}),
    ("kron_lora", {"rank": 2, "left_out": 2, "dropout": 0.1, "target_modules": SEVEN_LINEARS}),
    ("lora", {"rank": 4, "target_modules": ["q_proj", "down_proj"]}),
]


def _adapted(config, method, options, attention, task="causal_lm", kind="none", dtype=torch.bfloat16):
    base = meta_model(config, task, 2 if task == "seq_cls" else None, dtype, attention)
    if kind != "none":
        names = [n for n, m in base.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        memory.count_dequantization(base, names, kind)
    return peft.get_peft_model(base, adapters.peft_config(method, options))


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[m for m, _ in METHODS])
def test_saved_bytes_are_those_that_a_real_forward_pass_saves(tmp_path, method, options):
    """Eager attention, so that nothing stands in for anything; saved tensors as autograd's own hooks see them."""
    quantization = {"lsr": "nf4", "kron_lora": "int8", "lora": "none"}[method]
    LLAMA.save_pretrained(tmp_path)
    base = load_base(
        str(tmp_path), quantization=quantization, attention="eager", random_weights=True, device=torch.device("cpu")
    )
    model = peft.get_peft_model(base, adapters.peft_config(method, options)).train()
    allocated = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = base.model(torch.zeros(3, 40, dtype=torch.long)).last_hidden_state
    saved[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    measured = sum(storage.nbytes() for key, storage in saved.items() if key not in allocated)

    planned = _adapted(LLAMA, method, options, "eager", kind=quantization)
    counted = memory.trace_step(planned, memory.Batch(3, 40, True), "causal_lm")[False].saved
    assert counted == measured


@pytest.mark.parametrize(("kind", "masked"), [("nf4", False), ("none", True)])
def test_one_and_two_layers_give_the_memory_of_all(kind, masked):
    """What `trace_step` concludes for five layers, against a run of all five."""
    batch = memory.Batch(2, 64, masked)
    name, options = METHODS[1]
    attention = memory.attention_name(masked)
    concluded = memory.trace_step(_adapted(LLAMA, name, options, attention, kind=kind), batch, "causal_lm")
    for checkpointing in (False, True):
        full = _adapted(LLAMA, name, options, attention, kind=kind)
        mode = memory.FakeTensorMode()
        memory._to_fake(full, mode, None)
        if checkpointing:
            memory._enable_checkpointing(full)
        saved, peaks = memory._run(full, mode, batch, "causal_lm", None)
        assert concluded[checkpointing].saved == saved
        assert concluded[checkpointing].peak == max(peaks.values())


def test_checkpointing_saves_one_hidden_state_a_layer():
    name, options = METHODS[2]
    model = _adapted(LLAMA, name, options, memory.attention_name(False))
    batch = memory.Batch(2, 512, False)
    step = memory.trace_step(model, batch, "causal_lm")
    hidden = 2 * 512 * 64 * 2
    assert 5 * hidden < step[True].saved < 10 * hidden
    assert step[False].saved > 10 * step[True].saved
    assert step[True].peak < step[False].peak


def test_only_unfused_attention_grows_with_the_square_of_the_length():
    name, options = METHODS[2]

    def saved(length, attention):
        model = _adapted(ONE_LAYER, name, options, attention)
        return memory.trace_step(model, memory.Batch(1, length, False), "causal_lm")[False].saved

    fused = memory.attention_name(False)
    assert saved(2048, fused) == pytest.approx(2 * saved(1024, fused), rel=0.01)
    assert saved(2048, "eager") > 3.5 * saved(1024, "eager")


def test_encoders_are_traced_through_their_own_loss():
    options = {"rank": 4, "target_modules": ["query", "value"]}
    model = _adapted(ROBERTA, "lora", options, memory.attention_name(True), "seq_cls")
    step = memory.trace_step(model, memory.Batch(4, 32, True), "seq_cls")
    assert 0 < step[True].saved < step[False].saved < step[False].peak


def test_dequantized_weights_are_part_of_the_peak_but_not_saved():
    """A batch so small that the weights decide."""
    name, options = METHODS[2]
    attention = memory.attention_name(False)
    batch = memory.Batch(1, 2, False)
    steps = {
        kind: memory.trace_step(_adapted(ONE_LAYER, name, options, attention, kind=kind), batch, "causal_lm")[False]
        for kind in ("none", "nf4", "int8")
    }
    largest = 64 * 160
    assert steps["nf4"].saved == steps["int8"].saved == steps["none"].saved
    assert steps["nf4"].peak >= steps["nf4"].saved + 2 * largest
    assert steps["int8"].peak >= steps["int8"].saved + 8 * largest
