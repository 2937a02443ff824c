"""What a run will take: trainable parameters, adapter size, and one GPU's memory.

Nothing is downloaded, allocated or run on a GPU: the model is built on the meta device, the adapter is injected into it
for real, and one step is run on fake tensors (`memory.trace_step`).

Exact: parameter counts, the adapter's file, the bytes of the frozen base and of the adapter, its gradients and AdamW's
two moments (float32). Estimated: activations and workspace (every row at the full `max_length`, every position
supervised), DeepSpeed's buffers, and what is all-gathered under ZeRO-3. Sizes are what torch's allocator counts
(`torch.cuda.max_memory_allocated`); nvidia-smi shows about 0.5 GiB more for CUDA itself. Against peaks measured on an
H200 (tests/planning/test_planner.py) the totals are within 5 %; ZeRO-3 on several GPUs is not among the measured.
"""

import dataclasses
import json
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lsr_scale import adapters
from lsr_scale.adapters.coverage import coverage_notes
from lsr_scale.adapters.inject import inject
from lsr_scale.adapters.peft import AdapterLinear, in_out_features
from lsr_scale.config import RunConfig
from lsr_scale.config.conflicts import conflicts
from lsr_scale.config.deepspeed import SHIPPED
from lsr_scale.config.methods import METHODS, low_rate_note
from lsr_scale.config.training import checkpoints_layers, longest_row
from lsr_scale.config.yaml_text import dotted
from lsr_scale.data.model_limits import num_positions
from lsr_scale.errors import UserError
from lsr_scale.fused import FuseReport, fuse, keep_in_bf16
from lsr_scale.fused.fallback import DECODER_LAYERS
from lsr_scale.fused.layer_state import Recompute
from lsr_scale.model import (
    DTYPES,
    check_quantization,
    chosen_dtype,
    head_modules,
    load_config,
    local_device,
    meta_model,
    skipped_modules,
)
from lsr_scale.planning import memory
from lsr_scale.planning.completions import generation_memory, vllm_share
from lsr_scale.planning.sizes import adapter_file_bytes, frozen_bytes, quantized_layers
from lsr_scale.planning.stages import GIB, Memory, RunMemory
from lsr_scale.training.arguments import check_stage
from lsr_scale.training.gradient_start import planned_start
from lsr_scale.training.optimizers.state_bytes import pair_state_bytes

# tokens in a row if max_length is null
UNKNOWN_LENGTH = 1024


@dataclass(frozen=True)
class Row:
    """Memory under one DeepSpeed stage, with or without checkpointing."""

    stage: str
    checkpointing: bool
    memory_gib: Memory


@dataclass(frozen=True)
class Plan:
    """See the module's docstring for what is exact and what is not.

    `dtype` is the run's; model.dtype: auto is what it is on a GPU.
    `compute` is what it was counted in: the run's, or "bf16" where 8 bits would be refused. Which groups
    training.keep_in_bf16: auto would keep in bfloat16 is not known.
    `traced` is false where activations could not be counted: they come on top of every figure of memory.
    `sharded` is one GPU's memory under zero3 with checkpointing, in GiB by what it consists of.
    """

    model: str
    architecture: str
    quantization: str
    dtype: str
    method: str
    gpus: int
    tokens_per_gpu: int
    trainable_parameters: int
    adapter_parameters: int
    base_parameters: int
    adapted_modules: int
    lora8_parameters: int
    lora16_parameters: int
    share_of_lora8: float
    share_of_lora16: float
    adapter_bytes: int
    frozen_bytes: int
    fused: bool
    compute: str
    traced: bool
    memory_gib: Memory
    table: list[Row]
    sharded: dict[str, float]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Counted:
    """What a run takes however many GPUs there are, and how its memory is divided among them.

    `run` is the run with its labels and its dtype, `memory` its memory on one GPU, `values` the fields of a `Plan`
    that no number of GPUs changes, `warnings` likewise. It does not depend on `run.deepspeed`.
    """

    run: RunConfig
    text_config: Any
    memory: RunMemory
    values: dict[str, Any]
    warnings: list[str]

    def on(self, gpus: int) -> Plan:
        """Return the plan of the run on each of `gpus` GPUs."""
        decodes = self.run.training["method"] == "grpo" and not vllm_share(self.run)
        generation = generation_memory(self.run, self.text_config, gpus).peak if decodes else 0
        parts = replace(self.memory, gpus=gpus, generation=generation)
        stages = {**SHIPPED, "run": self.run.deepspeed.config or {}}
        keeps_weights = self.run.training["memory"] == "speed"
        allowed = _stages(self.run)
        refusal = _refused(self.run, stages["run"]) if gpus > 1 and stages["run"] else None
        return Plan(
            **self.values,
            gpus=gpus,
            # one process runs without DeepSpeed
            memory_gib=parts.under(
                stages["run"] if gpus > 1 else {}, checkpoints_layers(self.run.training), keeps_weights
            ),
            table=[
                # who recomputes has memory: save, and keeps no weights
                Row(stage, recomputes, parts.under(stages[stage], recomputes, keeps_weights and not recomputes))
                for stage in allowed
                for recomputes in (True, False)
            ],
            sharded={name: round(part / GIB, 4) for name, part in parts.sharded(SHIPPED["zero3"], True).items()}
            if "zero3" in allowed
            else {},
            warnings=[*self.warnings, *([f"the run would be refused on {gpus} GPUs: {refusal}"] if refusal else [])],
        )


