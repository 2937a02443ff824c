"""`lsr-scale preview`: samples as tokens, and what of them is supervised."""

import argparse

from lsr_scale.commands.arguments import Parser, add_run_arguments, count, load_run
from lsr_scale.screen import Screen

HELP = "Show a few training samples as tokens, and what of them is supervised."


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--samples", type=count, default=3)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    config = load_run(args)

    from rich.text import Text

    from lsr_scale.data.formats import KIND_MEANING
    from lsr_scale.data.preview import preview
    from lsr_scale.training.assembly import check_run_fits, read_data

    notes: list[str] = []
    data = read_data(config, say=notes.append)
    check_run_fits(config, data)
    shown = preview(data.train, data.kind, data.tokenizer, args.samples, config.training, data.validation)
    console = Screen()
    green = ("green", "bold green")
    console.print(
        Text.assemble(
            f"{len(data.train):,} rows, {data.kind}: {KIND_MEANING[data.kind]}. Supervised tokens are ", green, "."
        )
    )
    for index, sample in enumerate(shown.samples):
        supervised = sum(token.supervised for token in sample)
        label = "" if shown.labels is None else f", label {shown.labels[index]}"
        number = (f"{index + 1}", "bold")
        console.print(Text.assemble("\n", number, f"  {len(sample)} tokens, {supervised} supervised{label}"))
        # the bars keep the tokens, and with them what is supervised, apart without colours too
        parts = [(t.text, "bold green reverse" if t.supervised else "") for t in sample]
        console.print(Text.assemble(*parts), soft_wrap=True)
        console.print(Text("supervised: " + repr("".join(t.text for t in sample if t.supervised))), soft_wrap=True)
    if shown.counts:
        console.print("\n" + "\n".join(shown.counts), soft_wrap=True)
    for note in [*notes, *(f"note: {text}" for text in shown.notes)]:
        console.print(f"\n{note}", soft_wrap=True)
    return 0
