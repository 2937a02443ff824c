"""The model card beside an adapter, README.md: what it is, how it is loaded, and what the hub reads of it."""

import shlex
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
    base = builtin.name_of(base) or base
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


def loading(config: Any, folder: Path, code: Iterable[str]) -> list[str]:
    """Return the lines that say how PEFT loads an adapter, with code that runs as it stands.

    Args:
        config: The adapter's, of PEFT's class of its method.
        folder: Where the adapter lies.
        code: What `loading_code` returned.
    """
    method = str(config.peft_type.value).lower()
    ours = method not in PEFT_METHODS
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
        command = f"lsr-scale export {shlex.quote(str(folder))} --to {to} --out {to}"
        lines += [f"Where `lsr_scale` is not installed: export it first, {what}:", "", "```", command, "```", ""]
    return lines


def loading_code(
    config: Any,
    base: str,
    folder: Path,
    dtype: str = "bfloat16",
    num_labels: int = 0,
    labels: Sequence[str] = (),
    tokenizer: str | None = None,
    chat: bool = False,
) -> list[str]:
    """Return the lines of code that load an adapter with PEFT, and ask it something where `tokenizer` says whose.

    Args:
        config: The adapter's, of PEFT's class of its method.
        base: The base model's name.
        folder: Where the adapter lies.
        dtype: Of the base, as transformers names it.
        num_labels: Outputs of a classifier.
        labels: Their names, where they have any.
        tokenizer: Name or folder of the tokenizer to ask with; None leaves asking out.
        chat: Ask in the chat template.
    """
    method = str(config.peft_type.value).lower()
    is_classifier = getattr(config.task_type, "value", config.task_type) == "SEQ_CLS"
    auto = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    named = f"id2label={dict(enumerate(labels))!r}" if labels else f"num_labels={num_labels}"
    more = f", {named}" if is_classifier else ""
    name = public_name(base) or base
    code = [
        *([f"import lsr_scale  # it registers {method} with PEFT"] if method not in PEFT_METHODS else []),
        "from peft import PeftModel",
        f"from transformers import {auto}{', AutoTokenizer' if tokenizer else ''}",
        "",
        f"base = {auto}.from_pretrained({name!r}, dtype={dtype!r}{more})",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
    ]
    return code if tokenizer is None else [*code, *asking(tokenizer, is_classifier, chat)]


def asking(tokenizer: str, is_classifier: bool = False, chat: bool = False) -> list[str]:
    """Return the lines of code that ask `model` something: a text's continuation, an answer, or a text's class."""
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})"]
    if is_classifier:
        lines += ['inputs = tokenizer("A text to classify.", return_tensors="pt")']
        return [*lines, "print(model.config.id2label[int(model(**inputs).logits[0].argmax())])"]
    if chat:
        lines += ['messages = [{"role": "user", "content": "What is the capital of France?"}]']
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        lines += [f"inputs = tokenizer.apply_chat_template(messages, {options})"]
    else:
        lines += ['inputs = tokenizer("The capital of France is", return_tensors="pt")']
    lines += ["output = model.generate(**inputs, max_new_tokens=64)"]
    return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]


def held_note(quantization: str) -> list[str]:
    """Return the lines that say how the base was held in training, none where it was not quantized."""
    if quantization in ("none", "unknown"):
        return []
    return [f"It was trained on the base in {quantization}; held otherwise, its outputs differ a little.", ""]


def write_card(folder: Path, lines: Iterable[str]) -> None:
    """Write the card into an adapter's folder."""
    (folder / CARD_NAME).write_text("\n".join(lines), encoding="utf-8")
