"""The command line: parse, call, and say what went wrong in words. No logic of its own."""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from lsr_scale.errors import LOST_PEER, UserError, one_screen, printable
from lsr_scale.paths import user_path
from lsr_scale.screen import Screen, open_streams

SECONDS_FOR_RANK_0 = 4.0
_LARGEST = 10**9  # of what is counted on the command line
# the system's words, and what torch.save makes of them
_FULL_DISK = ("No space left on device", "PytorchStreamWriter", "inline_container", "iostream error")
# CUDA's words where torch has no exception of its own
_FULL_GPU = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# torch's words, the C++ library's and the system's
_FULL_MEMORY = ("DefaultCPUAllocator: ", "std::bad_alloc", "Cannot allocate memory", "not enough memory: you tried")
# a peer's end, in gloo's words and NCCL's
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "ncclSystemError")


class _Parser(argparse.ArgumentParser):
    """Takes an option by its whole name and once, and says what is wrong on one screen."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {one_screen(message)}\n")


class _Once(argparse.Action):
    """Stores an option's value; a second one would take the first one's place unsaid."""

    given = False

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.given and self.option_strings:
            raise argparse.ArgumentError(self, "stands twice; keep one of them")
        self.given = True
        setattr(namespace, self.dest, values)


class _YesOrNo(argparse.BooleanOptionalAction):
    """`--verify` or `--no-verify`, not both."""

    given: str | None = None

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if self.given not in (None, option_string):
            raise argparse.ArgumentError(self, f"{self.given} and {option_string} contradict each other; keep one")
        self.given = option_string
        super().__call__(parser, namespace, values, option_string)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lsr-scale",
        description="Fine-tune 4- and 8-bit language models with Kronecker-structured adapters.",
    )
    shared = _Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared])

    def takes_run(sub: argparse.ArgumentParser, required: bool = True) -> None:
        sub.add_argument("config_path", nargs="?", metavar="CONFIG", help="the run's YAML file")
        sub.add_argument("--config", help="the same, by name")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="for instance training.learning_rate=1e-3"
        )
        sub.set_defaults(needs_config=required)

    sub = command("train", "Train a run: score, train, score again, save the adapter.")
    takes_run(sub)
    sub.add_argument("--resume", metavar="auto|CHECKPOINT", help="go on from the newest checkpoint, or from this one")
    sub.add_argument("--overwrite", action="store_true", help="start again in a folder that holds a run")
    sub.add_argument("--quiet", action="store_true", help="print results only")
    sub.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it

    moved = "the base model, where it lies elsewhere than when the run began"
    sub = command("eval", "Load a run's adapter onto its base again and score multiple-choice tasks.")
    sub.add_argument("run", help="the run's folder")
    sub.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="task names, files or folders; the run's own by default"
    )
    sub.add_argument("--limit", type=_count, help="score only the first so many questions of each task")
    sub.add_argument("--base", metavar="MODEL", help=moved)
    sub.add_argument("--base-only", action="store_true", help="score the base without the adapter")
    sub.add_argument("--without-questions", action="store_true", help="a control: score the choices alone")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("generate", "Try a run: continue a prompt.")
    sub.add_argument("run", help="the run's folder")
    sub.add_argument(
        "--prompt", required=True, type=_with_new_lines, help=r"\n is a new line, \\n a backslash and an n"
    )
    sub.add_argument("--max-new-tokens", type=_count, default=64)
    sub.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    sub.add_argument("--base", metavar="MODEL", help=moved)
    sub.add_argument("--base-only", action="store_true", help="without the adapter")

    sub = command("export", "Write a trained adapter for other programs, and verify it.")
    sub.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's folder, or an adapter's")
    sub.add_argument("--to", required=True, choices=("adapter", "lora", "merged", "gguf"), help="the format")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    sub.add_argument("--bits", type=int, choices=(16, 8, 4), help="of the factors, for adapter; 16 by default")
    sub.add_argument("--max-rank", type=_count, help="truncate to this rank, for lora and gguf")
    sub.add_argument("--dtype", help="float32, bfloat16, float16; merged: also nf4; gguf --merged: also q8_0")
    sub.add_argument("--merged", action="store_true", help="a full GGUF rather than an adapter, for gguf")
    sub.add_argument("--base-gguf", metavar="FILE", help="a GGUF of the base, for gguf --merged: vocabulary, metadata")
    sub.add_argument("--base", metavar="MODEL", help=f"{moved}, or nothing beside the adapter names it")
    sub.add_argument("--verify", action=_YesOrNo, default=True, help="compare logits")
    sub.add_argument(
        "--accuracy",
        action=_YesOrNo,
        help="score the run's tasks as trained and exported; by default where the export loses something",
    )

    sub = command("inspect", "Show what is in an adapter: shapes, ranks, size, spectrum and condition of its factors.")
    sub.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run's folder, or an adapter's")
    sub.add_argument("--png", metavar="FILE", help="where to draw; spectra.png in the folder by default")
    sub.add_argument("--json", action="store_true", help="print JSON; drawn only with --png")

    sub = command("merge", "Add adapters of one base up, exactly, into one LoRA adapter.")
    sub.add_argument("sources", nargs="+", metavar="RUN_OR_ADAPTER")
    sub.add_argument("--weights", nargs="+", type=float, help="one for each; 1 by default")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    sub.add_argument("--max-rank", type=_count, help="truncate the sum to this rank")
    sub.add_argument("--dtype", default="float32", help="float32, bfloat16, float16")

    sub = command("preview", "Show a few training samples as tokens, and what of them is supervised.")
    takes_run(sub)
    sub.add_argument("--samples", type=_count, default=3)

    sub = command("plan", "Tell parameters, bytes and memory of a run; needs no weights, network or GPU.")
    takes_run(sub)
    sub.add_argument("--gpus", type=_count, help="1 by default")
    card = "say whether it fits: one card's GiB, as nvidia-smi shows them (MiB / 1024); by default this machine's GPU"
    sub.add_argument("--card-gib", type=_positive, metavar="24", help=card)
    sub.add_argument("--budget", metavar="4M", help="propose adapters of so many parameters at most, in place of that")
    sub.add_argument("--model", metavar="NAME", help="with --budget and no CONFIG: the model, all its linears adapted")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("doctor", "Report versions, hardware, which fast paths are on, and known bad combinations.")
    takes_run(sub, required=False)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("config", "Check a run and print it with every value resolved.")
    takes_run(sub, required=False)
    sub.add_argument("--json-schema", action="store_true", help="print the JSON schema of a run's file instead")
    return parser


def _positive(text: str) -> float:
    """Return a number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to {_LARGEST:,}, got {text!r}")
    return number


