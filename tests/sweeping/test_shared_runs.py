"""Runs that share a base and their training steps, through the whole of `train`: each is what it is alone."""

import functools
import itertools
import re
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from lsr_scale import UserError
from lsr_scale.model import load_base_for
from lsr_scale.model.share import share_base
from lsr_scale.run.folder import TENSORS
from lsr_scale.run.train import train
from lsr_scale.sweeping.places import Places
from lsr_scale.training.callbacks.signals import Signals, Terminated
from lsr_scale.training.shared import Shared
from lsr_scale.training.steps.joint import JointStep
from tests.helpers.tiny_models import SEVEN_LINEARS
from tests.helpers.tiny_runs import completions, do, factors, metrics, results, same, save_llama, tiny_run, write_rows

# differ from run to run
MEASURED = re.compile(r"wall_s|training_s|.*tokens_per_s|mfu|.*memory_gib|.*_runtime|.*_per_second")


def separately(members):
    """Stand in for a joint step: each member's own model computes its loss."""
    losses = []
    for member in members:
        inputs = {name: value for name, value in member.inputs.items() if name != "head"}
        loss = member.model(**inputs, use_cache=False, num_items_in_batch=member.divisor).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def flatly(members):
    """Do the same, with each member's gradients as one vector, which is written over in the next step."""
    losses = separately(members)
    for member in members:
        trained = [parameter for parameter in member.model.parameters() if parameter.requires_grad]
        member.gradient = torch.cat([parameter.grad.reshape(-1) for parameter in trained])
        for parameter in trained:
            parameter.grad = None
    return losses


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    save_llama(folder / "model")
    write_rows(folder / "long.jsonl", completions(40))
    write_rows(folder / "held-out.jsonl", completions(4))
    tiny_run(folder)
    return folder


def trial(place, folder, adapter, **training):
    """Return a run of float32, with one kind of validation."""
    training = {"output_dir": str(folder), "fused": "off", "eval_strategy": "steps", "eval_steps": 5, **training}
    data = {"train": [str(place / "long.jsonl")], "validation": [str(place / "held-out.jsonl")]}
    model = {"name": str(place / "model"), "quantization": "none", "dtype": "float32"}
    adapter = {"target_modules": SEVEN_LINEARS, **adapter}
    return tiny_run(place, model=model, data=data, adapter=adapter, training=training, eval={"tasks": []})


