"""Several trials in one step: each one's losses and factors are those of the trial alone."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lsr_scale.adapters import method_names
from lsr_scale.adapters.inject import inject
from lsr_scale.config import RunConfig, run_from_dict
from lsr_scale.errors import UserError
from lsr_scale.layers.frozen_linear import freeze_quantized
from lsr_scale.model.share import share_base
from lsr_scale.training.steps import joint as joint_module
from lsr_scale.training.steps.graphs import PackedCollator
from lsr_scale.training.steps.head_loss import HeadCollator
from lsr_scale.training.steps.joint import JointStep, Member
from tests.fused.test_memory import Gpu
from tests.helpers import recorded_graphs
from tests.helpers.tiny_models import SEVEN_LINEARS, quantize, randomize, tiny_llama

STEPS = 12
OWED = STEPS * 2.0**-24  # of float32: every step rounds each factor once, by half a unit in the last place
# two trials of each method, of different sizes and scalings
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lsr": [{"rank": 4, "separation_rank": 2}, {"rank": 8, "separation_rank": 4, "alpha": 3.0}],
    "kron_lora": [{"rank": 2, "dropout": 0.0}, {"rank": 2, "dropout": 0.0, "alpha": 7.0}],
    "kadaptation": [{"phm_dim": 4, "alpha": 1.0}, {"phm_dim": 4, "alpha": 2.0}],
    "krona": [{}, {"alpha": 2.0}],
    "lora_xs": [{"rank": 4, "alpha": 90.0}, {"rank": 6}],
    "slora": [{"rank": 3, "alpha": 1.0}, {"rank": 4, "init": "nystrom", "train": "middle"}],
    "lora": [{"rank": 3}, {"rank": 3, "alpha": 1.0}],
    "lokr": [{"rank": 2}, {"rank": 3}],
    "vera": [{"rank": 8}, {"rank": 5}],
    "tinylora": [{"u": 8}, {"u": 5, "rank": 3}],
}


def joint_run(**training: Any) -> RunConfig:
    """Return what a joint step is told of the trials' runs."""
    sections: dict[str, Any] = {
        "model": {"name": "tiny", "quantization": "none", "dtype": "float32"},
        "adapter": {"method": "lsr"},
        "data": {"train": ["arc_easy"]},
        "training": {"memory": "speed", **training},
    }
    return run_from_dict(sections)


def frozen(kind: str = "none", **changes: Any) -> Any:
    """Return a base as `load_base` leaves it."""
    base: Any = tiny_llama(**changes)
    if kind != "none":
        base = quantize(base, kind, torch.float32)
    freeze_quantized(base)
    base.config.use_cache = False
    return base.requires_grad_(False)


def trial(base: Any, method: str, options: dict[str, Any], seed: int, targets: Any = SEVEN_LINEARS) -> Any:
    """Return a trial's model in training: an adapter that changes it, in a copy of the base."""
    torch.manual_seed(seed)
    model = inject(share_base(base), method, {"target_modules": targets, **options}, "causal_lm")
    return randomize(model, seed, scale=0.1).train()


def batches(seed: int, number: int = STEPS, packed: bool = False, rows: int = 2) -> list[dict[str, Any]]:
    """Return batches as TRL's collator makes them, of rows of odd lengths whose first tokens are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    made = []
    for _ in range(number):
        examples = []
        for _ in range(rows):
            length = int(torch.randint(4, 12, (), generator=generator))
            ids = torch.randint(1, 96, (length,), generator=generator).tolist()
            examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
        made.append(collator(examples))
    return made


def divisor_of(*of_step: dict[str, Any]) -> Tensor:
    """Return what the trainer divides a step's losses by."""
    return sum(((batch["labels"][:, 1:] != -100).sum() for batch in of_step), torch.tensor(0))


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what is trained."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=rate)


def alone(model: Any, data: list[dict[str, Any]], rate: float, accumulation: int = 1) -> tuple[list[float], Any]:
    """Train as a trainer does, and return losses and factors."""
    optimizer, losses = optimizer_of(model, rate), []
    for start in range(0, len(data), accumulation):
        of_step = data[start : start + accumulation]
        for batch in of_step:
            inputs = {name: value for name, value in batch.items() if name != "head"}
            loss = model(**inputs, use_cache=False, num_items_in_batch=divisor_of(*of_step)).loss
            loss.backward()
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses, factors(model)


