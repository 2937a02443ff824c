"""`benchmarks/RESULTS.md`: every committed measurement as a table, with the command that makes it again."""

from pathlib import Path

from benchmarks.command_line import current
from benchmarks.quality import sequential, variants
from benchmarks.report import (
    commonsense_tables,
    export_tables,
    fp8_tables,
    frontier_tables,
    frontier_variants,
    grpo_tables,
    preference,
    real_training,
)
from benchmarks.report.markdown import grid, number
from benchmarks.report.measurements import MODES, Run, has_scaling, read, sweeps, where
from benchmarks.robustness import real_model_curves

HEAD = """# Results

Made by `python -m benchmarks.report` from the JSON under `results/`; not edited by hand. `LOG.md` tells what was
expected and what it taught.
"""

RENAMED = {"per linear": "unfused"}  # of curves, since some were recorded
OUT_OF_TIME = ("not reached before the time limit", "measuring took more than")


def throughput(path: Path, run: Run) -> str:
    """Return all rows of one throughput measurement."""
    rows, missed = [], []
    for row in run["rows"]:
        name = f"{row['provider']} {row['checkpointing']}"
        if row.get("detail", "").startswith(OUT_OF_TIME):
            missed.append(f"{name} {row['tokens'] // row['seq_len']} x {row['seq_len']:,}")
            continue
        batch = f"{row['tokens'] // row['seq_len']} x {row['seq_len']:,}"
        if row["status"] != "ok":
            rows.append([name, batch, row["status"], *[""] * 5])
            continue
        step = row["step_ms"]
        ratio = next((value for peer, value in row["ratio_to"].items() if peer.startswith("unsloth")), None)
        rows.append(
            [
                *(name, batch, number(row["tokens_per_s"])),
                f"{step['p50']:.1f} ({step['p20']:.1f}, {step['p80']:.1f})",
                number(row["peak_memory_gib"], ".1f"),
                *(number(row.get(field), ".2f") for field in ("mfu", "floor_fraction")),
                number(ratio, ".2f"),
            ]
        )
    head = ["provider, checkpointing", "batch", "tokens/s", "step, ms: p50 (p20, p80)", "GiB", "mfu", "of the floor"]
    config = run["config"]
    card = f", {config['memory_gib']:g} GiB of memory" if config.get("memory_gib") else ""
    lines = [f"### {config['model']}, {config['base']}{card}", where(run, path), grid([*head, "over Unsloth"], rows)]
    if missed:
        lines.append(f"The run's time was over before: {'; '.join(missed)}.")
    lines += floors_in_8_bits(run)
    if slopes := run.get("slopes"):
        slope_texts = [f"{s['provider']} {s['checkpointing']} {number(s['bytes_per_token_and_layer'])}" for s in slopes]
        lines.append(f"Bytes that one more token costs in a layer: {'; '.join(slope_texts)}.")
    if notes := dict.fromkeys(note for row in run["rows"] if row["checkpointing"] == "auto" for note in row["notes"]):
        lines.append("`auto` chose: " + "; ".join(notes))
    if sweeps(run):
        lines.append(f"![{path.stem}](results/{path.parent.name}/{path.stem}.png)")
    return "\n\n".join([*lines, f"    {current(config['command'])}"])


def floors_in_8_bits(run: Run) -> list[str]:
    """Return the parts of the floor of a step in 8 bits beside those in bf16, nothing where that was not measured.

    FP8 and int8 have one floor.
    """
    parts = []
    for point, in_8_bits in (run.get("floors_fp8_ms") or run.get("floors_int8_ms") or {}).items():
        # without a provider in bf16 there is no floor in bf16
        floors = {"bf16": run.get("floors_ms", {}).get(point, {}), "8 bits": in_8_bits}
        of_each = [(f"{name}, {MODES[mode]}", floor) for name, modes in floors.items() for mode, floor in modes.items()]
        rows = [
            [part, *(f"{floor[part]:.1f} ({floor[part] / floor['total']:.0%})" for _, floor in of_each)]
            for part in next(iter(in_8_bits.values()))
        ]
        product = run["ceilings"][point].get("fp8_product", "")
        text = (
            "Rows in FP8 and int8 are beside the floor in 8 bits, the same for both "
            f"(its products: FP8, {product}); ms of a step of {point}, activations:"
        )
        parts += [text, grid(["part of the floor", *(name for name, _ in of_each)], rows)]
    return parts


