"""`adapter.init: gradient`: the gradient that it takes, what each method makes of it, and runs that begin so."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lsr_scale import KronLoraConfig, LsrConfig, UserError
from lsr_scale.adapters.kron_terms import leading_singular
from lsr_scale.adapters.methods.kron_lora import KronLora
from lsr_scale.adapters.methods.lsr import Lsr
from lsr_scale.adapters.pairs import active_adapters
from lsr_scale.adapters.peft import LowRankPair
from lsr_scale.config import run_from_dict
from lsr_scale.fused import fuse
from lsr_scale.run.folder import RunFolder
from lsr_scale.training import gradient_start
from lsr_scale.training.arguments import trainer_arguments
from lsr_scale.training.assembly import build_trainer
from tests.helpers.tiny_models import SEVEN_LINEARS, TINY_SIZES, tiny_llama
from tests.helpers.tiny_runs import (
    do,
    factors,
    labelled,
    metrics,
    same,
    save_classifier,
    save_llama,
    tiny_run,
    write_rows,
)

OPTIONS = {
    "lora": {"rank": 4},
    "lsr": {"rank": 4, "separation_rank": 2},
    "kron_lora": {"rank": 4, "left_in": 2, "left_out": 4, "dropout": 0.0},
}
EXACT = {"quantization": "none", "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_llama(folder / "model", num_hidden_layers=2)
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


@pytest.fixture
def recorded(monkeypatch):
    """Return the passes of the last start, and the gradients that it took, by the module's name."""
    seen, own = {}, gradient_start._gradients

    def recording(*args):
        seen["passes"], found = args[2], own(*args)
        seen["gradients"] = {name.removeprefix("base_model.model."): one.clone() for name, one in found.items()}
        return found

    monkeypatch.setattr(gradient_start, "_gradients", recording)
    return seen


def documents_of(dataset, number, seed):
    """Return token ids and labels of each document of the rows that a start draws."""
    documents = []
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number].tolist():
        row = dataset[index]
        lengths = [int(length) for length in row.get("seq_lengths", [len(row["input_ids"])])]
        parts = [torch.as_tensor(row[name]).split(lengths) for name in ("input_ids", "labels")]
        documents += zip(*parts, strict=True)
    return documents


def assert_near(found, expected, most=1e-5):
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert (one - expected[name]).norm() <= most * expected[name].norm(), name


@pytest.mark.parametrize(("packing", "rows"), [(False, 7), (True, 2)])
def test_the_gradient_is_that_of_the_rows_mean_loss(place, tmp_path, recorded, packing, rows):
    """By autograd, on weights that train, a document at a time; the model is left as it was."""
    run = run_in(place, tmp_path, "lora", adapter={"init_rows": rows}, packing=packing, max_length=64)
    trainer, said = built(run)
    kind = "packed sequences" if packing else "rows"
    assert sum(f"adapters start from the gradient of {rows} {kind}, run 1 time" in line for line in said) == 1
    model = trainer.model
    assert all(parameter.grad is None for parameter in model.parameters())
    weights = {name: one.linear.get_base_layer().weight for name, one in adapters_of(model).items()}
    for weight in weights.values():
        weight.requires_grad_()
    documents = documents_of(trainer.train_dataset, rows, run.training["seed"])
    assert len({len(ids) for ids, _ in documents}) > 2
    assert len(documents) > len(recorded["passes"])
    total = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
    with model.disable_adapter():
        for ids, labels in documents:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            (loss / total).backward()
    assert_near(recorded["gradients"], {name: weight.grad for name, weight in weights.items()})


@pytest.mark.parametrize(
    ("method", "rows", "training"),
    [
        ("lora", 9, {"max_length": 64}),
        ("lsr", 2, {"packing": True, "max_length": 64}),
        ("kron_lora", 9, {"padding_free": True, "max_length": None}),
        ("lsr", 9, {"pad_to_multiple_of": 8}),
    ],
)
def test_rows_that_share_a_pass_start_adapters_as_rows_by_themselves(
    place, tmp_path, monkeypatch, recorded, method, rows, training
):
    run = run_in(place, tmp_path, method, adapter={"init_rows": rows}, **training)
    trainer, _ = built(run)
    shared = dict(recorded)
    monkeypatch.setattr(gradient_start, "PASS_NUMBERS", 0)
    alone, _ = built(run)
    documents = documents_of(trainer.train_dataset, rows, run.training["seed"])
    assert len(shared["passes"]) < len(recorded["passes"]) == len(documents)
    assert_near(shared["gradients"], recorded["gradients"])
    for a, b in zip(values(trainer.model), values(alone.model), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_passes_have_each_row_once_with_others_of_like_length(place):
    lengths = [5, 90, 1, 33, 40, 41, 7, 7, 2, 300, 39]
    rows = [{"input_ids": [place] * length} for place, length in enumerate(lengths)]
    passes = list(gradient_start._passes(list, rows, most=128))
    found = [[len(row["input_ids"]) for row in one] for one in passes]
    assert found == [[300], [90], [41, 40, 39], [33], [7, 7, 5], [2, 1]]
    assert sorted(row["input_ids"][0] for one in passes for row in one) == list(range(len(rows)))
    assert [len(one) for one in gradient_start._passes(list, rows, most=0)] == [1] * len(rows)


def test_a_models_size_says_how_many_tokens_share_a_pass():
    model = tiny_llama()
    of_a_layer = 2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80)
    assert gradient_start.pass_tokens(model) == gradient_start.PASS_NUMBERS // (2 * of_a_layer + 48 + 96)
    experts = MixtralForCausalLM(MixtralConfig(**TINY_SIZES, num_local_experts=4, num_experts_per_tok=2))
    of_a_layer = 2 * (48 + 48) + 2 * (48 + 24) + 2 * (48 + 160 + 80 + 48)
    experts.requires_grad_(False)
    assert gradient_start.pass_tokens(experts) == gradient_start.PASS_NUMBERS // (2 * of_a_layer + 48 + 96)
    experts.config.output_router_logits = True
    assert gradient_start.pass_tokens(experts) == 0


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_start_has_no_dropout_of_attention_either_and_draws_no_numbers(tmp_path, monkeypatch, recorded, kind):
    save_classifier(tmp_path / "model", kind)
    write_rows(tmp_path / "rows.jsonl", labelled(16))
    run = run_from_dict(
        {
            "model": {"name": str(tmp_path / "model"), "task": "seq_cls", "num_labels": 2, **EXACT},
            "adapter": {"method": "lora", "rank": 2, "init": "gradient", "init_rows": 9, "target_modules": ["query"]},
            "data": {"train": [str(tmp_path / "rows.jsonl")]},
            "training": {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2},
            "eval": {"tasks": []},
        }
    )
    built(run)
    first = dict(recorded)
    assert len(first["passes"]) < 9
    own, states = gradient_start._gradients, []

    def seeded(*args):
        torch.manual_seed(7)
        states.append(torch.get_rng_state())
        found = own(*args)
        states.append(torch.get_rng_state())
        return found

    monkeypatch.setattr(gradient_start, "_gradients", seeded)
    monkeypatch.setattr(gradient_start, "PASS_NUMBERS", 0)
    built(run)
    assert torch.equal(*states)
    assert len(recorded["passes"]) == 9
    assert_near(recorded["gradients"], first["gradients"])


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
