"""`lsr-scale doctor`: versions, hardware, and known bad combinations."""

import argparse

from lsr_scale.commands.arguments import Parser, add_run_arguments, load_run, names_run
from lsr_scale.quick_imports import quick_imports
from lsr_scale.screen import Screen

HELP = "Report versions, hardware, which fast paths are on, and known bad combinations."
EXAMPLES = (
    "lsr-scale doctor",
    "lsr-scale doctor run.yaml --all",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--all", action="store_true", help="every version, and every line in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status: 1 where something is bad."""
    config = load_run(args) if names_run(args) else None
    with quick_imports():
        from lsr_scale import doctor

    report = doctor.doctor(config)
    if args.json:
        print(report.to_json())
    else:
        Screen().print(doctor.render(report, whole=args.all))
    return report.exit_code
