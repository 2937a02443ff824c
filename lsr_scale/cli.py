"""The command line: parse, call, and say what went wrong in words. No logic of its own."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from lsr_scale.commands import (
    classify,
    compare,
    config,
    doctor,
    evaluate,
    export,
    failures,
    generate,
    init,
    inspect,
    merge,
    plan,
    preview,
    report,
    sweep,
    train,
)
from lsr_scale.commands.arguments import HelpWithExamples, Parser
from lsr_scale.screen import LOGGERS, open_streams
from lsr_scale.version import __version__

COMMANDS: dict[str, Any] = {
    "init": init,
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "compare": compare,
    "report": report,
    "generate": generate,
    "classify": classify,
    "export": export,
    "inspect": inspect,
    "merge": merge,
    "preview": preview,
    "plan": plan,
    "doctor": doctor,
    "config": config,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    0; 1, doctor found something, or a sweep's trial failed; 2, a mistake; 130, interrupted, while training once a
    checkpoint was saved; 143, ended by SIGTERM, a checkpoint saved.
    """
    open_streams()
    args = parser().parse_args(arguments)
    try:
        quiet_libraries(args.debug)
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        started = (
            args.command in ("train", "sweep") and "lsr_scale.run.train" in sys.modules
        )  # and not still importing torch
        saved = "; where a checkpoint was saved, the same command with --resume auto resumes from it"
        failures.say("interrupted" + (saved if started else ""))
        status = 130
    except BrokenPipeError:  # the reader of our output left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        explained = failures.explain(error, getattr(COMMANDS[args.command], "GPU_REMEDY", None))
        if explained is None:
            raise
        if args.debug:
            traceback.print_exc()
        words, status = explained
        failures.say(words)
    if status and os.environ.get("WORLD_SIZE"):
        # the other processes wait for this one in a collective; ending at once lets the launcher end them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def parser() -> Parser:
    """Return the parser of all commands; making it, and parsing, imports neither torch nor transformers nor peft."""
    top = Parser(
        prog="lsr-scale",
        description="Fine-tune 4- and 8-bit language models with Kronecker-structured adapters.",
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    shared = Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        examples = "\n  ".join(("examples:", *getattr(command, "EXAMPLES", ())))
        words = {"help": command.HELP, "description": command.HELP, "parents": [shared]}
        if examples != "examples:":
            words |= {"epilog": examples, "formatter_class": HelpWithExamples}
        command.add_arguments(subparsers.add_parser(name, **words))
    return top


def _notes_said_once() -> Any:
    """Return what writes a warning as a note, without the library's file and line; once, whatever its place.

    Python's own "once" forgets what was said where filters change, as they do in each trial of a sweep.
    """
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        note = f"note: {message}\n"
        if note not in said:
            said.add(note)
            sys.stderr.write(note)

    return show


def quiet_libraries(debug: bool = False) -> None:
    """Leave the screen to the run: the libraries' warnings and progress bars only with --debug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # read when torch is imported, later. Beside another job, threads that spin while they wait for one that has no core
    # take the cores from it: on two busy cores a run took 73 s so, and 32 s where they sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    if debug:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each try again where there is no network; the error says it
    # transformers reads this, and the line above, when it is imported: that takes seconds, and many commands never do
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):  # which read its variable when it was imported
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a letter of a title that a picture cannot show
    warnings.showwarning = _notes_said_once()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # this one sets its level when it is imported, so a filter; it warns that there is no GPU, and the like
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if failures.rank() != "0":
        logging.getLogger().setLevel(logging.ERROR)  # the first process speaks for all
