"""The folder of a run: its paths, and which of the files in a folder a run wrote."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsr_scale.errors import UserError
from lsr_scale.files import cannot_write, is_own_page, is_own_picture, is_picture, remove_left_over, write_text
from lsr_scale.run.find import CHECKPOINT, find_run

# of a checkpoint: what no other trainer writes
MANIFEST, STATE, TENSORS = "manifest.json", "training_state.json", "training_state.safetensors"
SWEEP = "sweep.json"  # the state of a sweep, whose folder is no run's
_PREDICTIONS = re.compile(r".*-(before|after|eval-(base|adapter|checkpoint-[0-9]+)(-without-questions)?)\.jsonl")
_SECTIONS = {"model", "adapter", "data", "training"}


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder. Its `env.json` marks it as one: it names this package, which nothing else writes.

    config.yaml        the resolved run            adapter/        the adapter, as PEFT saves it, with base.json
    env.json           versions and machine        tokenizer/      the run's, its end token and chat template too
    data.json          hash, rows, kind of the data   checkpoint-*/   what resuming needs
    metrics.jsonl      one line a logging step     eval/           predictions before and after
    loss.png           the loss curve              results.json    counts, times, accuracies
    .earlier-run/      backup of an earlier run, until this one has saved a checkpoint (`backup.py`)
    .lock              the process that is running here (`lock.py`)
    nonfinite.jsonl    batches without a finite loss, and steps without a finite gradient
    rewards.png        rewards over the steps, KL and lengths of completions: a method's that has them
    condition.png      how far the terms of LSR-Adapt's sums cancel
    compute.json       errors in 8 bits, what stays in bfloat16: training.compute fp8, int8 (`training/compute.py`)
    tensorboard/       TensorBoard's files, with training.report_to: tensorboard
    samples.jsonl      completions of eval.prompts: {"step", "moment", "prompt", "completion"} a line
    completions.jsonl  some completions of each logging step, with their rewards: training.method: grpo
    rewards.json       what completions were worth (training.reward), with the code of a user's own functions
    adapter_lora/      the adapter as PEFT's LoRA, where training.save_as_lora asks for it
    confusion-*.png    a classifier's confusion matrices, a picture for each of its predictions in eval/
    report.html        all of it on one page that needs no other file
    """

    path: Path
    checkpoint: Path | None = None  # whose adapter is read in place of the trained one

    @property
    def config(self) -> Path:
        """The resolved run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "env.json"

    @property
    def data(self) -> Path:
        """Where the rows came from: a hash and a count a source."""
        return self.path / "data.json"

    @property
    def earlier(self) -> Path:
        """What an earlier run left, while this one has saved no checkpoint; see `backup.Backup`."""
        return self.path / ".earlier-run"

    @property
    def metrics(self) -> Path:
        """One JSON object a logging step."""
        return self.path / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def rewards(self) -> Path:
        """The rewards over the steps, for training methods that have them."""
        return self.path / "rewards.png"

    @property
    def condition(self) -> Path:
        """The condition numbers over the steps, for methods that have them."""
        return self.path / "condition.png"

    @property
    def compute_errors(self) -> Path:
        """What training.keep_in_bf16: auto measured, and which groups of linears it keeps in bfloat16."""
        return self.path / "compute.json"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The trained adapter, or that of the checkpoint."""
        return self.checkpoint or self.path / "adapter"

    def adapter_name(self) -> str:
        """What scores of the adapter are called: "adapter", or the checkpoint's name."""
        return self.checkpoint.name if self.checkpoint else "adapter"

    @property
    def lora(self) -> Path:
        """The trained adapter as PEFT's LoRA (training.save_as_lora)."""
        return self.path / "adapter_lora"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer as it was when the run began."""
        return self.path / "tokenizer"

    @property
    def results(self) -> Path:
        """Counts, times, accuracies."""
        return self.path / "results.json"

    @property
    def nonfinite(self) -> Path:
        """One JSON object a batch whose loss was not finite, or a step whose gradient was not."""
        return self.path / "nonfinite.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a completion of a prompt; `moment` is "before", "evaluation" or "after"."""
        return self.path / "samples.jsonl"

    @property
    def completions(self) -> Path:
        """One JSON object a completion that training generated, with its rewards: a few of each logging step."""
        return self.path / "completions.jsonl"

    @property
    def reward_record(self) -> Path:
        """The rewards, each with its options, and a user's own with its file's hash and text."""
        return self.path / "rewards.json"

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard reads."""
        return self.path / "tensorboard"

    def predictions(self, task: str, when: str) -> Path:
        """The predictions of a task, `when` being "before", "after" or the name of another evaluation.

        No two tasks have one file, also where a file system takes `A` for `a`: a name that is not written as it stands
        has a hash behind a "+", which is in no other.
        """
        plain = re.sub(r"[^a-z0-9_.-]+", "_", task.lower())[:80]
        if plain != task:
            plain += f"+{hashlib.sha256(task.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
        return self.path / "eval" / f"{plain}-{when}.jsonl"

    def confusion(self, name: str, when: str) -> Path:
        """The confusion matrix of a classifier on labelled rows, of the predictions of that name."""
        return self.path / f"confusion-{self.predictions(name, when).stem}.png"

    def write_predictions(self, task: str, when: str, lines: Iterable[Any]) -> None:
        """Write the predictions of a task, one JSON object a line.

        Raises:
            UserError: if they cannot be written, or a link would lead them out of the folder.
        """
        file = self.predictions(task, when)
        if file.parent.is_symlink():
            raise UserError(
                f"{file.parent}: expected a folder, got a link to one, which is not written into; remove it"
            )
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints in the order of the steps in their names, other programs' and damaged ones too."""
        return sorted(
            (path for path in self.path.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)),
            key=step_of,
        )

    def own_checkpoints(self) -> list[Path]:
        """Return those that a run saved, complete or damaged."""
        return [path for path in self.checkpoints() if is_own_checkpoint(path)]

    def is_marked(self) -> bool:
        """Tell whether a run wrote here, by what nothing else writes."""
        return "lsr_scale" in _keys(self.environment) or bool(self.own_checkpoints())

    def is_run(self) -> bool:
        """Tell whether a run was started here."""
        return self.is_marked() and self.config in self.written()

    def has_adapter(self) -> bool:
        """Tell whether the run has saved its adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    def written(self) -> list[Path]:
        """Return the files that a run wrote here, told by their names and content; checkpoints are left out."""
        if not self.is_marked():
            return []
        from lsr_scale.adapters.read import ADAPTER_FILES  # these two import torch, which reading a run does not need
        from lsr_scale.model.tokenizer import tokenizer_files

        by_name = [folder / name for folder in (self.adapter, self.lora) for name in (*ADAPTER_FILES, "README.md")]
        by_name += tokenizer_files(self.tokenizer)
        eval_files = sorted(path for path in (self.path / "eval").glob("*.jsonl") if _PREDICTIONS.fullmatch(path.name))
        checks = {
            self.config: lambda file: set(re.findall(r"^(\w+):", _start(file), re.MULTILINE)) >= _SECTIONS,
            self.environment: lambda file: "lsr_scale" in _keys(file),
            self.data: lambda file: "train" in _keys(file),
            self.metrics: lambda file: _has_line_of(file, {"step"}),
            self.nonfinite: lambda file: _has_line_of(file, {"step"}),
            self.samples: lambda file: _has_line_of(file, {"moment", "prompt", "completion"}),
            self.completions: lambda file: _has_line_of(file, {"step", "completion", "rewards"}),
            self.reward_record: lambda file: "rewards" in _keys(file),
            self.results: lambda file: {"method", "steps"} <= _keys(file),
            self.compute_errors: lambda file: {"errors", "kept"} <= _keys(file),
            self.curve: is_picture,
            self.rewards: is_picture,
            self.condition: is_picture,
            self.report: is_own_page,
            self.path / "spectra.png": is_own_picture,
            **dict.fromkeys(sorted(self.path.glob("confusion-*.png")), is_own_picture),
            **dict.fromkeys([*by_name, *sorted(self.tensorboard.glob("events.out.tfevents.*"))], lambda file: True),
            **dict.fromkeys(
                eval_files,
                lambda file: any(_has_line_of(file, {key}) for key in ("log_likelihoods", "outputs")),
            ),
        }
        ours = [path for path, is_ours in checks.items() if path.is_file() and is_ours(path)]
        # a folder that is a link is one thing here, and its files are elsewhere
        links = {folder for folder in self._folders() if folder.is_symlink()}
        return list(dict.fromkeys(path.parent if path.parent in links else path for path in ours))

    def remove_left_over(self) -> None:
        """Remove what a run that was killed was in the middle of writing, under its temporary names."""
        own = {getattr(self, name).name for name, value in vars(RunFolder).items() if isinstance(value, property)}
        own |= {"spectra.png"}

        def is_own(name: str) -> bool:
            return name in own or re.fullmatch(r"checkpoint-[0-9]{1,18}|confusion-.*\.png", name) is not None

        remove_left_over(self.path, is_own)
        if not (self.path / "eval").is_symlink():
            remove_left_over(self.path / "eval", lambda name: _PREDICTIONS.fullmatch(name) is not None)

    def _of_some_runs(self) -> tuple[Path, ...]:
        of_grpo = self.completions, self.reward_record
        return self.nonfinite, self.samples, self.report, self.compute_errors, *of_grpo

    def _folders(self) -> tuple[Path, ...]:
        return self.adapter, self.lora, self.tokenizer, self.path / "eval", self.tensorboard

    def in_the_way(self) -> list[Path]:
        """Return what lies where a run writes, and is none of a run's."""
        ours = set(self.written())
        files = (
            self.config,
            self.environment,
            self.data,
            self.metrics,
            self.curve,
            self.rewards,
            self.condition,
            self.results,
        )
        blocking = [path for path in (*files, *self._of_some_runs()) if os.path.lexists(path) and path not in ours]
        marked = self.is_marked()
        folders = [path for path in self._folders() if os.path.lexists(path)]
        # a link would lead what is written into it out of the folder; the others are replaced, link and all
        written_into = self.path / "eval", self.tensorboard
        blocking += [p for p in folders if not p.is_dir() or not marked or (p in written_into and p.is_symlink())]
        return blocking if marked else [*blocking, *self.checkpoints()]

    def make(self) -> bool:
        """Make the folder and check that it can be written; return False if it was there already.

        Raises:
            UserError: if it cannot be made or written.
        """
        try:
            try:
                self.path.mkdir(parents=True)
                is_new = True
            except FileExistsError:
                is_new = False
                if not self.path.is_dir():
                    raise UserError(f"{self.path}: expected a folder for the run, got a file; name another") from None
            with tempfile.TemporaryFile(dir=self.path):
                return is_new
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def release(self) -> None:
        """Remove the folder if nothing is in it: a run that never began leaves none."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def is_own_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint that a run of this package saved, complete or damaged."""
    return any((folder / name).is_file() for name in (MANIFEST, STATE, TENSORS))


def _start(file: Path, num_bytes: int = 2**20) -> str:
    with file.open("rb") as stream:
        return stream.read(num_bytes).decode("utf-8", "replace")


def _keys(file: Path) -> set[str]:
    """Return the keys of a JSON object, none where the file is missing or something else."""
    try:
        content = json.loads(_start(file, 2**26)) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return set()
    return set(content) if isinstance(content, dict) else set()


def _has_line_of(file: Path, keys: set[str]) -> bool:
    """Tell whether a file is empty or has a line that is a JSON object with these keys."""
    lines = [line for line in _start(file).split("\n") if line.strip()]
    return not lines or any(keys <= _object(line).keys() for line in lines)


def _object(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def step_of(checkpoint: Path) -> int:
    """Return the training step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def open_run(path: str | Path) -> RunFolder:
    """Return an existing run folder.

    Raises:
        UserError: if there is none.
    """
    return RunFolder(find_run(path))