def exactly(model: Any, data: list[dict[str, Any]], rate: float) -> Any:
    """Train a trial alone in float64, and return losses and factors."""
    return alone(copy.deepcopy(model).double(), data, rate)


def together(
    base: Any, models: list[Any], data: list[Any], rates: list[float], accumulation: int = 1, **training: Any
) -> list[tuple[list[float], Any]]:
    """Train all in joint steps, and return losses and factors of each."""
    step = JointStep(base, joint_run(**training))
    optimizers = [optimizer_of(model, rate) for model, rate in zip(models, rates, strict=True)]
    losses: list[list[float]] = [[] for _ in models]
    for start in range(0, len(data[0]), accumulation):
        of_step = [of_trial[start : start + accumulation] for of_trial in data]
        for micro in range(accumulation):
            members = [Member(model, own[micro], divisor_of(*own)) for model, own in zip(models, of_step, strict=True)]
            for own, loss in zip(losses, step.run(members), strict=True):
                own.append(float(loss))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [(own, factors(model)) for own, model in zip(losses, models, strict=True)]


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return how far factors are from others, all as one vector, relative to their size."""
    assert one.keys() == two.keys()
    a, b = (torch.cat([value.double().flatten() for value in of.values()]) for of in (one, two))
    return float((a - b).norm() / b.norm())


def assert_same(found: Any, expected: Any, exact: Callable[[], Any] | None = None, tolerance: float = 1e-6) -> None:
    """Compare losses, and all factors as one vector, relative to their size.

    Where float32 itself is coarser, by what the trial alone is off a float64 run (AdamW divides by the root of small
    second moments, and how float32 is rounded is the processor's affair), that decides: factors are then apart by twice
    that at most, and no further from the float64 run than the trial alone by more than `OWED`.

    Args:
        found: Losses and factors of a trial in joint steps.
        expected: Those of the trial alone.
        exact: Does a float64 run of the trial; None: the tolerance holds without.
        tolerance: Of both.
    """
    assert len(found[0]) == len(expected[0])
    for step, (one, two) in enumerate(zip(found[0], expected[0], strict=True)):
        assert abs(one - two) <= 1e-6 * abs(two), f"step {step}: {one} and {two}"
    apart = distance(found[1], expected[1])
    # within the tolerance the float64 run would tell nothing: it cannot be nearer to one than to the other by more
    if apart > tolerance:
        assert exact is not None, apart
        reference = exact()[1]
        rounding = distance(expected[1], reference)
        assert apart <= 2 * rounding, (apart, rounding)
        assert distance(found[1], reference) <= rounding + OWED


def assert_bit_equal(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", method_names())
def test_trials_of_a_method_equal_each_alone(method, packed):
    base = frozen()
    one, two = OPTIONS[method]
    specs = [(one, 1, SEVEN_LINEARS), (two, 2, SEVEN_LINEARS), (one, 3, ["q_proj", "down_proj"])]
    rates, data = [5e-4, 1e-3, 3e-3], [batches(seed, packed=packed) for seed in (1, 2, 3)]

    def made() -> list[Any]:
        return [trial(base, method, options, seed, targets) for options, seed, targets in specs]

    found = together(base, made(), data, rates)
    for model, start, own, rate, one in zip(made(), made(), data, rates, found, strict=True):
        assert_same(one, alone(model, own, rate), partial(exactly, start, own, rate))


def test_where_float32_is_coarser_a_float64_run_decides():
    """LoKr, of which one processor's rounding made 1.04e-6; here with no tolerance, so that it is decided so."""
    base = frozen()
    model, other, start = (trial(base, "lokr", OPTIONS["lokr"][0], 1) for _ in range(3))
    data, rate = batches(1), 1e-3
    ((found, joint), _) = together(
        base, [other, trial(base, "lokr", OPTIONS["lokr"][1], 2)], [data, batches(2)], [rate] * 2
    )
    expected, reference = alone(model, data, rate), exactly(start, data, rate)
    assert 0 < distance(expected[1], reference[1]) < OWED
    assert_same((found, joint), expected, lambda: reference, tolerance=0.0)
    off = {name: value * (1 + 3e-6) for name, value in joint.items()}
    with pytest.raises(AssertionError):
        assert_same((found, off), expected, lambda: reference)


def all_methods(base: Any) -> list[Any]:
    """Return trials of all methods and sizes, those of one method no neighbours, some with few targets."""
    specs = [(name, OPTIONS[name][size]) for size in (0, 1) for name in method_names()]
    return [trial(base, name, options, seed, SEVEN_LINEARS[seed % 4 :]) for seed, (name, options) in enumerate(specs)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_trials_of_all_methods_in_one_step_equal_each_alone(packed):
    base = frozen()
    rates = [(1 + place) * 7e-5 for place in range(2 * len(OPTIONS))]
    # each method's own steps are more, above
    data = [batches(seed % 10, number=5, packed=packed) for seed in range(2 * len(OPTIONS))]
    found = together(base, all_methods(base), data, rates)
    models = zip(all_methods(base), all_methods(base), strict=True)
    for (model, start), own, rate, one in zip(models, data, rates, found, strict=True):
        assert_same(one, alone(model, own, rate), partial(exactly, start, own, rate))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trials_on_a_quantized_base_equal_each_alone(kind):
    base = frozen(kind)
    # PEFT's LoKr cannot adapt a 4-bit layer
    specs = [(name, OPTIONS[name][0]) for name in ("lsr", "kron_lora", "krona", "lora")]

    def made() -> list[Any]:
        return [trial(base, name, options, seed) for seed, (name, options) in enumerate(specs)]

    rates, data = [1e-3] * len(specs), [batches(seed) for seed in range(len(specs))]
    found = together(base, made(), data, rates)
    for model, own, rate, one in zip(made(), data, rates, found, strict=True):
        assert_same(one, alone(model, own, rate))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_micro_batches_are_accumulated(packed):
    base = frozen()

    def made() -> list[Any]:
        return [trial(base, "lsr", options, seed) for seed, options in enumerate(OPTIONS["lsr"])]

    rates, data = [1e-3, 2e-3], [batches(seed, packed=packed) for seed in (1, 2)]
    found = together(base, made(), data, rates, accumulation=4)
    for model, own, rate, one in zip(made(), data, rates, found, strict=True):
        assert_same(one, alone(model, own, rate, accumulation=4))


@pytest.mark.parametrize("training", [{"gradient_checkpointing": True, "memory": "auto"}, {"fused": "on"}])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_step_that_recomputes_or_runs_fused_is_the_same(packed, training):
    base = frozen()

    def made() -> list[Any]:
        return [trial(base, "lsr", options, seed) for seed, options in enumerate(OPTIONS["lsr"])]

    data = [batches(seed, number=5, packed=packed) for seed in (1, 2)]
    found = together(base, made(), data, [1e-3, 2e-3], **training)
    expected = together(base, made(), data, [1e-3, 2e-3])
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)


def test_activations_are_recomputed():
    base = frozen()
    step = JointStep(base, joint_run(gradient_checkpointing=True, memory="auto"))
    step.run([Member(trial(base, "lora", {"rank": 2}, 0), batches(0)[0])])
    assert all(layer.gradient_checkpointing for layer in step.model.model.layers)
    assert not any(layer.gradient_checkpointing for layer in base.model.layers)


def poisoned(base: Any, models: list[Any], rates: list[float], place: int | None = None) -> Any:
    """Train together, one trial's factors not numbers."""
    if place is not None:
        for parameter in models[place].parameters():
            if parameter.requires_grad:
                parameter.data.fill_(math.nan)
    return together(base, models, [batches(seed, number=2) for seed in range(len(models))], rates)


@pytest.fixture(scope="module")
def unpoisoned():
    """Return the losses and factors of trials none of which is disturbed."""
    base = frozen()
    return poisoned(base, all_methods(base), [1e-3] * 2 * len(OPTIONS))


def test_factors_that_are_not_numbers_change_no_other_trial(unpoisoned):
    base, expected = frozen(), unpoisoned
    rates = [1e-3] * 2 * len(OPTIONS)
    for place in range(0, 12, 5):
        found = poisoned(base, all_methods(base), rates, place)
        assert all(math.isnan(loss) for loss in found[place][0])
        for other in {*range(2 * len(OPTIONS))} - {place}:
            assert_bit_equal(found[other], expected[other])


def test_packed_rows_of_fused_layers_keep_what_is_not_a_number():
    base, found = frozen(), []
    for broken in (False, True):
        models = [trial(base, "lora", {"rank": 2 + seed}, seed) for seed in range(3)]
        for parameter in models[1].parameters():
            if parameter.requires_grad and broken:
                parameter.data.fill_(math.nan)
        step = JointStep(base, joint_run(fused="on"))
        losses = step.run([Member(model, batches(seed, packed=True)[0]) for seed, model in enumerate(models)])
        found.append((losses, [[p.grad for p in model.parameters() if p.requires_grad] for model in models]))
    (wanted, expected), (losses, gradients) = found
    assert [loss.isnan().item() for loss in losses] == [False, True, False]
    for place in (0, 2):
        assert losses[place] == wanted[place]
        assert all(torch.equal(*pair) for pair in zip(gradients[place], expected[place], strict=True))


def test_a_trial_that_diverges_changes_no_other(unpoisoned):
    base, expected = frozen(), unpoisoned
    rates = [1e-3] * 2 * len(OPTIONS)
    found = poisoned(base, all_methods(base), [*rates[:3], 1e10, *rates[4:]])
    assert found[3][0][-1] != expected[3][0][-1]
    for other in {*range(2 * len(OPTIONS))} - {3}:
        assert_bit_equal(found[other], expected[other])


def test_graphs_are_replayed_from_the_third_step_of_the_same_trials_on(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    base = frozen()
    collator = PackedCollator(HeadCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)), 16)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        rows = [torch.randint(1, 96, (length,), generator=generator).tolist() for length in (9, 16)]
        return collator([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])

    models = [trial(base, "lsr", options, seed) for seed, options in enumerate(OPTIONS["lsr"])]
    models.insert(1, trial(base, "lora", {"rank": 3}, 2))
    step, eager = JointStep(base, joint_run(fused="on")), JointStep(base, joint_run(fused="on"))
    for number in range(5):
        data = [batch() for _ in models]
        divisors = [10.0, 11.0, 12.0]
        members = [Member(*of_trial) for of_trial in zip(models, data, divisors, strict=True)]
        losses = step.run(members)
        assert recorded_graphs.RecordedGraph.replays == max(0, number - 1)
        assert all((member.gradient is None) == (number < 2) for member in members)
        found = [member.gradient for member in members]
        for model in models:
            model.zero_grad()
        for one in data:
            one.pop("static")
        expected = eager.run([Member(*of_trial) for of_trial in zip(models, data, divisors, strict=True)])
        assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in expected], rel=1e-6)
        for model, vector in zip(models, found, strict=True):
            gradient = torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
            assert vector is None or (vector - gradient).norm() <= 1e-5 * gradient.norm()
            model.zero_grad()
    assert recorded_graphs.RecordedGraph.made == 1
    # of other trials there is none yet
    step.run([Member(model, batch()) for model in models[:2]])
    assert recorded_graphs.RecordedGraph.replays == 3
    number, seconds = step.captures
    assert number == 1, "those of trials before count"
    assert seconds > 0


