"""An export, from its options to its folder, which appears complete and verified or not at all."""

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lsr_scale import files
from lsr_scale.adapters.identity import model_description, other_model_notes, other_weights
from lsr_scale.adapters.read import check_own_base
from lsr_scale.errors import UserError
from lsr_scale.exporting import pairs as lora
from lsr_scale.exporting.base_factors import with_base_factors
from lsr_scale.exporting.card import write_card
from lsr_scale.exporting.source import AdapterSource, describe_file, open_adapter
from lsr_scale.exporting.summary import in_words
from lsr_scale.exporting.verify import EXACT, Agreement, Reference, base_section, questions_of
from lsr_scale.model import load_config, resolve
from lsr_scale.model.load_errors import suggest_base_option
from lsr_scale.model.tokenizer import copy_tokenizer
from lsr_scale.paths import user_path
from lsr_scale.screen import Progress

KINDS = ("adapter", "lora", "merged", "gguf")
LOST = 0.5  # error, as a share of what the adapter changes, from which on it is said
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# where they are not those; the first is the default
_DTYPES_OF = {"merged": ("bfloat16", "float32", "nf4"), "merged gguf": ("float16", "float32", "bfloat16", "q8_0")}
_OPTIONS_OF = {
    **{"adapter": ("--bits",), "merged": ("--dtype",), "merged gguf": ("--dtype", "--base-gguf")},
    **dict.fromkeys(("lora", "gguf"), ("--max-rank", "--dtype")),
}
_NICKNAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "f32": "float32", "f16": "float16"}

Say = Callable[[str], None]


