"""The model card beside an adapter, README.md: what it is, how it is loaded, and what the hub reads of it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lsr_scale.adapters import PEFT_METHODS, SAVED_METHODS
from lsr_scale.model import builtin

CARD_NAME = "README.md"
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}


def public_name(base: str) -> str | None:
    """Return the base model's name on the hub, None where its name is that of a folder."""
    if base.startswith(builtin.PREFIX):
        packaged = builtin.MODELS.get(base.removeprefix(builtin.PREFIX))
        return packaged.hub_name if packaged else None
    return base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None


def licence(base: str) -> str | None:
    """Return the licence of an embedded base model, None of any other."""
    packaged = builtin.MODELS.get(base.removeprefix(builtin.PREFIX)) if base.startswith(builtin.PREFIX) else None
    return packaged.license if packaged else None


def front_matter(base: str, library: str, method: str, task_type: str | None = None) -> list[str]:
    """Return the lines that the hub reads; a base in a folder is left out, as nobody else has it."""
    values: dict[str, Any] = {"base_model": public_name(base), "library_name": library}
    values["pipeline_tag"] = _PIPELINES.get(task_type or "")
    values["license"] = (licence(base) or "other").lower()
    values["tags"] = ["lsr_scale", method]
    kept = {name: value for name, value in values.items() if value is not None}
    return ["---", *yaml.safe_dump(kept, sort_keys=False).splitlines(), "---"]


def table(rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of two columns."""
    return ["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()), ""]


def cell(value: Any) -> str:
    """Return a value as a cell of a table holds it."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def loading(
    config: Any,
    base: str,
    folder: Path,
    dtype: str = "bfloat16",
    num_labels: int = 0,
    labels: Sequence[str] = (),
) -> list[str]:
    """Return the lines that say how PEFT loads an adapter, with code that runs as it stands.

    Args:
        config: The adapter's, of PEFT's class of its method.
        base: The base model's name.
        folder: Where the adapter lies.
        dtype: Of the base, as transformers names it.
        num_labels: Outputs of a classifier.
        labels: Their names, where they have any.
    """
    method = str(config.peft_type.value).lower()
    ours = method not in PEFT_METHODS
    is_classifier = config.task_type == "SEQ_CLS"
    auto = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    named = f"id2label={dict(enumerate(labels))!r}" if labels else f"num_labels={num_labels}"
    more = f", {named}" if is_classifier else ""
    name = public_name(base) or base
    code = [
        *([f"import lsr_scale  # it registers {method} with PEFT"] if ours else []),
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f"base = {auto}.from_pretrained({name!r}, dtype={dtype!r}{more})",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
    ]
    lines = ["## Loading it", ""]
    if ours:
        lines += [f"PEFT alone does not know the method and ends in `KeyError: '{method.upper()}'`.", ""]
        lines[-2] += " Import `lsr_scale` first:"
    lines += ["```python", *code, "```", ""]
    if ours:
        to = "lora" if SAVED_METHODS[method].is_low_rank() else "merged"
        what = {
            "lora": "as PEFT's LoRA, exactly, for vLLM and others",
            "merged": "merged into its base (its updates are of full rank, so no LoRA holds them)",
        }[to]
        command = f"lsr-scale export {folder} --to {to} --out {to}"
        lines += [f"Where `lsr_scale` is not installed: export it first, {what}:", "", "```", command, "```", ""]
    return lines


def write_card(folder: Path, lines: Iterable[str]) -> None:
    """Write the card into an adapter's folder."""
    (folder / CARD_NAME).write_text("\n".join(lines), encoding="utf-8")
