"""The rows of a throughput measurement: medians, ratios, slopes, and all of it as text."""

import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.floors import floor_ms, step_flop
from benchmarks.speed.providers import compute_of


@dataclass(frozen=True)
class Case:
    """What a row is of."""

    provider: str
    mode: str
    tokens: int
    seq_len: int

    @property
    def point(self) -> str:
        """Name of the batch's size."""
        return f"{self.tokens}x{self.seq_len}"


def quantile(values: list[float], share: float) -> float:
    """Return a quantile by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def row_of(case: Case, config: dict[str, Any], turns: list[dict], machine: dict[str, Any]) -> dict:
    """Return a row of the result.

    Args:
        case: What it is of.
        config: The run's configuration.
        turns: Replies of its worker, in order; none if it was not reached.
        machine: `ceilings` by the batch's size (or none) and `nominal_tflops` (or None).
    """
    row: dict[str, Any] = {
        **{"provider": case.provider, "model": config["model"], "base": config["base"], "tokens": case.tokens},
        **{"seq_len": case.seq_len, "checkpointing": case.mode, "compute": compute_of(case.provider)},
        **{"num_gpus": 1, "zero_stage": 0},
        **{"status": "error", "tokens_per_s": None, "step_ms": None, "peak_memory_gib": None, "mfu": None},
        **{"floor_fraction": None, "ratio_to": {}, "trainable_parameters": None},
    }
    good = [turn for turn in turns if turn["status"] == "ok"]
    bad = [turn for turn in turns if turn["status"] != "ok"]
    if bad or not good:
        last = bad[-1] if bad else {"status": "error", "detail": "not reached before the time limit"}
        if not good:
            return {**row, "status": last["status"], "detail": last["detail"]}
        row["detail"] = f"a later turn failed ({last['status']}): {last['detail']}"
    steps = [ms for turn in good for ms in turn["step_ms"]]
    median = statistics.median(steps)
    peaks = [turn["peak_memory_gib"] for turn in good if turn["peak_memory_gib"] is not None]
    row.update(
        status="ok",
        tokens_per_s=1e3 * case.tokens / median,
        step_ms={"p20": quantile(steps, 0.2), "p50": median, "p80": quantile(steps, 0.8)},
        peak_memory_gib=max(peaks) if peaks else None,
        trainable_parameters=good[0]["trainable_parameters"],
        loss_initial=good[0]["loss_initial"],
        loss_first=good[0]["loss_first"],
        loss_last=good[-1]["loss_last"],
        steps_ms=[round(ms, 3) for ms in steps],
        notes=list(dict.fromkeys(note for turn in good for note in turn.get("notes", []))),
    )
    if machine.get("nominal_tflops"):
        flop = step_flop(config["shape"], case.tokens, case.seq_len)
        row["mfu"] = flop / (median * 1e-3) / (machine["nominal_tflops"] * 1e12)
    ceilings = (machine.get("ceilings") or {}).get(case.point)
    if ceilings and (row["compute"] == "bf16" or "layer_gemm_fp8_ms" in ceilings):
        floor = floor_ms(config["shape"], case.tokens, config["base"], case.mode, ceilings, row["compute"])
        row["floor_fraction"] = floor["total"] / median
    return row


def add_ratios(rows: list[dict]) -> None:
    """Fill `ratio_to`: a row's tokens/s over those of every other row of the same batch and checkpointing.

    Rows that recompute are compared with an offloading peer too, under the name `provider/offload`.
    """
    done = [row for row in rows if row["status"] == "ok"]
    for row in done:
        same = [other for other in done if all(other[name] == row[name] for name in ("tokens", "seq_len"))]
        row["ratio_to"] = {
            other["provider"]: row["tokens_per_s"] / other["tokens_per_s"]
            for other in same
            if other is not row and other["checkpointing"] == row["checkpointing"]
        }
        if row["checkpointing"] == "full":
            for other in same:
                if other["checkpointing"] == "offload":
                    row["ratio_to"][f"{other['provider']}/offload"] = row["tokens_per_s"] / other["tokens_per_s"]


def slopes(rows: list[dict], layers: int) -> list[dict]:
    """Return the bytes that a token costs in a layer: peaks at the fewest and the most tokens, one sequence length.

    Args:
        rows: The rows.
        layers: The model's number of decoder layers.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and row["peak_memory_gib"] is not None:
            groups.setdefault((row["provider"], row["checkpointing"], row["seq_len"]), []).append(row)
    lines = []
    for (provider, mode, seq_len), group in groups.items():
        few, many = (choose(group, key=lambda row: row["tokens"]) for choose in (min, max))
        # what fills the memory that there is has no slope
        if few["tokens"] < many["tokens"] and mode != "auto":
            more = 2**30 * (many["peak_memory_gib"] - few["peak_memory_gib"])
            slope = more / (many["tokens"] - few["tokens"]) / layers
            tokens = [few["tokens"], many["tokens"]]
            line = {"provider": provider, "checkpointing": mode, "seq_len": seq_len, "tokens": tokens}
            lines.append({**line, "bytes_per_token_and_layer": round(slope)})
    return lines


def table(rows: list[dict]) -> str:
    """Return the rows as text, with the ratio to the strongest peers that were measured."""
    strongest = ("unsloth_lora", "peft_lora_liger", "peft_kbit_liger")
    peers = [peer for peer in strongest if any(peer in row["ratio_to"] for row in rows)]
    head = ["provider", "checkpointing", "batch", "status", "tokens/s", "step ms", "GiB", "mfu", "of floor", "loss"]
    lines = [head + [f"x {peer}" for peer in peers]]
    show = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for row in rows:
        step = row["step_ms"]
        spread = "-" if step is None else f"{step['p50']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})"
        line = [row["provider"], row["checkpointing"], f"{row['tokens'] // row['seq_len']} x {row['seq_len']}"]
        line += [row["status"], show(row["tokens_per_s"], ",.0f"), spread]
        line += [show(row["peak_memory_gib"], ".1f"), show(row["mfu"], ".3f"), show(row["floor_fraction"], ".3f")]
        line += [show(row.get("loss_first"), ".3f")]
        lines.append(line + [show(row["ratio_to"].get(peer), ".3f") for peer in peers])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
