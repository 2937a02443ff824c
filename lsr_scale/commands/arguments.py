"""What commands share: the parser, the types of their options, and a run's CONFIG with its --set."""

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from lsr_scale.commands.failures import rank
from lsr_scale.errors import UserError, nearest, one_screen
from lsr_scale.paths import user_path
from lsr_scale.units import amount

if TYPE_CHECKING:
    from pathlib import Path

    from lsr_scale.config import RunConfig

_MISSING = 8  # sources that are named
_LARGEST = 10**9  # of what is counted on the command line
BASE_HELP = "the base model, where it lies elsewhere than when the run began"


class Parser(argparse.ArgumentParser):
    """Takes an option by its whole name and once, and says what is wrong on one screen."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        """End with the usage and the mistake, and status 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {one_screen(message)}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if near := nearest(str(value), map(str, action.choices or ())):
                error.message = f"invalid choice: {value!r}; did you mean {' or '.join(map(repr, near))}?"
            raise


class HelpWithExamples(argparse.HelpFormatter):
    """Wraps what is told in words, and leaves the lines of the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class _StoreOnce(argparse.Action):
    """Stores an option's value; argparse would let a second one replace the first without a word."""

    stored = False

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.stored and self.option_strings:
            raise argparse.ArgumentError(self, "stands twice; keep one of them")
        self.stored = True
        setattr(namespace, self.dest, values)


class YesOrNo(argparse.BooleanOptionalAction):
    """`--verify` or `--no-verify`, not both."""

    stored: str | None = None

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Store True or False; refuse the other of the two."""
        if self.stored not in (None, option_string):
            raise argparse.ArgumentError(self, f"{self.stored} and {option_string} contradict each other; keep one")
        self.stored = option_string
        super().__call__(parser, namespace, values, option_string)


def count(text: str) -> int:
    """Return a whole number from 1 on, for argparse."""
    number = int(text) if re.fullmatch("[0-9]{1,12}", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    if number > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number up to {_LARGEST:,}, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """Return a number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to {_LARGEST:,}, got {text!r}")
    return number


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, which --config names too, and --set."""
    parser.add_argument(
        "config_path", nargs="?", metavar="CONFIG", help="the run's YAML file, or the name of a shipped one"
    )
    parser.add_argument("--config", help="the same, by name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for instance training.learning_rate=1e-3"
    )


def names_run(args: argparse.Namespace) -> bool:
    """Tell whether any of the arguments of `add_run_arguments` is there."""
    return bool(args.config or args.config_path or args.set)


def load_run(args: argparse.Namespace) -> "RunConfig":
    """Return the run that the arguments of `add_run_arguments` mean.

    Raises:
        UserError: for no configuration, two, or one with a mistake.
    """
    return read_run(args)[0]


def read_run(args: argparse.Namespace) -> "tuple[RunConfig, dict[str, Any]]":
    """Return the run, as `load_run`, and what its file and --set say."""
    from lsr_scale.config.run import read_run

    return read_run(find_file(args), args.set)


def one_trial(args: argparse.Namespace, name: str | None) -> "RunConfig":
    """Return the run, as `load_run`; of a sweep a trial's, by its name, or the first one's, which is said.

    Raises:
        UserError: for a name that is no trial's; `load_run`'s.
    """
    from lsr_scale.config.run import load_run
    from lsr_scale.config.trials import is_sweep, read_sweep
    from lsr_scale.data.source_check import missing_of

    file = find_file(args)
    if not is_sweep(file, args.set):
        if name is not None:
            raise UserError(f"--trial {name}: {file} has no section sweep, so it is one run; leave it out")
        return load_run(file, args.set)
    sweep = read_sweep(file, args.set)
    if name is not None:
        return sweep.trial(name).run
    first, number = sweep.trials[0], len(sweep.trials)
    others = f"; another: --trial {sweep.trials[1].name}" if number > 1 else ""
    print(one_screen(f"note: the first of {amount(number, 'trial')}: {first.name}{others}"), file=sys.stderr)
    note_missing(missing_of(sweep.trials[1:], sweep))
    return first.run


def note_missing(lines: "list[str]") -> None:
    """Say which sources of rows are not there: a screen of them, one line each."""
    shown = [*lines[:_MISSING], *([f"... and {len(lines) - _MISSING} more"] if len(lines) > _MISSING else [])]
    for line in shown:
        print(one_screen(f"note: {line}"), file=sys.stderr)


def find_file(args: argparse.Namespace) -> "Path":
    """Return the file that CONFIG or --config means, and say which one a name is, and which --set have no effect.

    Raises:
        UserError: for no configuration, two, or one that is not there.
    """
    from lsr_scale.config.shipped import find_run

    path = args.config or args.config_path
    if path is None or (args.config and args.config_path and args.config != args.config_path):
        raise UserError(
            "expected one configuration: a YAML file (lsr-scale init writes one), or a shipped one, such as mistral_lsr"
        )
    if (found := find_run(path)) != user_path(path) and rank() == "0":
        print(one_screen(f"note: {path} is {found}"), file=sys.stderr)
    keys = [assignment.partition("=")[0].strip() for assignment in args.set]
    for index, key in enumerate(keys):
        if key in keys[index + 1 :] and rank() == "0":
            print(one_screen(f"note: --set {args.set[index]} has no effect, as {key} is set again"), file=sys.stderr)
    return found
