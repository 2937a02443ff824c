"""`adapter.init: gradient`: the gradient that it takes, what each method makes of it, and runs that begin so."""

from pathlib import Path

import pytest
import torch

from lsr_scale import KronLoraConfig, LsrConfig, UserError
from lsr_scale.adapters.kron_terms import leading_singular
from lsr_scale.adapters.methods.kron_lora import KronLora
from lsr_scale.adapters.methods.lsr import Lsr
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.adapters.peft import LowRankPair
from lsr_scale.fused import fuse
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import gradient_start
from lsr_scale.training.arguments import trainer_arguments
from lsr_scale.training.assembly import build_trainer
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import do, factors, metrics, same, save_llama, tiny_run

LEAVES_OUT_PAGES = True

OPTIONS = {
    "lora": {"rank": 4},
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 4, "left_in": 2, "left_out": 4, "dropout": 0.0},
}
EXACT = {"quantization": "none", "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_llama(folder / "model")
    tiny_run(folder)
    return folder


def run_in(place, folder, method, model=EXACT, adapter=(), **training):
    options = {"method": method, "init": "gradient", "init_rows": 6, **OPTIONS[method], **dict(adapter)}
    training = {"output_dir": str(folder), "max_steps": 4, **training}
    return tiny_run(place, model=model, adapter=options, training=training, eval={"tasks": []})


def built(run, **options):
    said = []
    trainer = build_trainer(run, RunFolder(Path(run.training["output_dir"])), say=said.append, **options)
    return trainer, said


def adapters_of(model):
    return {
        name.removeprefix("base_model.model."): found[0]
        for name, module in model.named_modules()
        if (found := active_adapters(module))
    }


def fresh(method, config, sizes=(48, 24), seed=0):
    """Return a method's factors as they are drawn, float64."""
    torch.manual_seed(seed)
    params = {name: torch.empty(shape).double() for name, shape in method.parameter_shapes(*sizes, config).items()}
    method.init_parameters(params, config)
    return params


def start(method, params, gradient):
    share = method.start_from_gradient(params, gradient, torch.Generator().manual_seed(0))
    assert method.delta_weight(params).count_nonzero() == 0
    return share


def first_step(method, params, gradient):
    """Return minus how the update moves by gradient descent: its factors' gradients are `gradient`'s."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    found = torch.autograd.grad((method.delta_weight(leaves) * gradient).sum(), list(leaves.values()))
    tiny = 1e-6
    moved = {name: params[name] + tiny * one for name, one in zip(leaves, found, strict=True)}
    return method.delta_weight(moved) / tiny


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


def gradient_of(out=24, inner=48):
    """Return a matrix whose singular values fall as those of gradients do."""
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(out, inner, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u * torch.logspace(0, -3, out, dtype=torch.float64)) @ v


def test_loras_first_step_is_the_nearest_matrix_of_its_rank():
    gradient = gradient_of()
    params = {"down": torch.randn(4, 48).double(), "up": torch.zeros(24, 4).double()}
    norm = params["down"].norm()
    share = start(LowRankPair, params, gradient)
    torch.testing.assert_close(params["down"].norm(), norm)
    u, values, v = torch.linalg.svd(gradient, full_matrices=False)
    nearest = (u[:, :4] * values[:4]) @ v[:4]
    assert share == pytest.approx(float(values[:4].square().sum() / values.square().sum()))
    assert cosine(first_step(LowRankPair, params, gradient), nearest) == pytest.approx(1)


def test_kron_loras_first_step_is_a_nearest_product_by_turns():
    """It is what least squares finds from there: no other A, and no other B of the rank, is nearer."""
    gradient = gradient_of()
    config = KronLoraConfig(rank=3, left_in=2, left_out=4)
    params = fresh(KronLora, config)
    norms = {name: value.norm() for name, value in params.items()}
    share = start(KronLora, params, gradient)
    for name in ("left", "right_down"):
        torch.testing.assert_close(params[name].norm(), norms[name])
    step = first_step(KronLora, params, gradient)
    found = cosine(step, gradient) ** 2
    assert found == pytest.approx(share)
    drawn = fresh(KronLora, config)
    assert share > 2 * cosine(first_step(KronLora, drawn, gradient), gradient) ** 2
    blocks = gradient.view(4, 6, 2, 24)
    b = (blocks * params["left"][:, None, :, None]).sum((0, 2)) / params["left"].norm()
    values = torch.linalg.svdvals(b)
    assert share == pytest.approx(float(values[:3].square().sum() / gradient.square().sum()))


def test_an_lsr_with_enough_terms_holds_what_its_rank_can_and_fewer_terms_less():
    gradient, shares = gradient_of(), []
    values = torch.linalg.svdvals(gradient)
    for terms in (1, 2, 12):
        config = LsrConfig(rank=4, separation_rank=terms)
        params = fresh(Lsr, config)
        shares.append(start(Lsr, params, gradient))
        assert all(value.isfinite().all() for value in params.values())
        assert all(params[name].flatten(1).any(1).all() for name in ("down_left", "up_left"))  # no term is dead
        drawn = fresh(Lsr, config)
        better = cosine(first_step(Lsr, params, gradient), gradient)
        assert better > cosine(first_step(Lsr, drawn, gradient), gradient) + 0.1
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(float(values[:4].square().sum() / values.square().sum()), rel=1e-6)


def test_the_subspace_of_a_large_matrix_is_that_of_its_svd(monkeypatch):
    monkeypatch.setattr("lsr_scale.adapters.kron_terms.EXACT_UP_TO", 8)
    gradient = gradient_of()
    u, values, v = leading_singular(gradient, 3, torch.Generator().manual_seed(0))
    exact = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(values, exact.S[:3])
    torch.testing.assert_close((u * values) @ v, (exact.U[:, :3] * exact.S[:3]) @ exact.Vh[:3])


@pytest.mark.parametrize("exact_up_to", [512, 8])
def test_singular_vectors_have_signs_of_their_own(monkeypatch, exact_up_to):
    """LSR-Adapt's sums depend on them: with LAPACK's, which rounding turns, no two machines had one start."""
    monkeypatch.setattr("lsr_scale.adapters.kron_terms.EXACT_UP_TO", exact_up_to)
    gradient = gradient_of()
    _, _, rows = leading_singular(gradient, 4, torch.Generator().manual_seed(0))
    assert (rows.max(1).values == rows.abs().max(1).values).all()
    params = [fresh(Lsr, LsrConfig(rank=4, separation_rank=2)) for _ in range(2)]
    start(Lsr, params[0], gradient)
    start(Lsr, params[1], -gradient)
    torch.testing.assert_close(params[0]["down_left"], params[1]["down_left"])
    torch.testing.assert_close(params[0]["down_right"], params[1]["down_right"])


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_the_rows_mean_loss(place, tmp_path, monkeypatch, packing):
    """By autograd, on weights that train, over all rows at once; the model is left as it was."""
    seen = {}
    own = gradient_start._gradients

    def recorded(*args):
        seen["rows"] = args[2]
        seen["gradients"] = own(*args)
        return seen["gradients"]

    monkeypatch.setattr(gradient_start, "_gradients", recorded)
    rows = {"init_rows": 1} if packing else {}
    run = run_in(place, tmp_path, "lora", adapter=rows, packing=packing, max_length=64)
    trainer, said = built(run)
    assert sum("adapters start from the gradient of" in line for line in said) == 1
    model = trainer.model
    assert all(parameter.grad is None for parameter in model.parameters())
    if packing:
        assert len(seen["rows"]) > 1  # its documents
    weights = {name: one.linear.get_base_layer().weight for name, one in adapters_of(model).items()}
    for weight in weights.values():
        weight.requires_grad_()
    total = sum(int((row["labels"][..., 1:] != -100).sum()) for row in seen["rows"])
    with model.disable_adapter():
        for row in seen["rows"]:
            logits = model(input_ids=row["input_ids"]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, row["labels"][0, 1:], reduction="sum")
            (loss / total).backward()
    for name, weight in weights.items():
        found = seen["gradients"][f"base_model.model.{name}"]
        torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", list(OPTIONS))
@pytest.mark.parametrize("quantization", ["nf4"])
def test_the_function_at_step_0_is_the_bases_and_the_start_is_the_same_however_it_is_made(
    place, tmp_path, monkeypatch, method, quantization
):
    run = run_in(place, tmp_path, method, {"quantization": quantization, "dtype": "float32"})
    state = torch.get_rng_state()
    trainer, _ = built(run)
    model = trainer.model.eval()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        started = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, started)
    drawn, _ = built(run_in(place, tmp_path, method, run.model.model_dump(), {"init": "zero"}))
    differing = [not torch.equal(a, b) for a, b in zip(values(trainer.model), values(drawn.model), strict=True)]
    assert sum(differing) >= len(SEVEN_LINEARS)
    monkeypatch.setattr(gradient_start, "GROUP_BYTES", 1)  # one module at a time
    torch.set_rng_state(state)
    again, said = built(run)
    assert any("run 14 times" in line for line in said)
    assert all(torch.equal(a, b) for a, b in zip(values(trainer.model), values(again.model), strict=True))


def values(model):
    return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("method", OPTIONS)
def test_fused_layers_start_as_others_do_to_the_bit_and_stay_fused(place, tmp_path, method):
    """No operation of the start is fused: singular vectors of like values would turn by far more than rounding."""
    trainer, _ = built(run_in(place, tmp_path, method))
    fused, _ = built(run_in(place, tmp_path, method, fused="on"))
    kinds = {type(module).__name__ for module in fused.model.modules()}
    assert "FusedLlamaDecoderLayer" in kinds
    for a, b in zip(values(trainer.model), values(fused.model), strict=True):
        assert torch.equal(a, b)
    assert fuse(fused.model).fused


def test_a_run_keeps_its_order_of_rows_and_resumes_without_a_new_start(place, tmp_path, monkeypatch):
    whole = do(run_in(place, tmp_path / "whole", "lsr", save_steps=2))
    do(run_in(place, tmp_path / "half", "lsr", save_steps=2), stop_after_step=2)
    zero = do(run_in(place, tmp_path / "zero", "lsr", adapter={"init": "zero"}))
    first = [next(row for row in metrics(one) if "loss" in row)["loss"] for one in (whole, zero)]
    assert first[0] == first[1]  # the same rows, and the base's function

    def none(*args):
        raise AssertionError("a start is computed again")

    monkeypatch.setattr(gradient_start, "_gradients", none)
    continued = do(run_in(place, tmp_path / "half", "lsr", save_steps=2), resume="auto")
    assert same(factors(whole), factors(continued))


def test_too_few_rows_and_gradients_that_are_not_finite_are_refused(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"adapter.init_rows: 64, but there are 12 training rows; set it to that or"):
        built(run_in(place, tmp_path, "lora", adapter={"init_rows": 64}))
    with pytest.raises(UserError, match=r"init_rows: expected a number of training rows, an integer >= 1, got 0"):
        run_in(place, tmp_path, "kron_lora", adapter={"init_rows": 0})
    own = gradient_start._gradients
    monkeypatch.setattr(gradient_start, "_gradients", lambda *args: {k: v / 0 for k, v in own(*args).items()})
    with pytest.raises(UserError, match=r"the gradient of model\.layers\.0\.\S+ is not finite; set model\.dtype"):
        built(run_in(place, tmp_path, "lora"))


def test_shards_are_refused(place, tmp_path, monkeypatch):
    run = run_in(place, tmp_path, "lsr")
    run = run.model_copy(update={"deepspeed": type(run.deepspeed)(config="zero3")})
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"adapter.init: gradient runs the model before DeepSpeed is there"):
        trainer_arguments(run, None)
