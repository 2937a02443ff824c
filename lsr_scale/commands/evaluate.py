"""`lsr-scale eval`: scores a run's adapter, or a base model, on tasks."""

import argparse
import json

from lsr_scale.commands.arguments import BASE_HELP, Parser, count
from lsr_scale.commands.failures import ON_ALL_GPUS
from lsr_scale.quick_imports import quick_imports

HELP = "Load a run's adapter onto its base again and score multiple-choice tasks, or a classifier's labelled rows."
GPU_REMEDY = f"{ON_ALL_GPUS} 'eval.tasks=[...]'"
EXAMPLES = (
    "lsr-scale eval runs/demo",
    "lsr-scale eval runs/demo --tasks piqa winogrande --limit 100",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run", help="the run's folder, or a checkpoint's in it")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="task names, files or folders; the run's own by default"
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", help="labelled rows to score a classifier on")
    parser.add_argument("--limit", type=count, help="score only the first so many questions of each task, or rows")
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    parser.add_argument("--base-only", action="store_true", help="score the base without the adapter")
    parser.add_argument("--without-questions", action="store_true", help="a control: score the choices alone")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lsr_scale.run.find import find_trained

    find_trained(args.run)  # a mistake does not wait for torch
    with quick_imports():
        from lsr_scale.run.evaluate import evaluate_run
        from lsr_scale.run.tables import print_accuracy

    options = {"base": args.base, "data": args.data}
    result = evaluate_run(args.run, args.tasks, args.limit, args.base_only, args.without_questions, **options)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_accuracy(result)
    return 0
