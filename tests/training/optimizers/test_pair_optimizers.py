"""LoRA-RITE and LoRA-Pro against the papers' equations, on LoRA's pair and through Kronecker factors, in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lsr_scale import KronLoraConfig, LsrConfig, UserError
from lsr_scale.adapters.kron_terms import arranged, nearest_terms, rearranged
from lsr_scale.adapters.pairs import Adapter, active_adapters
from lsr_scale.training.optimizers.kron_side import Side, factor_steps, gram_roots, side_gradient
from lsr_scale.training.optimizers.lora_pro import LoraPro, nearest_pair
from lsr_scale.training.optimizers.lora_rite import LoraRite
from lsr_scale.training.optimizers.state_bytes import pair_state_bytes
from tests.helpers.tiny_models import randomize

IN, OUT, RANK = 12, 16, 4
CONFIGS = {
    "lora": LoraConfig(r=RANK, lora_alpha=6, target_modules=["linear"]),
    "lsr": LsrConfig(rank=RANK, separation_rank=2, target_modules=["linear"]),
    "kron_lora": KronLoraConfig(rank=2, left_in=2, left_out=4, dropout=0.0, target_modules=["linear"]),
    # the left factor makes down, the identity up
    "kron_lora_wide": KronLoraConfig(rank=2, left_in=4, left_out=2, dropout=0.0, target_modules=["linear"]),
}


class Net(nn.Module):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.linear(x)


def adapted(method, at_start=False):
    """Return the float64 model, and its one adapter, at values that are not the start's."""
    torch.manual_seed(0)
    model = get_peft_model(Net().double(), copy.deepcopy(CONFIGS[method])).double()
    if not at_start:
        randomize(model)
    (layer,) = (one for one in model.modules() if active_adapters(one))
    return model, active_adapters(layer)[0]


def product(adapter):
    down, up = adapter.method.materialize(adapter.factors())
    return (up @ down).detach()


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(model, optimizer, steps=6):
    """Take steps of a loss that is not quadratic, so that the gradient turns."""
    x, y = normal(20, IN), normal(20, OUT, seed=4)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().log1p().sum().backward()
        optimizer.step()


def test_rearranged_makes_a_kronecker_product_of_rank_one_and_its_svd_the_nearest_sum():
    left, right = normal(3, 2), normal(4, 5, seed=4)
    matrix = rearranged(torch.kron(left, right), (3, 2), (4, 5))
    torch.testing.assert_close(matrix, left.flatten()[:, None] * right.flatten())
    full = normal(12, 10, seed=5)
    assert torch.equal(arranged(rearranged(full, (3, 2), (4, 5)), (3, 2), (4, 5)), full)
    lefts, rights = nearest_terms(full, (3, 2), (4, 5), terms=2)
    error = (full - sum(torch.kron(a, b) for a, b in zip(lefts, rights, strict=True))).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(rearranged(full, (3, 2), (4, 5)))[2:].norm())
    lefts, rights = nearest_terms(full, (3, 2), (4, 5), terms=9)  # more than there are
    torch.testing.assert_close(sum(torch.kron(a, b) for a, b in zip(lefts, rights, strict=True)), full)


@pytest.mark.parametrize("identity", [False, True])
def test_a_sides_gradient_and_its_factors_steps_are_those_of_least_squares(identity):
    left, right = (None if identity else normal(1, 2, 2, 3)), normal(1, 1 if identity else 2, 4, 5, seed=4)
    size = (12, 15) if identity else (8, 15)
    side = Side(left, right, size)
    parts = [part.clone().requires_grad_() for part in (left, right) if part is not None]

    def make(*parts):
        lefts = torch.eye(3, dtype=torch.float64)[None] if identity else parts[0][0]
        return sum(torch.kron(a, b) for a, b in zip(lefts, parts[-1][0], strict=False))

    jacobian = torch.cat(
        [j.reshape(size[0] * size[1], -1) for j in torch.autograd.functional.jacobian(make, tuple(parts))], 1
    )
    gradient = normal(*size, seed=5)
    expected = (jacobian @ torch.linalg.pinv(jacobian) @ gradient.flatten()).view(size)
    of_factors = torch.autograd.grad(make(*parts), parts, gradient)
    found = side_gradient(side, None if identity else of_factors[0], of_factors[-1])
    torch.testing.assert_close(found[0], expected)
    small = 1e-7 * gradient[None]  # the weight of a direction is 1 where the step is small
    steps = [step.flatten() for step in factor_steps(side, small) if step is not None]
    torch.testing.assert_close((jacobian @ torch.cat(steps)).view(size), 1e-7 * expected, rtol=1e-6, atol=1e-15)


