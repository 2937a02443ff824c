"""`lsr-scale report`: a run as one page, of older and unfinished runs too."""

import argparse

from lsr_scale.commands.arguments import Parser

HELP = "Write a run's report.html: configuration, curves, scores, samples, plan against measured, on one page."


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--html", metavar="FILE", help="where to; report.html in the folder by default")
    parser.add_argument("--no-plan", action="store_true", help="leave out what `plan` foretells, which takes seconds")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.paths import user_path
    from lsr_scale.report.write import write_report
    from lsr_scale.screen import print_line

    page = user_path(args.html, "--html") if args.html else None
    print_line(f"report  {write_report(args.run, page, planned=not args.no_plan)}")
    return 0
