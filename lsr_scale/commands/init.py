"""`lsr-scale init`: the commented YAML of a run on one's own model and data."""

import argparse
import os
import sys
from typing import Any

from lsr_scale.commands.arguments import Parser
from lsr_scale.errors import UserError, did_you_mean, printable
from lsr_scale.paths import user_path

HELP = "Write the commented YAML of a run on your model and data."
EXAMPLES = (
    "lsr-scale init --data my_chat.jsonl --model mistralai/Mistral-7B-Instruct-v0.3",
    "lsr-scale init classify --data reviews.csv --method lsr --out reviews.yaml",
)
_MODEL, _METHOD = "builtin:smollm2-135m-instruct", "lora"
_BUILTIN_DATA = {"chat": "builtin:chat", "commonsense": "builtin:commonsense"}


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    kinds = "chat (any text to write), classify, or commonsense (multiple choice); found in the data by default"
    parser.add_argument("kind", nargs="?", choices=("chat", "classify", "commonsense"), help=kinds)
    parser.add_argument("--model", metavar="NAME", help=f"hub name or local folder; {_MODEL} by default")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="files or folders of rows to train on")
    parser.add_argument("--method", metavar="NAME", help="the adapter's: lora by default; lsr, kron_lora, ...")
    parser.add_argument("--out", metavar="FILE", help="the file to write; named after data and method by default")
    parser.add_argument("--force", action="store_true", help="write over a file")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    asking = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if args.method is not None:
        _check_method(args.method)
    if args.out is not None:
        _check_free(args.out, args.force)
    sources = args.data or _ask_for_data(args.kind, asking)
    if not sources:
        raise UserError(
            "--data: expected files of rows to train on, such as --data my.jsonl: conversations ({messages}), prompts "
            "and completions, texts with a label, or multiple-choice questions"
        )
    method = args.method or (None if asking else _METHOD)
    if args.out is None and method is not None:
        _check_free(_default_name(sources[0], method), args.force)
    from lsr_scale.new_run.data_facts import look_at_data

    data = look_at_data(sources, args.kind)
    for line in data.lines:
        print(printable(line))
    name = args.model or _ask("Model: hub name or folder", _MODEL, asking)
    from lsr_scale.new_run.model_facts import look_at_model

    model = look_at_model(name, "seq_cls" if data.kind == "classify" else "causal_lm")
    print(printable(model.line))
    from lsr_scale.new_run.template import run_text

    method = method or _ask("Method (lora, lsr, kron_lora, ...)", _METHOD, asking)
    _check_method(method)
    out = args.out or _default_name(sources[0], method)
    _check_free(out, args.force)
    text, _ = run_text(model, data, method, str(user_path(out, "--out")))
    from lsr_scale import files

    files.write_text(user_path(out, "--out"), text)
    print(printable(f"written: {out}\n"))
    for command, why in _next(out):
        print(printable(f"  {command:<{len(out) + 19}} {why}"))
    return 0


def _check_method(method: str) -> None:
    from lsr_scale.config.sections import ADAPTER_SECTIONS

    if method not in ADAPTER_SECTIONS:
        raise UserError(f"--method {method!r}: {did_you_mean(method, ADAPTER_SECTIONS)}")


def _check_free(out: str, force: bool) -> None:
    path = user_path(out, "--out")
    if path.is_dir():
        raise UserError(f"--out {out}: expected a file, got a folder; name a file in it, such as {path / 'run.yaml'}")
    if os.path.lexists(path) and not force:
        raise UserError(f"{out}: is there already; --force writes over it, --out names another")


def _ask_for_data(kind: str | None, asking: bool) -> list[str]:
    built_in = _BUILTIN_DATA.get(kind or "", "")
    answer = _ask("Data: a file of rows (JSONL, CSV, parquet) or a folder", built_in, asking)
    return [answer] if answer else []


def _ask(question: str, default: str, asking: bool) -> str:
    """Return an answer from the terminal, the default for an empty one or where nobody can be asked."""
    if not asking:
        return default
    try:
        return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError:
        print()
        raise UserError("nothing was written; give the answers as options: lsr-scale init --help") from None


def _default_name(source: str, method: str) -> str:
    stem = user_path(source).name.removeprefix("builtin:").split(".")[0]
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in stem).strip("_-")
    return f"{kept or 'run'}_{method}.yaml"


def _next(out: str) -> list[tuple[Any, str]]:
    import shlex

    quoted = shlex.quote(out)
    return [
        (f"lsr-scale preview {quoted}", "what of the rows is learned"),
        (f"lsr-scale plan {quoted}", "does it fit?"),
        (f"lsr-scale train {quoted}", "an adapter"),
    ]
