"""The folder that every case starts in, and the register of shapes."""

import atexit
import contextlib
import functools
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from lsr_scale import cli
from lsr_scale.config import dump_yaml
from lsr_scale.exporting import export
from tests.chaos.runner import PLANTED, Case, Shape
from tests.helpers.tiny_runs import do, labelled, save_classifier, save_llama, tiny_run, write_rows

SHAPES: dict[str, Shape] = {}
# how many cases a shape gets beside the others: what takes a whole training step gets few
SHARES: dict[str, float] = {}

RUN = """\
model:
  name: model
  quantization: none
adapter:
  method: lsr
  rank: 4
  separation_rank: 2
  target_modules: [q_proj, v_proj]
data:
  train: [rows.jsonl]
training:
  output_dir: out
  max_steps: 2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  logging_steps: 1
  learning_rate: 0.001
  save_steps: 1
eval:
  tasks: [questions.jsonl]
"""
CLASSIFIER = """\
model: {name: encoder, quantization: none, task: seq_cls, num_labels: 2}
adapter: {method: lsr, rank: 4, separation_rank: 2, target_modules: [query, value]}
data: {train: [labelled.jsonl]}
training: {output_dir: out, max_steps: 1, per_device_train_batch_size: 2}
"""
# what nobody should ever see run
CODE = f"__import__('pathlib').Path('{PLANTED}').write_text('x')"


class Planted:
    """Pickles to code that leaves a file."""

    def __reduce__(self) -> Any:
        return eval, (CODE,)


def shape(share: float) -> Callable[[Shape], Shape]:
    """Register a function as a shape, named by its module's area: `yaml_tags` is `yaml.tags`."""

    def register(function: Shape) -> Shape:
        name: str = function.__name__.replace("_", ".", 1)  # pyright: ignore[reportFunctionMemberAccess]
        SHAPES[name] = function
        SHARES[name] = share
        return function

    return register


@functools.cache
def _template() -> Path:
    """Return a folder with models, rows, run files, a finished run, exports of it and a project of the user's own."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-template"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cli.quiet_libraries(debug=False)
    datasets.disable_progress_bars()  # a command says so in a variable, before it imports them
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        save_llama(Path("model"), num_hidden_layers=2, chat=True)
        save_classifier(Path("encoder"), "bert")
        write_rows(Path("labelled.jsonl"), labelled())
        run = tiny_run(
            Path(),
            model={"quantization": "none"},
            training={"output_dir": "done", "max_steps": 6},
            adapter={"target_modules": ["q_proj", "v_proj"]},
        )
        do(run)
        Path("run.yaml").write_text(RUN)
        Path("classifier.yaml").write_text(CLASSIFIER)
        Path("stopped.yaml").write_text(dump_yaml(run).replace("output_dir: done", "output_dir: stopped"))
        shutil.copytree("done", "stopped")
        shutil.rmtree("stopped/adapter")
        shutil.rmtree("stopped/checkpoint-6")
        Path("stopped/results.json").unlink()
        Path("stopped/config.yaml").write_text(Path("stopped.yaml").read_text())
        quietly: dict[str, Any] = {"verify": False, "accuracy": False, "say": lambda text: None}
        export("done", "lora", "lora", **quietly)
        export("done", "adapter", "adapter", bits=4, **quietly)
        for name, content in {"config.yaml": "mine: 1\n", "results.json": "{}", "eval/notes.txt": "mine"}.items():
            Path("project", name).parent.mkdir(parents=True, exist_ok=True)
            Path("project", name).write_text(content)
        Path("notes.txt").write_text("mine\n")
    return folder


def furnish(folder: Path) -> None:
    """Make a case's folder."""
    shutil.copytree(_template(), folder)


def pick(chance: random.Random, *choices: Any) -> Any:
    """Return one of the choices."""
    return chance.choice(choices)


def try_run(command: str, text: str | bytes, place: Path, *words: str, **options: Any) -> Case:
    """Return a case that runs a command on a run file of this text."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (place / "bad.yaml").write_bytes(content)
    writes = ("out", "out.lock") if command == "train" else ()
    return Case([command, "bad.yaml", *words], **{"writes": writes, **options})


def try_set(command: str, *assignments: str, base: str = "run.yaml", **options: Any) -> Case:
    """Return a case that runs a command with `--set` for each assignment."""
    words = [word for assignment in assignments for word in ("--set", assignment)]
    writes = ("out", "out.lock") if command == "train" else ()
    return Case([command, base, *words], **{"writes": writes, **options})


def with_value(raw: str, chance: random.Random) -> str:
    """Return the text of a run with one of its values, or one of its keys, replaced by other text."""
    lines: list[str] = str(RUN).splitlines()
    number = chance.choice([index for index, line in enumerate(lines) if line.startswith("  ")])
    key, _, value = lines[number].partition(": ")
    lines[number] = f"  {raw}: {value}" if chance.random() < 0.15 and "\n" not in raw else f"{key}: {raw}"
    return "\n".join(lines) + "\n"


def odd_file(path: Path, chance: random.Random) -> str:
    """Put something that is no file of words in a path's place; return what."""
    kind = pick(
        chance, "pipe", "device", "zero", "random", "folder", "nowhere", "loop", "socket-like", "empty", "bytes"
    )
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("device", "zero", "random"):
        path.symlink_to({"device": "/dev/null", "zero": "/dev/zero", "random": "/dev/urandom"}[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "socket-like":
        path.symlink_to("/proc/self/mem")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(chance.randbytes(300))
    return kind


def change_json(file: Path, chance: random.Random, values: Sequence[Any], keys: list[str] | None = None) -> None:
    """Set a key of a JSON file, one of those named or any, to one of these values."""
    content = json.loads(file.read_text())
    content[chance.choice(keys or list(content))] = chance.choice(values)
    file.write_text(json.dumps(content))


def damage(file: Path, chance: random.Random) -> None:
    """Cut a file short, flip bits of it, or put other bytes in its place."""
    content = bytearray(file.read_bytes())
    kind = pick(chance, "cut", "flip", "head", "grown", "other")
    if kind == "cut":
        content = content[: chance.randrange(len(content))]
    elif kind in ("flip", "head"):
        for _ in range(1 + chance.randrange(8)):
            content[chance.randrange(min(len(content), 400) if kind == "head" else len(content))] ^= (
                1 << chance.randrange(8)
            )
    elif kind == "grown":
        content += chance.randbytes(50)
    else:
        content = bytearray(
            pick(chance, b"", b"{}", b"[]", b"null", b"\0" * 100, b"[" * 100_000, b"9" * 5000, b'{"a":' * 9999)
        )
    file.write_bytes(content)


# JSON values that no setting takes, or few do
NASTY: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**70, 10**4000, 1e308, float("nan"), float("inf"), "", "x", "\0", "../../etc/passwd"),
    *([], {}, [[]], {"": 0}, {"a": {"b": [1]}}, ["../x"], "(a|a)*b", "[", "[/x]", "[bold]", "\x1b[2J", "x" * 10_000),
    *(list(range(2000)), "\ud800", -0.0, 1e-320, "${HOME}", "s3://bucket/x", "~nosuchuser/x", "/dev/zero"),
]
