"""The sweep over variants: what each trains and makes, on a model of a few layers."""

import json

import pytest
import torch

from benchmarks.models import LINEARS
from benchmarks.quality import variants
from benchmarks.quality.parametrization import PairedLinear
from benchmarks.quality.variants import VARIANTS, Variant, kron_fit, lora, lsr, weight_gradients
from lsr_scale.adapters.methods.kron_lora import KronLora
from tests.helpers.tiny_models import tiny_llama


def model():
    llama = tiny_llama(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1).bfloat16()
    for name, module in llama.named_modules():
        if name.rsplit(".", 1)[-1] in LINEARS:
            module.__class__ = PairedLinear
    return llama.requires_grad_(False)


def rows(number=6):
    return [([5 + (7 * i + j) % 50 for j in range(9)], 3) for i in range(number)]


def kron_sums(lefts, rights):
    both = zip(lefts, rights, strict=True)
    return torch.stack([torch.stack([torch.kron(a, b) for a, b in zip(*p, strict=True)]).sum(0) for p in both])


def test_a_sum_of_kronecker_products_is_found_again():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 2, 6, generator=generator)
    whole = kron_sums(left, right)
    for terms in (3, 2):
        *factors, share = kron_fit(whole, (4, 5), terms)
        lost = (kron_sums(*factors) - whole).square().sum((1, 2)) / whole.square().sum((1, 2))
        assert float(lost.mean()) == pytest.approx(1 - share, abs=1e-5)
        assert (share > 1 - 1e-5) == (terms == 3)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "64" not in name])
def test_every_variant_starts_as_the_base_and_trains_what_it_says(name):
    base, setting = model(), VARIANTS[name]
    setting = {key: value for key, value in setting.items() if value != "heads"}  # of this model's there are two
    if setting["form"] == "kron":
        pytest.skip("its 16 rows of A do not divide this model")
    trainee = Variant(base, setting, 0, weight_gradients(base, rows()))
    ids, labels = variants.padded(rows(), "cpu", variants.LENGTH)
    with torch.no_grad():
        before = trainee.losses(ids, labels)
    trainee.set_pairs()
    loss = trainee.losses(ids, labels)
    torch.testing.assert_close(loss.detach(), before)
    loss.sum().backward()
    for _, factors, _, _ in trainee.kinds:
        for factor, value in factors.items():
            assert value.requires_grad == (setting.get("train_down", True) or not factor.startswith("down"))
            assert value.shape[0] == (1 if factor in setting.get("shared", ()) else 2)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainee.parameters)


def test_terms_of_kron_lora_add_up():
    base = model()
    for module in base.modules():  # sizes that the paper's split divides
        if isinstance(module, PairedLinear):
            module.in_features, module.out_features = 64, 32
    trainee = Variant(base, {"form": "kron", "rank": 2, "terms": 3, "alpha": 2.0}, 0, {})
    modules, factors, _, scaling = trainee.kinds[0]
    with torch.no_grad():
        for value in factors.values():
            value.normal_()
    trainee.set_pairs()
    for layer, module in enumerate(modules):
        names = {"left": "up_scale", "right_up": "up_right", "right_down": "down_right"}
        terms = [{ours: factors[theirs][layer, t] for ours, theirs in names.items()} for t in range(3)]
        whole = scaling * torch.stack([KronLora.delta_weight(term) for term in terms]).sum(0)
        assert module.pair is not None
        down, up = (m.float() for m in module.pair)
        assert float((up @ down - whole).norm() / whole.norm()) < 0.02


def test_sums_of_full_rank_are_what_krona_adds_up():
    trainee = Variant(model(), VARIANTS["krona_2"], 0, {})
    modules, factors, _, scaling = trainee.kinds[0]
    with torch.no_grad():
        for value in factors.values():
            value.normal_()
    trainee.set_pairs()
    whole = scaling * kron_sums(factors["left"].detach(), factors["right"].detach())
    for layer, module in enumerate(modules):
        assert module.pair is not None
        down, up = (m.detach().float() for m in module.pair)
        assert float((up @ down - whole[layer]).norm() / whole[layer].norm()) < 0.01


def test_down_starts_along_the_gradient():
    base = model()
    gradients = weight_gradients(base, rows())
    trainee = Variant(base, lora(2, start="gradient"), 0, gradients)
    down = trainee.kinds[0][1]["down"].detach()
    wanted = torch.linalg.svd(gradients["q_proj"].float())[2][:, :2]
    torch.testing.assert_close(down @ down.mT * 3, torch.eye(2).expand(2, 2, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close((down @ wanted.mT).abs() * 3**0.5, torch.eye(2).expand(2, 2, 2), atol=1e-3, rtol=0)
    factored = Variant(base, lsr(4, 4, start="gradient"), 0, gradients)
    assert factored.captured_shares
    assert all(0 < share <= 1 + 1e-5 for share in factored.captured_shares)


def test_the_table_marks_the_best_rate(tmp_path):
    for rate, loss in ((4e-3, 3.9), (8e-3, 3.8)):
        row = {"variant": "lora_2", "lr": rate, "held_out_loss": loss, "trainable_parameters": 610560}
        (tmp_path / f"lora_2-{rate:g}.json").write_text(json.dumps(row))
    (tmp_path / "zero_shot.json").write_text("{}")
    (tmp_path / "lora_8-0.004.json").write_text(json.dumps({"variant": "lora_8", "lr": 4e-3, "error": "no"}))
    assert variants.table(tmp_path).splitlines()[2:] == ["| lora_2 | 610,560 | 3.900 | **3.800** |"]
