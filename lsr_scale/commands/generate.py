"""`lsr-scale generate`: text from a run's adapter, or from a base model."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lsr_scale.commands.arguments import BASE_HELP, Parser, count
from lsr_scale.commands.failures import ON_ALL_GPUS
from lsr_scale.errors import UserError, printable
from lsr_scale.quick_imports import quick_imports
from lsr_scale.units import amount

if TYPE_CHECKING:
    from lsr_scale.data.prompts import Prompt
    from lsr_scale.generation.sampling import Sampling
    from lsr_scale.run.generate import Answer
    from lsr_scale.run.generator import Generator

HELP = "Try a run: continue prompts, or talk to it (--chat)."
GPU_REMEDY = f"{ON_ALL_GPUS} 'eval.prompts=[...]'"
STDIN = "-"


def add_arguments(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run", nargs="?", help="the run's folder, or a checkpoint's in it")
    parser.add_argument("--model", metavar="NAME", help="a base model, in place of a run")
    parser.add_argument(
        "--prompt", type=_with_new_lines, help=r"\n is a new line, \\n a backslash and an n; - reads it from stdin"
    )
    parser.add_argument("--file", help='prompts, a row each: {"prompt": ...} or {"messages": [...]}, JSONL or the like')
    parser.add_argument(
        "--chat", action="store_true", help="use the chat template; without a prompt: talk, turn by turn"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands; no chat template")
    parser.add_argument("--system", metavar="TEXT", type=_with_new_lines, help="the system prompt, for the template")
    parser.add_argument("--max-new-tokens", type=count, default=256, help="stop there at the latest; 256 by default")
    parser.add_argument("--temperature", type=float, help="0 (default): the most likely token; 0.7: draw")
    parser.add_argument("--top-p", type=float, help="draw from the tokens that make up this probability")
    parser.add_argument("--top-k", type=int, help="draw from so many of the most likely tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    parser.add_argument("--seed", type=int, help="draw the same each time")
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    parser.add_argument("--base-only", action="store_true", help="without the adapter")
    parser.add_argument("--compare-base", action="store_true", help="the base's answer too, before the adapter's")
    parser.add_argument(
        "--quantization",
        choices=("nf4", "fp4", "int8", "none"),
        help="how --model is held; as it is quantized already, or nf4",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a line an answer")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    talks = _check_together(args)
    with quick_imports():
        from lsr_scale.generation.sampling import Sampling
        from lsr_scale.run.generator import Generator

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    if args.model:
        generator = Generator.of_base(args.model, args.quantization, say=_note)
    else:
        generator = Generator.of_run(args.run, args.base_only, args.base, say=_note)
    if talks:
        return _talk(args, generator, sampling)
    return _answer_all(args, generator, sampling)


def _check_together(args: argparse.Namespace) -> bool:
    """Refuse options that do not go together; return whether to talk, turn by turn."""
    if (args.run is None) == (args.model is None):
        raise UserError("expected a run's folder, or --model NAME for a base model: one of them")
    for name in ("base", "base_only", "compare_base"):
        if args.model and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: is about a run; --model is the base alone; leave it out")
    if args.quantization and not args.model:
        raise UserError(f"--quantization {args.quantization}: goes with --model; a run's base is held as it trained")
    if args.base_only and args.compare_base:
        raise UserError("--base-only and --compare-base: the second shows both; leave out the first")
    if args.chat and args.raw:
        raise UserError("--chat and --raw contradict each other; keep one")
    if args.prompt is not None and args.file is not None:
        raise UserError("--prompt and --file both give prompts; keep one")
    if args.prompt == "":
        raise UserError("--prompt: expected some text to continue, got none")
    talks = args.prompt is None and args.file is None
    if talks and not args.chat:
        raise UserError("expected --prompt TEXT, --file FILE, or --chat, to talk turn by turn")
    if talks and args.compare_base:
        raise UserError("--compare-base: goes with a prompt, not with a conversation; give --prompt or --file")
    return talks


def _answer_all(args: argparse.Namespace, generator: "Generator", sampling: "Sampling") -> int:
    """Answer the prompts of the command line, stdin or a file."""
    from lsr_scale.run.generate import Streamer
    from lsr_scale.run.generator import read_prompts
    from lsr_scale.screen import write

    chat = False if args.raw else (args.chat or None)
    if args.file is not None:
        prompts = read_prompts(args.file)
    else:
        prompts = [("--prompt", _stdin_text() if args.prompt == STDIN else args.prompt)]
    start = generator.conversation(args.system)
    uses_template, why = generator.uses_template(chat, args.system)
    if why and any(isinstance(prompt, str) for _, prompt in prompts):
        _note(why)

    def whole(prompt: "Prompt") -> "Prompt":
        if isinstance(prompt, str) and not uses_template:
            return prompt
        turns: Any = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return [*start, *turns]

    complete_prompts = [(where, whole(prompt)) for where, prompt in prompts]
    generator.check(complete_prompts)
    answers: list[Answer] = []
    for (where, prompt), (_, given) in zip(complete_prompts, prompts, strict=True):
        said: dict[str, Answer] = {}
        if len(prompts) > 1 and not args.json:
            write(f"{'' if not answers else chr(10)}> {printable(_shown(given))}\n")
        for name in ("base", "adapter") if args.compare_base else ("",):
            if name and not args.json:
                write(f"[{name}] ")
            streamer = None if args.json else Streamer(generator.tokenizer, lambda text: write(printable(text)))
            said[name] = generator.answer(prompt, sampling, streamer=streamer, base=name == "base", where=where)
            if not args.json:
                write("\n")
        answers += said.values()
        if args.json:
            print(json.dumps(_row(given, uses_template or isinstance(given, list), said)), flush=True)
    _note_speed(answers, sampling)
    return 0


def _row(prompt: "Prompt", uses_template: bool, said: "dict[str, Answer]") -> dict[str, Any]:
    """Return one line of --json."""
    answer = said.get("adapter") or said[""]
    row: dict[str, Any] = {"prompt": prompt, "completion": answer.text}
    if "base" in said:
        row["base_completion"] = said["base"].text
    return row | {
        "chat_template": uses_template,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "stopped": answer.stopped,
    }


def _talk(args: argparse.Namespace, generator: "Generator", sampling: "Sampling") -> int:
    """Talk, turn by turn, with a person or a pipe."""
    from lsr_scale.run.chat import HELP as COMMANDS
    from lsr_scale.run.chat import Chat, converse
    from lsr_scale.screen import write

    generator.uses_template(True, args.system)
    show: Callable[[str], None] = (lambda text: None) if args.json else (lambda text: write(printable(text)))
    chat = Chat(generator, sampling, args.system, show)
    person = sys.stdin.isatty()
    _ = generator.model  # now, not in the midst of the first turn
    if person:
        _note(COMMANDS)

    def answered(turn: str, answer: str) -> None:
        if args.json:
            print(json.dumps({"prompt": turn, "completion": answer}), flush=True)
        else:
            write("\n\n" if person else "\n")

    converse(chat, _reader(person), _note, answered, person)
    _note_speed(chat.answers, sampling)
    return 0


def _reader(person: bool) -> Callable[[], str]:
    """Return what reads the next turn: with line editing from a person, else from the pipe."""
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines by it

    def read() -> str:
        if person:
            return _with_new_lines(input("> "))
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return _with_new_lines(_text(line).rstrip("\r\n"))

    return read


def _stdin_text() -> str:
    """Return what stdin holds, its last line break left out, which is the shell's."""
    text = _text(sys.stdin.buffer.read()).removesuffix("\n")
    if not text:
        raise UserError("--prompt -: expected some text to continue on stdin, got none")
    return text


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: expected UTF-8 text, got other bytes at offset {error.start}") from None


def _shown(prompt: "Prompt") -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def _note_speed(answers: "list[Answer]", sampling: "Sampling") -> None:
    """Say how fast it was, and where an answer was cut."""
    tokens, seconds = sum(answer.tokens for answer in answers), sum(answer.seconds for answer in answers)
    if not tokens:
        return
    cut = sum(answer.stopped == "length" for answer in answers)
    which = "cut" if len(answers) == 1 else f"{cut} cut"
    more = f"; {which} at {amount(sampling.max_new_tokens, 'token')} (--max-new-tokens)" if cut else ""
    _note(f"{amount(tokens, 'token')} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s{more}")


def _with_new_lines(text: str) -> str:
    r"""Return a text in which \n, as it is typed into a shell's quotes, is a new line; \\n stays \n."""
    return re.sub(r"\\(\\?)n", lambda match: r"\n" if match[1] else "\n", text)
