"""`lsr-scale compare`: what differs in runs, and what came of it."""

import argparse
import json

from lsr_scale.commands.arguments import Parser

HELP = "Compare runs: what differs in them, losses or GRPO's rewards, scores with paired intervals, speed, memory."


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; differences are from the first")
    parser.add_argument("--all", action="store_true", help="every key, score and note, not a screen of them")
    parser.add_argument("--plot", metavar="FILE", help="draw all curves of losses, of GRPO's rewards, into a PNG")
    parser.add_argument("--html", metavar="FILE", help="write a page that needs nothing else: tables and curves")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.paths import user_path
    from lsr_scale.run.compare import compare
    from lsr_scale.run.compare_tables import render
    from lsr_scale.screen import Screen

    picture = user_path(args.plot, "--plot") if args.plot else None
    page = user_path(args.html, "--html") if args.html else None
    if picture is not None:
        from lsr_scale.run.plots import check_picture_place

        check_picture_place(picture, "--plot")
    if page is not None:
        from lsr_scale.report.write import check_page_place

        check_page_place(page, "--html")
    comparison = compare(args.runs)
    console = Screen()
    if args.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        console.print(render(comparison, args.all))
    if picture is not None:
        from lsr_scale.run.plots import draw_curves

        draw_curves(comparison.curves(), picture)
    if page is not None:
        from lsr_scale.report.write import write_comparison

        write_comparison(comparison, page)
    if not args.json:
        for name, path in (("curves", picture), ("page", page)):
            if path is not None:
                console.print(f"{name}  {path}", soft_wrap=True)
    return 0