def _stages(run: RunConfig) -> list[str]:
    """Return the shipped DeepSpeed configurations that a run can have."""
    return [stage for stage, content in SHIPPED.items() if not _refused(run, content)]


def _refused(run: RunConfig, content: dict[str, Any]) -> str | None:
    """Return why processes with a DeepSpeed configuration would refuse a run, None where they do not."""
    other = run.model_copy(update={"deepspeed": run.deepspeed.model_copy(update={"config": content})})
    own = list(conflicts(run))
    if of_stage := [problem for problem in conflicts(other) if problem not in own]:
        return f"{dotted(of_stage[0].path)}: {of_stage[0].text}"
    try:
        check_stage(other)
    except UserError as error:
        return str(error)
    return None


def plan(run: RunConfig, gpus: int = 1, trace: bool = True) -> Plan:
    """Return what a run takes on each of `gpus` GPUs.

    Args:
        run: The run.
        gpus: How many.
        trace: Count activations and workspace, which takes seconds; without, the plan is as where they cannot be.

    Raises:
        UserError: for an unknown model, a target that matches nothing, a rank or split that does not fit, or a
            classifier's rows that cannot be read where the run does not say how many labels there are.
    """
    return count(run, trace).on(gpus)


def count(run: RunConfig, trace: bool = True) -> Counted:
    """Return what a run takes, to be planned on any number of GPUs; arguments and errors are `plan`'s."""
    if run.model.task == "seq_cls":
        from lsr_scale.training.run_labels import with_labels  # imports datasets

        run = with_labels(run)
    if run.model.dtype == "auto":
        dtype = chosen_dtype("auto", local_device()) if torch.cuda.is_available() else "bfloat16"  # as on a GPU
        run = run.with_model(dtype=dtype)
    section, training = run.model, run.training
    config = load_config(section.name, section.revision)
    text = config.get_text_config()
    own = None if section.random_weights else check_quantization(config, section.quantization, section.name)
    double_quantization = section.double_quantization if own is None else own
    batch = _batch(run, getattr(text, "sliding_window", None))
    base: Any = _skeleton(run, config, batch.masked)
    positions = num_positions(base)
    if positions is not None and batch.length > positions:  # longer rows are refused when the run begins
        batch = replace(batch, length=positions)
    skipped = () if own is None else skipped_modules(config) or ()
    quantized = quantized_layers(base, skipped) if section.quantization != "none" else []
    trained = [*(run.adapter.options.get("modules_to_save") or ()), *_trained_head(run, base)]
    frozen = frozen_bytes(base, quantized, section.quantization, double_quantization, trained)
    base_parameters = sum(parameter.numel() for parameter in base.parameters())
    memory.count_dequantization(base, quantized, section.quantization)
    of_base = {id(buffer) for buffer in base.buffers()}
    model = _adapted(run, base)
    # what an adapter holds beside what trains, such as the frozen factors of LoRA-XS
    factors = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in of_base}
    frozen_factors = sum(buffer.numel() * buffer.element_size() for buffer in factors.values())
    frozen = replace(frozen, state=frozen.state + frozen_factors)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    sizes = [in_out_features(layer.get_base_layer()) or (0, 0) for layer in layers]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in trainable)
    to_save = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name)
    lora = sum(in_features + out_features for in_features, out_features in sizes)
    adapter_bytes = adapter_file_bytes(model)
    trainable_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    targets = run.adapter.options.get("target_modules")
    notes = [*_oversized(model), *coverage_notes(model, section.quantization, targets, section.dtype, set(quantized))]
    if frozen_factors:
        notes.append(f"{run.adapter.method} holds {frozen_factors / 2**20:,.1f} MiB of frozen factors beside its base")
    if run.adapter.options.get("init") == "gradient" and run.adapter.start_from is None:
        notes.append(planned_start(model, run))
    optimizer_state = pair_state_bytes(training["optim"], model)
    if optimizer_state is None and training["optim"] not in ("adamw_torch", "adamw_torch_fused", "lora_plus"):
        notes.append(f"the optimizer is counted as AdamW in float32; {training.get('optim')} may take less or more")

    stack = memory.layer_list(base)
    num_layers, hidden_size = len(stack[2]) if stack else 1, base.get_input_embeddings().weight.shape[1]
    refusal = _refusal(run) if trace else None
    compute = "bf16" if refusal else training["compute"]
    step = _step(run, config, batch, compute, model) if trace else _Step(None)
    if trace and step.memory is None:
        reason = f"they could not be counted for this model ({step.failure})"
        notes.append(f"activations and workspace come on top, {reason}")
    elif trace and longest_row(training) is None:
        notes.append(
            f"training.max_length is null: activations and workspace are of rows of {UNKNOWN_LENGTH:,} tokens; set it "
            "to what yours have"
        )
    steps = step.memory or dict.fromkeys((False, True), memory.StepMemory(0, 0))
    if training["method"] == "orpo" and trace and not step.fused:
        # bfloat16 logits, their log-softmax, and the gradient
        gib = 3 * DTYPES[section.dtype].itemsize * batch.rows * batch.length * text.vocab_size / GIB
        notes.append(
            f"TRL's ORPO makes all logits where layers run unfused, which are not counted: about {gib:.1f} GiB"
        )
    if note := low_rate_note(training):
        notes.append(note)
    if share := vllm_share(run):
        notes.append(
            f"vLLM takes {100 * share:.0f} % of each GPU beside what is counted, for a base of its own and its cache "
            "(training.vllm_gpu_memory_utilization)"
        )
    if refusal:
        notes.append(f"the run would be refused, and is planned in bf16: {refusal}")
    values = dict(
        model=section.name,
        architecture=(base.config.architectures or [base.config.model_type])[0],
        quantization=section.quantization,
        dtype=section.dtype,
        method=run.adapter.method,
        tokens_per_gpu=batch.rows * batch.length,
        trainable_parameters=num_trainable,
        adapter_parameters=num_trainable - to_save,
        base_parameters=base_parameters,
        adapted_modules=len(layers),
        lora8_parameters=8 * lora,
        lora16_parameters=16 * lora,
        share_of_lora8=(num_trainable - to_save) / (8 * lora),
        share_of_lora16=(num_trainable - to_save) / (16 * lora),
        adapter_bytes=adapter_bytes,
        frozen_bytes=frozen.total,
        fused=step.fused,
        compute=compute,
        traced=step.memory is not None,
    )
    parts = RunMemory(frozen, trainable_bytes, steps, hidden_size, num_layers, 1, optimizer_state)
    return Counted(run, text, parts, values, notes)


