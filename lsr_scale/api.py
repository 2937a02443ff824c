"""The commands as functions, for notebooks and programs: `from lsr_scale import load_run, train, evaluate, ...`.

They show what the commands show, or nothing with `quiet=True`; a mistake is a `UserError`. They can be called again and
again: the process is left as it was found (`surroundings.as_found`), and what lies on disk is what the commands leave.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lsr_scale import config, distributed, exporting, planning
from lsr_scale.config import RunConfig
from lsr_scale.config.shipped import find_run
from lsr_scale.config.trials import read_sweep, sweep_from_dict
from lsr_scale.data.prompts import Prompt, prompt_of_row
from lsr_scale.errors import UserError, did_you_mean, quoted
from lsr_scale.generation.sampling import Sampling
from lsr_scale.planning import Plan
from lsr_scale.run import train as training
from lsr_scale.run.compare import Comparison
from lsr_scale.run.compare import compare as compare_runs
from lsr_scale.run.evaluate import evaluate_run
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.generator import Generator
from lsr_scale.run.load import load_run_model
from lsr_scale.run.metrics import read_metrics
from lsr_scale.run.start import named_by_file
from lsr_scale.surroundings import as_found
from lsr_scale.sweeping.results import SweepResults, read_results
from lsr_scale.sweeping.sweep import run_sweep

# a YAML file, the name of a shipped one, the sections as a mapping, or what `load_run` returned
AnyRun = str | Path | Mapping[str, Any] | RunConfig
Overrides = Mapping[str, Any]

_EXPORT_OPTIONS = ("bits", "max_rank", "dtype", "merged", "base_gguf", "verify", "accuracy", "base")


@dataclass(frozen=True)
class Result:
    """What came of a run; the paths of its folder are `RunFolder`'s. On other processes than the first all is empty.

    Attributes:
        folder: The run's folder.
        adapter: The trained adapter, as PEFT saves it.
        metrics: A row a logging step or evaluation, as in `metrics.jsonl`: step, loss, tokens_per_s, memory_gib, ...
        results: `results.json`: counts, times, the final loss.
        scores: By task, then by moment ("before", "after"): accuracy and its standard error; a classifier's metrics.
        model: The trained model, in evaluation mode, where it was asked for.
        tokenizer: Its tokenizer.
    """

    folder: Path
    adapter: Path
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)
    results: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)


# the folder of a run that has trained
Trained = str | Path | Result


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        path: The folder.
        report: `export.json`: sizes, errors, agreement of the logits.
    """

    path: Path
    report: dict[str, Any]


def load_run(run: AnyRun, overrides: Overrides | None = None) -> RunConfig:
    """Return a run, checked; nothing is loaded.

    Args:
        run: A YAML file, the name of a shipped one ("mistral_lsr"), its sections as a mapping, or a run.
        overrides: Values in place of the run's: by path, `{"training.learning_rate": 1e-3}`, or by section,
            `{"training": {"learning_rate": 1e-3, "max_steps": 50}}`.

    Raises:
        UserError: naming every problem, where it stands, what was expected, and what to do.
    """
    changes = overrides or {}
    if not isinstance(changes, Mapping):
        raise UserError(f"overrides: expected a mapping such as {{'training.max_steps': 50}}, got {quoted(changes)}")
    if isinstance(run, str | Path):
        return config.load_run(run, changes)
    if isinstance(run, RunConfig):
        return config.run_from_dict(config.with_overrides(run.model_dump(), changes)) if changes else run
    if isinstance(run, Mapping):
        return config.run_from_dict(config.with_overrides(copy.deepcopy(config.plain(run)), changes))
    raise UserError(f"run: expected a YAML file, a shipped run's name, a mapping or a run, got {quoted(run)}")