def export(
    path: str | Path,
    kind: str,
    out: str | Path,
    *,
    bits: int | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    merged: bool = False,
    base_gguf: str | None = None,
    verify: bool = True,
    accuracy: bool = False,
    base: str | None = None,
    say: Say = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the adapter of a run or of a folder; nothing is left behind where it fails.

    Args:
        path: A run folder or an adapter folder.
        kind: "adapter", "lora", "merged" or "gguf".
        out: The folder to make; it must not hold anything yet.
        bits: Of the factors, for "adapter": 16 (default), 8 or 4.
        max_rank: Truncate to it, for "lora" and "gguf".
        dtype: Of what is written: float32 (default), bfloat16, float16 for "lora" and "gguf"; bfloat16 (default),
            float32 or nf4 for "merged"; float16 (default), float32, bfloat16 or q8_0 for a merged "gguf".
        merged: Write a full GGUF rather than llama.cpp's LoRA adapter, for "gguf".
        base_gguf: A GGUF of the base, whose vocabulary and metadata the merged one gets; a built-in model has one.
        verify: Compare logits with those of the adapter as trained before the folder appears.
        accuracy: Compare the accuracy on the run's tasks as well, on 200 questions of each at most: minutes on a CPU.
        base: The base model, where neither run nor base.json names it.
        say: Called with a line at a time.
        progress: Shows which stage it is at; nothing by default.

    Returns:
        What is also in `export.json`: sizes, errors, agreement.

    Raises:
        UserError: for an adapter that cannot be read, an option that does not fit, a folder that is taken, or logits
            that are not those of the adapter.
    """
    options = _checked_options(kind, bits, max_rank, dtype, merged, base_gguf, base)
    if accuracy and not verify:
        raise UserError("--accuracy: is measured while the export is verified; leave out --no-verify")
    if base is not None and not verify and kind in ("adapter", "lora"):
        raise UserError(f"--base {base}: has no effect with --to {kind} --no-verify; leave it out")
    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    progress.stage(f"reading {path}")
    source = open_adapter(path)
    check_own_base(source.folder, source.config)
    with suggest_base_option(base), _new_folder(user_path(out, "--out")) as folder, progress:
        if verify or options.form.startswith("merged"):  # or the base is not read
            _note_other_base(source, options, say)
        if kind != "adapter":
            source = with_base_factors(source, base)
        progress.stage(f"writing {options.form}")
        summary = {**_write(folder, source, options, progress), **_sizes(folder, source)}
        summary["seconds to write"] = round(time.perf_counter() - started, 2)
        result: dict[str, Any] = {"kind": options.form}
        if verify:
            agreement, lines = _verify(
                folder, source, options, "truncation error, largest" in summary, accuracy, progress
            )
            summary |= lines
            result |= {**summary, "agreement": dataclasses.asdict(agreement)}
        else:
            result |= summary
        write_card(folder, source, options.form, summary, user_path(out), options.dtype)
        files.write_json(folder / "export.json", result)
    for name, value in in_words(summary).items():
        say(f"{name}: {value}")
    if max_rank is not None and "truncation error, largest" not in summary:
        say(f"note: --max-rank {max_rank}: no rank is larger, so nothing was truncated")
    if not verify:
        say("not verified (--no-verify)")
    say(f"written: {out}")
    return result


def merge(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None,
    out: str | Path,
    *,
    max_rank: int | None = None,
    dtype: str = "float32",
    say: Say = print,
) -> dict[str, Any]:
    """Write the weighted sum of several adapters as one LoRA adapter, exactly: their pairs side by side.

    Args:
        paths: Run folders or adapter folders of one base, of any methods.
        weights: One a path; 1 each by default.
        out: The folder to make.
        max_rank: Truncate to it, and report the error.
        dtype: Of what is written.
        say: Called with a line at a time.

    Raises:
        UserError: if the adapters do not belong together, or the folder is taken.
    """
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(paths) < 2 or len(weights) != len(paths):
        raise UserError(f"merge: expected two adapters or more and a weight for each, got {len(paths)}, {len(weights)}")
    if not all(-1e6 < weight < 1e6 for weight in weights):
        raise UserError(f"--weights: expected finite numbers, got {weights}")
    dtype = _NICKNAMES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    sources = [with_base_factors(open_adapter(path)) for path in paths]
    for source in sources:
        check_own_base(source.folder, source.config)
    bases = {str(source.base["config_sha256"]): source for source in sources if source.base}
    if len(bases) > 1:
        names = ", ".join(f"{source.folder}: {(source.base or {}).get('name')}" for source in bases.values())
        raise UserError(f"merge: the adapters belong to different bases ({names})")
    for source in sources[1:]:
        if source.base and sources[0].base and other_weights(source.base, sources[0].base):
            say(f"note: {source.folder} was trained on other weights than {sources[0].folder}")
    pairs, errors = lora.truncated(lora.concatenate(sources, weights), max_rank)
    with _new_folder(user_path(out, "--out")) as folder:
        metadata = lora.metadata_of(sources[0], "merge", weights=list(weights))
        targets = {"target_modules": sorted(pairs)}
        lora.write_lora(folder, pairs, sources[0], DTYPES[dtype], metadata, targets)
        _copy_beside(sources[0], folder)
        summary = {"weights": list(weights), "dtype": dtype, **_ranks(pairs, errors), **_sizes(folder, sources[0])}
        write_card(folder, sources[0], "lora", {"merged from": len(sources), **summary}, user_path(out))
        files.write_json(folder / "export.json", {"kind": "merge", **summary})
    for name, value in in_words(summary).items():
        say(f"{name}: {value}")
    if max_rank is not None and not errors:
        say(f"note: --max-rank {max_rank}: no rank is larger, so nothing was truncated")
    return summary


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is written and how, with the defaults of its format filled in.

    Attributes:
        form: "adapter", "lora", "merged", "gguf", or "merged gguf".
        bits: Of the factors, of an adapter.
        max_rank: To truncate to.
        dtype: Of what is written, by its full name.
        base: The base model's name, where it is another than the run's or that in base.json.
        base_gguf: A GGUF of the base.
    """

    form: str
    bits: int
    max_rank: int | None
    dtype: str
    base: str | None
    base_gguf: str | None


def _checked_options(
    kind: str,
    bits: int | None,
    max_rank: int | None,
    dtype: str | None,
    merged: bool,
    base_gguf: str | None,
    base: str | None,
) -> _Options:
    """Return the options of `export`; refuse what is unknown, or has no effect on this format."""
    if kind not in KINDS:
        raise UserError(f"--to: expected one of {', '.join(KINDS)}, got {kind!r}")
    if bits not in (None, 16, 8, 4):
        raise UserError(f"--bits: expected 16, 8 or 4, got {bits}")
    if merged and kind != "gguf":
        raise UserError(f"--merged: goes with --to gguf, not with --to {kind}")
    form = "merged gguf" if merged else kind
    named = "gguf --merged" if merged else kind
    options = {"--bits": bits, "--max-rank": max_rank, "--dtype": dtype, "--base-gguf": base_gguf}
    for name, value in options.items():
        if value is not None and name not in _OPTIONS_OF[form]:
            raise UserError(f"{name} {value}: has no effect with --to {named}; leave it out")
    allowed = _DTYPES_OF.get(form, tuple(DTYPES))
    dtype = _NICKNAMES.get(dtype or "", dtype) or allowed[0]
    if dtype not in allowed:
        raise UserError(f"--dtype: expected one of {', '.join(allowed)} for --to {kind}, got {dtype!r}")
    return _Options(form, 16 if bits is None else bits, max_rank, dtype, base, base_gguf)


def _note_other_base(source: AdapterSource, options: _Options, say: Say) -> None:
    section = base_section(source, options.base)
    if source.base is not None:
        now = model_description(load_config(resolve(section["name"]), section["revision"]))
        for note in other_model_notes(source.base, now):
            say(f"note: {note}")


def _write(folder: Path, source: AdapterSource, options: _Options, progress: Progress) -> dict[str, Any]:
    """Write the files of a format; return what is to be said of them."""
    dtype = options.dtype
    if "gguf" in options.form and getattr(source.config.task_type, "value", source.config.task_type) == "SEQ_CLS":
        raise UserError("--to gguf: llama.cpp runs no classifiers; use --to merged, lora or adapter")
    if options.form == "adapter":
        metadata = lora.metadata_of(source, options.form, bits=options.bits)
        lora.write_factors(folder, source, options.bits, metadata)
        _copy_beside(source, folder)
        return {"bits": options.bits}
    if options.form == "merged":
        from lsr_scale.exporting.merged import write_merged

        metadata = lora.metadata_of(source, options.form, dtype=dtype)
        return write_merged(folder, source, base_section(source, options.base), dtype, metadata, progress)
    if options.form == "merged gguf":
        from lsr_scale.exporting.gguf_model import write_merged_gguf

        section = base_section(source, options.base)
        return write_merged_gguf(folder, source, section, dtype, options.base_gguf, progress)
    modules = progress.over(source.modules, len(source.modules), "module")
    pairs, errors = lora.truncated({name: source.pair(name) for name in modules}, options.max_rank)
    summary = {"dtype": dtype, **_ranks(pairs, errors)}
    if options.form == "lora":
        metadata = lora.metadata_of(source, options.form, dtype=dtype)
        lora.write_lora(folder, pairs, source, DTYPES[dtype], metadata)
        _copy_beside(source, folder)
        return summary
    from lsr_scale.exporting.gguf_file import write_gguf

    return summary | write_gguf(folder, pairs, base_section(source, options.base), DTYPES[dtype], source)


def _verify(
    folder: Path, source: AdapterSource, options: _Options, truncated: bool, accuracy: bool, progress: Progress
) -> tuple[Agreement, dict[str, Any]]:
    """Compare what was written with the adapter as trained; return the agreement, and what is to be said of it.

    Raises:
        UserError: if an export that loses nothing does not agree.
    """
    exact = not truncated and options.bits == 16 and options.dtype in DTYPES
    tasks = questions_of(source) if accuracy else {}
    reference = Reference(source, options.base, tasks, progress)
    if options.form.startswith("merged"):
        agreement = reference.of_model(folder)
    elif options.form == "gguf":
        agreement = _read_back_agrees(folder, source, reference)
    else:
        agreement = reference.of_adapter(folder)
    # an adapter's factors are written in 16 bits, whatever the dtype of the other formats
    tolerance = EXACT[DTYPES[options.dtype] if exact and options.form != "adapter" else torch.float16]
    if exact and agreement.relative_error > tolerance:
        raise UserError(
            f"the exported model is not the trained one: {agreement.line()}; expected a relative error of at most "
            f"{tolerance:g}; nothing was exported"
        )
    lines = {"logits": agreement.line()}
    if agreement.accuracy:
        lines["accuracy"] = "; ".join(agreement.accuracy_lines())
    elif not exact and source.run is not None and source.run.eval.tasks:
        lines["accuracy"] = "not compared; --accuracy scores the run's tasks, as trained and exported"
    if agreement.share_of_effect > LOST:
        more_bits = "--bits 16" if "--bits" in _OPTIONS_OF[options.form] else "--dtype float32"
        lines["note"] = (
            "the error of this export is more than half of what the adapter changes: take "
            f"{'a higher --max-rank' if truncated else more_bits}, or keep the adapter as it is beside its base"
        )
    return agreement, lines


def _read_back_agrees(folder: Path, source: AdapterSource, reference: Reference) -> Agreement:
    """Return the agreement of a GGUF adapter's own bytes, read again and put into PEFT's format for the comparison."""
    from lsr_scale.exporting.gguf_file import FILE, read_back

    pairs = read_back(folder / FILE, {name: source.pair(name) for name in source.modules}, reference.section)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as again:
        lora.write_lora(Path(again), pairs, source, torch.float32, {})
        return reference.of_adapter(Path(again))


def _ranks(pairs: lora.Pairs, errors: dict[str, float]) -> dict[str, Any]:
    ranks = sorted({down.shape[0] for down, _ in pairs.values()})
    summary: dict[str, Any] = {"ranks": ", ".join(map(str, ranks))}
    if errors:
        summary["truncation error, median"] = float(f"{statistics.median(errors.values()):.3g}")
        summary["truncation error, largest"] = float(f"{max(errors.values()):.3g}")
    return summary


def _sizes(folder: Path, source: AdapterSource) -> dict[str, Any]:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {}
    sizes = describe_file(file)
    fully_trained = sum(value.numel() for value in source.extra.values())
    in_16_bits = 2 * (source.num_parameters() + fully_trained)
    return {
        "bytes of tensors": sizes["tensors"],
        "bytes of the file": sizes["file"],
        "tensors, of the 16-bit factors'": round(sizes["tensors"] / in_16_bits, 4),
    }


def _copy_beside(source: AdapterSource, folder: Path) -> None:
    """Write what goes with factors in any format: what their base is, and the run's tokenizer."""
    if source.tokenizer is not None:
        copy_tokenizer(source.tokenizer, folder)
    if source.base is not None:
        (folder / "base.json").write_text(json.dumps(source.base, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write into; it becomes `out` at the end, or is removed."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: there is something already; export into a new folder")
    temporary = files.temporary_path(out)
    try:
        files.remove_stale_temporaries(out)  # of exports that were killed
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        files.apply_umask(temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise files.cannot_write(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