def test_the_steps_of_a_side_are_the_same_for_all_factors_that_make_it():
    left, right = normal(1, 3, 2, 3), normal(1, 3, 4, 5, seed=4)
    step = normal(1, 8, 15, seed=5)
    mix = normal(3, 3, seed=6)

    def after(left, right):
        d_left, d_right = factor_steps(Side(left, right, (8, 15)), step)
        return torch.einsum("nsab,nscd->nacbd", left + d_left, right + d_right)

    regauged = torch.einsum("st,ntab->nsab", torch.linalg.inv(mix).T, left), torch.einsum("st,ntab->nsab", mix, right)
    torch.testing.assert_close(after(*regauged), after(left, right))
    assert factor_steps(Side(left, torch.zeros_like(right), (8, 15)), step)[0].count_nonzero() == 0  # at the zero start


def test_lora_pros_pair_is_the_one_of_least_squares():
    down, up, s = normal(RANK, IN), normal(OUT, RANK, seed=4), 1.7
    g = normal(OUT, IN, seed=5)
    found = nearest_pair((down, up), (s * up.T @ g, s * g @ down.T), s, gram_roots(down), gram_roots(up.T))
    columns = [s * torch.kron(up, torch.eye(IN).double()), s * torch.kron(torch.eye(OUT).double(), down.T.contiguous())]
    jacobian = torch.cat(columns, 1)  # of the row-major weight
    best = torch.linalg.lstsq(jacobian, g.flatten(), driver="gelsd").solution
    moved = jacobian @ torch.cat([one.flatten() for one in found])
    torch.testing.assert_close(moved, jacobian @ best)
    # and of all those the nearest to the gradients: no change of X brings it nearer
    raw = s * up.T @ g, s * g @ down.T
    for x in (normal(RANK, RANK, seed=6), normal(RANK, RANK, seed=7)):
        slope = ((found[0] - raw[0]) * (x @ down)).sum() - ((found[1] - raw[1]) * (up @ x)).sum()
        assert abs(slope) < 1e-9


def test_lora_pros_first_step_at_a_zero_factor_is_the_papers():
    down, s = normal(RANK, IN), 1.7
    g = normal(OUT, IN, seed=5)
    up = torch.zeros(OUT, RANK, dtype=torch.float64)
    of_down, of_up = nearest_pair((down, up), (s * up.T @ g, s * g @ down.T), s, gram_roots(down), gram_roots(up.T))
    assert of_down.count_nonzero() == 0
    torch.testing.assert_close(of_up, s * g @ down.T @ torch.linalg.inv(down @ down.T) / s**2)


def test_lora_pro_does_not_see_the_scaling():
    """The equivalent gradient's step is the weight's: with another alpha the update moves as far."""
    moved, lr = [], 1e-7
    for alpha in (6, 60):
        model, adapter = adapted("lora")
        adapter.linear.scaling["default"] = alpha / RANK
        adapter.factors()["up"].data.mul_(6 / alpha)
        before = product(adapter)
        train(model, LoraPro([adapter], lr=lr), steps=1)
        moved.append((product(adapter) - before) * adapter.scaling / lr)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)


def pro_reference(model, adapter, lr, steps, betas=(0.9, 0.999), eps=1e-8):
    """The paper's algorithm with Adam as it is written, one pair, its Sylvester equation solved as a linear system."""
    a, b, s = adapter.factors()["down"], adapter.factors()["up"], adapter.scaling
    eye, moments = torch.eye(RANK).double(), [torch.zeros(OUT, IN).double() for _ in range(2)]
    x, y = normal(20, IN), normal(20, OUT, seed=4)

    def of_gradients(grad_a, grad_b):
        of_a, of_b = torch.linalg.inv(a @ a.T), torch.linalg.inv(b.T @ b)
        system = torch.kron(b.T @ b, eye) + torch.kron(eye, a @ a.T)  # of the row-major X
        right = -of_b @ grad_a @ a.T / s**2
        found = torch.linalg.solve(system, right.flatten()).view(RANK, RANK)
        outside = torch.eye(OUT).double() - b @ of_b @ b.T
        return of_b @ grad_a / s**2 + found @ a, outside @ grad_b @ of_a / s**2 - b @ found

    for t in range(1, steps + 1):
        model.zero_grad()
        (model(x) - y).square().log1p().sum().backward()
        with torch.no_grad():
            g_a, g_b = of_gradients(a.grad, b.grad)
            equivalent = s * (b @ g_a + g_b @ a)
            moments = [d * m + (1 - d) * equivalent**n for n, (d, m) in enumerate(zip(betas, moments, strict=True), 1)]
            first, second = (m / (1 - d**t) for d, m in zip(betas, moments, strict=True))
            step = first / (second.sqrt() + eps)
            g_a, g_b = of_gradients(s * b.T @ step, s * step @ a.T)
            a -= lr * g_a
            b -= lr * g_b


