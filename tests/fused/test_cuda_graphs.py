"""Batches in repeating shapes and their replayed steps: the same losses and gradients as without."""

import gc
import json
import math
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn.utils.rnn import pad_sequence

import lsr_scale
from lsr_scale.adapters import peft_config
from lsr_scale.errors import UserError
from lsr_scale.fused.cuda_graphs import Shapes, StepGraphs, graphs_fallback_reason, rounded, static_batch, static_loss
from lsr_scale.run.train import train
from lsr_scale.training import assembly
from lsr_scale.training.steps.finite_check import SkippingOptimizer
from lsr_scale.training.steps.graphs import GraphSteps, PackedCollator, host_bound
from lsr_scale.training.steps.head_loss import HeadLoss
from tests.helpers import recorded_graphs
from tests.helpers.recorded_graphs import RecordedGraph
from tests.helpers.tiny_models import SEVEN_LINEARS, randomize, tiny_llama
from tests.helpers.tiny_runs import completions, do, factors, metrics, questions, same, save_llama, tiny_run, write_rows

BIG: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]
LENGTHS = [(5,), (17, 3, 40, 1, 22), (16,) * 8, (64, 64, 63), (33,) * 31, (70, 2)]
OPTIONS = {"lsr": {"rank": 4, "separation_rank": 4}, "kron_lora": {"rank": 4, "dropout": 0.0}, "lora": {"rank": 4}}


def packed(lengths, vocabulary=300, seed=0):
    """Return a packed batch as TRL's collator makes it: a third of the tokens is not supervised, nor any start."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 1 / 3, -100, ids)
    labels[positions == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def adapted(method="lsr", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    base = tiny_llama(vocab_size=304, attn_implementation="sdpa", **changes).to(dtype)
    config = peft_config(method, {"target_modules": SEVEN_LINEARS, **OPTIONS[method]}, "CAUSAL_LM")
    model = randomize(get_peft_model(base, config), scale=0.1)
    if dtype == torch.float64:
        model.double()  # the factors too
    lsr_scale.fuse(model.train())
    return model


def gradients_of(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("number", [1, 2, 63, 64, 65, 1000, 4097])
def test_rounded_has_few_sizes_and_wastes_little(number):
    found = rounded(number, 8)
    assert number <= found <= number * 9 / 8 + 1
    assert len({rounded(n, 8) for n in range(1024, 2048)}) <= 10


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("longest", [70, 128])
def test_static_batch_has_the_loss_and_gradients_of_its_documents(lengths, longest):
    model = adapted()
    batch = packed(lengths)
    static = static_batch(**batch, longest=longest)
    assert static["input_ids"].shape == static["position_ids"].shape
    bounds = static["cu_seq_lens"]
    assert bounds[[0, -1]].tolist() == [0, static["input_ids"].shape[1]]
    assert int(bounds.diff().max()) <= static["longest"]
    assert int(static["position_ids"].max()) < static["longest"]
    static_loss(model.get_base_model(), static).backward()
    found = gradients_of(model)
    model.zero_grad()
    rows = [[document for document in batch[name][0].split(list(lengths))] for name in ("input_ids", "labels")]
    ids, labels = (
        pad_sequence(row, batch_first=True, padding_value=fill) for row, fill in zip(rows, (0, -100), strict=True)
    )
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, gradients_of(model), rtol=1e-9, atol=1e-12)


def test_batches_of_one_kind_share_their_shapes():
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for seed in range(50):
        lengths = torch.randint(20, 64, (128,), generator=generator).tolist()
        static = static_batch(**packed(lengths, seed=seed), longest=64)
        shapes.add(tuple(value.shape for value in static.values() if isinstance(value, torch.Tensor)))
    assert len(shapes) <= 3


def test_nothing_supervised_is_a_loss_of_zero():
    batch = packed((5, 9))
    batch["labels"][:] = -100
    model = adapted()
    loss = static_loss(model.get_base_model(), static_batch(**batch, longest=16))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients_of(model))


def test_why_steps_are_not_replayed():
    head = adapted().get_base_model()
    plain = {"packing": True, "padding_free": False, "loss_type": "nll", "label_smoothing_factor": 0.0}
    assert "GPU" in str(graphs_fallback_reason(head, plain))
    assert "packing" in str(graphs_fallback_reason(head, {**plain, "packing": False}))
    assert "cross-entropy" in str(graphs_fallback_reason(head, {**plain, "label_smoothing_factor": 0.1}))
    head.model.layers[0].self_attn.q_proj.extra = torch.nn.Dropout(0.1)
    assert "dropout" in str(graphs_fallback_reason(head, plain))


def test_small_models_are_bound_by_the_host():
    assert host_bound(135_000_000, 30, 4_096)
    assert host_bound(135_000_000, 30, 32_768)
    assert not host_bound(7_200_000_000, 32, 8_192)
    assert host_bound(7_200_000_000, 32, 2_048, joint=True), "190 ms to launch, some 115 to compute"
    assert not host_bound(7_200_000_000, 32, 8_192, joint=True)
    assert host_bound(7_200_000_000, 32, 8_192, eight_bit=True)
    assert not host_bound(7_200_000_000, 32, 32_768, eight_bit=True)


def test_graphs_that_cannot_be_are_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("they can be here")
    save_llama(tmp_path / "model")
    with pytest.raises(UserError, match="cuda_graphs: on, but they cannot be: the decoder layers do not run fused"):
        do(tiny_run(tmp_path, training={"cuda_graphs": "on"}))


class WithoutGraphs(StepGraphs):
    """Does at every replay what a graph's capture does; the trainer cannot tell."""

    fails_at: int | None = None
    replays = 0

    def replay(self, batch, divisor):
        type(self).replays += 1
        if self.replays == self.fails_at:
            raise torch.OutOfMemoryError("no room for another graph")
        loss = static_loss(self.model, batch) / divisor
        self.captured[0] = None
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters))


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(assembly, "StepGraphs", WithoutGraphs)
    monkeypatch.setattr(assembly, "graphs_fallback_reason", lambda *_: None)
    monkeypatch.setattr(WithoutGraphs, "replays", 0)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("fails_at", [None, 4])
