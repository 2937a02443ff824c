"""What `doctor` judges: each known bad combination with its remedy, and a machine that can run these tests as fit."""

import importlib
import importlib.util
import io
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from lsr_scale.doctor import Finding, Report, doctor, fused_trial, quantized_trial, render
from lsr_scale.doctor.environment import (
    check_environment,
    check_folder,
    check_helpers,
    check_kernels,
    check_torchao,
)
from lsr_scale.doctor.fused_trial import (
    MOST_BY_8_BITS,
    eight_bits_against_bf16,
    fused_against_unfused,
    layer_of,
    small_layer,
    try_eight_bits,
    try_fused,
)
from lsr_scale.doctor.hardware import check_torch_build
from lsr_scale.doctor.quantized_trial import try_quantized
from lsr_scale.doctor.versions import check_version, check_versions, requirements
from tests.helpers.fp8 import pretend_fp8
from tests.helpers.tiny_runs import save_llama, tiny_run


@pytest.fixture(scope="module")
def report():
    return doctor()


def test_the_machine_of_the_tests_is_fit(report):
    assert [finding for finding in report.findings if finding.status == "bad"] == []
    assert report.exit_code == 0
    names = {finding.name for finding in report.findings}
    assert {"python", "torch", "peft", "trl", "deepspeed", "bitsandbytes", "nf4 on cpu", "int8 on cpu"} <= names


def test_the_fused_path_is_not_claimed_without_a_gpu(report):
    (fused,) = [finding for finding in report.findings if finding.name == "fused layers"]
    assert fused.found.startswith("on a GPU LLaMA, Mistral") or torch.cuda.is_available()


def test_a_machine_without_fp8_is_told_why_and_what_to_set_where_a_run_asks_for_it():
    found = try_eight_bits(torch.device("cpu"), small_layer(4), "bf16")
    assert (found.status, found.found, found.remedy) == ("ok", "no: the device is cpu, no GPU", "")
    for compute in ("fp8", "int8"):
        found = try_eight_bits(torch.device("cpu"), small_layer(4), compute)
        assert (found.status, found.remedy) == ("bad", "set training.compute: bf16")


def test_8_bits_are_tried_beside_bfloat16(monkeypatch):
    pretend_fp8(monkeypatch)
    (fp8, no_problem), (int8, _) = (
        eight_bits_against_bf16(torch.device("cpu"), small_layer(4), compute) for compute in ("fp8", "int8")
    )
    assert no_problem is None
    assert 0.01 < int8 < fp8 < MOST_BY_8_BITS / 2
    found = try_eight_bits(torch.device("cpu"), small_layer(4), "fp8")
    assert (found.status, found.name) == ("ok", "compute: fp8, int8")
    assert f"fp8 (e4m3 forward and backward) differs from bf16 by {fp8:.1%}; int8 (" in found.found
    assert f"e4m3 backward) differs from bf16 by {int8:.1%}" in found.found
    monkeypatch.setattr(fused_trial, "MOST_BY_8_BITS", (fp8 + int8) / 2)
    found = try_eight_bits(torch.device("cpu"), small_layer(4), "bf16")
    assert (found.status, found.remedy) == ("bad", "set training.compute: bf16")
    assert f"by {fp8:.1%}, more than rounding explains: report it; int8" in found.found
    assert found.found.endswith(f"by {int8:.1%}")


def test_a_layer_that_cannot_compute_in_8_bits_is_not_tried(monkeypatch, tmp_path):
    pretend_fp8(monkeypatch)
    save_llama(tmp_path / "model")
    trial = layer_of(tiny_run(tmp_path, adapter={"method": "krona"}))
    found = try_eight_bits(torch.device("cpu"), trial, "bf16")
    assert found.status == "note"
    assert "fp8, int8 not tried: " in found.found
    assert "krona has no low-rank pair" in found.found
    wanted = try_eight_bits(torch.device("cpu"), trial, "fp8")
    assert (wanted.status, wanted.found) == ("bad", found.found), "the reason is said once"