def train(
    run: AnyRun,
    overrides: Overrides | None = None,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    return_model: bool = False,
) -> Result:
    """Do a run: score, train, score again, save the adapter, as `lsr-scale train` does.

    Ctrl-C (a notebook's "interrupt") ends it after the step, with a checkpoint; `resume="auto"` goes on from there.

    Args:
        run: A YAML file, the name of a shipped one, its sections as a mapping, or a run.
        overrides: As in `load_run`.
        resume: "auto" for the newest checkpoint in the run's folder, or a checkpoint.
        overwrite: Start again in a folder that holds a run.
        quiet: Show nothing.
        return_model: Return the trained model too; it is freed otherwise.

    Raises:
        UserError: for what a user can fix.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    given = load_run(run, overrides)
    name = "run"
    if isinstance(run, str | Path):
        given, name = named_by_file(given, find_run(run), overwrite or resume == "auto")
    if return_model and training.zero_stage(given) == 3 and training.uses_deepspeed(given):
        raise UserError("return_model: the base is sharded under ZeRO-3; load the run's model with load_model(folder)")
    kept: dict[str, Any] = {}

    def take(trainer: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        kept.update(model=model.eval(), tokenizer=trainer.processing_class)

    options: dict[str, Any] = {"take": take} if return_model else {}
    with as_found(quiet):
        folder = training.train(given, name, None if resume is None else str(resume), overwrite, quiet, **options)
    if not distributed.is_main():
        return Result(folder.path, folder.adapter, **kept)
    return _result(folder, kept)


def sweep(
    run: AnyRun,
    section: Mapping[str, Any] | None = None,
    overrides: Overrides | None = None,
    *,
    together: int | Literal["auto"] | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    pages: bool = True,
) -> SweepResults:
    """Train many variants of a run on one loading of its base, as `lsr-scale sweep` does.

    Args:
        run: A YAML file, the name of a shipped one, its sections as a mapping, or a run.
        section: The section sweep, `{"grid": {"training.learning_rate": [1e-3, 2e-3]}}`; by default the file's.
        overrides: As in `load_run`.
        together: How many trials share a step, "auto" or a number; in place of the section's.
        resume: "auto" to go on with the sweep that lies in the folder.
        overwrite: Start again in a folder that holds a sweep.
        quiet: Show nothing.
        pages: Draw the sweep's pictures, and each trial's with its page; otherwise `lsr-scale report` writes the page
            of a trial that is worth it.

    Raises:
        UserError: for what a user can fix of the sweep; what a single trial meets is in its result.
        KeyboardInterrupt: after Ctrl-C, once checkpoints are saved.
    """
    changes = dict(overrides or {})
    changes |= {} if section is None else {"sweep": section}
    changes |= {} if together is None else {"sweep.together": together}
    name = "run"
    if isinstance(run, str | Path):
        name = find_run(run).stem
        given = read_sweep(run, changes)
    else:
        sections = run.model_dump() if isinstance(run, RunConfig) else copy.deepcopy(config.plain(run))
        given = sweep_from_dict(config.with_overrides(sections, changes))
    with as_found(quiet):
        folder = run_sweep(given, name, resume, overwrite, quiet, pages=pages)
    return read_results(folder)


def _result(folder: RunFolder, kept: Mapping[str, Any]) -> Result:
    """Return what a run's folder says of it."""
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    scores = {**results.get("accuracy", {}), **results.get("classification", {})}
    return Result(folder.path, folder.adapter, read_metrics(folder.metrics), results, scores, **kept)


def load_model(run: Trained, *, base: str | None = None, base_only: bool = False) -> tuple[Any, Any]:
    """Return the model of a run, its adapter loaded from disk onto its base, in evaluation mode, and its tokenizer.

    Args:
        run: The run's folder, or what `train` returned.
        base: The base model's name, where it lies elsewhere than when the run began.
        base_only: Leave the adapter out.

    Raises:
        UserError: if there is no run, no adapter, or no base.
    """
    with as_found():
        model, tokenizer, _ = load_run_model(_folder(run), base_only, ("causal_lm", "seq_cls"), base)
    return model, tokenizer