def _with_new_lines(text: str) -> str:
    r"""Return a text in which \n, as it is typed into a shell's quotes, is a new line; \\n stays \n."""
    return re.sub(r"\\(\\?)n", lambda found: r"\n" if found[1] else "\n", text)


def _count(text: str) -> int:
    """Return a number from 1 on, for argparse."""
    number = int(text) if re.fullmatch("[0-9]{1,12}", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    if number > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number up to {_LARGEST:,}, got {text!r}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    0; 1, doctor found something; 2, a mistake; 130, interrupted, while training once a checkpoint was saved; 143, ended
    by SIGTERM, a checkpoint saved.
    """
    open_streams()
    args = _parser().parse_args(arguments)
    try:
        _quiet_libraries(args.debug)
        status = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        saved = "; where a checkpoint was saved, the same command with --resume auto goes on from it"
        _say_error("interrupted" + (saved if args.command == "train" else ""))
        status = 130
    except BrokenPipeError:  # the reader of our output left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        from lsr_scale.training.callbacks.signals import Terminated

        words = str(error) if isinstance(error, UserError | Terminated) else _remedy(error)
        if words is None:
            raise
        if args.debug:
            traceback.print_exc()
        _say_error(words)
        status = error.status if isinstance(error, Terminated) else 2
    if status and os.environ.get("WORLD_SIZE"):
        # the other processes wait for this one in a collective; ending at once lets the launcher end them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _say_error(text: str) -> None:
    rank = _rank()
    if text == LOST_PEER:
        time.sleep(1.0)  # the launcher is to see first the one that it lost, and to name that one
    elif rank != "0":
        # Most mistakes stop all processes alike: the first one says it and ends, and the launcher ends this one before
        # it has waited to the end. What only this process met, it says.
        time.sleep(SECONDS_FOR_RANK_0 * _busyness())
    if rank != "0":
        text = f"rank {rank}: {text}"
    text = one_screen(text)
    with contextlib.suppress(BrokenPipeError):  # its reader may be gone, as after Ctrl-C on `... |& tee`
        print(f"\nlsr-scale: {text}", file=sys.stderr, flush=True)


def _rank() -> str:
    """Return the launcher's number of this process as it stands, for it may be none; "0" without a launcher."""
    return os.environ.get("RANK") or "0"


def _busyness() -> float:
    """Return how many processes want each core of this host, from 1 to 10: on a busy one the others come later."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 1.0
    return min(10.0, max(1.0, load / (os.cpu_count() or 1)))


def _remedy(error: Exception) -> str | None:
    """Return words for a failure of the machine rather than of the program, None for a bug."""
    import torch
    from safetensors import SafetensorError

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _FULL_GPU):
        return (
            "the GPU's memory ran out; lower training.per_device_train_batch_size or training.max_length, or set "
            "training.memory: save (lsr-scale plan tells what each takes)"
        )
    if _no_memory(error):
        return (
            "this machine's memory (not the GPU's) ran out; lower training.per_device_train_batch_size, "
            "training.max_length or training.dataloader_num_workers, give it more, or end what else runs on it"
        )
    if any(words in text for words in _FULL_DISK) and "Reader" not in text:
        return (
            "the disk is full; free some space, then go on with --resume auto (whole checkpoints stay, and one cut "
            "short is passed over)"
        )
    if any(words in text for words in _LOST_PEER):
        return LOST_PEER
    if isinstance(error, SafetensorError):
        return f"a weight file is damaged or cut short ({text}); restore it, or resume from the checkpoint before"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return None


def _no_memory(error: BaseException) -> bool:
    """Tell whether the machine's memory ran out, by the exception or one that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or any(words in str(seen) for words in _FULL_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _quiet_libraries(debug: bool) -> None:
    """Leave the screen to the run: the libraries' warnings and bars only with --debug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
    if debug:
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a letter of a title that a picture cannot show
    for name in ("deepspeed", "torch.distributed", "trl", "peft", "accelerate", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # this one sets its level when it is imported, so a filter; it warns that there is no GPU, and the like
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if _rank() != "0":
        logging.getLogger().setLevel(logging.ERROR)  # the first process speaks for all


def _run_of(args: argparse.Namespace) -> Any:
    from lsr_scale.config import load_run

    path = args.config or args.config_path
    if path is None or (args.config and args.config_path and args.config != args.config_path):
        raise UserError("expected one configuration: --config configs/NAME.yaml")
    keys = [assignment.partition("=")[0].strip() for assignment in args.set]
    for index, key in enumerate(keys):
        if key in keys[index + 1 :] and _rank() == "0":
            print(one_screen(f"note: --set {args.set[index]} has no effect, as {key} is set again"), file=sys.stderr)
    return load_run(path, args.set)


def _train(args: argparse.Namespace) -> int:
    from lsr_scale.run.folder import RunFolder
    from lsr_scale.run.train import train

    run, file = _run_of(args), user_path(args.config or args.config_path)
    name = file.stem
    of_run = RunFolder(file.resolve().parent)
    if file.resolve() == of_run.config and of_run.is_run():  # a run's own: it means that run, wherever it lies
        name = file.resolve().parent.name
        if run.training["output_dir"] is None and (args.overwrite or args.resume == "auto"):
            run = run.model_copy(update={"training": {**run.training, "output_dir": str(file.parent)}})
    train(run, name, args.resume, args.overwrite, args.quiet)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from lsr_scale.run import evaluate

    result = evaluate.evaluate_run(
        args.run, args.tasks, args.limit, args.base_only, args.without_questions, base=args.base
    )
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        evaluate.print_accuracy(result)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from lsr_scale.run import evaluate

    model, tokenizer, _ = evaluate.load_run_model(args.run, args.base_only, base=args.base)

    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    print(printable(evaluate.generate(model, tokenizer, args.prompt, args.max_new_tokens, args.chat, note)))
    return 0


def _export(args: argparse.Namespace) -> int:
    from lsr_scale.export import export

    options = {"bits": args.bits, "max_rank": args.max_rank, "dtype": args.dtype}
    options |= {"merged": args.merged, "base_gguf": args.base_gguf}
    export(args.source, args.to, args.out, **options, verify=args.verify, accuracy=args.accuracy, base=args.base)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from lsr_scale.export import inspect

    if args.png:
        inspect.check_place(user_path(args.png, "--png"))
    report = inspect.inspect_adapter(args.source)
    console = Screen()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        console.print(inspect.render(report))
    if args.json and not args.png:
        return 0
    picture = user_path(args.png, "--png") if args.png else user_path(args.source) / "spectra.png"
    try:
        inspect.draw(report, picture)
    except UserError as error:
        if args.png:
            raise
        print(f"note: the spectra are not drawn: {error}", file=sys.stderr)  # nobody asked for the file
        return 0
    if not args.json:
        console.print(f"spectra  {picture}", soft_wrap=True)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from lsr_scale.export import merge

    merge(args.sources, args.weights, args.out, max_rank=args.max_rank, dtype=args.dtype)
    return 0


def _preview(args: argparse.Namespace) -> int:
    from rich.text import Text

    from lsr_scale.data.formats import KIND_MEANING
    from lsr_scale.data.preview import preview
    from lsr_scale.training.assembly import check_run_fits, read_data

    run = _run_of(args)
    notes: list[str] = []
    data = read_data(run, say=notes.append)
    check_run_fits(run, data)
    shown = preview(data.train, data.kind, data.tokenizer, args.samples, run.training, data.validation)
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


def _plan(args: argparse.Namespace) -> int:
    from lsr_scale.plan import fit, plan, render

    if args.budget:
        return _plan_budget(args)
    if args.model:
        raise UserError(
            "--model goes with --budget; without it, give a configuration: lsr-scale plan configs/NAME.yaml"
        )
    run = _run_of(args)
    result = plan(run, args.gpus or 1)
    card = args.card_gib or _own_card_gib()
    verdict = fit(run, result, card) if card and result.traced else None
    if args.json:
        print(json.dumps({**asdict(result), "fit": None if verdict is None else asdict(verdict)}, indent=2))
    else:
        console = Screen()
        console.print(render(result))
        if verdict is not None:
            console.print(f"this run {verdict.in_words()}", style="bold")
    return 0


def _own_card_gib() -> float | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def _plan_budget(args: argparse.Namespace) -> int:
    from lsr_scale.plan import budget

    count = budget.parse_budget(args.budget)
    for name, value in (("--gpus", args.gpus), ("--card-gib", args.card_gib)):
        if value is not None:
            raise UserError(f"{name} {value:g}: has no effect with --budget, which counts parameters; leave it out")
    if args.model and (args.config or args.config_path):
        raise UserError("--model and a configuration both name a model; give one of them")
    if args.model and args.set:
        raise UserError("--set: has no effect with --model, which brings no configuration; leave it out")
    if args.model:
        result = budget.propose(args.model, count)
    else:
        run = _run_of(args)
        targets = run.adapter.options["target_modules"] or "all-linear"
        section = run.model
        result = budget.propose(section.name, count, targets, section.task, section.num_labels, section.revision)
    if args.json:
        print(result.to_json())
    else:
        Screen().print(budget.render(result))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from lsr_scale.doctor import doctor, render

    given = args.config or args.config_path or args.set
    report = doctor(_run_of(args) if given else None)
    if args.json:
        print(report.to_json())
    else:
        Screen().print(render(report))
    return report.exit_code


def _config(args: argparse.Namespace) -> int:
    from lsr_scale import config

    if args.json_schema:
        if args.config or args.config_path or args.set:
            raise UserError("--json-schema: prints what any run's file may say; give no configuration and no --set")
        print(json.dumps(config.json_schema(), indent=2))
    else:
        print(config.dump_yaml(_run_of(args)), end="")
    return 0


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "export": _export,
    "inspect": _inspect,
    "merge": _merge,
    "preview": _preview,
    "plan": _plan,
    "doctor": _doctor,
    "config": _config,
}

if __name__ == "__main__":
    sys.exit(main())