def _trained_head(run: RunConfig, base: Any) -> list[str]:
    """Return the names of the modules outside a classifier's base, which train."""
    return head_modules(base) or [] if run.model.task == "seq_cls" else []


def _skeleton(run: RunConfig, config: Any, masked: bool) -> Any:
    """Return the model as the run computes it, its attention through the stand-in for SDPA where it can be."""
    section = run.model

    def build(attention: str) -> Any:
        return meta_model(config, section.task, section.num_labels, DTYPES[section.dtype], attention)

    own = build("auto" if section.attention == "flash_attention_2" else section.attention)
    if own.config._attn_implementation == "eager" and section.attention != "flash_attention_2":
        return own
    try:
        return build(memory.attention_name(masked))
    except (
        KeyError,
        ValueError,
    ):  # attention of its own, with classes to choose from, or not by Transformers' interface
        return own


def _adapted(run: RunConfig, base: Any) -> Any:
    """Return a base with the run's adapter in it, as it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oversized sides are told by `_oversized`, per shape
        return inject(base, run.adapter.method, run.adapter.options, run.model.task)


def _refusal(run: RunConfig) -> str | None:
    """Return why a run's model does not take the run's `training.compute`; None if it does."""
    from lsr_scale.training.compute import check_layers

    if run.training["compute"] == "bf16":
        return None
    try:
        check_layers(run)
    except UserError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Step:
    """The memory of a step without and with checkpointing, whether it runs fused; None where it could not be traced."""

    memory: dict[bool, memory.StepMemory] | None
    fused: bool = False
    failure: str = ""


def _step(run: RunConfig, config: Any, batch: memory.Batch, compute: Any, model: Any) -> _Step:
    """Return the memory of a run's step, fused where it can be; traced once in a process for all runs with that step.

    `model` is the run's, with its adapter; it cannot be used afterwards.
    """
    training, method = run.training, adapters.METHODS.get(run.adapter.method)
    parts = config.to_dict(), run.model.model_dump(), run.adapter.model_dump(), dataclasses.astuple(batch), compute
    text = json.dumps([*parts, training["fused"], training["keep_in_bf16"]], sort_keys=True, default=str)
    key = text, method, memory.trace_step  # another of that name may be registered
    if key not in _steps:
        fused = _fused_step(run, config, batch, compute)
        if fused is not None:
            _steps[key] = _Step(fused, fused=True)
        else:
            try:
                _steps[key] = _Step(memory.trace_step(model, batch, run.model.task))
            except memory.TraceError as error:
                _steps[key] = _Step(None, failure=str(error))
    return _steps[key]


_steps: dict[Any, _Step] = {}


def _fused_step(run: RunConfig, config: Any, batch: memory.Batch, compute: Any) -> dict[bool, memory.StepMemory] | None:
    """Return the memory of a step whose layers all run fused, as on a GPU they would; None if they do not."""
    section = run.model
    if run.training["fused"] == "off" or section.attention not in ("auto", "sdpa"):
        return None
    base = meta_model(config, section.task, section.num_labels, DTYPES[section.dtype], section.attention)
    if not any(type(module) in DECODER_LAYERS for module in base.modules()):
        return None
    model = _adapted(run, base).train()
    kept = [] if run.training["keep_in_bf16"] == "auto" else run.training["keep_in_bf16"]

    def prepare(recompute: Recompute) -> FuseReport:
        report = fuse(model, recompute, compute=compute)
        if compute != "bf16":
            keep_in_bf16(model, kept)
        return report

    report = prepare("none")
    if report.unfused or not report.fused:
        return None
    try:
        return memory.trace_step(model, batch, section.task, fuse=prepare)
    except memory.TraceError:
        return None


def _batch(run: RunConfig, sliding_window: int | None) -> memory.Batch:
    """Return the micro-batch at its largest; packing makes one long row of it.

    Attention needs a mask for the padding between rows, for packed rows, and for a window shorter than the row;
    FlashAttention takes all three without one.
    """
    training = run.training
    rows, length = training["per_device_train_batch_size"], longest_row(training) or UNKNOWN_LENGTH
    rows *= METHODS[training["method"]].sequences  # chosen and rejected are one batch
    if training.get("packing"):
        rows, length, masked = 1, rows * length, True
    else:
        masked = rows > 1 or (sliding_window is not None and length > sliding_window)
    return memory.Batch(rows, length, masked and run.model.attention != "flash_attention_2")


def _oversized(model: nn.Module) -> list[str]:
    """Return a line for each shape one of whose sides has more parameters than its dense form."""
    where: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLinear):
            for config in layer.adapter_configs.values():
                for line in layer.method.oversized_sides(layer.in_features, layer.out_features, config):
                    where.setdefault(line, []).append(name.removeprefix("base_model.model."))
    return [
        f"{names[0]}{f' and {len(names) - 1} more of that shape' if len(names) > 1 else ''}: {line}"
        for line, names in where.items()
    ]
