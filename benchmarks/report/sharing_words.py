"""GUIDE.md's table of what it brings that several trials share a step, from the sweeps and joint steps measured."""

import re
from pathlib import Path
from typing import Any

from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import Run, read

NAMES = {"smollm2-135m": "SmolLM2-135M", "mistral-7b": "Mistral-7B"}
BASES = {"none": "", "bf16": "", "nf4": " NF4", "int8": " int8"}


def guide(results: Path) -> str:
    """Return the table, and what `together: auto` measured; nothing without measurements."""
    runs = [run for _, run in sorted(read(results / "sweep"), key=lambda pair: _number(pair[0]))]
    rows = [*_beside_alone(runs), *_beside_processes(runs), *_several_gpus(runs), *_steps(results / "joint_step")]
    if not rows:
        return ""
    head = ["trials, and where", "together", "beside it", "times"]
    return "\n\n".join([grid(head, rows), *([text] if (text := _auto(runs)) else [])])


def _number(path: Path) -> tuple[str, int]:
    """Return a file's name and number: a measurement made again has the next one."""
    found = re.fullmatch(r"(.*?)(?:-(\d))?", path.stem)
    assert found is not None
    return found[1], int(found[2] or 1)


def _what(run: Run) -> str:
    config = run["config"]
    of = f"`{config['run']}`" if config["run"] else f"{config['tokens']:,} tokens a step"
    return f"{NAMES[config['model']]}{BASES[config['base']]}, {config['trials']} of {of}, {_where(run)}"


def _where(run: Run) -> str:
    cards = run["env"].get("gpus") or []
    cards = cards[: max(1, run["config"].get("gpus") or 0)]
    if not cards:
        return "two CPU cores" if ", 2 cores" in run["env"]["cpu"] else run["env"]["cpu"]
    return f"{('one', 'two')[len(cards) - 1] if len(cards) < 3 else len(cards)} {cards[0].removeprefix('NVIDIA ')}"


def _beside_alone(runs: list[Run]) -> list[list[str]]:
    """Return the newest of each kind of sweep beside its trials one after the other, earlier ones in brackets."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        if "steps_over_one_by_one" in run["ratios"]:
            kinds.setdefault(_what(run), []).append(run)
    rows = []
    for what, (*earlier, run) in kinds.items():
        together, alone = run["rows"]["together"], run["rows"]["one_by_one"]
        for ratio, ending, name, form, unit in (
            ("steps_over_one_by_one", "", "tokens_per_s", ",.0f", "tokens/s"),
            ("all_over_one_by_one", ", start-up included", "seconds", ",.0f", "s"),
        ):
            before = ", ".join(f"{one['ratios'][ratio]:.2f}" for one in earlier)
            times = f"{run['ratios'][ratio]:.2f}" + (f" (earlier {before})" if before else "")
            figures = [f"{number(row[name], form)} {unit}" for row in (together, alone)]
            rows.append([f"{what}{ending}", figures[0], f"{figures[1]}, one after the other", times])
    return rows


def _beside_processes(runs: list[Run]) -> list[list[str]]:
    rows = []
    for run in runs:
        if (ratio := run["ratios"].get("all_over_side_by_side")) is not None:
            together, beside = run["rows"]["together"], run["rows"]["side_by_side"]
            figures = [f"{row['seconds']:.0f} s, {row['gib']:.0f} GiB" for row in (together, beside)]
            others = f"{figures[1]}, as many processes side by side"
            rows.append([f"{_what(run)}, start-up included", figures[0], others, f"{ratio:.2f}"])
    return rows


def _several_gpus(runs: list[Run]) -> list[list[str]]:
    """Return sweeps over several GPUs beside the newest of as many trials a step on one."""
    rows = []
    for run in runs:
        config = run["config"]
        gpus = config.get("gpus") or 1
        one = [r for r in runs if _alike(r, run) and r["config"]["trials"] * gpus == config["trials"]]
        if gpus < 2 or not one:
            continue
        figures = [r["rows"]["together"]["tokens_per_s"] for r in (run, one[-1])]
        others = f"{figures[1]:,.0f} tokens/s, {one[-1]['config']['trials']} on one, in another run"
        rows.append([_what(run), f"{figures[0]:,.0f} tokens/s", others, f"{figures[0] / figures[1]:.2f}"])
    return rows


def _alike(run: Run, other: Run) -> bool:
    names = ("model", "base", "run", "tokens", "seq_len")
    alike = all(run["config"][name] == other["config"][name] for name in names)
    return alike and "steps_over_one_by_one" in run["ratios"]


def newest_steps(folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    """Return the newest run, and row, of each case of a joint step that CUDA graphs were measured of."""
    cases: dict[str, tuple[Run, dict[str, Any]]] = {}
    for _, run in sorted(read(folder), key=lambda pair: _number(pair[0])):
        for name, case in run["rows"].items():
            if "joint_graphs" in case["step_ms"]:
                cases[name] = run, case
    return list(cases.values())


def case_name(case: dict[str, Any]) -> str:
    """Return the model, trials and tokens of a joint step."""
    trials = f"{case['trials']} of LSR r={case['rank']}, {case['tokens']:,} tokens each"
    return f"{NAMES[case['model']]}{BASES[case['base']]}, {trials}"


def _steps(folder: Path) -> list[list[str]]:
    """Return the newest of each case of a bare step, by CUDA graphs: beside one by one, one adapter, and none."""
    rows = []
    for run, case in newest_steps(folder):
        what = f"{case_name(case)}, {_where(run)}: a bare step"
        steps = case["step_ms"]
        beside = {
            "sequential": (steps.get("short_graphs"), f"{case['trials']} steps of one trial", case["trials"]),
            "eager": (steps.get("short"), f"{case['trials']} steps of one trial without graphs", case["trials"]),
            "long": (steps.get("long_graphs"), "one adapter with all tokens", 1),
            "base": (steps.get("base_graphs"), "no adapter", 1),
        }
        for name, (ms, others, number_of) in beside.items():
            if ms is not None:
                ratio = case.get(f"{name}_ratio_graphs", ms * number_of / steps["joint_graphs"])
                cells = [f"{steps['joint_graphs']:.0f} ms", f"{ms * number_of:,.0f} ms, {others}", f"{ratio:.2f}"]
                rows.append([what, *cells])
                what = "the same"
    return rows


def _auto(runs: list[Run]) -> str:
    """Return what `together: auto` decided in the measurements that left it the choice."""
    texts = []
    for run in runs:
        notes = run["rows"]["together"].get("notes") or []
        measured = [note for note in notes if "ms alone" in note]
        if run["config"]["together"] == "auto" and measured:
            texts.append(f"{_what(run)}: {measured[0].partition(';')[0]}")
    return f"`together: auto` said there: {'; '.join(texts)}." if texts else ""