def evaluate(
    run: Trained,
    tasks: str | Sequence[str] | None = None,
    *,
    limit: int | None = None,
    base: str | None = None,
    base_only: bool = False,
    without_questions: bool = False,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score a run's saved adapter, loaded onto its base again, as `lsr-scale eval` does.

    Args:
        run: The run's folder, or what `train` returned.
        tasks: Task names, files or folders; the run's own by default.
        limit: Only the first so many questions, or rows, of each.
        base: The base model's name, where it lies elsewhere than when the run began.
        base_only: Leave the adapter out.
        without_questions: A control: score the choices with no context.
        quiet: Show nothing.

    Returns:
        By task: `accuracy`, `accuracy_stderr`, `num_examples` and others; for a classifier its metrics.

    Raises:
        UserError: if the run, its base or a task cannot be read.
    """
    names = [tasks] if isinstance(tasks, str) else None if tasks is None else [str(task) for task in tasks]
    with as_found(quiet):
        found = evaluate_run(str(_folder(run)), names, limit, base_only, without_questions, base)
    if "accuracy" in found:
        return {task: moments[found["scored"]] for task, moments in found["accuracy"].items()}
    return found["classification"]


def export(
    run: Trained,
    to: Literal["adapter", "lora", "merged", "gguf"],
    out: str | Path,
    *,
    quiet: bool = False,
    **options: Any,
) -> Export:
    """Write a trained adapter for other programs, and verify it, as `lsr-scale export` does.

    Args:
        run: The run's folder, an adapter's, or what `train` returned.
        to: "adapter" (factors, in 16, 8 or 4 bits), "lora" (exact; PEFT, vLLM), "merged" (a whole model), "gguf".
        out: The folder to make.
        quiet: Show nothing.
        options: `bits`, `max_rank`, `dtype`, `merged`, `base_gguf`, `verify`, `accuracy`, `base`: of
            `lsr_scale.exporting.export`.

    Raises:
        UserError: for an adapter that cannot be read, an option that does not fit, a folder that is taken, or logits
            that are not the trained adapter's.
    """
    unknown = [name for name in options if name not in _EXPORT_OPTIONS]
    if unknown:
        raise UserError(f"export: unknown option {unknown[0]!r}; {did_you_mean(unknown[0], _EXPORT_OPTIONS)}")
    with as_found(quiet):
        report = exporting.export(_folder(run), to, out, **options)
    return Export(Path(out), report)


def plan(
    run: AnyRun | None = None, overrides: Overrides | None = None, *, model: str | None = None, gpus: int = 1
) -> Plan:
    """Return what a run takes in parameters, bytes and memory under each ZeRO stage; no weights are loaded.

    Args:
        run: A YAML file, the name of a shipped one, its sections as a mapping, or a run.
        overrides: As in `load_run`.
        model: A base model in place of a run: LSR-Adapt on all its linears, where the overrides say nothing else.
        gpus: How many GPUs share it.

    Raises:
        UserError: for an unknown model, a target that matches nothing, a rank or split that does not fit.
    """
    if (run is None) == (model is None):
        raise UserError("plan: expected a run, or model=NAME: one of them")
    if type(gpus) is not int or gpus < 1:
        raise UserError(f"gpus: expected a whole number from 1 on, got {quoted(gpus)}")
    if run is None:
        adapter = {"method": "lsr", "target_modules": "all-linear"}
        run = {"model": {"name": model}, "adapter": adapter, "data": {"train": ["builtin:commonsense"]}}
    given = load_run(run, overrides)
    with as_found():
        return planning.plan(given, gpus)


def generate(
    run: Trained | nn.Module,
    prompts: str | Sequence[Prompt],
    *,
    tokenizer: Any = None,
    system: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    base: str | None = None,
    base_only: bool = False,
) -> list[str]:
    """Return a model's answers to prompts, one after the other.

    Args:
        run: The run's folder, what `train` returned, or a model in memory, which spares loading it at each call.
        prompts: Texts, or conversations: lists of `{"role": ..., "content": ...}`, which go into the chat template.
        tokenizer: Of a model in memory.
        system: A system prompt for the chat template.
        chat: Whether texts go into the chat template; as the run trained by default, not for a model in memory.
        max_new_tokens: When to stop at the latest.
        temperature: 0 takes the most likely token; above, tokens are drawn. By default drawn only where `top_p`,
            `top_k` or `seed` is given.
        top_p: Draw from the most likely tokens that together have this probability.
        top_k: Draw from so many of the most likely tokens.
        repetition_penalty: Above 1, what was there already is less likely.
        seed: Of the draws.
        base: The base model's name, where it lies elsewhere than when the run began.
        base_only: Leave the adapter out.

    Raises:
        UserError: for a run, prompt or value that does not fit, before the model is loaded.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    asked: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = [
        prompt if isinstance(prompt, str) else prompt_of_row({"prompt": prompt}, f"prompts[{number}]")
        for number, prompt in enumerate(asked)
    ]
    in_memory = run.model if isinstance(run, Result) and run.model is not None else run
    with as_found():
        if isinstance(in_memory, nn.Module):
            words = tokenizer or (run.tokenizer if isinstance(run, Result) else None)
            if words is None:
                raise UserError("generate: a model in memory needs its tokenizer: generate(model, ..., tokenizer=...)")
            if base is not None or base_only:
                raise UserError("base, base_only: are about a run's folder; with model.disable_adapter(): is the base")
            generator = Generator.of_model(in_memory, words)
        elif tokenizer is not None:
            raise UserError("tokenizer: goes with a model in memory; a run's folder has its own; leave it out")
        else:
            generator = Generator.of_run(_folder(in_memory), base_only, base)
        uses_template, _ = generator.uses_template(chat, system)
        start = generator.conversation(system)
        whole = [_in_template(prompt, start, uses_template) for prompt in asked]
        named = [(f"prompts[{number}]", prompt) for number, prompt in enumerate(whole)]
        generator.check(named)
        return [generator.answer(prompt, sampling, where=where).text for where, prompt in named]


def _in_template(prompt: Prompt, start: list[dict[str, Any]], uses_template: bool) -> Prompt:
    if isinstance(prompt, str):
        return [*start, {"role": "user", "content": prompt}] if uses_template else prompt
    return [*start, *prompt]


def compare(runs: Sequence[Trained]) -> Comparison:
    """Return what differs in runs, and what came of it: losses, scores with paired intervals, speed, memory.

    Args:
        runs: Their folders, or what `train` returned; differences are from the first.

    Raises:
        UserError: if a folder holds no run.
    """
    with as_found():
        return compare_runs([str(_folder(run)) for run in runs])


def _folder(run: Any) -> Path:
    if isinstance(run, Result):
        return run.folder
    if not isinstance(run, str | Path):
        raise UserError(f"run: expected a run's folder or what train returned, got {quoted(run)}")
    return Path(run)
