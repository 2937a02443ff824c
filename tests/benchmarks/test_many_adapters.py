"""The benchmark of many adapters in one batch, at sizes that mean nothing."""

import json

import pytest

from benchmarks.report.results_page import many_adapters as many_adapters_page
from benchmarks.speed import many_adapters


def test_every_row_has_an_adapter_of_its_own_and_peft_stands_beside(tmp_path):
    out = tmp_path / "a.json"
    sizes = ["--resident=6", "--rows=3", "--prompt=8", "--new=3", "--rounds=1"]
    assert many_adapters.main(["--model=tiny", *sizes, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"lsr", "peft_lora"}
    for row in result["rows"].values():
        for kind in ("forward", "generation"):
            speeds = row[kind]["tokens_per_s"]
            assert row[kind]["ratio"]["rows"] == pytest.approx(speeds["rows"] / speeds["base"])
    assert result["rows"]["lsr"]["adapter_bytes"] > 0
    generation = result["rows"]["lsr"]["generation"]
    speeds = generation["tokens_per_s"]
    assert generation["ratio"]["decoder"] == pytest.approx(speeds["decoder_rows"] / speeds["decoder_base"])
    assert generation["ratio"]["decoder_rows"] == pytest.approx(speeds["decoder_rows"] / speeds["base"])
    assert set(generation["step_ms"]) == {"decoder_base", "decoder_rows"}
    assert "lsr, generation by `Decoder`" in many_adapters_page(out, result)
    with pytest.raises(SystemExit):
        many_adapters.main(["--model=tiny", "--resident=2", "--rows=3", f"--out={tmp_path / 'b.json'}"])
