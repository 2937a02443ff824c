"""Tables of what FP8 loses: by group of linears (`quality/fp8_layers.py`), and in training (`fp8_accuracy.py`)."""

from pathlib import Path

from benchmarks.quality import fp8_accuracy, fp8_layers, trials
from benchmarks.report.markdown import grid
from benchmarks.report.measurements import Run, read, where

LIMIT = 0.05


def of_model(path: Path, run: Run) -> list[str]:
    """Return a model's errors: by group and recipe, of the layers that stand out, and of all layers together."""
    measured = run["groups"]
    head, *rows = fp8_layers.group_rows(measured)
    named = fp8_layers.exceeding(measured, LIMIT)
    # tokens such as <|im_start|> have what ends a cell
    layers_head, *layers = (
        [cell.replace("|", "\\|") for cell in row]
        for row in fp8_layers.layer_rows({name: measured[name] for name in named})
    )
    together_head, *together = fp8_layers.together_rows(run)
    text = f"{where(run, path)} {run['tokens']:,} tokens of {run['config']['data'].upper()}. Relative errors in %: by "
    text += "themselves, each with the inputs and gradients of the bf16 model, the median and the worst of the layers."
    parts = [f"### {run['config']['model']}, {run['config']['base']}", text, grid(head, rows)]
    if named:
        parts += [f"Groups with an error of more than {LIMIT:.0%}, of Y or of dX:", grid(layers_head, layers)]
    parts += [
        "All linears in FP8 at once, against float32; d up is the gradient of the adapters' `up` factors at the start:",
        grid(together_head, together),
        f"![{path.stem}](results/{path.parent.name}/{path.stem}.png)",
        f"    {run['command']}",
    ]
    return parts


def sections(results: Path) -> list[str]:
    """Return both sections, as far as there are measurements in the folder of all results."""
    parts: list[str] = []
    for path, run in read(results / "fp8_layers"):
        parts += of_model(path, run)
    if parts:
        parts = ["## FP8: what rounding costs, by layer", *parts]
    done = trials.load(results / "fp8_accuracy")
    if any("method" in trial for trial in done.values()):
        head, *rows = fp8_accuracy.table(done)
        text = "Adapters trained with the base's products in 8 bits and in bf16, scored alike on the test parts of "
        text += "ARC-E, ARC-C and OpenBookQA. Each trial has its command and settings in `fp8_accuracy/trials.jsonl`."
        parts += ["## FP8 and int8: accuracy beside bf16", text, grid(head, rows)]
        parts.append("![less that of bf16](results/fp8_accuracy/differences.png)")
    return parts
