"""`lsr-scale plan`: what a run takes, or with --budget what a number of parameters buys."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lsr_scale.commands.arguments import (
    Parser,
    add_run_arguments,
    count,
    find_file,
    positive_number,
    read_run,
)
from lsr_scale.errors import UserError, printable
from lsr_scale.quick_imports import quick_imports
from lsr_scale.screen import Screen
from lsr_scale.units import amount, parse_count

if TYPE_CHECKING:
    from lsr_scale.config.trials import Sweep

HELP = "Tell parameters, bytes and memory of a run; needs no weights, network or GPU."
EXAMPLES = (
    "lsr-scale plan mistral_lsr --card-gib 24",
    "lsr-scale plan run.yaml --set deepspeed.config=zero3 --gpus 4",
    "lsr-scale plan --budget 4M --model mistralai/Mistral-7B-v0.1 > run.yaml",
)


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    add_run_arguments(parser)
    parser.add_argument("--gpus", type=count, help="1 by default")
    card = "say whether it fits: one card's GiB, as nvidia-smi shows them (MiB / 1024); by default this machine's GPU"
    parser.add_argument("--card-gib", type=positive_number, metavar="24", help=card)
    parser.add_argument(
        "--budget", metavar="4M", help="propose adapters of so many parameters at most, in place of that"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="with --budget and no CONFIG: the model, all its linears adapted"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    if args.budget:
        return _propose(args)
    if args.model:
        raise UserError(
            "--model goes with --budget; without it, give a configuration, such as lsr-scale plan mistral_lsr"
        )
    file = find_file(args)
    from lsr_scale.config.run import load_run
    from lsr_scale.config.trials import is_sweep, read_sweep

    if is_sweep(file, args.set):
        return _of_sweep(read_sweep(file, args.set), args)
    config = load_run(file, args.set)
    with quick_imports():
        from lsr_scale.planning import fit, plan, render

    result = plan(config, args.gpus or 1)
    card = args.card_gib or _own_card_gib()
    verdict = fit(config, result, card) if card and result.traced else None
    if args.json:
        print(json.dumps({**asdict(result), "fit": None if verdict is None else asdict(verdict)}, indent=2))
    else:
        console = Screen()
        console.print(render(result))
        if verdict is not None:
            console.print(f"this run {verdict.in_words()}", style="bold")
    return 0


def _of_sweep(sweep: "Sweep", args: argparse.Namespace) -> int:
    """Print the plan of a sweep's largest trial, and what several take together."""
    with quick_imports():
        from lsr_scale.planning import render
        from lsr_scale.planning.together import plan_together
        from lsr_scale.training.steps.sharing import alone_words

    if args.gpus:
        raise UserError("--gpus: each trial of a sweep is trained on one GPU; leave it out")
    result = plan_together(sweep)
    card = args.card_gib or _own_card_gib()
    if args.json:
        together = {"trial": result.trial, "together_gib": result.totals(), "fit": card and result.most(card)}
        together |= {"alone_because": result.alone_because, "alone": result.alone}
        print(json.dumps({**asdict(result.one), **together}, indent=2))
        return 0
    console = Screen()
    console.print(f"the largest of {amount(result.num_trials, 'trial')}: {result.trial}\n", soft_wrap=True)
    console.print(render(result.one))
    if result.alone_because:
        why = f"trials are trained one after the other, as they cannot share steps: {result.alone_because}"
        console.print(why, soft_wrap=True)
    else:
        totals = ", ".join(f"{number}: {gib:.2f} GiB" for number, gib in result.totals().items())
        console.print(f"trials that share a step: {totals}", soft_wrap=True)
        if result.alone:
            console.print(alone_words(result.alone), soft_wrap=True)
    if card and result.one.traced:
        number = result.most(card)
        fits = "it fits" if result.alone_because else f"{number} share a step"
        console.print(f"on a card of {card:.4g} GiB {fits if number else 'not one trial fits'}", style="bold")
    return 0


def _own_card_gib() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def _propose(args: argparse.Namespace) -> int:
    num_parameters = parse_count(args.budget, "--budget")
    for name, value in (("--gpus", args.gpus), ("--card-gib", args.card_gib)):
        if value is not None:
            raise UserError(f"{name} {value:g}: has no effect with --budget, which counts parameters; leave it out")
    if args.model and (args.config or args.config_path):
        raise UserError("--model and a configuration both name a model; give one of them")
    if args.model and args.set:
        raise UserError("--set: has no effect with --model, which brings no configuration; leave it out")
    from lsr_scale.config import difference

    with quick_imports():
        from lsr_scale.planning import budget

    values: dict[str, Any] = {"model": {"name": args.model}, "data": {"train": ["rows.jsonl"]}}
    if args.model:
        result = budget.propose(args.model, num_parameters)
        if result.quantization != "nf4":
            values["model"]["quantization"] = result.quantization
    else:
        config, written = read_run(args)
        values = difference(config, written).values
        targets = config.adapter.options["target_modules"] or "all-linear"
        model = config.model
        about = (model.task, model.num_labels, model.revision, model.quantization)
        result = budget.propose(model.name, num_parameters, targets, *about)
    if args.json:
        print(result.to_json())
    else:
        print(printable(budget.render(result, values)), end="")
    return 0
