"""`lsr-scale config`: the resolved run of a YAML, or its JSON schema."""

import argparse
import json

from lsr_scale.commands.arguments import Parser, add_run_arguments, load_run, names_run
from lsr_scale.errors import UserError

HELP = "Check a run and print it with every value resolved."


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema of a run's file instead")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale import config

    if args.json_schema:
        if names_run(args):
            raise UserError("--json-schema: prints what any run's file may say; give no configuration and no --set")
        print(json.dumps(config.json_schema(), indent=2))
    else:
        print(config.dump_yaml(load_run(args)), end="")
    return 0
