"""The model card beside every export: base, method, counts, data, scores, licence, and how near the export is."""

import shlex
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lsr_scale.adapters import card
from lsr_scale.exporting.source import AdapterSource
from lsr_scale.exporting.summary import in_words
from lsr_scale.run.card import accuracy_lines, data_names, licence_words


def write_card(
    folder: Path, source: AdapterSource, kind: str, summary: dict[str, Any], target: Path, dtype: str | None = None
) -> None:
    """Write README.md: what the Hub's readers and people look for.

    Args:
        folder: Where it is written.
        source: The adapter.
        kind: The export's format: "adapter", "lora", "merged", "gguf" or "merged gguf".
        summary: What the export came to, as `export.json` holds it.
        target: Where the folder is to lie, for the code that loads it.
        dtype: Of a merged model.
    """
    base = (source.run.model.name if source.run else None) or (source.base or {}).get("name")
    base = base or source.config.base_model_name_or_path or "unknown"
    library = "gguf" if "gguf" in kind else "transformers" if kind == "merged" else "peft"
    described = source.base or {}
    rows = {
        "base": f"{base} ({described.get('architecture', 'unknown architecture')})",
        "base held in": described.get("quantization", "unknown"),
        "method": source.method,
        "rank": getattr(source.config, "rank", getattr(source.config, "r", None)),
        "trained parameters": f"{source.num_parameters():,} in {len(source.modules)} linear layers",
        **in_words(summary),
        "licence": licence_words(base),
    }
    if source.run is not None:
        rows["data"] = data_names(source.run)
    lines = [*card.front_matter(base, library, source.method, source.config.task_type), ""]
    lines += [f"# {source.method} adapter of {base}, exported as {kind}", "", *card.table(rows)]
    lines += accuracy_lines(source.results or {})
    labels = (source.run.model.labels if source.run else described.get("labels")) or []
    if labels:
        lines += [f"Labels, in the order of the outputs: {', '.join(f'`{card.cell(name)}`' for name in labels)}.", ""]
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = str(target) if has_tokenizer else card.public_name(base) or base
    code = _use(source, kind, base, target, tokenizer, labels, dtype)
    lines += ["## Loading it", "", "```" if "gguf" in kind else "```python", *code, "```", ""]
    if not kind.startswith("merged"):
        lines += card.held_note(described.get("quantization", "unknown"))
    card.write_card(folder, lines)


def _use(
    source: AdapterSource, kind: str, base: str, target: Path, tokenizer: str, labels: list[str], dtype: str | None
) -> list[str]:
    """Return the lines that load an export and ask it something; a classifier's base is to have as many labels."""
    is_classifier = getattr(source.config.task_type, "value", source.config.task_type) == "SEQ_CLS"
    if kind == "gguf":
        return [f"llama-cli -m BASE.gguf --lora {shlex.quote(f'{target}/adapter.gguf')} -p PROMPT"]
    if kind == "merged gguf":
        return [f"llama-cli -m {shlex.quote(f'{target}/model.gguf')} -p PROMPT"]
    if kind == "merged" and is_classifier:
        code = ["from transformers import pipeline", "", f'classify = pipeline("text-classification", {str(target)!r})']
        return [*code, 'print(classify("A text to classify."))']
    if kind == "merged":
        options = f", dtype={dtype!r}" if dtype in ("float32", "bfloat16") else ""
        code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        code += [f"model = AutoModelForCausalLM.from_pretrained({str(target)!r}{options})"]
        return [*code, *card.asking(tokenizer, chat=source.chat)]
    config: Any = LoraConfig(task_type=source.config.task_type) if kind == "lora" else source.config
    held = source.run.model.dtype if source.run else "bfloat16"
    head = [value.shape[0] for value in source.extra.values() if value.dim() == 2]  # its last matrix has a row a label
    outputs = (source.run.model.num_labels if source.run else None) or min(head, default=2)
    return card.loading_code(config, base, target, held, outputs, labels, tokenizer, source.chat)
