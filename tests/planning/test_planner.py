"""What `plan` says: counts as published, sizes as measured, and every mistake before anything is loaded."""

import dataclasses
import functools
import importlib
import io
import json
import socket
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.models import MODELS
from lsr_scale.cli import main
from lsr_scale.config import run_from_dict
from lsr_scale.errors import UserError
from lsr_scale.model import load_config
from lsr_scale.planning import fit, memory, plan, planner, render
from tests.helpers.tiny_runs import save_llama

PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")
MISTRAL = "mistralai/Mistral-7B-v0.1"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LSR = {"method": "lsr", "rank": 16, "separation_rank": 16, "target_modules": SEVEN}
KRON = {"method": "kron_lora", "rank": 8, "left_in": 2, "left_out": 16, "dropout": 0.0, "target_modules": SEVEN}


def run(model, adapter, training=None, **section):
    return run_from_dict(
        {
            "model": {"name": model, **section},
            "adapter": adapter,
            "data": {"train": ["arc_easy"]},
            "training": training or {},
        }
    )


@functools.cache
def _counted(values: str):
    return planner.count(run_from_dict(json.loads(values)))


def counted(run):
    """Return what a run takes, counted once for all numbers of GPUs and engines: a step on fake tensors takes seconds.

    All of a run is in its values.
    """
    values = run.model_dump()
    of_engine = values.pop("deepspeed")
    found = _counted(json.dumps(values, sort_keys=True))
    return dataclasses.replace(found, run=run_from_dict({**found.run.model_dump(), "deepspeed": of_engine}))


def planned(run, gpus=1):
    """Return the plan of a run that may have been counted before."""
    return counted(run).on(gpus)


@pytest.fixture
def plans_made_once(monkeypatch):
    """Have `fit` take what was counted before."""
    monkeypatch.setattr(importlib.import_module("lsr_scale.planning.fit"), "count", counted)


@pytest.fixture
def counts_only(monkeypatch):
    """Leave out the step on fake tensors, which counts need nothing of."""
    step = memory.StepMemory(0, 0)
    monkeypatch.setattr(memory, "trace_step", lambda *args, **kwargs: {False: step, True: step})


@pytest.fixture
def two_layers(monkeypatch):
    """Give every model two layers: what is said of one is the same at any depth, and is counted in less time.

    `planned` would keep such a count.
    """

    def shallow(*args):
        config = load_config(*args)
        config.num_hidden_layers = 2
        return config

    for module in ("lsr_scale.planning.planner", "lsr_scale.training.compute"):
        monkeypatch.setattr(importlib.import_module(module), "load_config", shallow)


@pytest.mark.usefixtures("counts_only")
def test_what_a_run_takes_is_counted_for_any_number_of_gpus_and_any_engine(tmp_path):
    small = run(str(save_llama(tmp_path / "model")), {"method": "lsr", "rank": 4, "separation_rank": 2})
    for engine, gpus in (("zero2", 1), ("zero1", 2), ("zero3_offload", 4)):
        of_engine = run_from_dict({**small.model_dump(), "deepspeed": {"config": engine}})
        assert counted(of_engine) == planner.count(of_engine)
        assert planned(of_engine, gpus) == plan(of_engine, gpus)
        assert counted(of_engine).memory is counted(small).memory
        assert planned(of_engine, gpus).gpus == gpus
        assert f"1/{gpus} of its master copy and moments" in planned(of_engine, gpus).sharded


@pytest.mark.parametrize(
    ("model", "adapter", "trainable", "lora8"),
    [
        (MISTRAL, LSR, 4_096_000, 20_971_520),
        ("meta-llama/Llama-2-7b-hf", LSR, 4_198_400, 19_988_480),
        ("meta-llama/Meta-Llama-3-8B", LSR, 4_096_000, 20_971_520),
        (MISTRAL, KRON, 5_676_032, 20_971_520),
        (MISTRAL, {"method": "lora", "rank": 8, "target_modules": SEVEN}, 20_971_520, 20_971_520),
        ("builtin:smollm2-135m-instruct", {**LSR, "rank": 4}, 698_880, 2_442_240),
        ("builtin:smollm2-135m-instruct", KRON, 683_520, 2_442_240),
    ],
)
@pytest.mark.usefixtures("counts_only")
def test_trainable_parameters_are_the_published_ones(model, adapter, trainable, lora8):
    result = plan(run(model, adapter))
    assert result.trainable_parameters == result.adapter_parameters == trainable
    assert result.lora8_parameters == lora8
    assert result.share_of_lora8 == trainable / lora8
    assert result.share_of_lora16 == trainable / (2 * lora8)