def test_lora_pro_is_the_papers_algorithm():
    """At a rate at which a step is small beside the factors: the damping of larger ones is not the paper's."""
    moved = []
    for reference in (False, True):
        model, adapter = adapted("lora")
        before = product(adapter)
        if reference:
            pro_reference(model, adapter, 1e-6, 6)
        else:
            train(model, LoraPro([adapter], lr=1e-6))
        moved.append((product(adapter) - before) / 1e-6)
    assert moved[1].norm() > 1
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)


def rite_reference(model, adapter, lr, steps, betas=(0.9, 0.999), eps=1e-8):
    """The paper's algorithm as it is written, with QR decompositions, one pair, one side after the other."""
    a, b = adapter.factors()["up"], adapter.factors()["down"]  # Z = a b
    state = {}
    x, y = normal(20, IN), normal(20, OUT, seed=4)
    for t in range(1, steps + 1):
        model.zero_grad()
        (model(x) - y).square().log1p().sum().backward()
        changes = []
        for name, own, other in (("up", a, b.T), ("down", b.T, a)):
            grad = a.grad if name == "up" else b.grad.T
            q, r = torch.linalg.qr(other.detach())
            g = grad @ torch.linalg.inv(r)
            zeros = torch.zeros(RANK, RANK).double()
            old_q, m, v, rho = state.get(name, (torch.zeros_like(q), torch.zeros_like(own), zeros, 0.0))
            p = q.T @ old_q
            beta1, beta2 = (d * (1 - d ** (t - 1)) / (1 - d**t) for d in betas)
            turned = p @ v @ p.T
            lost = (torch.linalg.eigvalsh(v) - torch.linalg.eigvalsh(turned)).max().clamp_min(0)
            rho = beta2 * (rho + lost)
            v = beta2 * turned + (1 - beta2) * g.T @ g / len(g)
            w, e = torch.linalg.eigh(v)
            m = beta1 * m @ p.T + (1 - beta1) * g @ (e / ((w.clamp_min(0) + rho).sqrt() + eps)) @ e.T
            state[name] = q, m.detach(), v.detach(), rho
            changes.append((lr * m @ torch.linalg.inv(r).T).detach())
        with torch.no_grad():
            a -= changes[0]
            b -= changes[1].T


def test_lora_rite_is_the_papers_algorithm():
    model, adapter = adapted("lora")
    train(model, LoraRite([adapter], lr=1e-2))
    found = product(adapter)
    model, adapter = adapted("lora")
    rite_reference(model, adapter, 1e-2, 6)
    torch.testing.assert_close(found, product(adapter), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", [LoraRite, LoraPro])
def test_the_escaped_mass_is_lora_rites_option_and_changes_its_steps(kind):
    model, adapter = adapted("lora")
    if kind is LoraPro:
        with pytest.raises(TypeError):
            LoraPro([adapter], lr=1e-2, escaped_mass=False)
        return
    train(model, LoraRite([adapter], lr=1e-2, escaped_mass=False))
    other, with_mass = adapted("lora")
    train(other, LoraRite([with_mass], lr=1e-2))
    assert (product(adapter) - product(with_mass)).norm() > 1e-6


def test_lora_rites_product_is_the_same_for_all_pairs_that_make_it():
    results = []
    for mix in (torch.eye(RANK).double(), normal(RANK, RANK, seed=6)):
        model, adapter = adapted("lora")
        factors = adapter.factors()
        factors["down"].data.copy_(torch.linalg.inv(mix) @ factors["down"].data)
        factors["up"].data.copy_(factors["up"].data @ mix)
        train(model, LoraRite([adapter], lr=1e-2))
        results.append(product(adapter))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [LoraRite, LoraPro])
@pytest.mark.parametrize("full", [False, True], ids=["each term", "mixed terms"])
def test_an_lsr_step_does_not_depend_on_how_terms_share_the_function(kind, full):
    """The S^2 gauge: (c a) (x) (b / c) of each term, and any mixing of a side's terms."""
    results = []
    for regauged in (False, True):
        model, adapter = adapted("lsr")
        if regauged:
            for number, side in enumerate(("down", "up")):
                mix = normal(2, 2, seed=6 + number) if full else torch.diag(torch.tensor([5.0, 0.3]).double())
                left, right = (adapter.factors()[f"{side}_{half}"].data for half in ("left", "right"))
                left.copy_(torch.einsum("st,tab->sab", torch.linalg.inv(mix).T, left))
                right.copy_(torch.einsum("st,tab->sab", mix, right))
        train(model, kind([adapter], lr=1e-2))
        results.append(product(adapter))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    model, adapter = adapted("lsr")  # what AdamW does depends on it
    train(model, torch.optim.AdamW(adapter.factors().values(), lr=1e-2))
    assert (product(adapter) - results[0]).norm() > 1e-3


