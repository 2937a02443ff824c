"""`lsr-scale sweep`: the trials of a run with a section sweep, on one loading of its base."""

import argparse
import re
from typing import Any

from lsr_scale.commands.arguments import Parser, add_run_arguments, count, find_file
from lsr_scale.errors import UserError
from lsr_scale.quick_imports import quick_imports

HELP = "Train many variants of a run on one loading of its base, together where that pays."
EXAMPLES = (
    "lsr-scale sweep run.yaml",
    "lsr-scale sweep run.yaml --resume auto",
    "lsr-scale sweep smollm2_sweep --together 4",
    "lsr-scale sweep run.yaml --gpus 8",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--together", type=_together, metavar="auto|N", help="how many trials share a step")
    parser.add_argument("--gpus", type=count, help="deal the trials out over so many GPUs, a process each")
    parser.add_argument("--resume", metavar="auto", help="go on with the sweep that lies there, trials and all")
    parser.add_argument("--overwrite", action="store_true", help="start again in a folder that holds a sweep")
    parser.add_argument("--quiet", action="store_true", help="print results only")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status: 1 where a trial failed."""
    from lsr_scale.config.trials import read_sweep
    from lsr_scale.sweeping import workers  # none of these two imports torch

    overrides = [*args.set, *([f"sweep.together={args.together}"] if args.together else [])]
    file = find_file(args)
    sweep = read_sweep(file, overrides)
    command = [
        str(file),
        *(word for text in overrides for word in ("--set", text)),
        *(["--quiet"] if args.quiet else []),
    ]
    if workers.is_launched():
        if args.gpus:
            raise UserError("--gpus: the launcher has started a process a GPU already; leave it out")
        again = [*(["--resume", args.resume] if args.resume else []), *(["--overwrite"] if args.overwrite else [])]
        workers.become_worker([*command, *again])
    with quick_imports():
        from lsr_scale.sweeping.sweep import run_sweep

    options: dict[str, Any] = {"gpus": args.gpus, "command": command} if args.gpus else {}
    folder = run_sweep(sweep, file.stem, args.resume, args.overwrite, args.quiet, **options)
    return 1 if any(trial.status == "failed" for trial in folder.read().trials.values()) else 0


def _together(text: str) -> str:
    if text != "auto" and not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"expected auto or a whole number from 1 on, got {text!r}")
    return text