def test_batches_of_fewer_documents_or_tokens_than_earlier_ones_need_no_graph_of_their_own(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    base = frozen()
    collator = PackedCollator(HeadCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)), 16)
    models = [trial(base, "lora", {"rank": 2}, seed) for seed in (0, 1)]
    step = JointStep(base, joint_run(fused="on"))
    captures = []
    for lengths in ((5,) * 26, (5,) * 26, (5,) * 26, (9,) * 14, (8, 10) * 7, (7,) * 18):
        batch = collator([{"input_ids": [*range(1, 1 + n)], "labels": [-100, *range(2, 1 + n)]} for n in lengths])
        step.run([Member(model, batch) for model in models])
        captures.append(recorded_graphs.RecordedGraph.made)
    assert captures == [0, 0, 1, 1, 1, 1]


def test_graphs_of_fewer_trials_have_no_more_documents_or_tokens_for_what_was_before(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    base = frozen()
    collator = PackedCollator(HeadCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)), 16)
    models = [trial(base, "lora", {"rank": 2}, seed) for seed in range(4)]
    joined, join = [], joint_module.join_static
    monkeypatch.setattr(joint_module, "join_static", lambda *args: (joined.append(join(*args)), joined[-1])[1])
    long, short = (
        collator([{"input_ids": [*range(1, 1 + n)], "labels": [-100, *range(2, 1 + n)]} for n in lengths])
        for lengths in ((7,) * 19, (9,) * 14)
    )
    step = JointStep(base, joint_run(fused="on"))
    for members, batch in ((models, long), (models[:1], short)):
        for _ in range(3):
            step.run([Member(model, batch) for model in members])
    alone = join([short["static"]])
    assert joined[0]["cu_seq_lens"].shape > joined[1]["cu_seq_lens"].shape == alone["cu_seq_lens"].shape
    assert joined[0]["input_ids"].shape[1] > joined[1]["input_ids"].shape[1] == alone["input_ids"].shape[1]