def test_runs_end_where_they_do_without(tmp_path, monkeypatch, on_the_cpu, accumulation, fails_at):
    monkeypatch.setattr(WithoutGraphs, "fails_at", fails_at)
    drop, models = GraphSteps._drop_gradients, []
    monkeypatch.setattr(GraphSteps, "_drop_gradients", lambda self, *a: models.append(self.model) or drop(self, *a))
    found = compare_runs(tmp_path, accumulation, fused="on", on_nonfinite="skip", num_train_epochs=2)
    assert WithoutGraphs.replays >= (4 if fails_at else 6)
    assert models
    assert "zero_grad" not in vars(models[-1])  # the model's own again
    for name, factor in found["on"].items():
        torch.testing.assert_close(factor, found["off"][name], rtol=1e-3, atol=1e-5)


def compare_runs(folder, accumulation, **fields):
    """Train twice, with graphs and without; return the factors of both, their logs compared."""
    save_llama(folder / "model", **({} if fields else BIG))  # those of fields run without a GPU
    write_rows(folder / "rows.jsonl", completions(30))
    write_rows(folder / "questions.jsonl", questions())
    found = {}
    for graphs in ("on", "off"):
        training = {"cuda_graphs": graphs, "padding_free": True, "max_length": None, "num_train_epochs": 6}
        training |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3}
        training |= {"output_dir": str(folder / graphs), "learning_rate": 1e-3, **fields}
        ended = do(tiny_run(folder, model={"dtype": "float32" if fields else "bfloat16"}, training=training))
        found[graphs] = factors(ended), [row for row in metrics(ended) if "loss" in row]
    for on, off in zip(found["on"][1], found["off"][1], strict=True):
        assert on["loss"] == pytest.approx(off["loss"], rel=2e-2)
        assert on["num_tokens"] == off["num_tokens"]
        assert on["grad_norm"] == pytest.approx(off["grad_norm"], rel=0.1)
    return {graphs: factors for graphs, (factors, _) in found.items()}


