"""`lsr-scale preview`: samples as tokens, and what of them is supervised."""

import argparse
from typing import TYPE_CHECKING, Any

from lsr_scale.commands.arguments import Parser, add_run_arguments, count, one_trial
from lsr_scale.quick_imports import quick_imports
from lsr_scale.screen import Screen
from lsr_scale.units import amount

if TYPE_CHECKING:
    from lsr_scale.data.token_counts import TokenCounts

HELP = "Show a few training samples as they are trained on, what of them is supervised, and their lengths."
EXAMPLES = (
    "lsr-scale preview run.yaml",
    "lsr-scale preview mistral_lsr --samples 1",
    "lsr-scale preview smollm2_sweep --trial lr=0.002,rank=4",
)
SUPERVISED, CONTEXT, STYLE = "> ", "  ", "green"


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--samples", type=count, default=3, help="how many are shown; 3 by default")
    parser.add_argument("--trial", metavar="NAME", help="of a sweep, the trial whose rows are shown; else its first")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    config = one_trial(args, args.trial)

    from rich.text import Text

    with quick_imports():
        from lsr_scale.data.answered_prompts import KINDS as PROMPTS
        from lsr_scale.data.formats import KIND_MEANING
        from lsr_scale.data.labels import Labels
        from lsr_scale.data.preview import preview, runs
        from lsr_scale.training.assembly import check_run_fits, read_data

    notes: list[str] = []
    data = read_data(config, say=notes.append)
    check_run_fits(config, data)
    shown = preview(data.train, data.kind, data.tokenizer, args.samples, config.training, data.validation)
    console = Screen()
    console.print(f"{amount(len(data.train), 'row')}, {data.kind}: {KIND_MEANING[data.kind]}")
    if shown.labels is None:
        what = "What is learned, or unlearned, is " if shown.names else "What is supervised is "
        if data.kind in PROMPTS:
            console.print("The model completes each by itself, and learns from what its completions are worth.")
        else:
            console.print(Text.assemble(what, (f"behind {SUPERVISED}", STYLE), "and green."))
    names = data.labels or Labels(())
    for index, sample in enumerate(shown.samples):
        supervised = sum(token.supervised for token in sample)
        label = "" if shown.labels is None else f", label {names.name(shown.labels[index])}"
        number = f"{index + 1}"
        if shown.names:
            number, label = f"{index * args.samples // len(shown.samples) + 1} {shown.names[index]}", ""
        learned = "" if data.kind in PROMPTS else f", {supervised} supervised{label}"
        console.print(Text.assemble("\n", (number, "bold"), f"  {amount(len(sample), 'token')}{learned}"))
        console.print(_text_of(runs(sample)), soft_wrap=True)
    console.print()
    console.print(_table(shown.parts))
    for note in [*notes, *(f"note: {text}" for text in shown.notes)]:
        console.print(f"\n{note}", soft_wrap=True)
    return 0


def _text_of(pieces: list[tuple[bool, str]]) -> Any:
    """Return a sample as lines, each behind a mark that tells whether it is supervised, without colours too."""
    from rich.text import Text

    text, at_start = Text(), True
    for supervised, piece in pieces:
        # a piece begins a line of its own, which shows the line break that it begins with
        lines = (piece if at_start else piece.removeprefix("\n")).split("\n")
        at_start = not lines[-1]
        for line in lines[:-1] if at_start else lines:
            text.append(f"{SUPERVISED if supervised else CONTEXT}{line}\n", STYLE if supervised else "")
    text.rstrip()
    return text


def _table(parts: "list[tuple[str, TokenCounts]]") -> Any:
    """Return rows, turns, lengths and what is supervised of each part, as a table."""
    from rich import box
    from rich.table import Table

    turns, supervised = any(counts.turns for _, counts in parts), any(counts.supervised for _, counts in parts)
    lost = any(counts.unsupervised for _, counts in parts)
    names = ["", "rows", *(["assistant\nturns"] if turns else []), "tokens\np50", "\np95", "\nmax", "rows\ncut"]
    names += [*(["rows\nleft out"] if lost else []), *(["supervised\ntokens"] if supervised else [])]
    table = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for where, counts in parts:
        cells = [
            where.removeprefix("data."),
            f"{counts.rows:,}",
            *([f"{counts.assistant_turns:,} of {counts.turns:,}"] if turns else []),
        ]
        cells += [f"{counts.percentile(share):,}" for share in (0.5, 0.95, 1)] + [f"{counts.truncated:,}"]
        cells += [f"{counts.unsupervised:,}"] if lost else []
        share = 100 * counts.supervised / max(1, counts.tokens)
        table.add_row(*cells, *([f"{counts.supervised:,} ({share:.3g} %)"] if supervised else []))
    return table
