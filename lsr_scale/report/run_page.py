"""What the page of a run shows, in the order of the page: plain values, as people read them."""

import base64
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from lsr_scale import files
from lsr_scale.config import run_from_dict, yaml_text
from lsr_scale.errors import UserError
from lsr_scale.report.figures import Drawn, drawn
from lsr_scale.run.compare import ABSENT, RunSummary, Score, compare_records
from lsr_scale.run.compare_tables import number, signed_percent, value_text
from lsr_scale.run.plots import NATS, conditions_figure, loss_figure, underflow_figure
from lsr_scale.run.policy_plots import rewards_figure
from lsr_scale.run.record import RunRecord, flat
from lsr_scale.scoring.paired import wilson
from lsr_scale.units import amount, byte_size, clock

MAX_SAMPLES = 24  # prompts on a page
_MAX_PICTURE = 4 * 2**20
_PLAN_FOR = "for rows of full max_length, fused as on a GPU where the model's layers can be"


def run_page(record: RunRecord, planned: bool = True, plan: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Return the values of `run.html.jinja` for a run.

    Args:
        record: What lies in the run's folder.
        planned: Compute too what `lsr-scale plan` foretells.
        plan: Foretells it, by default `planning.plan`.
    """
    summary = compare_records([record]).runs[0]
    said = record.results.get("notes")
    warnings = [str(line) for line in said] if isinstance(said, list) else []
    if not record.is_finished:
        warnings.insert(0, f"The run has not ended: this is how it stood after step {record.steps:,}.")
    warnings += record.notes
    choices, others = list(_choices(record, summary)), list(_others(summary))
    samples, samples_left = _samples(record)
    plan_rows, plan_note = _plan(record, summary, plan) if planned else ([], "")
    config_rows, config_caption = _config(record)
    text = yaml_text.dump(record.config) if record.config else ""
    values = {
        "title": record.folder.path.resolve().name or record.name,
        "plural": "",
        "lead": _lead(record, summary),
        "tiles": list(_tiles(record, summary)),
        "warnings": warnings,
        "choices": choices,
        "others": others,
        "pictures": _pictures(record),
        "figures": list(_figures(record, summary)),
        "compute": record.compute,
        "error_rows": list(_errors(record)),
        "compute_tolerance": record.compute_errors.get("tolerance"),
        "samples": samples,
        "samples_left": samples_left,
        "plan_rows": plan_rows,
        "plan_note": plan_note,
        "config_rows": config_rows,
        "config_caption": config_caption,
        "config_text": text,
        "config_lines": text.count("\n"),
        "data_rows": list(_data(record)),
        "data_notes": [line for line in warnings if line.startswith("data.")],
        "environment": list(_environment(record)),
    }
    sections = (
        ("notes", "Notes", warnings),
        ("scores", "Scores", choices or others),
        ("curves", "Curves", values["figures"]),
        ("errors", "Errors in 8 bits", values["error_rows"]),
        ("samples", "Samples", samples),
        ("plan", "Plan", plan_rows or plan_note),
        ("config", "Configuration", True),
        ("data", "Data", True),
        ("machine", "Machine", True),
    )
    return {**values, "sections": [(id, name) for id, name, shown in sections if shown]}


def _lead(record: RunRecord, summary: RunSummary) -> str:
    held = f", held in {summary.quantization}" if summary.quantization not in (None, "none") else ""
    held += f", multiplied in {summary.compute}" if summary.compute != "bf16" else ""
    state = "" if record.is_finished else " (not ended)"
    method, base = summary.method or "an adapter", summary.model or "an unknown base"
    return f"{method} on {base}{held}, {amount(summary.steps, 'step')}{state}"


def _tiles(record: RunRecord, summary: RunSummary) -> Iterator[dict[str, str]]:
    """Yield the figures that a reader looks for first."""

    def tile(name: str, value: str, more: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "more": more}

    for task, scores in list(summary.scores.items())[:1]:
        if score := scores.get("accuracy"):
            before = "" if score.before is None else f"from {100 * score.before:.1f} %"
            yield tile(f"right, {task}", f"{100 * score.value:.1f} %", before)
    judged = summary.judged
    if judged.train is not None:
        yield tile(f"training {summary.objective}", number(judged.train), "mean of the last tenth")
    if judged.best is not None:
        yield tile(f"best evaluation {summary.objective}", number(judged.best), f"step {judged.best_step:,}")
    if summary.parameters is not None:
        size = "" if summary.adapter_bytes is None else f"file of {byte_size(summary.adapter_bytes)}"
        yield tile("trained parameters", f"{summary.parameters:,}", size)
    if summary.tokens_per_s is not None:
        yield tile("tokens/s", f"{summary.tokens_per_s:,.0f}", "median of the logged steps")
    if summary.memory_gib is not None:
        yield tile(
            "peak memory", byte_size(summary.memory_gib * 2**30), "of a GPU" if summary.on_gpu else "of the process"
        )
    if summary.wall_s is not None:
        training = "" if summary.training_s is None else f"training: {clock(summary.training_s)}"
        yield tile("time", clock(summary.wall_s), training)


def _choices(record: RunRecord, summary: RunSummary) -> Iterator[dict[str, Any]]:
    """Yield a row a score that is a share of right answers."""
    for task, scores in summary.scores.items():
        for name, score in scores.items():
            if score.low is not None and score.high is not None:
                yield _choice(
                    task if name == "accuracy" else f"{task}, length-normalized", score, score.low, score.high
                )


def _choice(task: str, score: Score, low: float, high: float) -> dict[str, Any]:
    marks = [{"low": 100 * low, "high": 100 * high, "at": 100 * score.value, "y": 15, "color": "var(--s0)"}]
    row: dict[str, Any] = {
        "task": task,
        "n": f"{score.num_examples:,}",
        "after": f"{100 * score.value:.1f}",
        "after_interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "before": "",
        "change": "",
        "p": "",
        "marks": marks,
        "alt": f"{task}: after training {100 * score.value:.1f} %, between {100 * low:.1f} and {100 * high:.1f}",
    }
    gain = score.gain
    if score.before is not None and gain is not None and gain.p is not None:
        start, end = wilson(round(score.before * gain.common), gain.common)
        row["before"], row["before_interval"] = f"{100 * score.before:.1f}", f"{100 * start:.1f} to {100 * end:.1f}"
        row["change"] = signed_percent(gain.difference)
        row["change_interval"] = f"{signed_percent(gain.low)} to {signed_percent(gain.high)}"
        row["direction"] = direction(gain.low, gain.high)
        row |= {"p": f"{gain.p:.2g}", "gained": gain.gained, "lost": gain.lost}
        old = {"low": 100 * start, "high": 100 * end, "at": 100 * score.before, "y": 7, "color": "var(--quiet)"}
        marks.insert(0, old)
        row["alt"] += f"; before {100 * score.before:.1f} %, between {100 * start:.1f} and {100 * end:.1f}"
    return row


def direction(low: float, high: float) -> str:
    """Return the class of a difference: "up" or "down" where its interval leaves zero out, "" otherwise."""
    return "up" if low > 0 else "down" if high < 0 else ""


def _others(summary: RunSummary) -> Iterator[dict[str, str]]:
    for task, scores in summary.scores.items():
        for name, score in scores.items():
            if score.low is None:
                row = {"task": task, "name": name, "n": f"{score.num_examples:,}", "value": number(score.value)}
                row |= {"before": number(score.before), "change": ""}
                if gain := score.gain:
                    row["change"] = f"{gain.difference:+.4f}"
                    row["change_interval"] = f"{gain.low:+.4f} to {gain.high:+.4f}"
                yield row
    for name, value in summary.evaluated.items():
        yield {
            "task": "data.validation, last evaluation",
            "name": name.removeprefix("eval_"),
            "n": "",
            "value": number(value),
            "before": "",
            "change": "",
        }


def _figures(record: RunRecord, summary: RunSummary) -> Iterator[Drawn]:
    has_rewards = rewards_figure(record.metrics, "") is not None
    if summary.curves["loss"] or summary.curves["eval_loss"]:
        loss = summary.loss
        alt = f"Loss over {amount(summary.steps, 'step')}"
        if training := summary.curves["loss"]:
            alt += f", training from {training[0][1]:.3f} to {number(loss.train, 3) or f'{training[-1][1]:.3f}'}"
        if loss.best is not None:
            alt += f", best evaluation {loss.best:.3f} after step {loss.best_step}"
        unit = "" if has_rewards else NATS
        yield drawn(lambda size: loss_figure(summary.curves, "", size, unit), alt, "")
    if has_rewards:
        caption = (
            "How far the model prefers chosen completions to rejected ones, beyond what it began with; of ORPO, which "
            "has no reference, by mean log-probabilities."
        )
        if any("reward" in row for row in record.metrics):
            caption = "What completions were worth, how long they were, and how far the model went from the reference."
        yield drawn(lambda size: rewards_figure(record.metrics, "", size), "Rewards over the steps", caption)
    if conditions_figure(record.metrics, "") is not None:
        caption = "Condition numbers of LSR-Adapt's sums: 1 where their terms are orthogonal, large where they cancel."
        yield drawn(
            lambda size: conditions_figure(record.metrics, "", size), "Condition number gamma over the steps", caption
        )
    if underflow_figure(record.metrics, "") is not None:
        caption = (
            "Values that are too small in 8 bits beside the largest of their token: they lose bits, or become zero."
        )
        yield drawn(lambda size: underflow_figure(record.metrics, "", size), "Underflow over the steps", caption)


def _errors(record: RunRecord) -> Iterator[dict[str, str]]:
    """Yield what 8 bits change in each group of linears over the layers, and which layers keep it in bfloat16."""
    of_groups: dict[str, dict[str, dict[str, float]]] = {}
    for name, error in record.compute_errors.get("errors", {}).items():
        if found := re.fullmatch(r"([0-9]+)\.(\w+)\.(output|gradient)", str(name)):
            layer, group, product = found.groups()
            finite = of_groups.setdefault(group, {"output": {}, "gradient": {}})[product]
            if isinstance(error, int | float):
                finite[layer] = error
    kept = [str(name) for name in record.compute_errors.get("kept", [])]
    for group, products in of_groups.items():
        row = {
            "group": group,
            "kept": ", ".join(name.rpartition(".")[0] for name in kept if name.endswith(f".{group}")),
        }
        for product, finite in products.items():
            worst = max(finite, key=lambda layer: finite[layer], default="")
            row[f"{product}_median"] = f"{100 * statistics.median(finite.values()):.1f} %" if finite else ""
            row[f"{product}_largest"] = f"{100 * finite[worst]:.1f} % ({worst})" if finite else ""
        yield row


def _pictures(record: RunRecord) -> list[dict[str, str]]:
    """Return the confusion matrices that lie in the folder, as they are."""
    found = []
    for file in sorted(record.folder.path.glob("confusion-*.png")):
        if files.is_picture(file) and file.stat().st_size <= _MAX_PICTURE:
            content = base64.b64encode(file.read_bytes()).decode("ascii")
            alt = f"Confusion matrix: {file.stem.removeprefix('confusion-')}"
            found.append({"source": f"data:image/png;base64,{content}", "alt": alt})
    return found


def _samples(record: RunRecord) -> tuple[list[dict[str, Any]], int]:
    """Return the generations by prompt, and how many prompts are left out."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in record.samples:
        if "prompt" not in row or not isinstance(row.get("completion"), str):
            continue
        key = json.dumps(row["prompt"], sort_keys=True)
        sample = by_prompt.setdefault(
            key, {"prompt": _messages(row["prompt"]), "before": None, "after": None, "between": []}
        )
        sample.setdefault("after_label", "after training")
        if row.get("moment") in ("before", "after"):
            sample[row["moment"]] = row["completion"]
        else:
            sample["between"].append({"step": row.get("step"), "completion": row["completion"]})
    for sample in by_prompt.values():
        if sample["after"] is None and sample["between"]:  # a run that has not ended
            last = sample["between"].pop()
            sample["after"], sample["after_label"] = last["completion"], f"after step {last['step']}"
    samples = list(by_prompt.values())
    return samples[:MAX_SAMPLES], max(0, len(samples) - MAX_SAMPLES)


def _messages(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt as messages, a string being one."""
    if isinstance(prompt, list) and all(isinstance(one, dict) for one in prompt):
        shown = []
        for one in prompt:
            content = one.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            shown.append({"role": str(one.get("role") or "message"), "content": text})
        return shown
    return [
        {"role": "prompt", "content": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)}
    ]


def _plan(record: RunRecord, summary: RunSummary, plan: Callable[..., Any] | None) -> tuple[list[dict[str, str]], str]:
    """Return the plan beside what was measured, and a remark; the remark alone where there is no plan."""
    if plan is None:
        from lsr_scale.planning import plan

    try:
        run = run_from_dict(record.config, str(record.folder.config))
        # memory is planned for GPUs: where there was none, there is nothing to compare it with
        planned = plan(run, summary.num_processes or 1, trace=summary.on_gpu)
    except Exception as error:  # a base that is no longer there, a release that knows other options
        return [], f"There is no plan to compare with: {str(error)[:300]}"
    rows = []
    for name, foreseen, found in (
        ("trained parameters", planned.trainable_parameters, summary.parameters),
        ("adapter file", planned.adapter_bytes, summary.adapter_bytes),
    ):
        shown = byte_size if name == "adapter file" else "{:,}".format
        measured = "" if found is None else shown(found)
        remark = "" if found is None else "equal" if found == foreseen else f"{found / foreseen - 1:+.2%}"
        rows.append({"name": name, "planned": shown(foreseen), "measured": measured, "remark": remark})
    if not summary.on_gpu:
        command = f"lsr-scale plan {shlex.quote(str(record.folder.config))}"
        return rows, f"Memory is planned for GPUs, and there was none: {command} foretells it."
    if not planned.traced:
        return rows, "Memory is not compared: this model's activations could not be counted."
    total, found = planned.memory_gib.total, summary.memory_gib
    remark = "" if found is None else f"{found / total - 1:+.0%}"
    if found is not None and record.setting("training", "memory") == "auto":
        remark += "; training.memory: auto takes what is free"
    measured = "" if found is None else byte_size(found * 2**30)
    planned_size = byte_size(total * 2**30)
    rows.append({"name": "peak memory of a GPU", "planned": planned_size, "measured": measured, "remark": remark})
    return rows, f"Memory is planned {_PLAN_FOR}. Speed is not planned."


def _config(record: RunRecord) -> tuple[list[tuple[str, str, str]], str]:
    """Return what of the configuration is no default, and a caption."""
    if not record.config:
        return [], "The configuration cannot be read."
    defaults = _defaults(record.config)
    values = flat(record.config)
    if defaults is None:
        return [(key, value_text(value), "") for key, value in values.items()], "Every value."
    rows = []
    for key, value in values.items():
        default = defaults.get(key, ABSENT)
        if value != default and not (default == ABSENT and value in (None, {}, [])):
            rows.append((key, value_text(value), "" if default == ABSENT else value_text(default)))
    return rows, f"{len(rows)} of {len(values)} values are no defaults."


def _defaults(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the values of a run that says no more than it must, by dotted key; None where it is no run of today."""
    try:
        model = {key: config["model"].get(key) for key in ("task", "num_labels")}
        least = {
            "model": {"name": config["model"]["name"], **{key: value for key, value in model.items() if value}},
            "adapter": {"method": config["adapter"]["method"]},
            "data": {"train": config["data"]["train"]},
        }
        values = flat(run_from_dict(least).model_dump())
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    for key in ("model.name", "adapter.method", "data.train", "model.num_labels"):
        values.pop(key, None)  # what a run has to say is no default
    return values


def _data(record: RunRecord) -> Iterator[dict[str, str]]:
    for part, sources in record.data.items():
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict):
                digest = source.get("sha256") or source.get("fingerprint") or ""
                rows = source.get("num_rows")
                name = f" ({source['name']})" if source.get("name") else ""
                yield {
                    "part": {"train": "training", "validation": "evaluation"}.get(part, part),
                    "path": f"{source.get('path')}{name}",
                    "split": str(source.get("split") or ""),
                    "rows": f"{rows:,}" if isinstance(rows, int) else "",
                    "hash": str(digest)[:12],
                }


def _environment(record: RunRecord) -> Iterator[tuple[str, str]]:
    yield "machine", record.machine
    if processes := record.number("num_processes"):
        yield "processes", f"{processes:,.0f}"
    for key, value in record.environment.items():
        if key not in ("gpus", "cpu") and value not in (None, "", []):
            yield re.sub("_", " ", key) if key != "lsr_scale" else key, str(value)
