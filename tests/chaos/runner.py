"""Hostile inputs to every command, and what is promised of each: an answer or a refusal in words, and nothing lost.

    python -m tests.chaos --cases 3000 --seed 0 --json counts.json
    python -m tests.chaos --only yaml.tags-17            what that case is, what was printed and what is wrong with it

A case is the name of a shape (`shapes.py`) and a number that seeds its random choices, so a name says it
all. It runs in a folder of its own, which is compared before and after. `tests/test_chaos.py` runs some 300 of them.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

LINES, COLUMNS = 24, 80
CPU_SECONDS = 20  # of what is not to end by itself; a busy machine does not change it
SECONDS = 900  # of what waits for ever
MEMORY = 3 << 30  # more than any case needs, less than what would hurt others
PLANTED = "PLANTED"  # what planted code writes into the case's folder

CLASSES = (
    *("answered", "refused", "traceback", "accepted and wrong", "refused and right", "destroyed", "hung"),
    *("filled the screen", "unsafe"),
)


@dataclass
class Case:
    """One try of a command.

    Attributes:
        words: The command line; empty where `call` is tried in its place.
        expect: "refused" (status 2), "answered" (status 0, or 1 of doctor), or "either".
        says: Words of which the answer must have one.
        writes: Names in the folder that may appear or change.
        kept: Names under those that may not change all the same.
        check: Looks at what was said and written; returns what is wrong, or "".
        environment: Variables, None for one that is to be unset.
        stream: How standard output and error are: "utf-8", "ascii" or "closed".
        call: A function of the library, whose `UserError` is a refusal.
    """

    words: list[str] = field(default_factory=list)
    expect: Literal["refused", "answered", "either"] = "refused"
    says: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    check: Callable[[str, str], str] | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    stream: str = "utf-8"
    call: Callable[[], Any] | None = None


Shape = Callable[[Path, random.Random], Case]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: one of `CLASSES`, and what is wrong in words."""

    name: str
    kind: str
    what: str
    words: list[str]
    said: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Tell whether the promise was kept."""
        return self.kind in ("answered", "refused")


class _Hung(BaseException):
    """Raised by the alarm; no `except Exception` holds it."""


def snapshot(folder: Path) -> dict[str, str]:
    """Return what each name under a folder is: a file's size and hash, a link's target, or another kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {os.readlink(path)}"
        elif path.is_file():
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
        else:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "other"
    return found


def changes(
    before: dict[str, str], after: dict[str, str], allowed: tuple[str, ...], kept: tuple[str, ...]
) -> list[str]:
    """Return the names that changed and may not: those outside `allowed`, and those in it that are `kept`."""

    def within(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == root or name.startswith(f"{root}/") for root in roots)

    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return [name for name in changed if not within(name, allowed) or within(name, kept)]


@contextlib.contextmanager
def _surroundings(case: Case, folder: Path, out: Path, err: Path) -> Iterator[None]:
    """Run within a folder, with a case's variables and streams, a limit of memory and an alarm."""
    old_folder, old_variables = Path.cwd(), dict(os.environ)
    old_streams, old_handles = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    numbers = signal.SIGALRM, signal.SIGPROF, signal.SIGINT, signal.SIGTERM
    old_handlers = {number: signal.getsignal(number) for number in numbers}

    def end(*_: Any) -> None:
        raise _Hung

    for number, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update({"COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"})
    for name, value in case.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if case.stream == "closed":
        sys.stdout = sys.stderr = None  # as Python has them where a shell closed them
    else:
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False), encoding=case.stream, errors=errors, write_through=True
            )
            for number, errors in ((1, "strict"), (2, "backslashreplace"))
        )
    os.chdir(folder)
    signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGPROF, end)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old_limit[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 5.0)  # again and again, for what swallows it
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.flush()
        sys.stdout, sys.stderr = old_streams
        for number, handle in zip((1, 2), old_handles, strict=True):
            os.dup2(handle, number)
            os.close(handle)
        os.environ.clear()
        os.environ.update(old_variables)
        os.chdir(old_folder)


def _tried(case: Case) -> tuple[Any, str]:
    """Return the exit status, or "hung" or "traceback", and the traceback."""
    from lsr_scale import cli
    from lsr_scale.errors import UserError

    try:
        if case.call is None:
            return cli.main(case.words), ""
        case.call()
        return 0, ""
    except _Hung:
        return "hung", ""
    except UserError as error:
        if case.call is None:
            return "traceback", traceback.format_exc()
        cli.failures.say(str(error))
        return 2, ""
    except SystemExit as ended:  # argparse
        return ended.code, ""
    except BaseException:
        return "traceback", traceback.format_exc()


def judge(case: Case, status: Any, out: str, err: str, changed: list[str], planted: bool) -> tuple[str, str]:
    """Return the class of a case, and what is wrong in words."""
    said = out + err
    if planted:
        return "unsafe", "planted code ran"
    if changed:
        return "destroyed", f"changed: {', '.join(changed[:6])}"
    if status in ("hung", "traceback"):
        return status, ""
    if "Traceback (most recent call last)" in said:
        return "traceback", "a traceback on the screen"
    if status not in (0, 1, 2) or (status == 1 and case.words[0] != "doctor"):
        return "traceback", f"status {status}"
    if status == 2:
        if case.expect == "answered":
            return "refused and right", "expected an answer"
        lines = err.count("\n")  # a table that was asked for too, as of inspect, stands before it in its own right
        if lines > LINES or len(err) > LINES * COLUMNS:
            return "filled the screen", f"{lines} lines, {len(err)} characters of error"
        if case.stream != "closed" and not err.strip():
            return "accepted and wrong", "refused without a word"
    elif case.expect == "refused":
        return "accepted and wrong", f"expected a refusal, got status {status}"
    if any(character < " " and character not in "\n\t\r" for character in said):
        return "filled the screen", "control characters on the screen"
    if case.says and not any(words in said for words in case.says):
        return "accepted and wrong", f"says nothing of {case.says}"
    wrong = case.check(out, err) if case.check and status in (0, 2) else ""
    return ("accepted and wrong", wrong) if wrong else ("refused" if status == 2 else "answered", "")