def run_of_graphs(folder, lengths, **training):
    """Return a run of float32, fused, a row a step in this order, whose texts have so many words of one token."""
    save_llama(folder / "model")
    rows = [{"text": " ".join("abcdefgh"[n % 8] for n in range(length))} for length in lengths]
    write_rows(folder / "graphs.jsonl", rows)
    training = {
        **{"output_dir": str(folder / "run"), "fused": "on", "cuda_graphs": "on", "padding_free": True},
        **{"max_length": None, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"},
        **{"save_strategy": "no", "learning_rate": 1e-3, **training},
    }
    data = {"train": [str(folder / "graphs.jsonl")]}
    if "eval_strategy" in training:
        data["validation"] = data["train"]
    return tiny_run(folder, model={"dtype": "float32"}, data=data, training=training, eval={"tasks": []})


def without_graphs(run, folder):
    return run.model_copy(update={"training": {**run.training, "cuda_graphs": "off", "output_dir": str(folder)}})


def by_step(folder, name):
    return [row[name] for row in metrics(folder) if "loss" in row]


@pytest.fixture
def recorded(monkeypatch):
    recorded_graphs.stand_in(monkeypatch)
    monkeypatch.setattr(assembly, "graphs_fallback_reason", lambda *_: None)


def test_recorded_graphs_are_the_steps_themselves_and_nothing_is_decided_anew(tmp_path, recorded, capsys):
    run = run_of_graphs(tmp_path, [20] * 5 + [33] + [20] * 3)
    found = train(run)
    assert "2 CUDA graphs were captured, one a shape of the batches, in " in capsys.readouterr().out
    plain = do(without_graphs(run, tmp_path / "plain"))
    assert (RecordedGraph.made, RecordedGraph.replays) == (2, 7)
    assert by_step(found, "loss") == pytest.approx(by_step(plain, "loss"), rel=1e-4)
    for name, factor in factors(found).items():
        torch.testing.assert_close(factor, factors(plain)[name], rtol=1e-3, atol=1e-5)


def test_warm_ups_have_the_memory_of_the_graphs(recorded, monkeypatch):
    graphs, threads = StepGraphs(adapted().get_base_model()), []
    grad = torch.autograd.grad

    def recording(outputs, inputs, *args, **kwargs):
        if inputs is graphs.parameters:  # fused layers, too, ask for gradients
            threads.append(torch._C._is_multithreading_enabled())
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", recording)
    for lengths in [(17, 3), (64, 40), (17, 3)]:
        graphs.replay(static_batch(**packed(lengths), longest=70), 1.0)
    used = recorded_graphs.Pool.used
    assert [what for what, *_ in used] == ["warm-up", "capture"] * 2
    assert len({pool for _, pool, _ in used}) == 1
    assert all(stream is used[0][2] for *_, stream in used)
    # a pool takes the allocations of one thread
    assert threads == [False, True] * 2
    graphs.clear()
    graphs.replay(static_batch(**packed((17, 3)), longest=70), 1.0)
    assert used[-1][1] == used[-2][1] != used[0][1]


class Memory:
    """Stands in for what a GPU's memory holds."""


def test_the_eager_step_after_a_failed_capture_has_the_memory_of_the_graphs(tmp_path, monkeypatch, on_the_cpu):
    held, seen, compute = weakref.WeakSet(), [], HeadLoss.compute_loss

    def fails(self, batch, divisor):
        activations = Memory()
        self.captured[0] = Memory()
        held.update((activations, self.captured[0]))
        type(self).replays += 1
        raise torch.OutOfMemoryError("no room for another graph")

    def recording(self, *args, **kwargs):
        seen.append(len(held))
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(WithoutGraphs, "replay", fails)
    monkeypatch.setattr(HeadLoss, "compute_loss", recording)
    do(run_of_graphs(tmp_path, [20] * 4))
    assert (WithoutGraphs.replays, seen) == (1, [0, 0, 0, 0])


def test_the_graphs_memory_is_free_after_training(tmp_path, monkeypatch, recorded):
    made, captured = [], []

    def make(model):
        made.append(StepGraphs(model))
        return made[-1]

    clear = StepGraphs.clear
    monkeypatch.setattr(assembly, "StepGraphs", make)
    monkeypatch.setattr(StepGraphs, "clear", lambda self: captured.append(len(self.captured)) or clear(self))
    do(run_of_graphs(tmp_path, [20] * 4 + [33]))
    assert captured == [0, 2], "before the first capture, and at the end"
    assert not made[0].captured


def test_evaluations_that_do_not_fit_beside_the_graphs_are_without_them(tmp_path, monkeypatch, recorded):
    captured, predict = [], HeadLoss.prediction_step

    def needs_the_memory(self, *args, **kwargs):
        captured.append(len(self.graphs.captured))
        if self.graphs.captured:
            raise torch.OutOfMemoryError("no room beside the graphs")
        return predict(self, *args, **kwargs)

    run = run_of_graphs(tmp_path, [20] * 10, eval_strategy="steps", eval_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(HeadLoss, "prediction_step", needs_the_memory)
        found = do(run)
    plain = do(without_graphs(run, tmp_path / "plain"))
    # the evaluation of step 3 is begun again, those of 6 and 9 fit at once, and so does the one after training
    assert captured[:2] == [1, 0]
    assert not any(captured[1:])
    assert RecordedGraph.made == 4
    losses = [[row["eval_loss"] for row in metrics(folder) if "eval_loss" in row] for folder in (found, plain)]
    assert len(losses[0]) >= 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_capture_right_after_a_dropped_batch_is_of_the_batch_that_is_captured(tmp_path, monkeypatch, recorded):
    compute = HeadLoss.compute_loss

    def poisoned(self, *args, **kwargs):  # of the second step, the last before graphs
        return compute(self, *args, **kwargs) * (math.nan if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(HeadLoss, "compute_loss", poisoned)
    run = run_of_graphs(tmp_path, [20] * 6, on_nonfinite="skip")
    found, plain = do(run), do(without_graphs(run, tmp_path / "plain"))
    assert (RecordedGraph.made, RecordedGraph.replays) == (1, 4)
    norms = by_step(found, "grad_norm")
    assert [norm > 0 for norm in norms] == [True, False, True, True, True, True]
    assert norms == pytest.approx(by_step(plain, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_replayed_step_that_is_not_finite_is_skipped_and_the_next_capture_is_complete(
    tmp_path, monkeypatch, recorded, what
):
    replay = StepGraphs.replay

    def poisoned(self, *args):
        loss, gradients = replay(self, *args)
        if RecordedGraph.replays == 2:  # the fourth step; the fifth is captured
            loss = loss * math.nan if what == "loss" else loss
            gradients[0].fill_(math.inf)
        return loss, gradients

    monkeypatch.setattr(StepGraphs, "replay", poisoned)
    run = run_of_graphs(tmp_path, [20] * 4 + [33] * 2 + [20], on_nonfinite="skip", save_strategy="steps", save_steps=1)
    found = do(run)
    assert (RecordedGraph.made, RecordedGraph.replays) == (2, 5)
    assert [norm > 0 for norm in by_step(found, "grad_norm")] == [True, True, True, False, True, True, True]
    assert same(factors(found, "checkpoint-3"), factors(found, "checkpoint-4"))
    assert not same(factors(found, "checkpoint-4"), factors(found, "checkpoint-5"))
    (line,) = [json.loads(text) for text in found.nonfinite.read_text().splitlines()]
    assert line["step"] == 4
    assert ("rows" in line) == (what == "loss")


def on_the_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class TestOnTheGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("method", list(OPTIONS))
    def test_replays_have_the_gradients_of_eager_steps(self, method):
        model = adapted(method, torch.bfloat16, **BIG).cuda()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lsr_" in name or "kron_" in name or "lora_" in name)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        head = model.get_base_model()
        graphs = StepGraphs(head)
        kinds = [(17, 30, 40, 1, 22), (16,) * 8, (64, 64, 63)]
        for seed in range(9):
            static = on_the_gpu(static_batch(**packed(kinds[seed % 3], seed=seed), longest=70))
            eager = static_loss(head, static) / 7
            expected = torch.autograd.grad(eager, graphs.parameters)
            loss = float(eager.detach())
            del eager  # its nodes belong to this stream, which a capture must not touch
            found, gradients = graphs.replay(static, 7.0)
            assert float(found) == pytest.approx(loss, rel=1e-3)
            for one, other in zip(gradients, expected, strict=True):
                assert float((one - other).norm() / other.norm()) < 5e-3
            with torch.no_grad():  # as an optimizer would
                for parameter, gradient in zip(graphs.parameters, gradients, strict=True):
                    parameter -= 0.01 * gradient
        assert len(graphs.captured) == 3

    def test_a_smaller_batch_has_the_memory_of_the_larger_one(self):
        model = adapted("lora", torch.bfloat16, max_position_embeddings=1024, **BIG).cuda()
        graphs, most = StepGraphs(model.get_base_model()), []
        # what tests before this one left
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        for lengths in [(1000,) * 16, (1000,) * 12, (1000,) * 14]:
            graphs.replay(on_the_gpu(static_batch(**packed(lengths), longest=1000)), 7.0)
            most.append(torch.cuda.max_memory_reserved() - before)
        assert len(graphs.captured) == 3
        # batches, gradients, and what the allocator rounds up
        assert most[2] < 1.2 * most[0], most
        graphs.clear()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before < 0.5 * most[0]

    def test_batches_of_a_step_add_up(self):
        model = adapted("lsr", torch.bfloat16, **BIG).cuda()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dtype == torch.float32 or parameter.requires_grad)
        graphs = StepGraphs(model.get_base_model())
        total = None
        for seed, lengths in enumerate([(17, 30), (64, 2), (17, 29)]):
            static = on_the_gpu(static_batch(**packed(lengths, seed=seed), longest=70))
            _, gradients = graphs.replay(static, 3.0)
            copied = [gradient.clone() for gradient in gradients]
            total = copied if total is None else [a + b for a, b in zip(total, copied, strict=True)]
            graphs.add_to_grads(gradients, accumulates=True)
        torch.testing.assert_close([p.grad for p in graphs.parameters], total)

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_runs_end_where_they_do_without(self, tmp_path, accumulation):
        found = compare_runs(tmp_path, accumulation)
        for name, factor in found["on"].items():
            other = found["off"][name]
            assert float((factor - other).norm() / other.norm()) < 0.05, name

    @pytest.mark.parametrize("handling", ["stop", "skip"])
    def test_a_loss_that_is_not_finite(self, tmp_path, monkeypatch, handling):
        replay, calls = StepGraphs.replay, []

        def poisoned(self, *args):
            loss, gradients = replay(self, *args)
            calls.append(1)
            if len(calls) == 3:
                loss.fill_(math.nan)
                gradients[0].fill_(math.nan)
            return loss, gradients

        monkeypatch.setattr(StepGraphs, "replay", poisoned)
        training = {
            "cuda_graphs": "on",
            "padding_free": True,
            "max_length": None,
            "on_nonfinite": handling,
            "logging_steps": 50,
        }
        save_llama(tmp_path / "model", **BIG)
        run = tiny_run(tmp_path, training=training)
        if handling == "stop":
            with pytest.raises(UserError, match="the loss is nan at step 5"):
                do(run)
        else:
            assert all(factor.isfinite().all() for factor in factors(do(run)).values())
        (line,) = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 5

    @pytest.mark.parametrize("handling", ["stop", "skip"])
    def test_a_gradient_that_is_not_finite(self, tmp_path, monkeypatch, handling):
        replay, calls = StepGraphs.replay, []

        def poisoned(self, *args):
            loss, gradients = replay(self, *args)
            calls.append(1)
            if len(calls) == 3:
                gradients[0].fill_(math.inf)
            return loss, gradients

        monkeypatch.setattr(StepGraphs, "replay", poisoned)
        run = run_of_graphs(tmp_path, [20] * 8, on_nonfinite=handling, logging_steps=50)
        if handling == "stop":
            with pytest.raises(UserError, match="the gradient of step 5 is not finite"):
                do(run)
        else:
            assert all(factor.isfinite().all() for factor in factors(do(run)).values())
        (line,) = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
        assert json.loads(line) == {"step": 5, "gradient_norm": json.loads(line)["gradient_norm"]}

    def test_a_capture_right_after_a_dropped_batch(self, tmp_path, monkeypatch):
        compute = HeadLoss.compute_loss

        def poisoned(self, *args, **kwargs):
            return compute(self, *args, **kwargs) * (math.nan if self.state.global_step == 1 else 1.0)

        monkeypatch.setattr(HeadLoss, "compute_loss", poisoned)
        found = do(run_of_graphs(tmp_path, [20] * 6, on_nonfinite="skip"))
        assert [norm > 0 for norm in by_step(found, "grad_norm")] == [True, False, True, True, True, True]

    def test_deciding_on_a_step_does_not_wait_for_the_gpu(self):
        parameter = torch.nn.Parameter(torch.ones(1000, device="cuda"))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        skipping = SkippingOptimizer(optimizer)
        moved = []
        for scale in (1.0, math.inf, 2.0):
            parameter.grad = torch.full_like(parameter, scale)
            before = parameter.detach().clone()
            torch.cuda.set_sync_debug_mode("error")
            try:
                skipping.decide(torch.nn.utils.clip_grad_norm_([parameter], 1.0))
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            moved.append(bool((parameter != before).any()))
        assert moved == [True, False, True]
        assert float(optimizer.state[parameter]["step"]) == 2


def test_batches_take_the_shapes_of_earlier_ones_where_that_is_a_seventh_more_at_most():
    shapes = Shapes()
    documents = lambda tokens: 100 + -(-(tokens - 1000) // 50)  # noqa: E731
    assert shapes.holding(3328, documents, 1536) == (3328, 256, 1536)
    assert shapes.holding(3072, documents, 1536) == (3328, 256, 1536)
    assert shapes.holding(2816, documents, 1024) == (2816, 256, 1536), "too much more; no fewer documents or places"
    assert shapes.holding(3328, documents, 2048) == (3328, 256, 2048), "more places"
    assert shapes.holding(3584, documents, 1536) == (3584, 256, 2048)
    assert shapes.holding(3500, lambda tokens: 300, 1536) == (3500, 512, 2048), "more documents"
    assert shapes.holding(3328, documents, 1000) == (3328, 256, 1536)
    assert len(shapes.made) == 5


def test_few_graphs_are_captured_of_batches_whose_rows_are_short_and_uneven():
    """128 rows a step, some 3,500 tokens, as of questions with short answers."""
    generator = torch.Generator().manual_seed(0)
    alone, shared, tokens = set(), set(), [0, 0]
    own, held = (PackedCollator(lambda batch: batch, 60, shapes) for shapes in (None, Shapes()))
    for seed in range(100):
        lengths = torch.randint(14, 41, (128,), generator=generator).tolist()
        batch = packed(lengths, seed=seed)
        for place, (collator, found) in enumerate(((own, alone), (held, shared))):
            static = collator(batch)["static"]
            found.add(tuple(value.shape for value in static.values() if isinstance(value, torch.Tensor)))
            tokens[place] += static["input_ids"].shape[1]
    assert (len(shared), len(alone)) == (2, 4)
    assert tokens[1] < 1.05 * tokens[0]
