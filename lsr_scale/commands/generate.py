"""`lsr-scale generate`: text from a run's adapter."""

import argparse
import re
import sys

from lsr_scale.commands.arguments import BASE_HELP, Parser, count
from lsr_scale.errors import printable

HELP = "Try a run: continue a prompt."


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run", help="the run's folder")
    parser.add_argument(
        "--prompt", required=True, type=_with_new_lines, help=r"\n is a new line, \\n a backslash and an n"
    )
    parser.add_argument("--max-new-tokens", type=count, default=64)
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    parser.add_argument("--base-only", action="store_true", help="without the adapter")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.run.generate import generate
    from lsr_scale.run.load import load_run_model

    model, tokenizer, _ = load_run_model(args.run, args.base_only, base=args.base)

    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    print(printable(generate(model, tokenizer, args.prompt, args.max_new_tokens, args.chat, note)))
    return 0


def _with_new_lines(text: str) -> str:
    r"""Return a text in which \n, as it is typed into a shell's quotes, is a new line; \\n stays \n."""
    return re.sub(r"\\(\\?)n", lambda match: r"\n" if match[1] else "\n", text)
