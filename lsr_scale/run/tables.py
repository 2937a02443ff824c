"""Tables on the screen: a run's results, and what `eval` found."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lsr_scale.config.training import EVALUATED
from lsr_scale.errors import printable, shortened
from lsr_scale.run.folder import RunFolder
from lsr_scale.scoring.accuracy import TaskScore
from lsr_scale.screen import Screen
from lsr_scale.units import amount, byte_size


def print_results(folder: RunFolder, results: dict[str, Any], scores: dict[str, dict[str, TaskScore]]) -> None:
    """Print the small table at the end of a run, and where things lie."""
    console = Screen()
    if scores:
        table = Table(title="Accuracy, % (standard error)", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column("task", overflow="fold")
        for column in ("n", *scores, "gained / lost", "p"):
            table.add_column(column, justify="right")
        for task, values in results["accuracy"].items():
            paired = values.get("mcnemar")
            table.add_row(
                task,
                str(next(by_task[task].num_examples for by_task in scores.values() if task in by_task)),
                *(percent(scores[when][task]) if task in scores[when] else "" for when in scores),
                f"{paired['newly_right']} / {paired['newly_wrong']}" if paired else "",
                f"{paired['p']:.2g}" if paired else "",
            )
        console.print(table)
    for name, by_moment in results.get("classification", {}).items():
        console.print(_classifier_table(name, by_moment))
    if validation := [f"{name.removeprefix('eval_')} {results[name]:.4f}" for name in EVALUATED if name in results]:
        console.print(f"validation  {', '.join(validation)}", soft_wrap=True)
    file = f"{results['trainable_parameters']:,} parameters, {byte_size(results['adapter_bytes'])}"
    console.print(
        f"adapter  {folder.adapter}  ({file})\nloss     {folder.curve}\nresults  {folder.results}",
        soft_wrap=True,
    )


def _classifier_table(name: str, by_moment: dict[str, Any]) -> Table:
    """Return a table of a classifier's scores before and after training."""
    number = next(iter(by_moment.values()))["num_examples"]
    title = f"{name}, {amount(number, 'row')}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("", *by_moment):
        table.add_column(column, justify="right" if column else "left")
    for score in (key for key in next(iter(by_moment.values())) if key not in ("num_examples", "confusion")):
        table.add_row(score, *(f"{scores[score]:.4f}" for scores in by_moment.values()))
    return table


def print_accuracy(result: dict[str, Any]) -> None:
    """Print what `evaluate.evaluate_run` returns as a table."""
    if "classification" in result:
        by_name = result["classification"]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", *by_name):
            table.add_column(column, justify="right" if column else "left", overflow="fold")
        for name in next(iter(by_name.values())):
            shown = (values[name] for values in by_name.values())
            table.add_row(name, *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in shown))
        console = Screen()
        console.print(f"{result['run']}: {result['scored']}", soft_wrap=True)
        console.print(table)
        return
    title = f"{result['run']}: accuracy, % (standard error), {result['scored']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for column in ("task", "accuracy", "length-normalized", "questions"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, by_moment in result["accuracy"].items():
        values = by_moment[result["scored"]]
        pairs = (("accuracy", "accuracy_stderr"), ("acc_norm", "acc_norm_stderr"))
        shown = [f"{100 * values[mean]:.1f} ({100 * values[error]:.1f})" for mean, error in pairs]
        table.add_row(task, *shown, str(values["num_examples"]))
    Screen().print(table)


def print_classified(found: Sequence[dict[str, Any]]) -> None:
    """Print what `classifier.classify` returns as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    is_class = "probability" in found[0]
    table.add_column("label" if is_class else "score", justify="left" if is_class else "right", overflow="fold")
    if is_class:
        table.add_column("probability", justify="right")
    table.add_column("text", overflow="fold")
    for row in found:
        shown = [row["predicted"], f"{row['probability']:.3f}"] if is_class else [f"{row['predicted']:.3f}"]
        text = " | ".join(row[name] for name in ("text", "text_pair") if name in row)
        table.add_row(*map(Text, (*shown, shortened(printable(text), 200))))
    Screen().print(table)


def percent(result: TaskScore) -> str:
    """Return an accuracy and its standard error, for people."""
    return f"{100 * result.accuracy:.1f} ({100 * result.accuracy_stderr:.1f})"