def kernels(path: Path, run: Run) -> str:
    """Return the times of single operations beside their bound."""
    rows = []
    for row in run["rows"]:
        other = f"{row['alternative']}: {row['alternative_ms']:.4f}" if "alternative_ms" in row else ""
        units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s"}
        rate = next((f"{row[name]:,.0f} {unit}" for name, unit in units.items() if name in row), "")
        share = number(row.get("share_of_bound"), ".2f")
        error = number(row.get("error"), ".1e")
        rows.append([row["name"], row["shape"], f"{row['ms']:.4f}", rate, share, other, error])
    head = [
        "operation",
        "shape",
        "ms",
        "rate",
        "of the copy bandwidth",
        "in its place, ms",
        "error, relative to float64",
    ]
    copy = run["config"]["copy_bytes_per_s"] / 1e9
    text = f"{where(run, path)} Copying runs at {copy:,.0f} GB/s."
    if totals := run.get("sums_ms"):
        ways = "; ".join(f"{way} {total:.2f}" for way, total in sorted(totals.items(), key=lambda pair: pair[1]))
        text += f" A layer's eight products in 8 bits with their adapters take, ms: {ways}."
    groups = f"--groups {' '.join(chosen)} " if (chosen := run["config"].get("groups")) else ""
    command = f"    python -m benchmarks.speed.kernel_times {groups}--out {path.name}"
    return "\n\n".join([text, grid(head, rows), command])


def trainer_overhead(path: Path, run: Run) -> str:
    """Return the training command's speed beside the bare loop's."""
    rows = [
        [
            row["memory"],
            *(number(sum(row[side]) / len(row[side])) for side in ("command", "bare")),
            f"{row['ratio']:.3f}",
        ]
        for row in run["rows"]
    ]
    head = ["memory", "command, tokens/s", "bare loop", "ratio"]
    config = run["config"]
    title = f"### {config['model']}, {config['tokens'] // config['seq_len']} x {config['seq_len']:,} tokens a step"
    names = ("model", "layers", "base", "tokens", "seq_len", "steps", "logging_steps", "memory", "rounds")
    given = {name: config[name] for name in names if config.get(name) is not None}
    words = {name: " ".join(value) if isinstance(value, list) else value for name, value in given.items()}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in words.items())
    command = f"    python -m benchmarks.speed.trainer_overhead {options} --out {path.name}"
    return "\n\n".join([title, where(run, path), grid(head, rows), command])


def scaling(path: Path, run: Run) -> str:
    """Return the training command's speed on several GPUs beside one, or in several processes that share a CPU."""
    config, rows = run["config"], []
    for row in run["rows"]:
        stage = "without DeepSpeed" if row["zero_stage"] is None else f"ZeRO-{row['zero_stage']}"
        cells = [number(row["tokens_per_s"]), number(row["peak_memory_gib"], ".1f"), number(row["scaling"], ".2f")]
        rows.append([f"{row['num_gpus']}, {stage}", *(cells if row["status"] == "ok" else [row["status"], "", ""])])
    one, many = ("GPU", "GPUs") if config["device"] == "cuda" else ("CPU process", "processes")
    batch = f"{config['tokens'] // config['seq_len']} x {config['seq_len']:,} tokens a {one} and step"
    title = f"### {config['model']}, {config['base']}, {batch}, `memory: {config['memory']}`"
    table = grid([many, "tokens/s", "GiB, each", f"times one {one}"], rows)
    picture = [f"![{path.stem}](results/{path.parent.name}/{path.stem}.png)"] if has_scaling(run) else []
    return "\n\n".join([title, where(run, path), table, *picture, f"    {current(config['command'])}"])


