"""A step whose gradient is not finite under finite losses: left out whole, or the end of the run; no row is blamed."""

import json
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTTrainer

from lsr_scale import UserError
from lsr_scale.run.folder import TENSORS, RunFolder
from lsr_scale.training.steps import nonfinite
from lsr_scale.training.steps.engine import EngineSteps
from lsr_scale.training.steps.finite_check import FiniteCheck, SkippingOptimizer
from tests.helpers.gradients import make_infinite
from tests.helpers.tiny_runs import do, factors, metrics, same, save_llama, tiny_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    save_llama(folder / "model")
    tiny_run(folder)
    return folder


def run_in(place, folder, **training):
    """Return a run that saves every step, whose loss is TRL's."""
    training = {"output_dir": str(folder), "fused": "off", "save_steps": 1, "max_steps": 3, **training}
    return tiny_run(place, training=training, eval={"tasks": []})


def noted(folder):
    return [json.loads(line) for line in folder.nonfinite.read_text().splitlines()]


def state_of(folder, step):
    """Return the tensors of the optimizer's state, and the parameters, as a checkpoint has them."""
    return load_file(folder.path / f"checkpoint-{step}" / TENSORS)


@pytest.mark.parametrize(
    ("optim", "accumulation", "max_grad_norm"),
    [("adamw_torch_fused", 1, 1.0), ("adamw_torch_fused", 2, 0.0), ("adamw_torch", 1, 0.0), ("sgd", 2, 1.0)],
)
def test_a_step_without_a_finite_gradient_changes_nothing(
    place, tmp_path, monkeypatch, optim, accumulation, max_grad_norm
):
    # of the second step's batches, the last
    make_infinite(monkeypatch, SFTTrainer, lambda t: t.state.global_step == 1 and t.micro_step == accumulation - 1)
    training = {"optim": optim, "gradient_accumulation_steps": accumulation, "max_grad_norm": max_grad_norm}
    folder = do(run_in(place, tmp_path, on_nonfinite="skip", weight_decay=0.1, **training))
    assert noted(folder) == [{"step": 2, "gradient_norm": noted(folder)[0]["gradient_norm"]}], "no row is blamed"
    assert noted(folder)[0]["gradient_norm"] in ("inf", "nan")
    assert same(state_of(folder, 1), state_of(folder, 2)), "factors, moments and the optimizer's count"
    assert not same(factors(folder, "checkpoint-2"), factors(folder, "checkpoint-3"))
    assert [row["grad_norm"] == 0 for row in metrics(folder)] == [False, True, False]
    assert all(factor.isfinite().all() for factor in factors(folder).values())


class UnderAnEngine(FiniteCheck, EngineSteps):
    is_deepspeed_enabled = True

    def __init__(self, norm):
        self.deepspeed = SimpleNamespace(get_global_grad_norm=lambda: norm)
        self.state, self._unchecked = SimpleNamespace(global_step=4), deque()


def test_under_an_engine_that_clips_a_step_is_noted_once(monkeypatch):
    told = []
    monkeypatch.setattr(nonfinite, "handle_nonfinite_gradient", lambda trainer, norm, step: told.append((norm, step)))
    trainer = UnderAnEngine(torch.tensor(torch.inf))
    trainer._get_grad_norm(None, grad_norm=trainer._clip_grad_norm(None))  # as the trainer's loop does
    assert told == [(torch.inf, 4)]


def test_a_step_of_which_no_batch_is_left_moves_nothing(place, tmp_path, monkeypatch):
    compute = SFTTrainer.compute_loss

    def poisoned(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step == 1 else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    folder = do(run_in(place, tmp_path, on_nonfinite="skip", weight_decay=0.1))
    assert same(state_of(folder, 1), state_of(folder, 2)), "Adam's moments would have moved it"
    (line,) = noted(folder)
    assert (line["step"], line["loss"], len(line["rows"])) == (2, "nan", 2)


def test_the_run_ends_at_the_gradient_before_it_is_used(place, tmp_path, monkeypatch):
    make_infinite(monkeypatch, SFTTrainer, lambda trainer: trainer.state.global_step == 1)
    said = r"the gradient of step 2 is not finite \(its norm is (inf|nan)\), but its losses are; set training"
    with pytest.raises(UserError, match=said):
        do(run_in(place, tmp_path))
    folder = RunFolder(tmp_path)
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-1"]
    assert [row["step"] for row in metrics(folder)] == [1]
    assert [sorted(line) for line in noted(folder)] == [["gradient_norm", "step"]]


def test_the_advice_to_skip_and_resume_works(place, tmp_path, monkeypatch, capsys):
    make_infinite(monkeypatch, SFTTrainer, lambda trainer: trainer.state.global_step == 1)
    with pytest.raises(UserError, match=r"set training\.on_nonfinite: skip and resume with --resume auto"):
        do(run_in(place, tmp_path))
    from lsr_scale.run.train import train

    folder = train(run_in(place, tmp_path, on_nonfinite="skip"), resume="auto")
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    said = "counted for nothing (training.on_nonfinite: skip): the loss of 0 batches, the gradient of 1 step; see"
    assert said in capsys.readouterr().out


def test_the_loss_of_another_process_is_what_a_gradient_is_reported_by(tmp_path, monkeypatch):
    row = {"step": 5, "process": 1, "loss": "inf", "rows": [3, 4], "input_ids": [[1]]}
    slept = []

    def sleep(seconds):  # meanwhile the other one writes
        slept.append(seconds)
        with RunFolder(tmp_path).nonfinite.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    monkeypatch.setattr(nonfinite.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(nonfinite.time, "sleep", sleep)
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), on_nonfinite="stop")
    with pytest.raises(
        UserError, match=r"the loss is inf at step 5, on rows \[3, 4\] .* \(process 1; the tokens are in"
    ):
        nonfinite.handle_nonfinite_gradient(trainer, float("nan"), 4)
    assert len(slept) == 1


@pytest.mark.parametrize("kind", ["fused", "other"])
def test_an_optimizer_leaves_out_what_it_is_told(kind):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=kind == "fused")
    skipping = SkippingOptimizer(optimizer)
    assert skipping.on_device == (kind == "fused")
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the step, too
    for norm, moves in ((1.0, True), (float("nan"), False), (0.0, False), (float("inf"), False), (2.0, True)):
        before = parameter.detach().clone()
        parameter.grad = torch.full((3,), norm)
        skipping.decide(torch.tensor(norm))
        optimizer.step()
        schedule.step()
        assert bool((parameter != before).all()) == moves, norm
        assert torch.equal(parameter, before) != moves
    assert int(optimizer.state[parameter]["step"]) == 2