@pytest.mark.parametrize(("sizes", "untried"), [((40, 72), {"fp8": 16, "int8": 64}), ((48, 80), {"int8": 64})])
def test_a_layer_of_other_sizes_is_not_tried(monkeypatch, tmp_path, sizes, untried):
    pretend_fp8(monkeypatch)
    hidden_size, intermediate_size = sizes
    save_llama(tmp_path / "narrow", hidden_size=hidden_size, intermediate_size=intermediate_size)
    trial = layer_of(tiny_run(tmp_path, model={"name": str(tmp_path / "narrow")}))
    statuses = {}
    for compute in ("bf16", "fp8", "int8"):
        found = try_eight_bits(torch.device("cpu"), trial, compute)
        statuses[compute] = found.status
        for name, unit in untried.items():
            assert f"{name} not tried: " in found.found
            assert f"no multiple of {unit}" in found.found
    assert statuses == {"bf16": "note", **{name: "bad" if name in untried else "note" for name in ("fp8", "int8")}}


def test_a_broken_path_of_8_bits_is_bad(monkeypatch):
    pretend_fp8(monkeypatch)
    monkeypatch.setattr(fused_trial, "eight_bits_against_bf16", lambda *args: 1 / 0)
    found = try_eight_bits(torch.device("cpu"), small_layer(4), "bf16")
    assert found.status == "bad"
    assert "fp8, int8 fails, report it: ZeroDivisionError" in found.found


@pytest.mark.parametrize("rank", [4, 64])
def test_the_fused_path_is_tried_not_concluded(rank):
    difference, how = fused_against_unfused(torch.device("cpu"), small_layer(rank))
    assert 0 < difference < 0.05
    assert how == "attention by sdpa"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4, "separation_rank": 2}, "attention by sdpa"),
        ({"method": "lora", "rank": 40}, "attention by sdpa"),
        ({"method": "lora", "rank": 2, "dropout": 0.5}, "dropout on the adapter's input"),
        ({"method": "krona"}, "krona has no low-rank pair"),
    ],
)
def test_a_runs_own_model_and_adapter_are_tried(options, expected, tmp_path):
    save_llama(tmp_path / "model")
    trial = layer_of(tiny_run(tmp_path, adapter=options))
    assert trial.config.num_hidden_layers == 1
    assert trial.adapter.rank == options["rank"] if "separation_rank" in options else True
    difference, how = fused_against_unfused(torch.device("cpu"), trial)
    assert expected in how
    assert difference < 0.05


def test_a_run_whose_modules_are_not_in_one_layer_is_told_so(tmp_path):
    save_llama(tmp_path / "model")
    trial = layer_of(tiny_run(tmp_path, adapter={"target_modules": r"model\.layers\.1\..*q_proj"}))
    found = try_fused(torch.device("meta"), trial)
    assert (found.status, found.remedy) == ("note", "")
    assert found.found.startswith("not tried: a layer of ")


def test_the_report_is_json_and_a_page(report):
    document = json.loads(report.to_json())
    assert document["ok"] is True
    assert {"group", "name", "found", "status", "remedy"} == set(document["findings"][0])
    bad = Report([*report.findings, Finding("versions", "peft", "0.20.0", "bad", 'pip install "peft>=0.21,<0.22"')])
    assert bad.exit_code == 1
    assert json.loads(bad.to_json())["ok"] is False
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(bad))
    page = console.export_text()
    assert '-> pip install "peft>=0.21,<0.22"' in page
    assert "1 known problem, see above" in page


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    python, needed = requirements()
    assert str(python) == project["requires-python"]
    assert {r.name for r in needed} == {Requirement(text).name for text in project["dependencies"]}


@pytest.mark.parametrize(
    ("version", "status"), [("0.21.2", "ok"), ("0.21.0", "ok"), ("0.22.0", "bad"), ("0.20.9", "bad"), (None, "bad")]
)
def test_a_version_out_of_range_is_bad_and_says_what_to_install(version, status):
    finding = check_version(Requirement("peft>=0.21,<0.22"), version)
    assert finding.status == status
    assert (finding.remedy == 'pip install "peft<0.22,>=0.21"') == (status == "bad")


