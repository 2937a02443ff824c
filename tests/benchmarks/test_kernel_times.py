"""The kernels' benchmark runs, and what it runs is right."""

import json

import pytest
import torch

from benchmarks.report import results_page
from benchmarks.speed import kernel_times
from benchmarks.speed.ceilings import scaled_mm
from lsr_scale.kernels.fp8 import E4M3
from lsr_scale.kernels.gemm_8bit import gemm_8bit


def test_every_case_runs_and_agrees_with_float64(tmp_path):
    out = tmp_path / "tiny.json"
    assert kernel_times.main(["--tiny", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 83
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == 60
    assert max(errors) < 1e-2
    with pytest.raises(SystemExit):
        kernel_times.main(["--tiny", "--out", str(out)])


def test_products_are_summed_by_who_makes_them():
    def row(name, ms, alternative="", other=None):
        return {"name": name, "ms": ms} | ({"alternative": alternative, "alternative_ms": other} if alternative else {})

    rows = [row("rms_norm", 9.0), row("gemm_8bit in e4m3: qkv forward", 1.0, "by rows", 2.0)]
    rows += [row("gemm_8bit in e4m3: down forward", 0.5, "by rows", 0.25)]
    rows += [row("by blocks: qkv forward", 3.0, "bf16", 4.0)]
    rows += [{"name": "by blocks: down forward", "status": "error"}]
    assert kernel_times.sums(rows) == {"gemm_8bit in e4m3": 1.5, "by rows": 2.25}, "blocks failed once"
    assert kernel_times.sums(rows[:1]) == {}
    # int8 is forward alone: its input gradients are FP8's
    in_int8 = [row("gemm_8bit in int8: qkv forward", 5.0, "torch._int_mm alone", 4.0)]
    in_fp8 = [row("gemm_8bit in e4m3: qkv forward", 1.0), row("gemm_8bit in e4m3: qkv input gradient", 2.0)]
    assert kernel_times.sums(in_fp8 + in_int8) == {"gemm_8bit in e4m3": 3.0, "gemm_8bit in int8": 7.0}
    run = {
        "env": {"cpu": "a CPU"},
        "config": {"copy_bytes_per_s": 1e12},
        "rows": [],
        "sums_ms": kernel_times.sums(rows),
    }
    page = results_page.kernels(results_page.Path("kernel_times/a.json"), run)
    assert "gemm_8bit in e4m3 1.50; by rows 2.25." in page


def test_the_product_that_ours_is_timed_beside_is_the_same_one():
    torch.manual_seed(0)
    codes, weight = torch.randn(32, 64).to(E4M3), torch.randn(48, 64).to(E4M3)
    scales, weight_scale, out = torch.rand(32) + 0.5, torch.tensor([0.25]), torch.empty(32, 48, dtype=torch.bfloat16)
    gemm_8bit(codes, scales, weight, weight_scale, out)
    theirs = scaled_mm(codes, scales[:, None], weight, weight_scale.expand(1, 48).contiguous())
    assert torch.allclose(theirs, out, rtol=1e-2)
