"""`lsr-scale merge`: the weighted sum of adapters, as an adapter."""

import argparse

from lsr_scale.commands.arguments import Parser, count
from lsr_scale.quick_imports import quick_imports

HELP = "Add adapters of one base up, exactly, into one LoRA adapter."
EXAMPLES = ("lsr-scale merge runs/a runs/b --weights 0.5 0.5 --out sum",)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_ADAPTER", help="folders of runs or adapters, of one base")
    parser.add_argument("--weights", nargs="+", type=float, help="one for each; 1 by default")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--max-rank", type=count, help="truncate the sum to this rank")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.run.find import find_adapter

    for source in args.sources:
        find_adapter(source)  # a mistake does not wait for torch
    with quick_imports():
        from lsr_scale.exporting import merge

    merge(args.sources, args.weights, args.out, max_rank=args.max_rank, dtype=args.dtype)
    return 0