@pytest.mark.parametrize(
    ("model", "adapter", "adapter_parameters", "head"),
    [
        (
            "FacebookAI/roberta-base",
            {"method": "lsr", "rank": 4, "separation_rank": 16, "target_modules": ["query", "value"]},
            86_016,
            768 * 768 + 768 + 2 * 768 + 2,
        ),
        (
            "distilbert-base-uncased",
            {
                **KRON,
                "left_out": 4,
                "target_modules": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
            },
            249_120,
            768 * 768 + 768 + 2 * 768 + 2,
        ),
    ],
)
@pytest.mark.usefixtures("counts_only")
def test_a_classifiers_head_trains_too_and_is_counted_apart(model, adapter, adapter_parameters, head):
    result = plan(run(model, adapter, task="seq_cls", num_labels=2))
    assert result.adapter_parameters == adapter_parameters
    assert result.trainable_parameters == adapter_parameters + head


# Peaks of one training step (torch.cuda.max_memory_allocated, GiB) on one H200: torch 2.11, transformers 5.17, TRL
# 1.15, bitsandbytes 0.50.2, DeepSpeed 0.19.8, AdamW, random weights, a few padded positions where rows are several.
MEASURED = [
    (LSR, {}, 4, 2048, {("zero0", True): 8.019, ("zero0", False): 53.759, ("zero1", True): 8.083,
                        ("zero2", True): 8.083, ("zero3", True): 8.098}),
    (LSR, {}, 1, 8192, {("zero0", True): 8.163, ("zero0", False): 56.762}),
    (LSR, {}, 1, 512, {("zero0", True): 4.309, ("zero0", False): 6.981}),
    (LSR, {"quantization": "int8"}, 4, 2048, {("zero0", True): 11.232, ("zero0", False): 56.909}),
    (LSR, {"quantization": "none"}, 4, 2048, {("zero0", True): 17.665, ("zero0", False): 63.404}),
    (KRON, {}, 4, 2048, {("zero0", True): 8.043, ("zero0", False): 53.783}),
    ({"method": "lora", "rank": 16, "target_modules": SEVEN}, {}, 4, 2048,
     {("zero0", True): 9.677, ("zero0", False): 81.346}),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "section", "rows", "length", "peaks"), MEASURED)
def test_memory_is_within_five_percent_of_measured_peaks(adapter, section, rows, length, peaks):
    training = {"per_device_train_batch_size": rows, "max_length": length, "fused": "off"}
    result = planned(run(MISTRAL, adapter, training, **section))
    totals = {(row.stage, row.checkpointing): row.memory_gib.total for row in result.table}
    for key, peak in peaks.items():
        assert totals[key] == pytest.approx(peak, rel=0.05), key
    assert result.memory_gib.total == totals["zero0", True]


THROUGHPUT = Path(__file__).parents[2] / "benchmarks/results/throughput"
LORA16 = {"method": "lora", "rank": 16, "target_modules": SEVEN}


ADAPTERS = {"lsr": LSR, "kron_lora": KRON, "lora": LORA16}


def eager_rows(path):
    """The rows whose peaks `plan` foresees."""
    rows = json.loads(path.read_text())["rows"]
    return [
        row
        for row in rows
        if row["provider"] in ADAPTERS and row["status"] == "ok" and row["checkpointing"] in ("none", "full")
    ]