@pytest.mark.parametrize(("total", "level"), [(2_000_000, ("full", False)), (40_000_000, ("none", True))])
def test_fused_layers_keep_what_the_first_step_of_the_same_trials_left_free(total, level):
    base = frozen()
    models = [trial(base, "lora", {"rank": 2}, seed) for seed in (0, 1, 2)]
    said: list[str] = []
    gpu = Gpu(1_000_000, 2_000_000, total)
    step = JointStep(base, joint_run(fused="on", memory="auto", max_length=None), said.append, gpu)

    def levels(chosen: list[Any]) -> set[Any]:
        step.run([Member(model, batches(0)[0], most_tokens=32) for model in chosen])
        return {(layer.recompute, bool(layer.weight_cache)) for layer in step.model.model.layers}

    assert levels(models[:2]) == {("full", False)}
    assert levels(models[:2]) == {level}
    assert levels(models[1:]) == {("full", False)}  # another trial has taken a place
    assert levels(models[1:]) == {level}
    assert len(said) == 1
    assert said[0].startswith("2 trials in a step: of 2 decoder layers 2 recompute")


def test_members_may_change_and_their_order_does_not_matter():
    base = frozen()
    models = [trial(base, name, OPTIONS[name][0], seed) for seed, name in enumerate(("lsr", "lora", "lsr", "krona"))]
    data = [batches(seed)[0] for seed in range(4)]
    step = JointStep(base, joint_run())

    def losses(*places: int) -> list[float]:
        return [float(loss) for loss in step.run([Member(models[place], data[place]) for place in places])]

    every = losses(0, 1, 2, 3)
    joint = step.model
    assert losses(0, 1, 2, 3) == every
    assert step.model is joint
    assert losses(3, 0, 2, 1) == pytest.approx([every[place] for place in (3, 0, 2, 1)], rel=1e-6)
    assert losses(2, 3) == pytest.approx(every[2:], rel=1e-6)
    assert losses(1) == pytest.approx(every[1:2], rel=1e-6)
    assert not any(parameter.requires_grad for parameter in step.model.parameters())
    assert "layers.0.self_attn.q_proj.base_layer" in dict(step.model.model.named_modules())


