"""`lsr-scale export`: an adapter as LoRA, packed, merged into its base, or as GGUF."""

import argparse

from lsr_scale.commands.arguments import BASE_HELP, Parser, YesOrNo, count
from lsr_scale.commands.failures import ON_THE_CPU
from lsr_scale.paths import user_path
from lsr_scale.quick_imports import quick_imports
from lsr_scale.screen import Progress

HELP = "Write a trained adapter for other programs, and verify it."
GPU_REMEDY = (
    f"{ON_THE_CPU}; --no-verify loads no base, but for methods whose frozen factors are made of its weights (lora_xs)"
)
EXAMPLES = (
    "lsr-scale export runs/demo --to lora --out lora",
    "lsr-scale export runs/demo --to adapter --bits 4 --out small",
    "lsr-scale export runs/demo --to merged --out model",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's folder, a checkpoint's, or an adapter's")
    parser.add_argument("--to", required=True, choices=("adapter", "lora", "merged", "gguf"), help="the format")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), help="of the factors, for adapter; 16 by default")
    parser.add_argument("--max-rank", type=count, help="truncate to this rank, for lora and gguf")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; merged: also nf4; gguf --merged: also q8_0")
    parser.add_argument("--merged", action="store_true", help="a full GGUF rather than an adapter, for gguf")
    parser.add_argument(
        "--base-gguf", metavar="FILE", help="a GGUF of the base, for gguf --merged: vocabulary, metadata"
    )
    parser.add_argument("--base", metavar="MODEL", help=f"{BASE_HELP}, or nothing beside the adapter names it")
    parser.add_argument("--verify", action=YesOrNo, default=True, help="compare logits, of a few prompts")
    parser.add_argument(
        "--accuracy",
        action=YesOrNo,
        default=False,
        help="score the run's tasks too, as trained and exported: up to 200 questions of each, minutes on a CPU",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.run.find import find_adapter

    if not user_path(args.source).exists():
        find_adapter(args.source)  # a mistake does not wait for torch
    with quick_imports():
        from lsr_scale.exporting import export

    options = {"bits": args.bits, "max_rank": args.max_rank, "dtype": args.dtype}
    options |= {"merged": args.merged, "base_gguf": args.base_gguf}
    options |= {"verify": args.verify, "accuracy": args.accuracy, "base": args.base, "progress": Progress()}
    export(args.source, args.to, args.out, **options)
    return 0