def loss_curve(path: Path, run: Run) -> str:
    """Return how far the bfloat16 curves are from float32."""
    config = run["config"]
    rows = [
        [RENAMED.get(name, name), *(f"{errors[field]:.4f}" for field in ("rms", "largest", "mean_of_last_50"))]
        for name, errors in run["differences"].items()
    ]
    text = f"{where(run, path)} {config['steps']} steps of {config['method']}, rate {config['rate']:g}."
    head = ["minus float32, nats", "rms", "largest", "mean of the last 50"]
    options = f"--method {config['method']} --rate {config['rate']:g} --seed {config['seed']}"
    picture = f"![{path.stem}](results/{path.parent.name}/{path.stem}.png)"
    return "\n\n".join(
        [text, grid(head, rows), picture, f"    python -m benchmarks.robustness.loss_curve {options} --out {path.name}"]
    )


def many_adapters(path: Path, run: Run) -> str:
    """Return the speed of batches whose rows use different adapters beside the base's."""
    rows = []
    for name, row in run["rows"].items():
        for kind in ("forward", "generation"):
            speeds = row[kind]["tokens_per_s"]
            rows.append([f"{name}, {kind}", *(number(speeds[way]) for way in ("base", "rows"))])
            rows[-1].append(f"{row[kind]['ratio']['rows']:.2f}")
            if "decoder" in row[kind]["ratio"]:
                each = (number(speeds[f"decoder_{way}"]) for way in ("base", "rows"))
                rows.append([f"{name}, {kind} by `Decoder`", *each, f"{row[kind]['ratio']['decoder']:.2f}"])
    config = run["config"]
    text = f"{where(run, path)} {config['resident']:,} adapters in memory, {config['rows']} rows of as many adapters."
    head = ["", "base, tokens/s", "with adapters", "ratio"]
    return "\n\n".join([text, grid(head, rows), f"    python -m benchmarks.speed.many_adapters --out {path.name}"])


def joint_steps(path: Path, run: Run) -> str:
    """Return what a step of several trials costs beside one adapter's and the base's, eager and as CUDA graphs."""
    rows = []
    for case in run["rows"].values():
        what = (
            f"{case['model']}, {case['base'].upper()}, {case['trials']} x {case['tokens']:,} tokens, r={case['rank']}"
        )
        for ending, how in (("_graphs", "CUDA graphs"), ("", "eager")):
            times = [case["step_ms"].get(way + ending) for way in ("joint", "long", "short", "base")]
            if times[0] is not None:
                ratios = [case.get(f"{name}_ratio_{'graphs' if ending else 'bare'}") for name in _RATIOS]
                rows.append(
                    [f"{what}, {how}", *(number(ms, ".1f") for ms in times), *(number(r, ".2f") for r in ratios)]
                )
    head = ["LSR-Adapt on seven linears", "together, ms", "one adapter, all tokens", "one trial's step", "no adapter"]
    head += ["over trials one by one", "over one adapter", "over none"]
    text = (
        f"{where(run, path)} Forward, loss, backward and AdamW; cells without a figure were cut off by the time limit."
    )
    return "\n\n".join([text, grid(head, rows), f"    {run['config']['command']}"])


_RATIOS = ("sequential", "long", "base")