@pytest.mark.parametrize("kind", [LoraRite, LoraPro])
@pytest.mark.parametrize("method", list(CONFIGS))
def test_a_small_step_of_the_factors_is_that_of_their_pair(kind, method):
    """The first step from anywhere: the product moves by the pair's step, as far as its factors can follow."""
    model, adapter = adapted(method)
    before, lr = product(adapter), 1e-6
    factors = adapter.factors()

    def make(*values):
        down, up = adapter.method.materialize(dict(zip(factors, values, strict=True)))
        return (up @ down).flatten()

    jacobian = torch.cat(
        [j.flatten(1) for j in torch.autograd.functional.jacobian(make, tuple(factors.values()))], 1
    ).detach()
    train(model, kind([adapter], lr=lr), steps=1)
    moved = (product(adapter) - before).flatten() / lr
    assert moved.norm() > 1e-3
    inside = jacobian @ torch.linalg.lstsq(jacobian, moved, driver="gelsd").solution
    assert (inside - moved).norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize("kind", [LoraRite, LoraPro])
@pytest.mark.parametrize("method", list(CONFIGS))
def test_states_are_float32_and_restored_to_the_same_bits(kind, method):
    def fresh():
        model, adapter = adapted(method, at_start=True)
        model.float()
        return model, kind([Adapter(adapter.linear, "default")], lr=1e-2, weight_decay=0.1)

    def steps(model, optimizer, numbers):
        for number in numbers:
            optimizer.zero_grad()
            (model(normal(20, IN, seed=number).float()) - 1).square().sum().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, range(6))
    tensors = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert all(value.dtype == torch.float32 for value in tensors)
    name = "lora_rite" if kind is LoraRite else "lora_pro"
    assert pair_state_bytes(name, model) == 4 * sum(value.numel() for value in tensors)
    assert pair_state_bytes("adamw_torch", model) is None
    other, again = fresh()
    steps(other, again, range(3))
    saved = copy.deepcopy(again.state_dict()), copy.deepcopy(other.state_dict())
    other, again = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(other, again, range(3, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        assert value.isfinite().all()


def test_what_is_in_no_pair_is_adamws():
    _, adapter = adapted("lora")
    head = nn.Linear(OUT, 2).double()
    twin = copy.deepcopy(head)
    optimizer = LoraRite([adapter], [{"params": list(head.parameters()), "weight_decay": 0.1}], lr=1e-2)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for of, one in ((head, optimizer), (twin, reference)):
        for _ in range(3):
            of.zero_grad()
            of(normal(5, OUT)).square().sum().backward()
            one.step()
    for a, b in zip(head.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not optimizer.state[next(iter(adapter.factors().values()))]  # no gradient, no step


def test_weighted_terms_are_refused():
    torch.manual_seed(0)
    config = LsrConfig(rank=4, separation_rank=2, term_weights=True, target_modules=["linear"])
    model = get_peft_model(Net(), config)
    (layer,) = (one for one in model.modules() if active_adapters(one))
    with pytest.raises(UserError, match=r"lsr with these options has none; set training\.optim: adamw_torch_fused"):
        LoraPro(active_adapters(layer), lr=1e-2)


def loss_after(method, make, steps, scales, decades):
    """Return the loss of fitting a weight of rank 2, from the start, with inputs whose scales span some decades."""
    model, adapter = adapted(method, at_start=True)
    target = normal(OUT, 2, seed=7) @ (torch.tensor(scales).double()[:, None] * normal(2, IN, seed=8))
    x = normal(64, IN, seed=9) * torch.logspace(0, -decades, IN).double()
    y = x @ (model.base_model.model.linear.get_base_layer().weight.detach() + target).T
    optimizer = make(adapter)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("method", "steps", "scales", "decades", "rite", "pro"),
    [("lora", 100, (0.1, 0.05), 0, 0.1, 0.1), ("lsr", 60, (0.3, 0.1), 2, 0.03, 0.1)],
)
def test_a_small_regression_ends_lower_than_with_adamw_at_its_best_rate(method, steps, scales, decades, rite, pro):
    problem = steps, scales, decades
    adamw = min(
        loss_after(method, lambda one, lr=10**power: torch.optim.AdamW(one.factors().values(), lr=lr), *problem)
        for power in (-2, -1.5, -1, -0.5, 0)
    )
    assert loss_after(method, lambda one: LoraRite([one], lr=rite), *problem) < adamw / 1.5
    assert loss_after(method, lambda one: LoraPro([one], lr=pro), *problem) < adamw / 1.5
