"""The model of a run: its base, with the adapter loaded from the run's folder or from one of its checkpoints."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsr_scale.adapters.coverage import coverage_notes
from lsr_scale.adapters.save_and_load import load_adapter
from lsr_scale.config import RunConfig, load_run
from lsr_scale.errors import UserError, printable
from lsr_scale.model import load_base_for, tokenizer_of
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.run.find import find_trained, newest_checkpoint
from lsr_scale.run.folder import RunFolder

CHAT_KINDS = ("messages", "chat_prompt_completion", "chat_preference", "chat_unpaired", "chat_prompts")


def open_trained(
    path: str | Path, base_only: bool = False, tasks: Sequence[str] = ("causal_lm",)
) -> tuple[RunFolder, RunConfig]:
    """Return the folder and the configuration of a run that has an adapter.

    Args:
        path: The run's folder, or a checkpoint's in it, whose adapter is taken then.
        base_only: An adapter is not needed.
        tasks: Values of `model.task` that will do: only a language model answers questions or generates.

    Raises:
        UserError: if the folder holds no run, none of such a task, or (unless `base_only`) no adapter yet.
    """
    folder = RunFolder(*find_trained(path))
    run = load_run(folder.config)
    if run.model.task not in tasks:
        if run.model.task == "seq_cls":
            raise UserError(
                f"{folder.path}: a classifier's run, and only language models generate; to classify a text: lsr-scale "
                f'classify {shlex.quote(str(folder.path))} --text "..."'
            )
        raise UserError(f"{folder.path}: a language model's run, and only a classifier's (task: seq_cls) has labels")
    if not base_only and not folder.adapter.is_dir():
        remedy = "it was interrupted: resume it with --resume auto" if folder.checkpoints() else "train it first"
        if newest := newest_checkpoint(folder.path):
            command, option = ("classify", "--text") if run.model.task == "seq_cls" else ("generate", "--prompt")
            remedy += f', or try its newest checkpoint: lsr-scale {command} {shlex.quote(str(newest))} {option} "..."'
        if folder.earlier.is_dir():
            remedy = "if it has ended, train --resume auto restores the earlier one that it was to replace"
        raise UserError(f"{folder.path}: the run has no adapter yet; {remedy}")
    return folder, run


def load_run_model(
    path: str | Path, base_only: bool = False, tasks: Sequence[str] = ("causal_lm",), base: str | None = None
) -> tuple[Any, Any, RunConfig]:
    """Return the model of a finished run, its adapter loaded from disk, with its tokenizer and configuration.

    Args:
        path: The run's folder, or a checkpoint's in it.
        base_only: Leave the adapter out; none is needed.
        tasks: Values of `model.task` that will do, as in `open_trained`.
        base: The base model's name, where it lies elsewhere than when the run began.

    Raises:
        UserError: if the folder holds no run, no adapter that fits, or the base is not to be found.
    """
    folder, run = open_trained(path, base_only, tasks)
    if base is not None:
        run = run.with_model(name=base, revision=None)
    with suggest_base_option(base):
        return _load(folder, run, base_only)


def _load(folder: RunFolder, run: RunConfig, base_only: bool) -> tuple[Any, Any, RunConfig]:
    tokenizer = tokenizer_of(run, folder.tokenizer)
    # a classifier's head is in the adapter
    model: Any = load_base_for(run.model, run.training["seed"], head_from_adapter=not base_only)
    if not base_only:
        model, notes = load_adapter(model, folder.adapter)
        targets = run.adapter.options.get("target_modules")
        for note in (*notes, *coverage_notes(model, run.model.quantization, targets, run.model.dtype)):
            print(printable(f"note: {note}"), file=sys.stderr)
    return model.eval(), tokenizer, run


def trained_on_chat(folder: RunFolder, run: RunConfig) -> bool | None:
    """Tell whether a run trained on conversations; None where its folder, of an earlier release, does not say."""
    try:
        kind = json.loads(folder.data.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = None
    if kind is None and {source.format for source in run.data.train} & {"messages", "sharegpt"}:
        return True
    return None if kind is None else kind in CHAT_KINDS
