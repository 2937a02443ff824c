"""Training in 8 bits on a GPU, kernels and all: its error beside the simulation, odd lengths, graphs, memory."""

import pytest
import torch

import lsr_scale
from lsr_scale.fused import compute_errors, underflow_counts
from lsr_scale.fused.cuda_graphs import StepGraphs, static_batch, static_loss
from lsr_scale.kernels.fp8 import fp8_fallback_reason
from tests.fused.test_eight_bit import (
    ALL_GROUPS,
    COMPUTES,
    METHODS,
    adapted,
    check_padded,
    flat,
    relative,
    simulate,
    step,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(fp8_fallback_reason("cuda") is not None, reason="no GPU with FP8 on this machine"),
]
# TinyLlama-1.1B's
REAL = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
# dimensions that no tile divides
ODD = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def inputs(kind):
    ids = torch.randint(1, 96, (3, 67), generator=torch.Generator().manual_seed(1)).cuda()
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in (31, 1, 90, 79)])[None].cuda()
        return ids.view(1, -1), {"position_ids": positions}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, 23:] = 0
        return ids, {"attention_mask": mask}
    return ids, {}


@pytest.mark.parametrize("rows", ["plain", "packed", "padded"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute", COMPUTES)
def test_errors_beside_a_simulation(compute, method, recompute, rows):
    model = adapted(method, "nf4", **ODD).cuda()
    ids, given = inputs(rows)
    simulated, exact = simulate(model, compute)
    steps = {"exact": step(exact, ids, **given), "simulated": step(simulated, ids, **given)}
    lsr_scale.fuse(model, recompute=recompute)
    steps["plain"] = step(model, ids, **given)
    report = lsr_scale.fuse(model, recompute=recompute, compute=compute, calibrate=True)
    assert report.eight_bit == ALL_GROUPS
    steps["found"] = step(model, ids, **given)
    assert abs(float(steps["found"]["loss"] - steps["exact"]["loss"])) < 0.02
    for values in steps.values():
        del values["loss"]
    errors = {name: relative(flat(values), flat(steps["exact"])) for name, values in steps.items()}
    assert errors["found"] < 1.5 * (errors["simulated"] + errors["plain"]), errors
    by_name = compute_errors(model)
    assert list(dict.fromkeys(name.rpartition(".")[0] for name in by_name)) == ALL_GROUPS
    assert max(by_name.values()) < 0.06


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["lsr", "lora"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_padded_rows_of_every_length(compute, method, side):
    check_padded(compute, side, adapted(method, "nf4", **REAL).cuda(), longest=37)


@pytest.mark.parametrize("compute", COMPUTES)
def test_adapters_of_many_columns(compute):
    model = adapted("lora", "nf4", rank=40, **ODD).cuda()
    ids, _ = inputs("plain")
    lsr_scale.fuse(model)
    plain = step(model, ids)
    lsr_scale.fuse(model, compute=compute, calibrate=True)
    assert abs(float(step(model, ids)["loss"] - plain["loss"])) < 0.05
    assert max(compute_errors(model).values()) < 0.06


@pytest.mark.parametrize("compute", COMPUTES)
def test_graphs_replay_what_eager_steps_do(compute):
    model = adapted("lora", "nf4", **ODD).cuda()
    lsr_scale.fuse(model, compute=compute)
    head, graphs = model.get_base_model(), StepGraphs(model.get_base_model())
    for seed in range(4):
        lengths = [(17, 30, 40, 1, 22), (64, 64, 63)][seed % 2]
        ids = torch.randint(1, 96, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        batch = static_batch(ids, ids.masked_fill(positions == 0, -100), positions, longest=70)
        batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        loss = static_loss(head, batch) / 7
        expected = torch.autograd.grad(loss, graphs.parameters)
        value = float(loss.detach())
        del loss
        before = {name: count.clone() for name, count in underflow_counts(model).items()}
        found, gradients = graphs.replay(batch, 7.0)
        assert float(found) == pytest.approx(value, rel=1e-3)
        assert relative(torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in expected])) < 5e-3
        assert all(count[1] > before[name][1] for name, count in underflow_counts(model).items())
    assert len(graphs.captured) == 2


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_takes_no_more_memory_than_in_bf16(compute, recompute):
    model = adapted("lora", "nf4", hidden_size=1024, intermediate_size=3584).cuda()
    ids = torch.randint(1, 96, (2, 1024), generator=torch.Generator().manual_seed(1)).cuda()
    peaks = {}
    for name in ("bf16", compute):
        lsr_scale.fuse(model, recompute=recompute, compute=name)
        step(model, ids)
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated()
    assert peaks[compute] <= 1.005 * peaks["bf16"], peaks
