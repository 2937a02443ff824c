"""The throughput benchmark without a GPU: its arithmetic, its rows, and what happens when a provider misbehaves."""

import json
import os
import threading
from pathlib import Path

import pytest

from benchmarks.models import model_values
from benchmarks.speed import floors, measurement, throughput, throughput_rows, workers
from benchmarks.speed.providers import MissingError
from benchmarks.speed.smaller_gpu import SmallerGpu
from benchmarks.speed.throughput_rows import Case
from tests.helpers.launch import QUICK_START

# an H100's, as measured: ms for 8,192 tokens of Mistral-7B
H100 = {
    **{"copy_bytes_per_s": 3.0e12, "layer_gemm_ms": 9.78, "layer_gemm_recompute_ms": 3.57, "lm_head_ms": 6.0},
    **{"attention_ms": 1.22, "attention_forward_ms": 0.271},
}
H100_FP8 = H100 | {"layer_gemm_fp8_ms": 5.2, "layer_gemm_recompute_fp8_ms": 1.9}
FIELDS = (
    *("provider", "model", "base", "tokens", "seq_len", "checkpointing", "num_gpus", "zero_stage", "status"),
    *("tokens_per_s", "step_ms", "peak_memory_gib", "mfu", "floor_fraction", "ratio_to", "trainable_parameters"),
)


class Fake:
    """A provider that answers at once."""

    def __init__(self, config):
        self.config = config

    def build(self):
        pass

    def free_memory(self):
        pass

    def measure(self, request):
        losses = {"loss_initial": 5.0, "loss_first": 4.0, "loss_last": 3.0}
        return {"step_ms": [10.0, 20.0], "peak_memory_gib": 1.5, "trainable_parameters": 7, **losses}


class Twice(Fake):
    def measure(self, request):
        return {**super().measure(request), "step_ms": [30.0, 30.0]}


class Raises(Fake):
    def measure(self, request):
        raise ValueError("the kernels of this provider do not like this model")


class RunsOut(Fake):
    def measure(self, request):
        import torch

        raise torch.OutOfMemoryError("tried to allocate everything")


class Hangs(Fake):
    def measure(self, request):
        threading.Event().wait()


class HangsInBuild(Fake):
    def build(self):
        threading.Event().wait()


class Dies(Fake):
    def measure(self, request):
        os._exit(3)


class IsMissing(Fake):
    def build(self):
        raise MissingError("a_package is not installed")


def arguments(out: Path, *providers: str, **options: str) -> list[str]:
    """Return a command line that measures fakes of this file, or providers of its own, on a tiny model."""
    names = [name if name in throughput.PROVIDERS else f"{__name__}:{name}" for name in providers]
    values = {"model": "tiny", "device": "cpu", "base": "bf16", "tokens": "64", "seq-len": "32", "rounds": "2"}
    values.update({"steps": "2", "checkpointing": "none", "turn-limit": "3600", "build-limit": "3600"})
    flags = options.pop("flags", "--no-parity").split()
    values.update({name.replace("_", "-"): value for name, value in options.items()})
    return ["--providers", ",".join(names), "--out", str(out), *flags, *(f"--{k}={v}" for k, v in values.items())]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    for name, value in QUICK_START.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hanging(monkeypatch):
    """Give who hangs a second, and all others as long as they take."""
    receive, start_all = workers.Worker.receive, workers.start_all

    def limited(limit_s, doing, *these):
        hangs = {"building": "HangsInBuild", "measuring": "Hangs"}[doing]
        return 1.0 if any(each.provider == f"{__name__}:{hangs}" for each in these) else limit_s

    monkeypatch.setattr(workers.Worker, "receive", lambda self, s, doing: receive(self, limited(s, doing, self), doing))
    monkeypatch.setattr(measurement, "start_all", lambda these, s: start_all(these, limited(s, "building", *these)))


