"""`lsr-scale train`, which `launch/train.py` runs too."""

import argparse

from lsr_scale.commands import sweep
from lsr_scale.commands.arguments import Parser, add_run_arguments, load_run
from lsr_scale.quick_imports import quick_imports
from lsr_scale.sweeping.workers import is_launched

HELP = "Train a run: score, train, score again, save the adapter."
EXAMPLES = (
    "lsr-scale train mistral_lsr",
    "lsr-scale train run.yaml --set training.learning_rate=1e-3",
    "lsr-scale train run.yaml --resume auto",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT", help="resume from the newest checkpoint, or from this one"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again in a folder that holds a run")
    parser.add_argument("--quiet", action="store_true", help="print results only")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.config.shipped import find_run
    from lsr_scale.config.trials import is_sweep

    if is_launched() and (path := args.config or args.config_path) and is_sweep(find_run(path), args.set):
        return sweep.run(argparse.Namespace(**vars(args), together=None, gpus=None))
    config, file = load_run(args), find_run(args.config or args.config_path)
    from lsr_scale.run.start import named_by_file  # a mistake in the file does not wait for torch

    with quick_imports():
        from lsr_scale.run.train import train

    config, name = named_by_file(config, file, args.overwrite or args.resume == "auto")
    train(config, name, args.resume, args.overwrite, args.quiet)
    return 0