def test_a_package_that_does_not_import_is_bad(monkeypatch):
    real = importlib.import_module

    def broken(name):
        if name == "trl":
            raise ImportError("cannot import name 'x'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    (finding,) = [f for f in check_versions() if f.status == "bad"]
    assert finding.name == "import trl"
    assert "cannot import name" in finding.found


@pytest.mark.parametrize(
    ("cuda", "driver", "usable", "status", "words"),
    [
        (None, None, False, "ok", ""),
        ("13.0", "580.1", True, "ok", ""),
        (None, "580.1", False, "bad", "build of torch for CUDA"),
        ("13.0", "470.0", False, "bad", "update the driver"),
        ("13.0", None, False, "note", "whl/cpu"),
    ],
)
def test_the_build_of_torch_must_go_with_the_gpu(cuda, driver, usable, status, words):
    finding = check_torch_build(cuda, driver, usable)
    assert finding.status == status
    assert words in finding.remedy


def test_several_processes_need_no_compiler():
    finding = next(finding for finding in check_helpers() if finding.name == "DeepSpeed")
    assert finding.status == "ok"
    assert "nothing is compiled" in finding.found


def test_kernels_is_bad_only_where_the_hub_would_be_asked():
    assert check_kernels(offline=True).status == "ok"
    assert "HF_HUB_OFFLINE=1" in check_kernels(offline=False).remedy


def test_old_torchao_is_bad():
    assert check_torchao("0.15.1").status == "bad"
    assert check_torchao("0.16.0").status == "ok"


def test_variables_left_over_from_a_launcher_are_bad(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    found = {finding.name: finding for finding in check_environment()}
    assert found["WORLD_SIZE"].status == found["DS_ACCELERATOR"].status == "bad"
    assert "unset" in found["WORLD_SIZE"].remedy


def test_folders_are_judged_by_writing_and_by_space(tmp_path, monkeypatch):
    assert check_folder("model cache", tmp_path / "not" / "yet").status == "ok"
    (tmp_path / "file").write_text("")
    blocked = check_folder("model cache", tmp_path / "file" / "inside")
    assert blocked.status == "note"
    assert blocked.remedy == "set LSR_SCALE_CACHE"
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 2**20}))
    assert check_folder("working folder", tmp_path).status == "bad"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_that_repacks_or_has_no_gradient_is_caught(monkeypatch, kind):
    assert try_quantized(kind, torch.device("cpu")).status == "ok"
    monkeypatch.setattr(quantized_trial, "dequantize", lambda layer, dtype: torch.zeros(96, 128, dtype=dtype))
    assert "weight error 1.000" in try_quantized(kind, torch.device("cpu")).found

    class Repacking(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.weight = layer.weight

        def forward(self, x):
            self.weight.data = self.weight.data.flip(0)
            return x

    monkeypatch.setattr(quantized_trial, "_quantized_layer", lambda kind, dense: Repacking(torch.nn.Linear(128, 96)))
    finding = try_quantized(kind, torch.device("cpu"))
    assert finding.status == "bad"
    assert "changed the stored weight" in finding.found


def test_a_missing_embedded_model_is_a_note_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("LSR_SCALE_CACHE", "empty")
    found = {finding.name: finding for finding in check_helpers()}
    assert found["model smollm2-135m-instruct"].status == "note"
    assert found["model smollm2-135m-instruct"].found == "fetched on first use, 93.8 MiB"
    assert found["model smollm2-135m-instruct"].remedy == "beforehand: python -m lsr_scale.model"


def test_a_report_is_a_screen_and_whole_when_asked():
    versions = [Finding("versions", name, "1.2.3") for name in ("python", "torch", "peft", "numpy", "rich")]
    others = [Finding("hardware", f"part {number}", "works " * 40) for number in range(12)]
    bad = Finding("versions", "trl", "0.1", "bad", "install another " * 12)
    report = Report([*versions, bad, *others])

    def lines(whole):
        console = Console(width=80, file=io.StringIO())
        console.print(render(report, whole))
        return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]

    short = lines(whole=False)
    assert len(short) <= 24
    assert max(map(len, short)) <= 80
    assert "versions  python 1.2.3, torch 1.2.3, peft 1.2.3, and 2 more" in short[0]
    assert " ".join(" ".join(short).split()).count("install another") == 12, "what is bad is told in full"
    assert short[-1] == "1 known problem, see above; --all tells all in full"
    assert sum("numpy" in line for line in lines(whole=True)) == 1