COMMITTED = [path for path in sorted(THROUGHPUT.glob("*.json")) if eager_rows(path)]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_fused_memory_is_within_five_percent_of_every_committed_measurement(path):
    peaks: dict[tuple, dict[bool, float]] = {}
    for row in eager_rows(path):
        key = row["provider"], row["model"], row["base"], row["tokens"], row["seq_len"]
        peaks.setdefault(key, {})[row["checkpointing"] == "full"] = row["peak_memory_gib"]
    for (method, model, base, tokens, length), measured in peaks.items():
        training = {"per_device_train_batch_size": tokens // length, "max_length": length}
        result = planned(
            run(MODELS[model], ADAPTERS[method], training, quantization="none" if base == "bf16" else base)
        )
        assert result.fused
        totals = {r.checkpointing: r.memory_gib.total for r in result.table if r.stage == "zero0"}
        for recomputed, peak in measured.items():
            assert totals[recomputed] == pytest.approx(peak, rel=0.05), (method, model, tokens, length, recomputed)


HELD = [path for path in sorted(THROUGHPUT.glob("*.json")) if '"lsr_held"' in path.read_text()]


@pytest.mark.parametrize("path", HELD, ids=lambda path: path.stem)
def test_weights_that_are_kept_dequantized_are_counted(path):
    of_file = json.loads(path.read_text())["rows"]
    (row,) = (row for row in of_file if (row["provider"], row["checkpointing"]) == ("lsr_held", "none"))
    training = {"per_device_train_batch_size": row["tokens"] // row["seq_len"], "max_length": row["seq_len"]}
    found = planned(run(MODELS[row["model"]], LSR, {**training, "memory": "speed"}, quantization=row["base"]))
    assert found.memory_gib.total == pytest.approx(row["peak_memory_gib"], rel=0.05)


@pytest.mark.parametrize("compute", ["bf16", "fp8", "int8"])
@pytest.mark.usefixtures("two_layers")
def test_only_who_spends_memory_on_speed_keeps_weights_and_none_that_are_gathered(compute):
    training = {"per_device_train_batch_size": 1, "max_length": 512, "compute": compute}
    first, kept = (plan(run(MISTRAL, LSR, {**training, "memory": memory})) for memory in ("save", "speed"))
    of_layer = 6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336
    assert kept.memory_gib.dequantized == pytest.approx(2 * of_layer * 2 / 2**30, rel=0.05), "codes both ways, or bf16"
    assert first.memory_gib.dequantized == 0
    for before, row in zip(first.table, kept.table, strict=True):
        further = 0 if row.checkpointing or "zero3" in row.stage else kept.memory_gib.dequantized
        assert row.memory_gib.total - before.memory_gib.total == pytest.approx(further, abs=1e-3), row.stage
    shown = io.StringIO()
    Console(width=120, file=shown).print(render(kept))
    assert "training.memory: speed: weights has those that layers keep dequantized, too" in shown.getvalue()


@pytest.mark.usefixtures("two_layers")
def test_a_step_is_traced_once_for_all_runs_that_have_it(monkeypatch):
    traced = []

    def trace_step(*args, **kwargs):
        traced.append(args)
        return {on: memory.StepMemory(len(traced), 2 * len(traced)) for on in (False, True)}

    monkeypatch.setattr(memory, "trace_step", trace_step)
    training = {"per_device_train_batch_size": 1, "max_length": 512}
    runs = [{}, {"memory": "speed"}, {"learning_rate": 1e-3}, {"seed": 3}]
    runs += [{"max_length": 256}, {"per_device_train_batch_size": 2}, {"fused": "off"}, {"compute": "int8"}]
    counts = [planner.count(run(MISTRAL, LSR, {**training, **more})) for more in runs]
    saved = [found.memory.steps[False].saved for found in counts]
    assert saved == [1, 1, 1, 1, 2, 3, 4, 5]
    assert planner.count(run(MISTRAL, {**LSR, "rank": 4}, training)).memory.steps[False].saved == 6
    assert planner.count(run(MISTRAL, LSR, training, quantization="int8")).memory.steps[False].saved == 7
    assert len(traced) == 7


@pytest.mark.usefixtures("two_layers")
def test_what_cannot_run_fused_is_planned_unfused():
    result = plan(run(MISTRAL, {**KRON, "dropout": 0.1}, {"max_length": 512, "per_device_train_batch_size": 1}))
    assert not result.fused


def test_the_stages_divide_what_they_say(monkeypatch):
    step = memory.StepMemory(2**30, 2 * 2**30)
    monkeypatch.setattr(memory, "trace_step", lambda *args, **kwargs: {False: step, True: step})
    configured = run(MISTRAL, {"method": "lora", "rank": 64, "target_modules": SEVEN})
    of_all = planner.count(configured)
    one, four = of_all.on(1), of_all.on(4)
    rows = {row.stage: row.memory_gib for row in four.table if row.checkpointing}
    trained = 4 * one.trainable_parameters / 2**30
    assert one.memory_gib.optimizer == pytest.approx(2 * trained, abs=1e-3)
    assert rows["zero0"].gradients == rows["zero1"].gradients == pytest.approx(trained, abs=1e-3)
    assert rows["zero1"].optimizer == rows["zero2"].optimizer == pytest.approx(3 * trained / 4, abs=1e-3)
    assert rows["zero2"].gradients == rows["zero1"].gradients
    assert rows["zero2"].weights == one.memory_gib.weights
    assert trained < rows["zero3"].weights < 0.4 * one.memory_gib.weights + trained
    assert rows["zero3_offload"].weights < rows["zero3"].weights
    # a layer in four bits, and the head, which is larger
    gathered = ((2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) / 2 + 2 * 32000 * 4096) / 2**30
    assert rows["zero3"].workspace == pytest.approx(rows["zero2"].workspace + gathered, abs=2e-4)
    assert four.memory_gib == rows["zero2"]  # the default of a run
    for memory_gib in rows.values():
        parts = [getattr(memory_gib, name) for name in PARTS]
        assert memory_gib.total == pytest.approx(sum(parts), abs=1e-3)
    assert sum(four.sharded.values()) == pytest.approx(rows["zero3"].total, abs=1e-3)
    assert rows["zero3"].loading < 0.5 * rows["zero2"].loading
    assert one.frozen_bytes / 2**30 < rows["zero2"].loading < rows["zero2"].weights + 0.3


@pytest.mark.usefixtures("counts_only")
def test_a_module_that_trains_is_whole_on_every_gpu_under_stage_3(tmp_path):
    name = str(save_llama(tmp_path / "model"))
    adapter = {"method": "lora", "rank": 2, "target_modules": ["q_proj"]}
    plain, trained = (planner.count(run(name, {**adapter, **more})) for more in ({}, {"modules_to_save": ["lm_head"]}))
    numel = 304 * 48
    assert plain.memory.frozen.head == 2 * numel
    assert trained.memory.frozen.head == 0
    assert trained.memory.frozen.total == plain.memory.frozen.total
    assert trained.memory.trainable == plain.memory.trainable + 4 * numel
    assert plain.memory.frozen.matrices - trained.memory.frozen.matrices == 2 * numel
    assert trained.memory.frozen.layers == plain.memory.frozen.layers


@pytest.mark.usefixtures("counts_only")
def test_what_is_offloaded_is_told_of_the_machine():
    planned_run = plan(run(MISTRAL, LSR), gpus=4)
    rows = {row.stage: row.memory_gib for row in planned_run.table if row.checkpointing}
    assert [rows[stage].host for stage in ("zero0", "zero2", "zero3")] == [0, 0, 0]
    offloaded = rows["zero3_offload"].host
    assert offloaded == planned_run.sharded["1/4 of the frozen matrices' 3.74"]
    assert rows["zero3"].weights - rows["zero3_offload"].weights == pytest.approx(offloaded, abs=2e-4)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(planned_run))
    assert f"{4 * offloaded:.2f} in all" in console.export_text()


GRPO = {"method": "grpo", "reward": ["exact_answer"]}


@pytest.mark.usefixtures("counts_only")
@pytest.mark.parametrize(
    ("adapter", "training", "stages"),
    [
        ("lsr", {}, "zero0 zero1 zero2 zero3 zero3_offload"),
        ("lsr", GRPO, "zero0 zero1 zero2 zero3 zero3_offload"),
        ("tinylora", {}, "zero0 zero1 zero2"),
        ("lsr", {"optim": "lora_rite"}, "zero0"),
        ("lora", {"optim": "lora_pro"}, "zero0"),
        ("lsr", {"optim": "adamw_bnb_8bit"}, "zero0"),
        ("lsr", {"condition_guard": "rescale"}, "zero0"),
    ],
)
def test_stages_that_would_be_refused_are_not_planned(tmp_path, adapter, training, stages):
    small = run_from_dict(
        {
            "model": {"name": str(save_llama(tmp_path / "model")), "quantization": "none"},
            "adapter": {"method": adapter},
            "data": {"train": ["arc_easy"]},
            "training": training,
            "deepspeed": {"config": "zero0"},
        }
    )
    result = plan(small, gpus=2)
    assert list(dict.fromkeys(row.stage for row in result.table)) == stages.split()
    assert bool(result.sharded) == ("zero3" in stages)
    assert not any("refused" in line for line in result.warnings)
    shown = io.StringIO()
    Console(width=80, file=shown).print(render(result))
    assert ("zero3" in shown.getvalue()) == ("zero3" in stages)


@pytest.mark.usefixtures("counts_only")
def test_a_run_whose_own_stage_is_refused_is_told(tmp_path):
    small = run(str(save_llama(tmp_path / "model")), {"method": "lsr"}, {"optim": "lora_rite"})
    small = run_from_dict({**small.model_dump(), "deepspeed": {"config": "zero2"}})
    words = "training.optim: lora_rite steps both factors of a pair together"
    of_all = planner.count(small)
    assert any(line.startswith(f"the run would be refused on 2 GPUs: {words}") for line in of_all.on(2).warnings)
    assert not any("refused" in line for line in of_all.on(1).warnings), "one process runs without DeepSpeed"


@pytest.mark.usefixtures("two_layers")
def test_packing_and_padding_and_windows_decide_the_mask(monkeypatch):
    seen = []

    def record(model, batch, task, fuse=None):
        seen.append(batch)
        return {on: memory.StepMemory(0, 0) for on in (False, True)}

    monkeypatch.setattr(memory, "trace_step", record)
    for model, training, section in (
        ("meta-llama/Llama-2-7b-hf", {"per_device_train_batch_size": 1, "max_length": 8192}, {}),
        (MISTRAL, {"per_device_train_batch_size": 1, "max_length": 8192}, {}),  # its window is 4,096
        (MISTRAL, {"per_device_train_batch_size": 4, "max_length": 512}, {}),
        (MISTRAL, {"per_device_train_batch_size": 4, "max_length": 512, "packing": True}, {}),
        (MISTRAL, {"per_device_train_batch_size": 4, "max_length": 512}, {"attention": "flash_attention_2"}),
    ):
        plan(run(model, LSR, training, **section))
    assert seen == [
        memory.Batch(1, 8192, False),
        memory.Batch(1, 8192, True),
        memory.Batch(4, 512, True),
        memory.Batch(1, 2048, True),
        memory.Batch(4, 512, False),
    ]


@pytest.mark.usefixtures("counts_only")
def test_a_warning_names_sides_larger_than_their_dense_form_once_per_shape():
    adapter = {**LSR, "rank": 4, "separation_rank": 28, "target_modules": ["query", "value"]}
    result = plan(run("FacebookAI/roberta-base", adapter, task="seq_cls", num_labels=2))
    assert result.warnings
    assert all("and 23 more of that shape" in line and "attention.self.query" in line for line in result.warnings)
    assert (
        plan(run("FacebookAI/roberta-base", {**adapter, "separation_rank": 16}, task="seq_cls", num_labels=2)).warnings
        == []
    )


@pytest.mark.usefixtures("counts_only", "two_layers")
def test_a_warning_names_the_length_that_rows_are_supposed_to_have():
    (line,) = plan(run(MISTRAL, LSR, {"max_length": None})).warnings
    assert line.startswith("training.max_length is null: activations and workspace are of rows of 1,024 tokens")


@pytest.mark.usefixtures("counts_only", "two_layers")
def test_a_warning_names_an_optimizer_that_is_counted_as_adamw():
    assert plan(run(MISTRAL, LSR)).warnings == []
    (line,) = plan(run(MISTRAL, LSR, {"optim": "adamw_bnb_8bit"})).warnings
    assert "adamw_bnb_8bit" in line


@pytest.mark.usefixtures("counts_only")
def test_a_plan_counts_the_state_of_optimizers_of_pairs_and_says_what_a_start_costs():
    rite, pro = (
        plan(run(MISTRAL, {**LSR, **more}, {"optim": name}))
        for name, more in (("lora_rite", {}), ("lora_pro", {"init": "gradient"}))
    )
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert pro.memory_gib.optimizer == pytest.approx(8 * weights / 2**30, rel=1e-4)
    assert 0 < rite.memory_gib.optimizer < pro.memory_gib.optimizer / 50
    assert rite.warnings == []
    (line,) = pro.warnings
    assert line.startswith("adapter.init: gradient runs 64 rows forward and backward 4 times before the first step")
    assert "tokens or one longer row at once" in line
    assert "with up to 7." in line


@pytest.mark.usefixtures("counts_only")
def test_a_plan_needs_no_network_and_is_json_and_a_page(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    result = plan(run(MISTRAL, LSR), gpus=2)
    document = json.loads(json.dumps(dataclasses.asdict(result)))
    assert document["trainable_parameters"] == 4_096_000
    assert document["base_parameters"] == 7_241_732_096
    assert document["adapter_bytes"] > 4 * 4_096_000
    assert set(document["memory_gib"]) == {*PARTS, "generation", "total", "loading", "dequantized", "host"}
    assert [row["stage"] for row in document["table"]][::2] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(result))
    page = console.export_text()
    assert "4,096,000 parameters" in page
    assert "of rank 8 (20,971,520)" in page
    assert "one of 2 GPUs" in page
    narrow = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    narrow.print(render(result))
    assert "…" not in narrow.export_text(), "no column is cut on a terminal's 80"


@pytest.mark.parametrize(
    ("model", "adapter", "message"),
    [
        (MISTRAL, {**LSR, "target_modules": ["q_projj"]}, r"did you mean .*q_proj"),
        ("builtin:smollm2-135m-instruct", {**LSR, "rank": 512}, "larger than the smaller dimension"),
        ("mistralai/Mistral-7B-v9", LSR, "hub cannot be reached"),
        ("FacebookAI/roberta-base", {**LSR, "target_modules": ["query"]}, "is an encoder"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_loaded(model, adapter, message):
    with pytest.raises(UserError, match=message):
        plan(run(model, adapter))


@pytest.mark.usefixtures("plans_made_once")
def test_whether_a_run_fits_names_what_is_free_or_what_would_fit():
    small = run(MISTRAL, LSR, {"per_device_train_batch_size": 4, "max_length": 2048})
    result = planned(small)
    roomy = fit(small, result, 80.0)
    assert roomy.nearest is None
    taken = max(result.memory_gib.total, result.memory_gib.loading)
    assert roomy.free == pytest.approx(80 - roomy.reserve - taken, abs=0.02)
    assert "fits on a card of 80 GiB" in roomy.in_words()
    least = taken / 0.92 + 0.5 / 0.92  # 8 % and half a GiB are kept back
    assert fit(small, result, least + 0.1).nearest is None
    tight = fit(small, result, least - 0.1)
    assert tight.free < 0
    assert tight.nearest is not None
    assert "does not fit" in tight.in_words()
    single = fit(small, result, 7.5)
    assert single.nearest == "training.per_device_train_batch_size: 1, training.memory: save"
    assert fit(small, result, 1.0).nearest == "nothing on up to 8 GPUs"


@pytest.mark.usefixtures("plans_made_once")
def test_a_proposal_fits_when_it_is_followed():
    large = run("meta-llama/Llama-2-70b-hf", LSR, {"per_device_train_batch_size": 1, "max_length": 512})
    alone = fit(large, planned(large), 40.0)
    of_host = next(row.memory_gib.host for row in planned(large).table if row.stage == "zero3_offload")
    words = f"deepspeed.config: zero3_offload, training.memory: save, {of_host:.1f} GiB of the machine's own memory"
    assert alone.nearest == words
    values = large.model_dump()
    values["deepspeed"]["config"] = "zero3"
    sharded = run_from_dict(values)
    assert fit(sharded, planned(sharded, 4), 24.0).nearest is None


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_8_bits_take_codes_of_the_weights_and_of_activations_while_they_are_used(compute):
    training = {"per_device_train_batch_size": 4, "max_length": 2048}
    bf16 = plan(run(MISTRAL, LSR, training))
    found = plan(run(MISTRAL, LSR, {**training, "compute": compute}))
    kept = plan(run(MISTRAL, LSR, {**training, "compute": compute, "keep_in_bf16": ["qkv", "o", "gate_up", "down"]}))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(found.memory_gib, name) == getattr(bf16.memory_gib, name)
    scales = {"fp8": 0, "int8": 2 * (6144 + 4096 + 28672 + 4096) * 4 / 2**30}[compute]  # of rows, held by the layers
    assert found.memory_gib.activations - bf16.memory_gib.activations == pytest.approx(scales, abs=1e-4)
    assert found.memory_gib.workspace < bf16.memory_gib.workspace, "a weight's code is one byte"
    assert kept.memory_gib == bf16.memory_gib
    assert (found.compute, found.fused, found.warnings) == (compute, True, [])
    shown = io.StringIO()
    Console(width=120, file=shown).print(render(found))
    assert f"fused, as on a GPU, products with the base in {compute}" in shown.getvalue()


@pytest.mark.parametrize("compute", ["fp8", "int8"])
@pytest.mark.usefixtures("counts_only", "two_layers")
def test_a_plan_says_where_8_bits_would_be_refused(compute):
    adapter = {**LSR, "method": "krona"}
    adapter = {name: adapter[name] for name in ("method", "target_modules")}
    result = plan(run("HuggingFaceTB/SmolLM2-135M", adapter, {"compute": compute}))
    assert any(f"compute: {compute} is for fused" in line and "would be refused" in line for line in result.warnings)
    assert result.compute == "bf16"
    assert not any("refused" in line for line in plan(run("HuggingFaceTB/SmolLM2-135M", adapter)).warnings)
    training = {"compute": compute, "keep_in_bf16": ["99.down"]}
    result = plan(run(MISTRAL, LSR, training))
    assert any("refused" in line and "keep_in_bf16: 99.down: " in line for line in result.warnings)
    assert plan(run(MISTRAL, LSR, {**training, "compute": "bf16"})).warnings == [], "as training, which ignores it"


@pytest.mark.usefixtures("counts_only")
def test_a_plan_says_where_no_linear_has_the_size_for_8_bits(tmp_path):
    name = str(save_llama(tmp_path / "narrow", hidden_size=48, intermediate_size=80))
    of_computes = {compute: plan(run(name, LSR, {"compute": compute})).warnings for compute in ("bf16", "fp8", "int8")}
    (line,) = set(of_computes["int8"]) - set(of_computes["bf16"])
    assert "would be refused" in line
    assert "48 inputs, no multiple of 64" in line
    assert of_computes["fp8"] == of_computes["bf16"]


@pytest.mark.usefixtures("counts_only", "two_layers")
def test_a_plan_in_8_bits_with_another_attention_is_not_said_to_be_refused():
    found = plan(run(MISTRAL, LSR, {"compute": "fp8"}, attention="flash_attention_2"))
    assert (found.warnings, found.compute) == ([], "fp8")


@pytest.mark.parametrize("text", ["0", "-1", "x", "inf", "nan"])
def test_a_card_has_a_size(text, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "configs/mistral_lsr.yaml", "--card-gib", text])
    assert "expected a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "gpus", "card_gib", "fits"),
    [
        ("meta-llama/Llama-2-70b-hf", 2, 24, True),
        ("meta-llama/Llama-2-70b-hf", 4, 16, True),
        # a head of 128,256 words is all-gathered
        ("meta-llama/Llama-3.1-70B", 2, 24, False),
        ("meta-llama/Llama-3.1-70B", 4, 16, False),
    ],
)
def test_the_sum_says_whether_a_70b_in_four_bits_fits(model, gpus, card_gib, fits):
    result = planned(run(model, LSR, {"per_device_train_batch_size": 1, "max_length": 512}), gpus)
    zero3 = next(row.memory_gib for row in result.table if row.stage == "zero3" and row.checkpointing)
    assert sum(result.sharded.values()) == pytest.approx(zero3.total, abs=2e-3)
    assert zero3.loading < card_gib - 1, "sharded from the first weight on, it loads on each of these"
    assert (zero3.total < card_gib - 1) == fits
    shown = io.StringIO()
    Console(width=120, file=shown).print(render(result))
    text = shown.getvalue()
    assert f"zero3 on one of {gpus} GPUs" in text
    for name, part in result.sharded.items():
        assert f"{part:.2f}  {name}" in text