TRIALS = {
    "lsr": ({"method": "lsr", "rank": 4, "separation_rank": 2}, {"max_steps": 20, "seed": 1}),
    "lora": (
        {"method": "lora", "rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"max_steps": 12, "learning_rate": 1e-2, "seed": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    ),
    "kron": (
        {"method": "kron_lora", "rank": 2, "left_out": 4, "dropout": 0.0},
        {"max_steps": 20, "seed": 3, "data_seed": 7, "warmup_steps": 3, "max_grad_norm": 0.0, "logging_steps": 3},
    ),
}


def trials(place, folder, **more):
    return {
        name: trial(place, folder / name, adapter, **{**training, **more})
        for name, (adapter, training) in TRIALS.items()
    }


def together(runs, size=3, step=separately, signals=None, before=lambda meet: None, **options):
    """Do runs that share; return how they ended by their names, and what each said."""
    first = next(iter(runs.values()))
    base, signals = load_base_for(first.model, 0), signals or Signals()
    ended, said = {}, {name: [] for name in runs}

    def start(name, meet):
        def meet_others(member):
            before(name)
            return meet(member)

        shared = Shared(lambda run: share_base(base), meet_others, signals, said[name].append)
        return train(runs[name], quiet=True, shared=shared, **options)

    def took(end):
        ended[end.start.args[0]] = end.error or end.value

    starts = iter([functools.partial(start, name) for name in runs])
    with signals.listening():
        Places(step, size, signals).work(functools.partial(next, starts, None), took)
    return ended, said


def without_measured(row):
    return {name: value for name, value in row.items() if not MEASURED.fullmatch(name)}


def assert_equal(folder, alone):
    """Check that two runs trained on the same rows and came to the same."""
    of_trl = {"entropy", "mean_token_accuracy"}  # TRL's loss logs them in training
    for row, expected in zip(metrics(folder), metrics(alone), strict=True):
        assert set(expected) - set(row) <= of_trl
        for name in without_measured(row):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (name, row["step"])
    for name, factor in factors(folder).items():
        torch.testing.assert_close(factor, factors(alone)[name], rtol=0, atol=1e-6)
    found, expected = results(folder), results(alone)
    assert found.keys() == expected.keys()
    for name, value in without_measured(found).items():
        close = pytest.approx(expected[name], rel=1e-5, abs=1e-6) if isinstance(value, float) else expected[name]
        assert value == close, name


@pytest.fixture(scope="module")
def alone(place):
    return {name: do(run) for name, run in trials(place, place / "alone").items()}


@pytest.mark.parametrize(("step", "size"), [(separately, 3), (flatly, 2)])
def test_each_is_what_it_is_alone(place, tmp_path, alone, step, size, capsys):
    ended, said = together(trials(place, tmp_path), size, step)
    assert capsys.readouterr().out == ""
    for name, folder in ended.items():
        assert_equal(folder, alone[name])
        assert f"run folder: {folder.path}" in said[name]
        assert any(line.startswith("done in") for line in said[name])


@pytest.mark.parametrize(
    ("step", "optim"),
    [(separately, "adamw_torch_fused"), *((flatly, name) for name in ("adamw_torch_fused", "adamw_torch", "sgd"))],
)
def test_several_batches_a_step_and_any_optimizer(place, tmp_path, step, optim):
    more = {"gradient_accumulation_steps": 3, "optim": optim, "max_steps": 4, "eval_strategy": "no"}
    adapter, training = TRIALS["lora"]
    expected = do(trial(place, tmp_path / "alone", adapter, **{**training, **more}))
    ended, _ = together({"lora": trial(place, tmp_path / "shared", adapter, **{**training, **more})}, 1, step)
    assert_equal(ended["lora"], expected)


def poisoned(step, poisons):
    """Return a joint step whose losses are no numbers for those members of which `poisons` says so."""

    def run(members):
        losses = step(members)
        for index, member in enumerate(members):
            if poisons(member):
                losses[index] = losses[index] * torch.nan
                for gradient in [member.gradient, *(parameter.grad for parameter in member.model.parameters())]:
                    if gradient is not None:
                        gradient.fill_(torch.nan)
        return losses

    return run


def test_one_that_diverges_is_named_and_harms_no_other(place, tmp_path, alone):
    def is_third_of_lora(member):
        return len(member.model.peft_config["default"].target_modules) == 2 and next(count) == 2

    count = itertools.count()
    ended, _ = together(trials(place, tmp_path), 3, poisoned(flatly, is_third_of_lora))
    assert isinstance(ended["lora"], UserError)
    assert "training diverged: the loss is nan at step 3, on rows" in str(ended["lora"])
    assert str(tmp_path / "lora") in str(ended["lora"])
    for name in ("lsr", "kron"):
        assert_equal(ended[name], alone[name])


@pytest.mark.parametrize("step", [separately, flatly])
def test_a_batch_that_is_not_finite_is_left_out(place, tmp_path, step):
    count = itertools.count()
    more = {"max_steps": 4, "on_nonfinite": "skip", "eval_strategy": "no", "save_steps": 1, "weight_decay": 0.1}
    runs = {"lora": trial(place, tmp_path, TRIALS["lora"][0], **more)}
    ended, said = together(runs, 1, poisoned(step, lambda member: next(count) == 2))
    saved = [load_file(ended["lora"].path / f"checkpoint-{number}" / TENSORS) for number in (1, 2, 3, 4)]
    assert [same(*pair) for pair in itertools.pairwise(saved)] == [False, True, False]
    assert [row["loss"] == 0 for row in metrics(ended["lora"])] == [False, False, True, False]
    assert any("what was not finite counted for nothing" in line for line in said["lora"])


def test_a_joint_step_that_runs_out_of_memory_loses_nobody(place, tmp_path, alone):
    def too_many(members):
        losses = separately(members)
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    ended, _ = together(trials(place, tmp_path), 3, too_many)
    for name, folder in ended.items():
        assert_equal(folder, alone[name])


def test_a_signal_leaves_each_with_a_checkpoint_and_they_resume(place, tmp_path, alone):
    runs, signals = trials(place, tmp_path), Signals()
    count = itertools.count()

    def signalled(members):
        if next(count) == 6:
            signal.raise_signal(signal.SIGTERM)
        return separately(members)

    ended, _ = together(runs, 2, signalled, signals)
    assert signals.received == signal.SIGTERM
    assert list(ended) == ["lsr", "lora"], "the third is not begun"
    for name, error in ended.items():
        assert isinstance(error, Terminated)
        assert "after step 7, a checkpoint is saved" in str(error)
        assert (tmp_path / name / "checkpoint-7").is_dir()
        assert not (tmp_path / name / ".lock").exists()
    ended, _ = together(runs, 2, resume="auto")
    for name, folder in ended.items():
        torch.testing.assert_close(factors(folder), factors(alone[name]), rtol=0, atol=1e-6)


def test_a_second_ctrl_c_ends_all_at_once(place, tmp_path):
    count = itertools.count()

    def interrupted(members):
        if next(count) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return separately(members)

    with pytest.raises(KeyboardInterrupt):
        together(trials(place, tmp_path), 3, interrupted)
    assert not any((tmp_path / name / ".lock").exists() for name in TRIALS)
    assert not any(thread.name.startswith("place") for thread in threading.enumerate())


@pytest.mark.parametrize("shares", [False, True])
def test_a_run_stops_after_a_step_and_goes_on_as_if_it_had_not(place, tmp_path, alone, shares):
    runs, taken = trials(place, tmp_path), []
    if not shares:
        runs = {"lora": runs["lora"]}
    for stop_after_step in (5, 5, 8):

        def take(trainer):
            taken.append(trainer.state.global_step)

        options = {"resume": "auto", "take": take, "stop_after_step": stop_after_step}
        if shares:
            ended, _ = together(runs, 3, **options)
        else:
            ended = {name: do(run, **options) for name, run in runs.items()}
        for folder in ended.values():
            assert folder.own_checkpoints()[-1].name == f"checkpoint-{stop_after_step}"
            assert not folder.has_adapter()
            assert not folder.results.exists()
    assert taken == [5] * 2 * len(runs) + [8] * len(runs)
    ended = together(runs, 3, resume="auto")[0] if shares else {name: do(r, resume="auto") for name, r in runs.items()}
    for name, folder in ended.items():
        torch.testing.assert_close(factors(folder), factors(alone[name]), rtol=0, atol=1e-6)
        if name != "kron":  # what is logged every third step is of other steps since
            # where it paused it was evaluated as well
            found = {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}
            for row in metrics(alone[name]):
                assert "loss" not in row or found[row["step"]] == pytest.approx(row["loss"], rel=1e-5)


def test_checkpoints_of_shared_runs_and_others_are_exchangeable(place, tmp_path, alone):
    for first, name in (("shared", "lsr"), ("alone", "lora")):
        run = trials(place, tmp_path)[name]
        for number, stop_after_step in enumerate((6, None)):
            options = {"resume": "auto", "stop_after_step": stop_after_step}
            if (first == "shared") == (number == 0):
                folder = together({name: run}, 1, **options)[0][name]
            else:
                folder = do(run, **options)
        torch.testing.assert_close(factors(folder), factors(alone[name]), rtol=0, atol=1e-6)


def test_runs_may_share_a_base_alone(place, tmp_path, alone):
    run = trials(place, tmp_path)["lsr"]
    base = load_base_for(run.model, 0)
    folder = train(run, quiet=True, shared=Shared(lambda run: share_base(base)))
    assert same(factors(folder), factors(alone["lsr"]))
    assert not any("lsr" in name for name, _ in base.named_parameters()), "the base has no adapter"


def test_joint_steps(place, tmp_path, alone):
    runs = trials(place, tmp_path)
    base = load_base_for(runs["lsr"].model, 0)
    ended, _ = together(runs, 3, JointStep(base, runs["lsr"]).run)
    for name, folder in ended.items():
        assert_equal(folder, alone[name])
