"""The separation condition number: by its definition, in a run's log, and mended where terms cancel."""

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.robustness import condition_guard
from lsr_scale import LsrConfig, UserError, distributed
from lsr_scale.adapters.condition import (
    TOLERANCE,
    apply_guard,
    condition,
    conditions,
    ill_conditioned,
    kronecker_sums,
    orthogonal_terms,
)
from lsr_scale.training.callbacks.condition import ConditionCallback
from tests.helpers.tiny_runs import do, metrics, save_llama, tiny_run


def by_definition(left, right):
    terms = [torch.kron(a.double(), b.double()) for a, b in zip(left, right, strict=True)]
    total = torch.stack(terms).sum(0)
    return (torch.stack([term.norm() ** 2 for term in terms]).sum().sqrt() / total.norm()).item()


def some_factors(terms=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(terms, *shape, generator=generator) for shape in ((3, 4), (2, 6)))
    return left.to(dtype), right.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gamma_is_that_of_the_definition(dtype):
    left, right = some_factors(dtype=dtype)
    assert condition(left, right).item() == pytest.approx(by_definition(left, right))
    stacked = condition(torch.stack([left, 2 * left]), torch.stack([right, right.flip(0)]))
    assert stacked.tolist() == pytest.approx([by_definition(left, right), by_definition(left, right.flip(0))])


@pytest.mark.parametrize("difference", [1.0, 1e-1, 1e-2, 1e-3])
def test_rounding_the_factors_changes_the_sum_by_about_gamma_times_the_roundoff(difference):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(6, *shape, generator=generator, dtype=torch.float64) for shape in ((16, 4), (24, 4)))
    left[1::2] = left[::2] + difference * left[1::2]
    right[1::2] = -right[::2] + difference * right[1::2]
    total, rounded = (
        torch.einsum("sMN,smn->MmNn", *pair) for pair in ((left, right), (left.half().double(), right.half().double()))
    )
    change = (rounded - total).norm() / total.norm()
    # two roundings a term, each uniform in a spacing that is between one and two roundoffs of the value
    assert 0.3 < change / (condition(left, right) * 2**-11) < 1.5


def test_gamma_of_orthogonal_cancelling_and_no_terms():
    left, right = some_factors(2)
    one_each = torch.zeros(2, 3, 4)
    one_each[0, 0, 0] = one_each[1, 1, 1] = 1
    assert condition(one_each, right).item() == pytest.approx(1)
    assert condition(left, torch.zeros_like(right)).item() == 1
    same = torch.stack([left[0], left[0]])
    nearly = torch.stack([right[0], -right[0] * (1 - 1e-3)])
    assert condition(same, nearly).item() == pytest.approx(2**0.5 * 1e3, rel=2e-3)
    assert 1e6 < condition(same, torch.stack([right[0], -right[0]])).item() < 1e9  # finite where all cancels


@pytest.mark.parametrize("terms", [1, 5, 20])  # 20: more than either factor has elements
def test_orthogonal_terms_have_the_same_sum_and_gamma_one(terms):
    left, right = some_factors(terms, dtype=torch.float64)
    right[-1] = -right[0] * 0.999  # with much cancellation
    left[-1] = left[0]
    new_left, new_right = orthogonal_terms(left, right)
    assert (new_left.shape, new_right.shape) == (left.shape, right.shape)
    total = torch.einsum("sMN,smn->MmNn", left, right)
    torch.testing.assert_close(torch.einsum("sMN,smn->MmNn", new_left, new_right), total)
    assert condition(new_left, new_right).item() == pytest.approx(1, abs=1e-9)
    used = new_right.flatten(1).norm(dim=1) > 1e-9
    torch.testing.assert_close(new_left.flatten(1).norm(dim=1)[used], new_right.flatten(1).norm(dim=1)[used])


def adapted(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LsrConfig(target_modules=["0", "1"], rank=4, separation_rank=3, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24)), config)
    for name, factor in model.named_parameters():
        if "lsr_" in name:
            factor.data = torch.randn_like(factor).to(dtype)
    return model


@pytest.mark.parametrize("term_weights", [False, True])
def test_every_side_of_every_module_is_found_with_its_weights(term_weights):
    model = adapted(term_weights=term_weights)
    sums = kronecker_sums(model)
    assert [(one.module, one.side) for one in sums] == [("0", "down"), ("0", "up"), ("1", "down"), ("1", "up")]
    assert conditions(sums).tolist() == pytest.approx([by_definition(*one.factors()) for one in sums])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    before = [layer.get_delta_weight("default") for layer in model.base_model.model]
    apply_guard(sums[0], "rescale", optimizer)
    assert conditions(sums)[0].item() == pytest.approx(1, abs=1e-5)
    for layer, delta in zip(model.base_model.model, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-4, atol=1e-4)
    assert not any(parameter in optimizer.state for parameter in sums[0].parameters)
    assert all(parameter in optimizer.state for parameter in sums[1].parameters)


