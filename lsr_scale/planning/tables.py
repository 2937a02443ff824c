"""A plan as tables for a terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lsr_scale.planning.planner import Plan
from lsr_scale.planning.stages import CUDA_GIB, Memory
from lsr_scale.units import amount, byte_size


def render(plan: Plan) -> Group:
    """Return the plan for a person, to be printed by a rich console."""

    def percent(share: float) -> str:
        return f"{100 * share:.3g} %"

    how = f", products with the base in {plan.compute}" if plan.compute != "bf16" else ""
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")  # a model's path may be long
    for name, text in (
        ("base", f"{plan.model}, {plan.quantization}, {plan.dtype}"),
        ("parameters", f"{plan.base_parameters:,} ({plan.architecture})"),
        ("frozen bytes", f"{plan.frozen_bytes:,} ({byte_size(plan.frozen_bytes)}), exact"),
        ("adapter", f"{plan.method} on {amount(plan.adapted_modules, 'module')}"),
        ("trainable", f"{amount(plan.trainable_parameters, 'parameter')}"),
        (
            "of LoRA",
            f"{percent(plan.share_of_lora8)} of rank 8 ({plan.lora8_parameters:,}), "
            f"{percent(plan.share_of_lora16)} of rank 16",
        ),
        ("layers", f"fused, as on a GPU{how}" if plan.fused else "each linear by itself"),
        ("adapter file", f"{plan.adapter_bytes:,} bytes ({byte_size(plan.adapter_bytes)})"),
    ):
        facts.add_row(Text(name, style="bold"), text)

    # so short that 80 columns hold the table
    columns = {
        **{"weights": "weights", "gradients": "grads", "optimizer": "optim", "activations": "activ"},
        "workspace": "work",
        **({"generation": "gener"} if plan.memory_gib.generation else {}),
        **{"total": "total", "loading": "load"},
    }
    title = f"GiB on one of {plan.gpus} GPUs" if plan.gpus > 1 else "GiB on one GPU"
    table = Table(
        title=f"{title}, {amount(plan.tokens_per_gpu, 'token')} at once", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    table.add_column("stage", no_wrap=True)
    table.add_column("recomp", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)

    def gib(value: float) -> str:
        digits = 2 if value < 99.995 else 1 if value < 999.95 else 0  # five characters, so that 80 columns hold them
        return "<0.01" if 0 < value < 0.005 else f"{value:.{digits}f}"

    def add(stage: str, checkpointing: str, memory: Memory, style: str = "") -> None:
        table.add_row(stage, checkpointing, *(gib(getattr(memory, column)) for column in columns), style=style)

    add("this run", "", plan.memory_gib, "bold")
    table.add_section()
    for row in plan.table:
        add(row.stage, "on" if row.checkpointing else "off", row.memory_gib)
    first = {row.checkpointing: row.memory_gib for row in plan.table[:2]}
    thousand = {on: (m.activations + m.workspace) * 1000 / plan.tokens_per_gpu for on, m in first.items()}
    offloaded = {row.stage: row.memory_gib.host for row in plan.table if row.memory_gib.host}
    has_zero3 = any(row.stage == "zero3" for row in plan.table)
    lines = (
        "recomp: layers are checkpointed, their activations computed again",
        f"weights{' (but for zero3)' if has_zero3 else ''}, grads and optim are exact",
        *(
            ["  training.memory: speed: weights has those that layers keep dequantized, too"]
            if plan.memory_gib.dequantized
            else []
        ),
        "activ and work: activations and workspace, estimated at full max_length,",
        f"  per 1,000 tokens {thousand[True]:.2f} GiB with checkpointing, {thousand[False]:.2f} without",
        *(
            [
                "gener: GRPO's completions, at their longest, when activ and work are not there;",
                "  total has the larger of the two",
            ]
            if plan.memory_gib.generation
            else []
        ),
        *(
            f"{stage}: {host:.2f} GiB of the machine's own memory a process, {plan.gpus * host:.2f} in all"
            for stage, host in offloaded.items()
        ),
        f"nvidia-smi shows about {CUDA_GIB} GiB more, for CUDA itself",
    )
    note = Text("\n".join(lines), style="dim")
    warned = [Text(f"warning: {line}", style="yellow") for line in plan.warnings]
    return Group(facts, Text(), table, note, *([_sum(plan)] if plan.gpus > 1 and has_zero3 else []), *warned)


def _sum(plan: Plan) -> Table:
    """Return what zero3's memory consists of."""
    table = Table(title=f"zero3 on one of {plan.gpus} GPUs, checkpointing on", title_justify="left", box=None)
    table.add_column("GiB", justify="right")
    table.add_column("of")
    for name, part in plan.sharded.items():
        table.add_row(f"{part:.2f}", name)
    zero3 = next(row.memory_gib for row in plan.table if row.stage == "zero3" and row.checkpointing)
    table.add_row(f"{zero3.total:.2f}", "in all; fragmentation, CUDA and NCCL come on top", style="bold")
    table.add_row(f"{zero3.loading:.2f}", "while loading: the shards, the states, and one weight being quantized")
    return table
