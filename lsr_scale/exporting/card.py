"""The model card beside every export: base, method, counts, data, scores, licence, and how near the export is."""

from pathlib import Path
from typing import Any

from lsr_scale.adapters import card
from lsr_scale.exporting.source import AdapterSource
from lsr_scale.run.card import accuracy_lines, data_names, licence_words

_USE = {
    "adapter": "import lsr_scale, peft\nmodel = peft.PeftModel.from_pretrained(base, FOLDER)",
    "lora": "import peft  # lsr_scale is not needed\nmodel = peft.PeftModel.from_pretrained(base, FOLDER)",
    "merged": "import transformers  # nothing else is needed\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)",
    "gguf": "llama-cli -m BASE.gguf --lora FOLDER/adapter.gguf -p PROMPT",
    "merged gguf": "llama-cli -m FOLDER/model.gguf -p PROMPT",
}


def write_card(folder: Path, source: AdapterSource, kind: str, summary: dict[str, Any]) -> None:
    """Write README.md: what the Hub's readers and people look for."""
    base = (source.run.model.name if source.run else None) or (source.base or {}).get("name") or "unknown"
    library = "gguf" if "gguf" in kind else "transformers" if kind == "merged" else "peft"
    described = source.base or {}
    rows = {
        "base": f"{base} ({described.get('architecture', 'unknown architecture')})",
        "base held in": described.get("quantization", "unknown"),
        "method": source.method,
        "rank": getattr(source.config, "rank", getattr(source.config, "r", None)),
        "trained parameters": f"{source.num_parameters():,} in {len(source.modules)} linear layers",
        **summary,
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
    lines += ["```" if "gguf" in kind else "```python", _use(source, kind, labels), "```", ""]
    card.write_card(folder, lines)


def _use(source: AdapterSource, kind: str, labels: list[str]) -> str:
    """Return the code that loads an export; a classifier's base is to have as many labels."""
    if getattr(source.config.task_type, "value", source.config.task_type) != "SEQ_CLS":
        return _USE[kind]
    if kind == "merged":
        first, _, _ = _USE[kind].partition("\n")
        return f'{first}\nclassify = transformers.pipeline("text-classification", FOLDER)'
    names = f"id2label={dict(enumerate(labels))!r}" if labels else "num_labels=NUMBER"
    load = f"base = transformers.AutoModelForSequenceClassification.from_pretrained(BASE, {names})"
    first, _, last = _USE[kind].partition("\n")
    return f"import transformers\n{first}\n{load}\n{last}"
