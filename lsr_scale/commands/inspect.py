"""`lsr-scale inspect`: shapes, ranks, sizes and spectra of an adapter."""

import argparse
import json
import sys

from lsr_scale.commands.arguments import Parser
from lsr_scale.errors import UserError
from lsr_scale.paths import user_path
from lsr_scale.quick_imports import quick_imports
from lsr_scale.screen import Screen

HELP = "Show what is in an adapter: shapes, ranks, size, spectrum and condition of its factors."
EXAMPLES = (
    "lsr-scale inspect runs/demo",
    "lsr-scale inspect runs/demo --all --png spectra.png",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's folder, or an adapter's")
    parser.add_argument("--png", metavar="FILE", help="where to draw; spectra.png in the folder by default")
    parser.add_argument("--all", action="store_true", help="the factors' table too")
    parser.add_argument("--json", action="store_true", help="print JSON; drawn only with --png")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.run.find import find_adapter

    find_adapter(args.source)  # a mistake does not wait for torch
    with quick_imports():
        from lsr_scale.exporting import inspect

    if args.png:
        inspect.check_place(user_path(args.png, "--png"))
    report = inspect.inspect_adapter(args.source)
    console = Screen()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        console.print(inspect.render(report, whole=args.all))
    if args.json and not args.png:
        return 0
    picture = user_path(args.png, "--png") if args.png else user_path(args.source) / "spectra.png"
    try:
        inspect.draw(report, picture)
    except UserError as error:
        if args.png:
            raise
        print(f"note: the spectra are not drawn: {error}", file=sys.stderr)  # nobody asked for the file
        return 0
    if not args.json:
        console.print(f"spectra  {picture}", soft_wrap=True)
        if not args.all:
            console.print("factors  --all")
    return 0