def test_batches_may_have_other_numbers_of_rows():
    base = frozen()
    models = [trial(base, "lsr", OPTIONS["lsr"][0], seed) for seed in (0, 1)]
    data = [batches(0, rows=5)[0], batches(1, rows=2)[0]]
    losses = JointStep(base, joint_run()).run([Member(model, one) for model, one in zip(models, data, strict=True)])
    expected = [model(**one, use_cache=False).loss.item() for model, one in zip(models, data, strict=True)]
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero():
    base = frozen()
    models = [trial(base, "lora", {"rank": 2}, seed) for seed in (0, 1)]
    first, second = batches(0)[0], batches(1)[0]
    first["labels"] = torch.full_like(first["labels"], -100)
    losses = JointStep(base, joint_run()).run([Member(models[0], first), Member(models[1], second)])
    assert float(losses[0]) == 0
    assert not any(value.grad.any() for value in models[0].parameters() if value.requires_grad)
    assert float(losses[1]) > 0


def test_a_model_of_conv1d_layers_equals_each_trial_alone():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    base: Any = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=1)).requires_grad_(False)
    specs = [(name, OPTIONS[name][0]) for name in ("lsr", "krona", "lora")]

    def made() -> list[Any]:
        return [trial(base, name, options, 1, ["c_attn", "c_fc"]) for name, options in specs]

    data = [batches(seed) for seed in range(3)]
    found = together(base, made(), data, [1e-3] * 3)
    for model, own, one in zip(made(), data, found, strict=True):
        assert_same(one, alone(model, own, 1e-3))


def test_rows_that_a_model_picks_are_refused():
    base = frozen()
    forward = type(base.model.layers[0].mlp).forward

    class PickingMLP(type(base.model.layers[0].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            half = x.flatten(0, 1)[::2]
            return x + functional.pad(forward(self, half), (0, 0, 0, x.shape[:2].numel() - len(half))).view_as(x)

    base.model.layers[1].mlp.__class__ = PickingMLP
    models = [trial(base, "lora", {"rank": 2}, seed) for seed in (0, 1)]
    with pytest.raises(UserError, match="rows that a model picks"):
        JointStep(base, joint_run()).run([Member(model, batches(0)[0]) for model in models])
