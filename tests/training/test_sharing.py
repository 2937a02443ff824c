"""Which runs share a step, and why others do not."""

from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from lsr_scale.config import RunConfig, run_from_dict
from lsr_scale.training.steps.sharing import base_fallback_reason, sharing_fallback_reason
from tests.helpers.tiny_models import tiny_llama


def run(**changes: Any) -> RunConfig:
    """Return a run; each change is of one section."""
    sections: dict[str, Any] = {
        "model": {"name": "tiny"},
        "adapter": {"method": "lsr"},
        "data": {"train": ["arc_easy"]},
        "training": {},
    }
    return run_from_dict({name: section | changes.get(name, {}) for name, section in sections.items()})


def test_what_may_differ():
    runs = [
        run(),
        run(adapter={"method": "lora", "rank": 3, "alpha": 1.0, "target_modules": ["q_proj"]}),
        run(adapter={"method": "krona"}, data={"train": ["boolq"], "validation_split": 0.1}),
        run(training={"learning_rate": 1.0, "optim": "sgd", "seed": 7, "num_train_epochs": 9, "weight_decay": 0.5}),
    ]
    assert sharing_fallback_reason(runs) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter": {"method": "lora", "dropout": 0.1}}, "adapter.dropout"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
        ({"model": {"task": "seq_cls", "num_labels": 2}}, "model.task: seq_cls"),
        ({"model": {"quantization": "int8"}}, "model.quantization differs: nf4 and int8"),
        ({"training": {"per_device_train_batch_size": 3}}, "training.per_device_train_batch_size differs: 8 and 3"),
        ({"training": {"gradient_accumulation_steps": 3}}, "training.gradient_accumulation_steps differs: 2 and 3"),
        ({"training": {"max_length": 64}}, "training.max_length differs: 1024 and 64"),
        ({"training": {"packing": True}}, "training.packing differs: False and True"),
        ({"training": {"label_smoothing_factor": 0.1}}, "training.label_smoothing_factor"),
        ({"training": {"neftune_noise_alpha": 5}}, "training.neftune_noise_alpha"),
        ({"training": {"loss_type": "dft"}}, "training.loss_type"),
        ({"training": {"compute": "int8"}}, "training.compute: int8"),
        ({"training": {"gradient_checkpointing": False}}, "training.gradient_checkpointing differs"),
        ({"training": {"report_to": ["tensorboard", "wandb"]}}, "training.report_to: wandb records one run"),
    ],
)
def test_what_may_not_is_named(changes, named):
    assert named in str(sharing_fallback_reason([run(), run(**changes)]))


def test_bases_whose_rows_depend_on_others_or_on_chance_are_named():
    assert base_fallback_reason(tiny_llama()) is None
    sizes: dict[str, Any] = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    assert "drop out" in str(base_fallback_reason(GPT2LMHeadModel(GPT2Config(**sizes))))
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    experts = MixtralForCausalLM(MixtralConfig(**small, **heads, output_router_logits=True))
    assert "router" in str(base_fallback_reason(experts))


def test_random_weights_are_drawn_by_one_seed():
    model = {"name": "tiny", "random_weights": True}
    runs = [run(model=model, training={"seed": seed}) for seed in (1, 2)]
    assert "training.seed differs: 1 and 2" in str(sharing_fallback_reason(runs))
    assert sharing_fallback_reason(runs[:1] * 2) is None
