"""What GRPO's completions take: against what a generation allocates, and how it adds up with a training step."""

import io
import weakref
from dataclasses import replace

import pytest
import torch
import trl
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsr_scale.fused.memory import MARGIN
from lsr_scale.generation.decoder import Decoder
from lsr_scale.planning import fit, plan, render
from lsr_scale.planning.completions import generation_memory, vllm_share
from lsr_scale.planning.stages import CUDA_GIB
from tests.helpers.tiny_models import tiny_llama
from tests.training.test_grpo import grpo_run


class Allocated(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it and live, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _drop(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize(
    ("prompt", "new", "sizes"),
    [
        (480, 32, {"vocab_size": 64}),  # prefill's end is the most
        (16, 48, {"vocab_size": 8192}),  # the logits are
    ],
)
def test_a_generation_allocates_what_is_planned(tmp_path, prompt, new, sizes):
    model = tiny_llama(**sizes).eval()
    options = {"max_prompt_length": prompt, "max_completion_length": new, "per_device_train_batch_size": 32}
    run = grpo_run(tmp_path, model={"dtype": "float32"}, training={**options, "num_generations": 8})
    planned = generation_memory(run, model.config)
    assert planned.rows == 32
    ids = torch.randint(3, 60, (4, prompt))
    known = [*model.parameters(), *model.buffers(), ids]
    decoder = Decoder(model)
    with Allocated() as allocated:
        allocated.known = {tensor.untyped_storage()._cdata for tensor in known}
        decoder.generate(ids, answers=[8] * 4, max_new_tokens=new, temperature=0.7, eos_token_id=[])
    (step,) = decoder.steps.values()
    cache = sum(part.numel() * part.element_size() for layer in step.layers for part in (layer.keys, layer.values))
    assert planned.cache == cache
    assert planned.peak <= allocated.peak
    # not planned: a layer's activations of the prompts, and masks
    assert allocated.peak < 1.15 * planned.peak


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_plan_of_grpo_fits_a_terminal_and_has_every_stage(tmp_path, gpus):
    result = plan(grpo_run(tmp_path), gpus=gpus)
    assert {row.stage for row in result.table} == {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}
    large = replace(result.memory_gib, activations=123.456, workspace=99.994, total=1234.5, loading=99.996)
    shown = io.StringIO()
    Console(width=80, file=shown).print(render(replace(result, memory_gib=large)))
    assert "\u2026" not in shown.getvalue()
    assert all(number in shown.getvalue() for number in (" 123.5 ", " 99.99 ", " 1234 ", " 100.0"))


def test_a_sharded_base_is_whole_while_completions_are_generated(tmp_path):
    result = plan(grpo_run(tmp_path, training={"gradient_accumulation_steps": 512}), gpus=4)
    rows = {row.stage: row.memory_gib for row in result.table if row.checkpointing}
    matrices = result.sharded["all frozen matrices, gathered to generate with"]
    assert rows["zero3"].generation == pytest.approx(rows["zero2"].generation + matrices, abs=2e-4)
    assert sum(result.sharded.values()) == pytest.approx(rows["zero3"].total, abs=1e-3)
    assert rows["zero3"].weights < rows["zero2"].weights


def test_vllm_generates_in_a_share_of_its_own_and_no_base_is_gathered_for_it(tmp_path):
    training = {"gradient_accumulation_steps": 512, "use_vllm": True}
    run = grpo_run(tmp_path, training=training)
    result = plan(run, gpus=4)
    assert {row.memory_gib.generation for row in result.table} == {0}
    assert not any("generate" in part or "completions" in part for part in result.sharded)
    assert vllm_share(run) == trl.GRPOConfig.vllm_gpu_memory_utilization
    (told,) = (line for line in result.warnings if "vLLM" in line)
    assert told.startswith("vLLM takes 30 % of each GPU beside what is counted")
    run.training["vllm_gpu_memory_utilization"] = 0.5
    card = 2 * (result.memory_gib.total + CUDA_GIB) / (1 - MARGIN)
    verdict, smaller = (fit(run, result, size) for size in (card + 0.1, card - 0.1))
    assert f", {card / 2 + 0.05:.1f} vLLM's own" in verdict.in_words()
    assert verdict.nearest is None
    assert smaller.free < 0


def test_the_larger_phase_is_in_the_total(tmp_path):
    few = {"max_prompt_length": 8, "max_completion_length": 56, "per_device_train_batch_size": 4}
    totals = []
    for steps in (1, 512):
        run = grpo_run(tmp_path, training={**few, "gradient_accumulation_steps": steps})
        memory = plan(run).memory_gib
        kept = memory.weights + memory.gradients + memory.optimizer
        phases = memory.activations + memory.workspace, memory.generation
        assert memory.total == pytest.approx(kept + max(phases), abs=2e-4)
        totals.append((memory.total, phases[1] > phases[0]))
    assert [larger for _, larger in totals] == [False, True]
    assert totals[1][0] > totals[0][0] + 1e-3
    assert plan(run.model_copy(update={"training": {**run.training, "gradient_accumulation_steps": 1}})).warnings == []


def test_what_fits_is_whole_groups(tmp_path):
    options = {"max_prompt_length": 512, "max_completion_length": 512, "per_device_train_batch_size": 64}
    run = grpo_run(tmp_path, training={**options, "num_generations": 8, "fused": "off"})
    result = plan(run)
    smaller = run.model_copy(
        update={"training": {**run.training, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}}
    )
    card = (plan(smaller).memory_gib.total + CUDA_GIB) / (1 - MARGIN) + 0.01
    verdict = fit(run, result, card)
    assert verdict.free < 0
    nearest = verdict.nearest
    assert nearest is not None
    assert nearest.startswith("training.per_device_train_batch_size: 1, training.gradient_accumulation_steps: ")