def run_case(name: str, seed: int = 0, keep: Path | None = None) -> Outcome:
    """Try one case.

    Args:
        name: Its name, `area.shape-number`.
        seed: Another one gives each name another case.
        keep: A folder that is to stay, to look at.
    """
    from tests.chaos.shapes import SHAPES, furnish

    shape = name.rpartition("-")[0]
    chance = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory(prefix="chaos") as temporary:
        home = keep or Path(temporary)
        folder = home / "place"
        furnish(folder)
        case = SHAPES[shape](folder, chance)
        before = snapshot(folder)
        started = time.process_time()
        with _surroundings(case, folder, home / "out", home / "err"):
            status, trace = _tried(case)
        seconds = time.process_time() - started
        out, err = ((home / stream).read_text(encoding="utf-8", errors="replace") for stream in ("out", "err"))
        planted = any(folder.rglob(PLANTED)) or (home / PLANTED).exists()
        changed = changes(
            before, snapshot(folder), case.writes if status in (0, 1) else _may_appear(case, before), case.kept
        )
        kind, what = judge(case, status, out, err, changed, planted)
    return Outcome(name, kind, what, case.words, out + err + trace, seconds)


def _may_appear(case: Case, before: dict[str, str]) -> tuple[str, ...]:
    """Return what a refusal may leave: an output folder that was not there, with what was done until then."""
    return tuple(name for name in case.writes if name not in before)


def names(cases: int) -> list[str]:
    """Return the names of so many cases, each shape as often as its share says."""
    from tests.chaos.shapes import SHARES

    total = sum(SHARES.values())
    counts = {shape: max(1, round(cases * share / total)) for shape, share in SHARES.items()}
    return [f"{shape}-{number}" for shape, count in counts.items() for number in range(count)]


def _worker(seed: int) -> None:
    """Do the cases whose names come in, one line of JSON each."""
    lines = os.fdopen(os.dup(1), "w")
    for name in sys.stdin:
        try:
            outcome = vars(run_case(name.strip(), seed))
        except Exception:  # the case itself is wrong
            outcome = vars(Outcome(name.strip(), "traceback", "the case", [], traceback.format_exc(), 0.0))
        outcome["said"] = outcome["said"][-6000:]
        outcome["words"] = [word[:200] for word in outcome["words"]]
        lines.write(json.dumps(outcome) + "\n")
        lines.flush()


def outcomes(todo: list[str], seed: int) -> Iterator[Outcome]:
    """Yield what became of cases, done in another process, which is started again where one ends it or hangs in C."""
    while todo:
        command = [sys.executable, "-m", "tests.chaos", "--worker", "--seed", str(seed)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            while todo:
                worker.stdin.write(todo[0] + "\n")
                worker.stdin.flush()
                previous = signal.signal(signal.SIGALRM, lambda *_: worker.kill())
                signal.alarm(2 * SECONDS)
                line = worker.stdout.readline()
                signal.alarm(0)
                signal.signal(signal.SIGALRM, previous)
                if not line:
                    worker.kill()
                    yield Outcome(todo.pop(0), "hung", "the process had to be ended, or ended itself", [], "", 0.0)
                    break
                todo.pop(0)
                yield Outcome(**json.loads(line))
            worker.stdin.close()


def main() -> int:
    """Run cases and print their counts by class and each that broke the promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="CASE", help="a case's name, or how names of shapes begin")
    parser.add_argument("--json", metavar="FILE", help="where to write counts and the cases that broke the promise")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _worker(args.seed)
        return 0
    if args.only and args.only.rpartition("-")[2].isdigit():
        outcome = run_case(args.only, args.seed, keep=Path(tempfile.mkdtemp(prefix="chaos")))
        from lsr_scale.errors import printable

        words = printable(" ".join(outcome.words))
        print(f"{words}\n{outcome.said}\n{outcome.kind}: {outcome.what} ({outcome.seconds:.2f} s)")
        return not outcome.is_good
    todo = [name for name in names(args.cases) if name.startswith(args.only or "")]
    counts: Counter[str] = Counter()
    bad: list[Outcome] = []
    by_shape: dict[str, list[float]] = {}
    for outcome in outcomes(todo, args.seed):
        counts[outcome.kind] += 1
        by_shape.setdefault(outcome.name.rpartition("-")[0], []).append(outcome.seconds)
        if not outcome.is_good:
            bad.append(outcome)
            last = outcome.said.strip().splitlines()[-1:] or [""]
            print(f"{outcome.name}: {outcome.kind}: {outcome.what or last[0][:200]}", flush=True)
    for kind in CLASSES:
        print(f"{counts[kind]:6}  {kind}")
    print(f"{counts.total():6}  in {sum(map(sum, by_shape.values())):.0f} s of CPU")
    if args.json:
        found = {
            "cases": counts.total(),
            "seed": args.seed,
            "counts": {kind: counts[kind] for kind in CLASSES},
            "seconds": {shape: round(sum(times) / len(times), 3) for shape, times in sorted(by_shape.items())},
            "broken": [vars(outcome) for outcome in bad],
        }
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return bool(bad)