def measured(out: Path, *providers: str, **options: str) -> dict[tuple[str, str], dict]:
    """Run the benchmark and return the rows of its file."""
    throughput.main(arguments(out, *providers, **options))
    rows = json.loads(out.read_text())["rows"]
    return {(row["provider"].rpartition(":")[2], row["checkpointing"]): row for row in rows}


def mistral() -> dict[str, int]:
    return floors.shape_of(model_values("mistral-7b"))


def test_shapes_of_the_models():
    shape = mistral()
    assert shape == {
        **{"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128},
        "vocab": 32000,
    }
    # q, o 4096 x 4096; k, v 1024 x 4096; three of 14336 x 4096
    assert floors.layer_weights(shape) == 218_103_808
    assert floors.shape_of(model_values("llama2-7b"))["kv_heads"] == 32
    assert floors.shape_of(model_values("llama3-8b", layers=3))["layers"] == 3
    assert model_values("mistral-7b")["sliding_window"] is None


def test_floor_without_checkpointing_by_hand():
    floor = floors.floor_ms(mistral(), 8192, "nf4", "none", H100)
    assert floor["gemm"] == pytest.approx(32 * 9.78)
    assert floor["attention"] == pytest.approx(39.04)
    # 6,979,321,856 weights, twice, 0.5 + 1/64 + 4/16384 + 2 bytes
    assert floor["dequantization"] == pytest.approx(6_979_321_856 * 2 * 2.515869140625 / 3e9, rel=1e-6)
    assert floor["dequantization"] == pytest.approx(11.7, abs=0.05)
    # (24 x 8,192 + 9 x 28,672) bytes a token and layer
    assert floor["traffic"] == pytest.approx(8192 * 32 * 454_656 / 3e9, rel=1e-6)
    assert floor["traffic"] == pytest.approx(39.7, abs=0.05)
    assert floor["recomputation"] == 0
    assert floor["total"] == pytest.approx(409.4, abs=0.2)
    assert floors.floor_ms(mistral(), 8192, "bf16", "none", H100)["dequantization"] == 0


def test_floor_with_checkpointing_by_hand():
    floor = floors.floor_ms(mistral(), 8192, "nf4", "full", H100)
    # 32 x (3.57 + 0.271) and 8192 x 32 x (12 x 8,192 + 3 x 28,672) bytes
    assert floor["recomputation"] == pytest.approx(122.912 + 8192 * 32 * 184_320 / 3e9, rel=1e-6)
    assert floor["total"] == pytest.approx(548.4, abs=0.3)


def test_floor_in_fp8_by_hand():
    floor = floors.floor_ms(mistral(), 8192, "nf4", "none", H100_FP8, "fp8")
    assert floor["gemm"] == pytest.approx(32 * 5.2)
    # lm_head and attention stay in bf16
    bf16 = floors.floor_ms(mistral(), 8192, "nf4", "none", H100)
    assert (floor["lm_head"], floor["attention"]) == (bf16["lm_head"], bf16["attention"])
    # 6,979,321,856 weights, twice, 0.5 + 1/64 + 4/16384 + 1 bytes
    assert floor["dequantization"] == pytest.approx(6_979_321_856 * 2 * 1.515869140625 / 3e9, rel=1e-6)
    # (23 x 8,192 + 7.5 x 28,672) bytes a token and layer
    assert floor["traffic"] == pytest.approx(8192 * 32 * 403_456 / 3e9, rel=1e-6)
    assert floor["total"] == pytest.approx(sum(floor[part] for part in floor if part != "total"))
    # what is quantized as bf16 is read and written: 2 + 1 bytes
    of_bf16 = floors.floor_ms(mistral(), 8192, "bf16", "none", H100_FP8, "fp8")
    assert of_bf16["dequantization"] == pytest.approx(6_979_321_856 * 2 * 3 / 3e9, rel=1e-6)


def test_floor_in_fp8_with_checkpointing_by_hand():
    floor = floors.floor_ms(mistral(), 8192, "nf4", "full", H100_FP8, "fp8")
    # 32 x (1.9 + 0.271), 8192 x 32 x (11 x 8,192 + 2.5 x 28,672) bytes, and qkv, o and gate+up once more: a byte each
    again = 32 * (218_103_808 - 4096 * 14336)
    assert floor["recomputation"] == pytest.approx(69.472 + (8192 * 32 * 161_792 + again) / 3e9, rel=1e-6)


def test_the_floor_in_int8_is_that_in_fp8():
    for mode in ("none", "full"):
        in_fp8, in_int8 = (floors.floor_ms(mistral(), 8192, "nf4", mode, H100_FP8, each) for each in ("fp8", "int8"))
        assert in_int8 == in_fp8 != floors.floor_ms(mistral(), 8192, "nf4", mode, H100_FP8)


@pytest.mark.parametrize("compute", ["fp8", "int8"])
def test_a_row_in_8_bits_is_beside_the_floor_in_8_bits(tmp_path, compute):
    _, config = throughput.parse(arguments(tmp_path / "a.json", "Fake"))
    config["shape"] = mistral()
    turn = {"status": "ok", **Fake(config).measure({})}
    case = Case(f"lora_{compute}", "full", 64, 32)
    row = throughput_rows.row_of(case, config, [turn], {"ceilings": {"64x32": H100_FP8}})
    floor = floors.floor_ms(mistral(), 64, "bf16", "full", H100_FP8, "fp8")["total"]
    assert (row["compute"], row["floor_fraction"]) == (compute, pytest.approx(floor / 15))
    assert throughput_rows.row_of(case, config, [turn], {"ceilings": {"64x32": H100}})["floor_fraction"] is None


def test_floors_of_all_computes_are_in_the_result(tmp_path, monkeypatch):
    names = "lsr", "lsr_fp8", "lsr_int8"
    _, config = throughput.parse(arguments(tmp_path / "a.json", *names, checkpointing="none,full,auto"))
    config["shape"] = mistral()
    for ceilings, keys in ((H100_FP8, {"floors_ms", "floors_fp8_ms", "floors_int8_ms"}), (H100, {"floors_ms"})):
        run = measurement.Measurement(config, tmp_path / "a.json", {"all": 1e9, "build": 1.0, "turn": 1.0})
        monkeypatch.setattr(run, "_ask_once", lambda *_, c=ceilings: [{"status": "ok", "ceilings": c}])
        run._measure_ceilings()
        floors_of = {key: value["64x32"] for key, value in run.result.items() if key.startswith("floors")}
        assert floors_of.keys() == keys
        assert all(set(modes) == {"none", "full"} for modes in floors_of.values())
    assert run.result["floors_ms"]["64x32"]["full"] == floors.floor_ms(mistral(), 64, "bf16", "full", H100)


def test_a_gpu_without_fp8_costs_rows_not_the_gate(tmp_path, monkeypatch):
    from benchmarks.speed import parity
    from benchmarks.speed.providers import find_provider, fused

    monkeypatch.setattr(fused, "no_fp8_reason", lambda device: "this GPU has no e4m3")
    monkeypatch.setattr(parity, "no_fp8_reason", lambda device: "this GPU has no e4m3")
    _, config = throughput.parse(arguments(tmp_path / "a.json", "lsr_fp8", "lsr_int8", "lora"))
    for name in ("lsr_fp8", "lsr_int8"):
        with pytest.raises(MissingError, match="this GPU has no e4m3"):
            find_provider(name)(config).build()
    rows = parity.Parity(config).measure({})["parity"]
    assert {(row["method"], row["compute"]) for row in rows} == {("lora", "bf16")}


def test_flop_by_hand():
    # 4 x 8192 x (6,979,321,856 + 131,072,000) + 6 x 8192 x 2048 x 4096 x 32
    flop = floors.step_flop(mistral(), 8192, 2048)
    assert flop == pytest.approx(4 * 8192 * 7_110_393_856 + 6 * 8192 * 2048 * 4096 * 32)


def test_a_row_has_the_fields_of_the_format_whatever_happened(tmp_path):
    _, config = throughput.parse(arguments(tmp_path / "a.json", "Fake"))
    config["shape"] = mistral()
    machine = {"ceilings": {"64x32": H100}, "nominal_tflops": 989.4}
    turn = {"status": "ok", **Fake(config).measure({})}
    good = throughput_rows.row_of(Case("lsr", "none", 64, 32), config, [turn, turn], machine)
    failed = throughput_rows.row_of(Case("lsr", "none", 64, 32), config, [{"status": "oom", "detail": "much"}], machine)
    unreached = throughput_rows.row_of(Case("lsr", "none", 64, 32), config, [], machine)
    for row in (good, failed, unreached):
        assert set(FIELDS) <= set(row)
    assert (good["status"], failed["status"], unreached["status"]) == ("ok", "oom", "error")
    assert good["step_ms"] == {"p20": 10.0, "p50": 15.0, "p80": 20.0}
    assert good["tokens_per_s"] == pytest.approx(64 / 15e-3)
    floor = floors.floor_ms(mistral(), 64, "bf16", "none", H100)["total"]
    assert good["floor_fraction"] == pytest.approx(floor / 15)
    assert good["mfu"] == pytest.approx(floors.step_flop(mistral(), 64, 32) / 15e-3 / 989.4e12)
    assert failed["tokens_per_s"] is None
    assert "not reached" in unreached["detail"]


def test_a_turn_that_fails_later_is_told_beside_the_figures(tmp_path):
    _, config = throughput.parse(arguments(tmp_path / "a.json", "Fake"))
    turns = [{"status": "ok", **Fake(config).measure({})}, {"status": "error", "detail": "then it broke"}]
    row = throughput_rows.row_of(Case("lsr", "none", 64, 32), config, turns, {})
    assert row["status"] == "ok"
    assert "then it broke" in row["detail"]


def test_ratios_compare_rows_of_the_same_checkpointing():
    def row(provider, mode, speed):
        status = "ok" if speed else "oom"
        return {
            **{"provider": provider, "checkpointing": mode, "status": status, "tokens_per_s": speed, "ratio_to": {}},
            **{"tokens": 64 if provider != "d" else 128, "seq_len": 32},
        }

    rows = [row("a", "none", 300.0), row("b", "none", 200.0), row("a", "full", 150.0), row("b", "full", 100.0)]
    rows += [row("b", "offload", 50.0), row("c", "none", None), row("d", "none", 900.0)]
    throughput_rows.add_ratios(rows)
    assert rows[0]["ratio_to"] == {"b": 1.5}
    assert rows[2]["ratio_to"] == {"b": 1.5, "b/offload": 3.0}
    assert rows[3]["ratio_to"] == {"a": pytest.approx(2 / 3), "b/offload": 2.0}
    assert rows[5]["ratio_to"] == rows[6]["ratio_to"] == {}, "another batch is another comparison"


def test_slopes_are_bytes_a_token_and_layer():
    def row(tokens, peak, mode="none", status="ok"):
        return {
            **{"provider": "a", "checkpointing": mode, "status": status, "tokens": tokens, "seq_len": 512},
            **{"peak_memory_gib": peak},
        }

    rows = [row(1024, 4.0), row(2048, 4.5), row(8192, 8.0, status="oom"), row(4096, 7.0)]
    rows += [row(1024, 4.0, "full"), row(1024, 4.0, "auto"), row(2048, 5.0, "auto")]
    (slope,) = throughput_rows.slopes(rows, 32)
    assert slope["tokens"] == [1024, 4096]
    assert slope["bytes_per_token_and_layer"] == round(3 * 2**30 / 3072 / 32)


@pytest.mark.parametrize("base", ["nf4", "int8", "bf16"])
def test_the_gate_is_green_as_it_is_and_red_when_a_gradient_is_wrong(base, tmp_path, monkeypatch):
    # not above: the processes of the fakes import this file
    from benchmarks.speed import parity
    from lsr_scale.fused import linear_groups

    _, config = throughput.parse(arguments(tmp_path / "a.json", "lsr", "lora", "frozen", "peft_lora", base=base))
    rows = parity.Parity(config).measure({})["parity"]
    assert {row["method"] for row in rows} == {"lsr", "lora"}
    assert len(rows) == 2 * len(parity.VARIANTS)
    assert not any(row["problems"] for row in rows)
    assert all(0 < row["worst_ratio"] < 2 for row in rows)
    right = linear_groups.LinearGroup.up_gradients
    wrong = lambda *args: [None if each is None else 1.1 * each for each in right(*args)]  # noqa: E731
    monkeypatch.setattr(linear_groups.LinearGroup, "up_gradients", wrong)
    rows = parity.Parity(config).measure({})["parity"]
    assert all("is off by" in row["problems"][0] for row in rows)


@pytest.fixture
def eight_bits_on_cpu(monkeypatch):
    """Let the kernels' references compute in 8 bits."""
    from benchmarks.speed import parity
    from benchmarks.speed.providers import fused
    from lsr_scale.fused import eight_bit

    monkeypatch.setattr(eight_bit, "fp8_fallback_reason", lambda device: None)
    for module in (parity, fused):
        monkeypatch.setattr(module, "no_fp8_reason", lambda device: None)


# a weight is encoded from what it is stored as, in each way once; from 4 bits, as in the tables, in both
@pytest.mark.parametrize(
    ("compute", "least", "base"),
    [("fp8", 2e-2, "nf4"), ("fp8", 2e-2, "bf16"), ("int8", 5e-3, "nf4"), ("int8", 5e-3, "int8")],
)
def test_the_gate_is_red_when_8_bits_are_less_exact_than_their_recipe(
    compute, least, base, tmp_path, monkeypatch, eight_bits_on_cpu
):
    import torch

    from benchmarks.speed import parity
    from lsr_scale.fused import eight_bit_group

    names = ("lsr", f"lsr_{compute}", f"lora_{compute}")
    _, config = throughput.parse(arguments(tmp_path / "a.json", *names, base=base))
    rows = parity.Parity(config).measure({})["parity"]
    checked = [(row["method"], row["compute"]) for row in rows]
    expected = (("lsr", "bf16"), ("lsr", compute), ("lora", compute))
    assert checked == [each for each in expected for _ in parity.VARIANTS]
    assert not any(row["problems"] for row in rows)
    in_8_bits = [row for row in rows if row["compute"] == compute]
    assert all({"loss", "output", "input gradient"} < row["errors"].keys() for row in rows)
    # the format's error, not bfloat16's
    assert all(4 * least > error > least for row in in_8_bits for error in row["errors"]["output"])
    if base != "nf4":
        return
    right = eight_bit_group.gemm_8bit

    def less_exact(codes, scales, weight, weight_scale, out, **options):
        right(codes, scales, weight, weight_scale, out, **options)
        out.mul_(1 + 0.1 * (-1) ** torch.arange(out.shape[1]))

    monkeypatch.setattr(eight_bit_group, "gemm_8bit", less_exact)
    rows = parity.Parity(config).measure({})["parity"]
    assert all(bool(row["problems"]) == (row["compute"] == compute) for row in rows)
    assert "the simulation by" in rows[-1]["problems"][0]


# all names are tried below; a provider runs with an adapter of ours, with PEFT's, and with none, in each format
@pytest.mark.parametrize("name", ["lsr_fp8", "frozen_fp8", "lora_int8"])
def test_providers_compute_in_8_bits(name, tmp_path, eight_bits_on_cpu):
    from benchmarks.speed.providers import bf16_of, find_provider

    losses = {}
    for each in (name, bf16_of(name)):
        _, config = throughput.parse(arguments(tmp_path / "a.json", each, warmup="1", layers="1"))
        provider = find_provider(each)(config)
        provider.build()
        for mode in ("none", "full"):
            measured = provider.measure({"mode": mode, "tokens": 64, "seq_len": 32})
            losses[each, mode] = measured["loss_initial"]
            assert ("4 of 4 groups of linears compute in 8 bits" in measured["notes"][0]) == (each == name)
    in_8_bits, in_bf16 = losses[name, "none"], losses[bf16_of(name), "none"]
    assert in_8_bits == losses[name, "full"] != in_bf16
    assert in_8_bits == pytest.approx(in_bf16, abs=0.02)


def test_a_provider_in_8_bits_is_one_of_bf16_under_the_same_options():
    from benchmarks.speed.providers import EIGHT_BIT, PROVIDERS, bf16_of, compute_of, find_provider

    named = [name for name in PROVIDERS if compute_of(name) != "bf16"]
    assert len(named) == 7 * len(EIGHT_BIT)
    for name in named:
        ours, plain = find_provider(name), find_provider(bf16_of(name))
        assert issubclass(ours, plain)
        assert (ours.compute, plain.compute) == (compute_of(name), "bf16")


def test_nothing_is_written_behind_a_red_gate(tmp_path, monkeypatch, capsys):
    parity = [{"method": "lsr", "recompute": "none", "worst_ratio": 9.0, "problems": ["lsr: loss is off by 1e-1"]}]
    monkeypatch.setattr(measurement.Measurement, "_ask_once", lambda *_: [{"status": "ok", "parity": parity}])
    out = tmp_path / "a.json"
    assert throughput.main(arguments(out, "lsr", flags="")) == 3
    assert "parity: red, nothing is measured\nlsr: loss is off by 1e-1" in capsys.readouterr().err
    assert not out.exists()


def test_quantiles():
    assert throughput_rows.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert throughput_rows.quantile([0.0, 10.0], 0.2) == 2.0
    assert throughput_rows.quantile([4.0], 0.8) == 4.0


@pytest.mark.slow
def test_providers_that_fail_cost_a_row_not_the_run(tmp_path, hanging):
    out = tmp_path / "deep" / "a.json"
    names = ("Fake", "Raises", "RunsOut", "Hangs", "Dies", "IsMissing", "Twice")
    rows = measured(out, *names)  # a process each
    assert len(rows) == len(names)
    by = lambda name: rows[name, "none"]  # noqa: E731
    assert by("Fake")["status"] == "ok"
    assert by("Fake")["steps_ms"] == [10.0, 20.0, 10.0, 20.0]
    assert by("Fake")["ratio_to"][f"{__name__}:Twice"] == pytest.approx(2.0)
    assert (by("Fake")["peak_memory_gib"], by("Fake")["trainable_parameters"]) == (1.5, 7)
    assert (by("Fake")["loss_first"], by("Fake")["loss_last"]) == (4.0, 3.0)
    assert by("Raises")["status"] == "error"
    assert "do not like this model" in by("Raises")["detail"]
    assert by("RunsOut")["status"] == "oom"
    assert by("Hangs")["status"] == "error"
    assert "more than 1 s" in by("Hangs")["detail"]
    assert "exit code 3" in by("Dies")["detail"]
    assert by("IsMissing")["status"] == "missing"
    logs = "".join(path.read_text() for path in out.parent.glob("*.log"))
    assert "Traceback" in logs
    result = json.loads(out.read_text())
    assert set(result) >= {"env", "config", "rows"}
    assert {"torch", "triton", "bitsandbytes", "unsloth", "liger-kernel", "commit", "date"} <= set(result["env"])


@pytest.mark.slow
def test_one_model_at_a_time_and_a_build_that_never_ends(tmp_path, hanging):
    rows = measured(tmp_path / "a.json", "Fake", "HangsInBuild", resident="no", rounds="1")
    assert rows["Fake", "none"]["status"] == "ok"
    assert rows["HangsInBuild", "none"]["status"] == "error"
    assert "building" in rows["HangsInBuild", "none"]["detail"]


def test_a_smaller_gpu_reports_its_memory_and_no_more_can_be_allocated():
    class Gpu:
        share = None

        def mem_get_info(self):
            return 100 * 2**30, 140 * 2**30

        def set_per_process_memory_fraction(self, share):
            self.share = share

        def memory_reserved(self):
            return 5 * 2**30

    small = SmallerGpu(24, gpu := Gpu())
    small.limit_allocator()
    assert gpu.share == pytest.approx(23.4 / 140)
    assert small.mem_get_info() == (int(23.4 * 2**30) - 5 * 2**30, 24 * 2**30)
    assert small.memory_reserved() == 5 * 2**30


@pytest.mark.slow
def test_trainers_run_end_to_end_on_a_cpu(tmp_path):
    out = tmp_path / "a.json"
    names = ("lsr", "lsr_held", "peft_lora")
    options = {"checkpointing": "full,auto", "layers": "1", "rounds": "1", "tokens": "64"}
    throughput.main(arguments(out, *names, **options, flags=""))
    result = json.loads(out.read_text())
    assert {row["method"] for row in result["parity"]} == {"lsr"}
    cases = [(row["provider"], row["checkpointing"], row["tokens"]) for row in result["rows"]]
    assert len(cases) == len(set(cases)) == 2 + 1 + 1
    for row in result["rows"]:
        assert row["status"] == "ok", row
        assert row["trainable_parameters"] > 0
        # random weights know nothing: ln 256
        assert row["loss_initial"] == pytest.approx(5.545, abs=0.1)
    assert result["loss_spread"] < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--providers=lrs"], "unknown provider 'lrs'"),
        (["--checkpointing=all"], "unknown kind 'all'"),
        (["--tokens=100", "--seq-len=64"], "no multiple"),
        (["--tokens=0"], "--tokens: expected at least 1"),
        (["--rounds=0"], "--rounds: expected at least 1"),
        (["--memory-gib=0.5"], "--memory-gib: expected more than 0.6, got 0.5"),
        (["--seq-len=65536", "--tokens=65536"], "32768 positions"),
        (["--out=result.txt"], "should end in .json"),
    ],
)
def test_wrong_values_are_told_in_one_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        throughput.parse([f"--out={tmp_path / 'a.json'}", *options])
    assert message in capsys.readouterr().err.strip().split("\n")[-1]