def test_what_is_ill_conditioned_depends_on_the_dtype():
    gammas = torch.tensor([3.0, 30.0, 1e6, 1.0], dtype=torch.float64)
    limits = {torch.float32: [2], torch.float16: [1, 2], torch.bfloat16: [0, 1, 2]}
    for dtype, expected in limits.items():
        assert ill_conditioned(kronecker_sums(adapted(dtype)), gammas, TOLERANCE) == expected


@pytest.mark.parametrize("guard", ["warn", "rescale", "fp32"])
def test_the_guard_does_what_it_says_once(guard):
    model = adapted(torch.float16)
    side = kronecker_sums(model)[1]
    side.left.data[1], side.right.data[1] = side.left.data[0], -side.right.data[0] * 0.999
    side.left.data[2] *= 0.01
    warnings = []
    callback = ConditionCallback(TOLERANCE, guard, warnings.append)
    for _ in range(2):
        logs = {"loss": 1.0}
        callback.on_log(None, None, None, logs=logs, model=model, optimizer=None)
    assert set(logs) == {"loss", *(f"condition_{name}_{kind}" for name in ("down", "up") for kind in ("median", "max"))}
    assert len(warnings) == 1
    assert "0, up side: terms cancel, gamma = " in warnings[0]
    assert "rounding to float16 may change" in warnings[0]
    guarded = kronecker_sums(model)[1]
    if guard == "warn":
        assert logs["condition_up_max"] > 8
    elif guard == "rescale":
        assert logs["condition_up_max"] < 8
        assert guarded.left.dtype == torch.float16
    else:
        assert guarded.left.dtype == guarded.right.dtype == torch.float32
        assert kronecker_sums(model)[0].left.dtype == torch.float16


@pytest.mark.parametrize("measured", ["ill-conditioned", "well-conditioned"])
def test_every_process_rescales_what_the_main_one_measures_and_to_its_factors(monkeypatch, measured):
    model = adapted(torch.float16)
    sums = kronecker_sums(model)
    of_main = torch.ones(len(sums), dtype=torch.float64)
    if measured == "ill-conditioned":
        of_main[1] = 1e3  # here it is well-conditioned
    else:
        sums[1].left.data[1], sums[1].right.data[1] = sums[1].left.data[0], -sums[1].right.data[0] * 0.999
    before, copied = [one.left.detach().clone() for one in sums], []
    monkeypatch.setattr(distributed, "broadcast", lambda mine: of_main)
    monkeypatch.setattr(distributed, "broadcast_tensor", lambda tensor: copied.append(tensor.data_ptr()))
    ConditionCallback(TOLERANCE, "rescale", str).on_log(
        None, None, None, logs={"loss": 1.0}, model=model, optimizer=None
    )
    changed = [not torch.equal(one.left, left) for one, left in zip(sums, before, strict=True)]
    assert changed == [False, measured == "ill-conditioned", False, False]
    assert copied == ([p.data_ptr() for p in sums[1].parameters] if measured == "ill-conditioned" else [])


def test_other_methods_and_other_logs_are_not_measured():
    callback = ConditionCallback(TOLERANCE, "warn")
    for logs in ({"eval_loss": 1.0}, None):
        callback.on_log(None, None, None, logs=logs, model=adapted())
        assert logs in ({"eval_loss": 1.0}, None)
    logs = {"loss": 1.0}
    callback.on_log(None, None, None, logs=logs, model=nn.Linear(2, 2))
    assert logs == {"loss": 1.0}


@pytest.mark.usefixtures("rendered", "written_pages")
def test_a_run_logs_and_draws_it(tmp_path):
    save_llama(tmp_path / "model", num_hidden_layers=2)
    folder = do(tiny_run(tmp_path))
    rows = metrics(folder)
    assert all(row["condition_up_max"] >= row["condition_up_median"] for row in rows)
    assert rows[0]["condition_down_max"] > 0
    assert folder.condition.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("guard", ["rescale", "fp32"])
def test_a_guard_that_would_rewrite_sharded_masters_is_refused(tmp_path, guard):
    with pytest.raises(UserError, match="ZeRO-2 keeps in parts; set it to warn"):
        tiny_run(tmp_path, training={"condition_guard": guard}, deepspeed={"config": "zero2"})


def test_the_constructed_case_is_lost_without_rescaling(tmp_path):
    out = tmp_path / "a.json"
    assert condition_guard.main(["--out", str(out), "--steps", "600"]) == 0
    runs = json.loads(out.read_text())["runs"]
    last = {name: values["loss"][-1] for name, values in runs.items()}
    assert last["float16, rescale"] < 1e-3 < 0.03 < min(loss for name, loss in last.items() if "rescale" not in name)
    assert out.with_suffix(".png").exists()
