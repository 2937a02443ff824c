"""The model card of a run's adapter: base, method, data, scores, and how it is loaded."""

from typing import Any

from lsr_scale import files
from lsr_scale.adapters.card import CARD_NAME, cell, front_matter, held_note, licence, loading, loading_code, table
from lsr_scale.adapters.read import read_base, read_config
from lsr_scale.config import RunConfig
from lsr_scale.run.folder import RunFolder
from lsr_scale.units import amount

# the loss of GRPO, which has rewards, tells nothing
_AT_THE_END = {"final_reward": "reward at the end", "final_loss": "loss at the end"}


def write_run_card(folder: RunFolder, run: RunConfig, results: dict[str, Any]) -> None:
    """Write `adapter/README.md`, in place of the one without scores that was saved with the adapter.

    Args:
        folder: The run's, with its adapter.
        run: The run.
        results: What `results.json` holds.
    """
    config, described = read_config(folder.adapter), read_base(folder.adapter) or {}
    base, method = run.model.name, run.adapter.method
    validation = {name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")}
    last = next((name for name in _AT_THE_END if name in results), None)
    rows = {
        "base": f"{base} ({described.get('architecture', 'unknown architecture')})",
        "base held in": described.get("quantization", "unknown"),
        "method": method,
        "rank": getattr(config, "rank", getattr(config, "r", None)),
        "trained parameters": f"{results['trainable_parameters']:,}",
        "data": data_names(run),
        "training": f"{amount(results['steps'], 'step')}, {amount(results['train_rows'], 'row')}",
        **({_AT_THE_END[last]: results[last]} if last else {}),
        **{f"validation: {name}": value for name, value in validation.items()},
        "licence": licence_words(base),
    }
    lines = [*front_matter(base, "peft", method, config.task_type), "", f"# {method} adapter of {base}", ""]
    lines += ["Trained by lsr_scale.", "", *table(rows), *accuracy_lines(results)]
    section = run.model
    code = loading_code(config, base, folder.adapter, section.dtype, section.num_labels or 0, section.labels or ())
    lines += loading(config, folder.adapter, code)
    lines += held_note(run.model.quantization)
    files.write_text(folder.adapter / CARD_NAME, "\n".join(lines))


def accuracy_lines(results: dict[str, Any]) -> list[str]:
    """Return the lines of a table of the accuracies before and after training, none without questions."""
    accuracy = {**(results.get("accuracy") or {}), **_of_classes(results)}
    if not accuracy:
        return []
    lines = ["Accuracy before and after training, by the run that made it:", "", "| task | before | after | n |"]
    lines += ["|---|---:|---:|---:|"]
    for task, moments in accuracy.items():
        cells = [f"{100 * moments[when]['accuracy']:.1f} %" if when in moments else "" for when in ("before", "after")]
        number = next((m["num_examples"] for m in moments.values() if "num_examples" in m), "")
        lines.append(f"| {cell(task)} | {cells[0]} | {cells[1]} | {number} |")
    return [*lines, ""]


def _of_classes(results: dict[str, Any]) -> dict[str, Any]:
    """Return a classifier's scores by its held-out rows, none of a regression, which has no accuracy."""
    found = results.get("classification") or {}
    return {name: moments for name, moments in found.items() if all("accuracy" in m for m in moments.values())}


def data_names(run: RunConfig) -> str:
    """Return the names of the sources that a run is trained on."""
    return ", ".join(source.path for source in run.data.train)


def licence_words(base: str) -> str:
    """Return whose licence holds for an adapter."""
    return f"{licence(base)} (the base's)" if licence(base) else "that of the base model and of the data"