def test_a_result_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "a.json"
    out.write_text("{}")
    with pytest.raises(SystemExit):
        throughput.parse([f"--out={out}"])
    assert "never overwritten" in capsys.readouterr().err
    assert out.read_text() == "{}"


def test_only_some_can_offload_and_their_process_knows_one_mode(tmp_path):
    _, config = throughput.parse(
        arguments(tmp_path / "a.json", "lsr", "unsloth_lora", checkpointing="none,full,offload")
    )
    workers = measurement.plan_workers(config, lambda name: tmp_path / name)
    modes = [(worker.provider, worker.modes) for worker in workers]
    assert modes[0] == ("lsr", ["none", "full"])
    assert modes[1:] == [("unsloth_lora", [mode]) for mode in ("none", "full", "offload")]


def test_models_stay_resident_only_where_they_leave_room(tmp_path):
    _, config = throughput.parse(["--model=mistral-7b", "--base=nf4", f"--out={tmp_path / 'a.json'}"])
    assert measurement.stays_resident(config, 11, 139.0)
    assert not measurement.stays_resident(config, 11, 79.0)


def test_smoke_shrinks_the_run(tmp_path):
    _, config = throughput.parse(["--smoke", f"--out={tmp_path / 'a.json'}"])
    assert (config["layers"], config["points"], config["rounds"], config["steps"]) == (2, [[512, 256]], 1, 2)
    assert config["shape"]["layers"] == 2
