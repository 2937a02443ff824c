"""Fused layers of several trials on a GPU: errors against float64 beside those of a trial alone; graphs of them."""

import pytest
import torch
from peft import get_peft_model

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.fused.cuda_graphs import static_batch, static_losses
from lsr_scale.fused.joint_graphs import JointGraphs, join_static
from lsr_scale.layers.frozen_linear import dequantize, freeze_quantized
from lsr_scale.model.share import share_base
from tests.fused.test_cuda_graphs import packed
from tests.fused.test_gpu import FAMILIES, OPTIONS, SIZES
from tests.fused.test_joint_layers import joint_of
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]

LSR = ("lsr", {})
# of each trial: its method, and what it changes in that one's options
ALIKE = [LSR, ("lsr", {"alpha": 5.0}), LSR]
UNLIKE = [LSR, ("lora", {"rank": 5}), ("kron_lora", {"target_modules": ["q_proj", "down_proj", "up_proj"]})]


def bases(kind, family="llama"):
    """Return a frozen base in bfloat16 of that kind, and the same in float64, both on the GPU."""
    config, cls = FAMILIES[family]
    torch.manual_seed(0)
    base = cls(config(**SIZES)).to(torch.bfloat16)
    base = (quantize(base, kind) if kind else base).cuda().requires_grad_(False)
    freeze_quantized(base)
    weights = dict(base.state_dict()) if not kind else {name: p.detach() for name, p in base.named_parameters()}
    if kind:
        linears = {name: module for name, module in base.named_modules() if name.endswith("_proj")}
        weights |= {f"{name}.weight": dequantize(module, torch.bfloat16) for name, module in linears.items()}
    exact = cls(config(**SIZES))
    exact.load_state_dict(weights)
    return base, exact.double().cuda().requires_grad_(False)


def members_of(base, trials):
    """Return the trials' models, in float64 on such a base, else with factors in float32."""
    members = []
    for seed, (method, changes) in enumerate(trials):
        options = {"target_modules": SEVEN_LINEARS, **OPTIONS[method], **changes}
        model = randomize(get_peft_model(share_base(base), peft_config(method, options, "CAUSAL_LM")), seed, scale=0.1)
        members.append(model.train())
    return members


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def on_the_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def vectors_of(losses, members):
    """Return each loss in float64, and the gradients of each trial as one vector."""
    parameters = [trained(model) for model in members]
    gradients = iter(torch.autograd.grad(losses.sum(), [p for group in parameters for p in group]))
    flat = [torch.cat([next(gradients).double().reshape(-1) for _ in group]) for group in parameters]
    return losses.detach().double(), flat


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "family", "trials"),
    [("nf4", "llama", ALIKE), ("nf4", "qwen3", UNLIKE), (None, "mistral", UNLIKE), (None, "llama", ALIKE[:1])],
)
@pytest.mark.parametrize("lengths", [(300, 7, 205), (256, 256)])
def test_errors_are_those_of_each_trial_alone(kind, family, trials, lengths, recompute):
    base, exact = bases(kind, family)
    batches = [on_the_gpu(static_batch(**packed(lengths, 1000, seed), longest=300)) for seed in range(len(trials))]
    members, exact_members = members_of(base, trials), members_of(exact, trials)
    for one, other in zip(members, exact_members, strict=True):
        for parameter, source in zip(trained(other), trained(one), strict=True):
            parameter.data = source.data.double()
    joint = joint_of(base, members)
    assert len(lsr_scale.fuse(joint, recompute=recompute).fused) == SIZES["num_hidden_layers"]
    losses, together = vectors_of(static_losses(joint, join_static(batches)), members)
    for index, (model, reference, batch) in enumerate(zip(members, exact_members, batches, strict=True)):
        lsr_scale.fuse(model, recompute=recompute)
        lsr_scale.fuse(reference)
        wanted, (expected,) = vectors_of(static_losses(reference.get_base_model(), batch), [reference])
        loss, (alone,) = vectors_of(static_losses(model.get_base_model(), batch), [model])
        errors = [float((found - expected).norm() / expected.norm()) for found in (together[index], alone)]
        print(f"trial {index}: {errors[0]:.1e} together, {errors[1]:.1e} alone")
        assert errors[0] <= 1.5 * errors[1] + 2e-3
        errors = [float((found - wanted).abs() / wanted) for found in (losses[index], loss)]
        assert errors[0] <= 2 * errors[1] + 2e-3


@pytest.mark.parametrize("kind", ["nf4", None])
def test_replays_are_what_an_eager_step_computes(kind):
    base, _ = bases(kind)
    members = members_of(base, ALIKE)
    joint = joint_of(base, members)
    lsr_scale.fuse(joint, cache_weights=kind is not None)
    graphs = JointGraphs(joint, [trained(model) for model in members])
    for seed, lengths in enumerate([(300, 7, 205), (290, 17, 200), (300, 100), (256, 256)]):
        rows = [packed(lengths, 1000, seed + place) for place in range(3)]
        batch = on_the_gpu(join_static([static_batch(**row, longest=300) for row in rows]))
        divisors = torch.tensor([100.0, 7.0, 300.0], device="cuda")
        expected, wanted = vectors_of(static_losses(joint, batch) / divisors, members)
        losses, vectors = graphs.replay(batch, divisors)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)
        for vector, other in zip(vectors, wanted, strict=True):
            assert vector.dtype == torch.float32
            # attention's backward pass adds in an order of its own
            assert (vector.double() - other).norm() <= 1e-2 * other.norm()
        with torch.no_grad():  # the graph reads the parameters where they are
            for model in members:
                for parameter in trained(model):
                    parameter.mul_(0.9)
    assert 1 <= len(graphs.captured) <= 3


@pytest.mark.parametrize("replayed", [False, True])
def test_a_trial_that_is_not_finite_leaves_the_others_as_they_are(replayed):
    base, _ = bases("nf4")
    members = members_of(base, ALIKE)
    joint = joint_of(base, members)
    lsr_scale.fuse(joint)
    rows = [packed((300, 7, 205), 1000, seed) for seed in range(3)]
    batch = on_the_gpu(join_static([static_batch(**row, longest=300) for row in rows]))
    graphs = JointGraphs(joint, [trained(model) for model in members])

    def step():
        ones = torch.ones(3, device="cuda")
        losses, vectors = graphs.replay(batch, ones) if replayed else graphs._outputs(batch, ones)
        return losses.clone(), [vector.clone() for vector in vectors]

    losses, vectors = step()
    with torch.no_grad():
        trained(members[1])[0].fill_(float("nan"))
    broken, found = step()
    assert broken.isnan().tolist() == [False, True, False]
    assert torch.equal(broken[[0, 2]], losses[[0, 2]])
    for index in (0, 2):
        assert found[index].isfinite().all()
        assert (found[index] - vectors[index]).norm() <= 1e-2 * vectors[index].norm()
