"""`lsr-scale classify`: the labels that a classifier's run gives to texts."""

import argparse
import json

from lsr_scale.commands.arguments import BASE_HELP, Parser, count
from lsr_scale.commands.failures import ON_THE_CPU
from lsr_scale.quick_imports import quick_imports

HELP = "Try a classifier's run: label texts, or the rows of a file."
GPU_REMEDY = ON_THE_CPU


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run", help="the run's folder, or a checkpoint's in it")
    parser.add_argument("--text", nargs="+", default=[], help="a text, or several")
    parser.add_argument("--pair", nargs="+", default=[], metavar="TEXT", help="the second sentence of each")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="rows with texts; no labels are needed")
    parser.add_argument("--limit", type=count, help="only the first so many rows of each file")
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, with every probability")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    with quick_imports():
        from lsr_scale.run.classifier import classify
        from lsr_scale.run.tables import print_classified

    found = classify(args.run, args.text, args.pair, args.data, args.limit, args.base)
    if args.json:
        for row in found:
            print(json.dumps(row))
    else:
        print_classified(found)
    return 0