def trial_sweeps(path: Path, run: Run) -> str:
    """Return how fast the command's trials are together, one after the other, and as processes side by side."""
    names = {"together": "together", "one_by_one": "one after the other", "side_by_side": "processes side by side"}
    config, rows = run["config"], []
    for way, row in run["rows"].items():
        ratios = (run["ratios"].get(f"{kind}_over_{way}") for kind in ("steps", "all"))
        figures = (number(row[name], kind) for name, kind in (("tokens_per_s", ",.0f"), ("seconds", ".0f")))
        rows.append([names[way], *figures, *(number(ratio, ".2f") for ratio in ratios), number(row["gib"], ".1f")])
    what = f"{config['model']}, {config['base']}, {config['tokens']:,} tokens and {config['steps']} steps each"
    if config["run"]:  # whose tokens and steps are its own
        changes = ", ".join(f"`{change}`" for change in config["set"])
        what = f"`{config['run']}`" + (f" with {changes}" if changes else "")
    text = (
        f"{where(run, path)} {config['trials']} trials of {what}. The rate is that of steps; seconds are all that a "
        "user waits for."
    )
    head = ["", "tokens/s", "seconds", "together: rate over it", "seconds under it", "GiB"]
    return "\n\n".join([text, grid(head, rows), f"    {config['command']}"])


SECTIONS = {
    "throughput": ("Training steps", throughput),
    "trainer_overhead": ("The training command beside a bare loop", trainer_overhead),
    "scaling": ("Several GPUs", scaling),
    "kernel_times": ("Single operations", kernels),
    "loss_curve": ("Fused training beside float32", loss_curve),
    "many_adapters": ("Many adapters in one batch", many_adapters),
    "joint_step": ("Several trials in one step", joint_steps),
    "sweep": ("A sweep beside its trials by themselves", trial_sweeps),
    "preference": ("Preference and reinforcement steps beside TRL's", preference.section),
}


def sharding(folder: Path) -> list[str]:
    """Return how much of a base each process has by ZeRO stage, or nothing where nothing was measured."""
    shares_rows, losses = [], []
    for path, run in read(folder):
        options, gpus = run["options"], run["environment"]["gpus"]
        machine = (gpus or ["CPU"])[0].removeprefix("NVIDIA ").partition(" ")[0]
        where = (
            f"{run['processes']} on one {machine}" if len(gpus) < run["processes"] else f"{run['processes']} {machine}"
        )
        # files of before several stages were measured at once
        of_one_stage = [{"base": b, "stage": options["stage"], "by_rank": r} for b, r in run.get("by_rank", {}).items()]
        for row in run.get("rows", of_one_stage):
            first, stage = row["by_rank"][0], row["stage"]
            # files of before the base was sharded by this library have that option
            by = "" if not stage.startswith("zero3") else "DeepSpeed" if "persistent" in options else "lsr_scale"
            shares = [f"{first[name]:.3f}" for name in ("after_step_of_whole", "load_peak_of_whole")]
            sizes = [f"{first[name] / 1e9:.2f}" for name in ("whole_bytes", "step_peak_bytes")]
            if by:
                shares_rows.append([f"{path.stem}, {row['base']}, {stage}", where, by, sizes[0], *shares, sizes[1]])
            losses.append([f"{path.stem}, {row['base']}, {stage}", where, *(f"{x:.4f}" for x in first["losses"][:3])])
    if not shares_rows:
        return []
    head = ["file, base, stage", "processes", "sharded by", "whole, GB", "after a step", "at most while loading"]
    text = "Shares of the whole base in each process, all storages that it refers to counted; what else a step "
    text += "allocates at most."
    same = "The losses of the first steps, which see the same eight rows on any number of processes:"
    command = "    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.sharding --model MODEL --out NAME.json"
    table = grid(["file, base, stage", "processes", "first loss", "second", "third"], losses)
    return ["## A base sharded among processes", text, grid([*head, "a step, GB"], shares_rows), same, table, command]


