"""`lsr-scale config`: a run checked, and what it comes to; or the JSON schema of its file."""

import argparse
import json
from typing import TYPE_CHECKING

from lsr_scale.commands.arguments import Parser, add_run_arguments, find_file, names_run, note_missing
from lsr_scale.errors import UserError
from lsr_scale.units import amount

if TYPE_CHECKING:
    from lsr_scale.config.trials import Sweep

HELP = "Check a run and print what differs from the defaults, as a run's file."
EXAMPLES = (
    "lsr-scale config mistral_lsr",
    "lsr-scale config mistral_lsr --set adapter.rank=8 > mine.yaml",
    "lsr-scale config run.yaml --all",
    "lsr-scale config --json-schema > lsr_scale.schema.json",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--all", action="store_true", help="print every value of the resolved run")
    parser.add_argument("--json-schema", action="store_true", help="print the JSON schema of a run's file instead")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale import config

    if args.json_schema:
        if names_run(args):
            raise UserError("--json-schema: prints what any run's file may say; give no configuration and no --set")
        if args.all:
            raise UserError("--json-schema: has every key; leave out --all")
        print(json.dumps(config.json_schema(), indent=2))
    else:
        from lsr_scale.config.run import read_run
        from lsr_scale.config.trials import is_sweep, read_sweep
        from lsr_scale.data.source_check import missing_of, missing_sources

        file = find_file(args)
        if is_sweep(file, args.set):
            sweep = read_sweep(file, args.set)
            print(_of_sweep(sweep, args.all), end="")
            note_missing(missing_of(sweep.trials, sweep))
            return 0
        resolved, written = read_run(file, args.set)
        print(config.dump_yaml(resolved) if args.all else config.difference(resolved, written).to_yaml(), end="")
        note_missing([f"{file}: {key}: {text}" for key, text in missing_sources(resolved)])
    return 0


def _of_sweep(sweep: "Sweep", whole: bool) -> str:
    """Return a sweep as a file, and its trials as comments."""
    from lsr_scale import config
    from lsr_scale.config import yaml_text
    from lsr_scale.config.difference import derived_otherwise

    trials = [(trial.changes, trial.run) for trial in sweep.trials]
    if sweep.base is None:
        run = yaml_text.dump(sweep.written, short=True)
    elif whole:
        left_out = derived_otherwise(sweep.base, sweep.written, trials)
        resolved = sweep.base.model_dump().items()
        run = yaml_text.dump(
            {
                section: {name: value for name, value in fields.items() if (section, name) not in left_out}
                for section, fields in resolved
            }
        )
    else:
        run = config.difference(sweep.base, sweep.written, trials).to_yaml()
    section = sweep.section.model_dump(exclude_none=True, exclude_defaults=not whole)
    lines = [
        f"# {trial.name}: {', '.join(f'{key}={value}' for key, value in trial.changes.items())}"
        for trial in sweep.trials
    ]
    heading = f"# {amount(len(sweep.trials), 'trial')}, compared by {sweep.scored_by()}"
    notes = [f"# note: {note}" for note in sweep.notes()]
    return run + yaml_text.dump({"sweep": section}, short=True) + "\n".join([heading, *notes, *lines]) + "\n"
