"""Adapters in image models: trained by the benchmark's own program, saved and loaded; convolutions are refused."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from benchmarks.quality import trials, vision
from lsr_scale import UserError
from lsr_scale.adapters import METHODS, peft_config

pytest.importorskip("sklearn")  # the digits come with it

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=42)
MODELS = {
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**SIZES, patch_size=14, num_labels=10)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, patch_size=14, num_labels=10)),
    "clip": lambda: tf.CLIPForImageClassification(
        tf.CLIPConfig(vision_config={**SIZES, "patch_size": 14}, num_labels=10)
    ),
}


@pytest.mark.parametrize("provider", vision.PROVIDERS)
@pytest.mark.parametrize("family", MODELS)
def test_an_image_model_trains_and_its_adapter_gives_the_same_logits_when_loaded(family, provider, tmp_path):
    torch.manual_seed(0)
    MODELS[family]().save_pretrained(tmp_path)
    trial = trials.Trial("digits", provider, trials.TUNING_SEED, 0)
    result = vision.measure(str(tmp_path), 3, trial, vision.PROVIDERS[provider].points[0])
    assert result["steps"] == 3
    assert result["part"] == "dev"
    assert 0 <= result["score"] <= 1
    if provider == "head_only":
        assert result["adapter_parameters"] == 0
        assert result["trainable_parameters"] > 0
    else:
        assert result["adapter_parameters"] > 0
        assert result["reload_max_difference"] == 0


def test_parts_of_the_digits_do_not_overlap_and_are_all_of_them():
    pixels, labels = vision.digits()
    assert pixels.shape == (1797, 3, 42, 42)
    rows = [row for part in vision.PARTS.values() for row in range(1797)[part]]
    assert sorted(rows) == list(range(1797))
    assert len(labels[vision.PARTS["train"]].unique()) == 10


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    ("family", "target"), [("dinov2", "projection"), ("vit", "projection"), ("clip", "patch_embedding")]
)
def test_patch_embeddings_are_refused_with_their_name(family, target, method):
    with pytest.raises(UserError, match=rf"{target}: a Conv2d is not a linear layer; leave it out of target_modules"):
        get_peft_model(MODELS[family](), peft_config(method, {"target_modules": [target]}))


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_leaves_patch_embeddings_alone(family):
    options = {"target_modules": "all-linear", "rank": 4, "separation_rank": 2, "modules_to_save": ["classifier"]}
    model = get_peft_model(MODELS[family](), peft_config("lsr", options))
    adapted = [name for name, parameter in model.named_parameters() if "lsr_" in name and parameter.requires_grad]
    assert adapted
    assert not any("patch_embed" in name for name in adapted)