def faults(folder: Path) -> list[str]:
    """Return how many killed runs resumed, or nothing where none was killed."""
    rows = []
    for path, run in read(folder):
        phases = ", ".join(f"{count} {name}" for name, count in sorted(run["phases"].items()))
        stage = run.get("stage") or ("zero2" if run["processes"] > 1 else "")
        on = (run["environment"]["gpus"] or ["- CPU"])[0].split()[1]
        counts = [str(run[name]) for name in ("kills", "resumed", "same_adapter")]
        end = number(run.get("slowest_end_seconds"), ".1f")
        rows.append([path.stem, f"{run['processes']}, {on}", stage, phases, *counts, end])
    if not rows:
        return []
    head = [
        "file",
        "processes",
        "stage",
        "killed in",
        "kills",
        "resumed",
        "to the same bits",
        "other processes ended after, s",
    ]
    text = "Runs killed by SIGKILL at moments spread over start-up, steps and saves, then `--resume auto`."
    return [
        "## Kills",
        text,
        grid(head, rows),
        "    python -m benchmarks.robustness.kill_and_resume --processes 2 --out NAME.json",
    ]


def accuracy(results: Path) -> list[str]:
    """Return the tables of the accuracy comparison, if there are any."""
    parts = []
    for stem, (table, tests) in commonsense_tables.sections(results).items():
        runs = f"{len(tests)} runs. Each has its command and settings in `{results.name}/trials.jsonl`."
        parts += [f"### SmolLM2-135M, {stem}", runs, table, f"![{stem}](results/{results.name}/{stem}.png)"]
    if not parts:
        return []
    everything = commonsense_tables.load(results)
    parts += [
        "### Tuning, joint-bf16",
        "Development means after one epoch, by point (learning rate, alpha of LSR-Adapt); the best one is taken.",
        commonsense_tables.tuning_table(everything),
        "### Factors rounded after training, joint-bf16",
        "Points lost, as `lsr-scale export --to adapter --bits` rounds: groups of 64 in 8 bits, of 32 in 4.",
        commonsense_tables.rounded_table(everything),
    ]
    return ["## Accuracy on commonsense questions", *parts]


def real_models(folder: Path) -> list[str]:
    """Return what the losses of real models were at both ends of an epoch, in every way to train."""
    parts: list[str] = []
    for path, run in read(folder):
        rows = []
        for one in run["runs"]:
            first, last = real_model_curves.ends(one["curve"])
            figures = [str(len(one["curve"])), number(first, ".3f"), number(last, ".3f")]
            rows.append([one["name"].replace("per_linear", "unfused"), *figures, "yes" if one["finite"] else "NO"])
        head = ["run", "steps", "first 20 steps", "last 20 steps", "finite to the end"]
        picture = f"![{path.stem}](results/{folder.name}/{path.stem}.png)"
        parts += [f"### {run['config']['model']}", where(run, path), grid(head, rows), picture]
    text = "Mean loss, nats per token, of one epoch of ARC-E, ARC-C and OpenBookQA "
    text += "(`benchmarks/robustness/real_model_curves.py`)."
    return ["## Real models, in every way to train", text, *parts] if parts else []


def page(results: Path) -> str:
    """Return the page: a section a kind of measurement, the newest file first."""
    parts = [HEAD.strip()]
    for folder, (title, section) in SECTIONS.items():
        runs = read(results / folder)
        if runs:
            parts += [f"## {title}", *(section(path, run) for path, run in reversed(runs))]
    parts += [*sharding(results / "sharding"), *faults(results / "faults")]
    if (results / "sequential").is_dir():
        text = (sequential.__doc__ or "").strip()
        parts += ["## One task after another", text, sequential.table(results / "sequential")]
    parts += real_training.sections(results)
    parts += real_models(results / "real_model")
    parts += fp8_tables.sections(results)
    parts += frontier_tables.sections(results / "frontier")
    parts += frontier_variants.section(results / "frontier")
    parts += grpo_tables.sections(results / "grpo")
    if (results / "variants").is_dir():
        parts += ["## Variants of the methods", (variants.__doc__ or "").strip(), variants.table(results / "variants")]
    return "\n\n".join([*parts, *accuracy(results / "commonsense"), *export_tables.sections(results / "export")]) + "\n"
