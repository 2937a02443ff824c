"""The model card beside every export: base, method, counts, data, scores, licence, and how near the export is."""

from pathlib import Path
from typing import Any

from lsr_scale.exporting.source import AdapterSource
from lsr_scale.model import builtin

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
    packaged = builtin.MODELS.get(base.removeprefix(builtin.PREFIX)) if base.startswith(builtin.PREFIX) else None
    licence = packaged.license.lower() if packaged else "other"
    header = [
        "---",
        *([f"base_model: {packaged.hub_name if packaged else base}"] if packaged or _is_hub_name(base) else []),
        f"library_name: {'gguf' if 'gguf' in kind else 'transformers' if kind == 'merged' else 'peft'}",
        f"license: {licence}",
        f"tags: [lsr_scale, {source.method}]",
        "---",
    ]
    lines = [*header, "", f"# {source.method} adapter of {base}, exported as {kind}", ""]
    described = source.base or {}
    rows = {
        "base": f"{base} ({described.get('architecture', 'unknown architecture')})",
        "base held in": described.get("quantization", "unknown"),
        "method": source.method,
        "rank": getattr(source.config, "rank", getattr(source.config, "r", None)),
        "trained parameters": f"{source.num_parameters():,} in {len(source.modules)} linear layers",
        **summary,
        "licence": f"{packaged.license} (the base's)" if packaged else "that of the base model and of the data",
    }
    if source.run is not None:
        rows["data"] = ", ".join(_name(item) for item in source.run.data.train)
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items()), ""]
    accuracy = (source.results or {}).get("accuracy") or {}
    if accuracy:
        lines += ["Accuracy before and after training, by the run that made it:", "", "| task | before | after | n |"]
        lines += ["|---|---:|---:|---:|"]
        for task, moments in accuracy.items():
            cells = [
                f"{100 * moments[when]['accuracy']:.1f} %" if when in moments else "" for when in ("before", "after")
            ]
            number = next((m["num_examples"] for m in moments.values() if "num_examples" in m), "")
            lines.append(f"| {_cell(task)} | {cells[0]} | {cells[1]} | {number} |")
        lines.append("")
    lines += ["```" if "gguf" in kind else "```python", _USE[kind], "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _name(item: Any) -> str:
    return item if isinstance(item, str) else str(getattr(item, "path", item))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
