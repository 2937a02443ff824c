"""Every operation of the fused path against its bound, and against what does the same without it.

    python -m benchmarks.speed.kernel_times --out benchmarks/results/kernel_times/NAME.json    (one GPU, a minute)

One layer of a 7B model at T tokens, bf16, random data, buffers that take turns so that no cache holds them. A row has
the median time, the bytes that must be moved (each input read once, each output written once) or the operations, the
share of the bound (bytes over the copy bandwidth of the same run), the error against float64 (relative, Frobenius), and
the time of the alternative named beside it; for GEMMs that is the same product without the adapter's columns. `sums_ms`
are a layer's eight products in 8 bits with their adapters, by who makes them: what decides between scales per row and
per block, and what int8 forward costs, whose input gradients are those of FP8.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.command_line import new_file, script_parser
from benchmarks.speed import kernel_cases, kernel_cases_documents, kernel_cases_fp8, kernel_cases_int8
from benchmarks.speed.kernel_cases import Buffers, Case, Sizes
from benchmarks.speed.providers.fused import no_fp8_reason
from lsr_scale import files

EIGHT_BIT = kernel_cases_fp8.GROUPS | kernel_cases_int8.GROUPS
GROUPS = kernel_cases.GROUPS | kernel_cases_documents.GROUPS | EIGHT_BIT


def milliseconds(b: Buffers, run: Callable[[int], Any]) -> float:
    """Return the median time of a call, the sets of buffers taking turns."""
    if b.device != "cuda":
        run(0)
        return 0.0
    from triton.testing import do_bench

    turn = iter(range(10**9))
    median: Any = do_bench(lambda: run(next(turn) % b.sets), warmup=15, rep=60, return_mode="median")
    return median


def copy_bandwidth(b: Buffers, size: int) -> float:
    """Return the bytes per second, read and written, of a copy of `size` bytes on the device."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=b.device) for _ in range(2))
    spent = milliseconds(b, lambda _: target.copy_(source))
    return 2e3 * size / spent if spent else 1.0


def measured(case: Case, b: Buffers, bytes_per_s: float) -> dict[str, Any]:
    """Return the row of a case; a case that fails is a row that says so."""
    row: dict[str, Any] = {"name": case.name, "shape": case.shape, "status": "ok"}
    try:
        if case.exact is not None:
            pairs = case.exact()
            row["error"] = max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)
        row["ms"] = milliseconds(b, case.run)
        if case.other is not None:
            row |= {"alternative": case.alternative, "alternative_ms": milliseconds(b, case.other)}
    except Exception as error:
        return row | {"status": "error", "detail": f"{type(error).__name__}: {error}"[:400]}
    if row["ms"] and case.bytes:
        row |= {"gb_per_s": case.bytes / row["ms"] / 1e6, "share_of_bound": case.bytes / bytes_per_s * 1e3 / row["ms"]}
    elif row["ms"] and case.flop:
        row["tflop_per_s"] = case.flop / row["ms"] / 1e9
    return row


def sums(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the time of all products in 8 bits, by who makes them; not of one that failed for any."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        way, of_products, product = row["name"].partition(": ")
        if of_products:
            times.setdefault(way, {})[product] = row.get("ms", float("nan"))
            if "alternative_ms" in row:
                times.setdefault(row["alternative"], {})[product] = row["alternative_ms"]
    if kernel_cases_int8.OURS in times:
        times[kernel_cases_int8.OURS] = times.get(kernel_cases_fp8.OURS, {}) | times[kernel_cases_int8.OURS]
    most = max(map(len, times.values()), default=0)
    totals = {way: sum(each.values()) for way, each in times.items() if len(each) == most}
    return {way: total for way, total in totals.items() if total == total}


def main(arguments: list[str] | None = None) -> int:
    """Measure all groups, or some, and write the JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all?")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    b, s = Buffers(device, 1 if args.tiny else 3), Sizes(args.tokens, args.tiny)
    bytes_per_s = copy_bandwidth(b, 2**20 if args.tiny else 2**30)
    rows: list[dict[str, Any]] = []
    reason = no_fp8_reason(torch.device(device))
    if reason and device == "cuda":
        args.groups = [name for name in args.groups if name not in EIGHT_BIT]
        print(f"nothing in 8 bits: {reason}", flush=True)
    for name in args.groups:
        for case in GROUPS[name](b, s):
            rows.append(measured(case, b, bytes_per_s))
            row = rows[-1]
            share = f"{row['share_of_bound']:.2f} of copy" if "share_of_bound" in row else ""
            other = f"{row['alternative']} {row['alternative_ms']:.4f}" if "alternative_ms" in row else ""
            spent = f"{row['ms']:.4f} ms" if "ms" in row else row.get("detail", "")
            print(f"{row['name']:34} {row['shape']:26} {spent:12} {share:14} {other}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    config = {"tokens": s.T, "groups": args.groups, "tiny": args.tiny, "copy_bytes_per_s": bytes_per_s}
    content = {"env": files.environment(), "config": config, "rows": rows}
    if totals := sums(rows):
        content["sums_ms"] = totals
        print(f"a layer's products in 8 bits, ms: {totals}", flush=True)
    files.write_json(args.out, content)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
