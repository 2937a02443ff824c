import json

import pytest
from run_text import CONFIGS, MINIMAL, load, problem

from lsr_scale.config.deepspeed import SHIPPED


def test_shipped_deepspeed_files_are_the_dictionaries_of_the_package():
    on_disk = {path.stem: json.loads(path.read_text()) for path in (CONFIGS / "deepspeed").glob("*.json")}
    assert on_disk == SHIPPED, "regenerate with lsr_scale.config.deepspeed.write_shipped(Path('configs/deepspeed'))"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_deepspeed_files_cast_nothing(name):
    content = load(MINIMAL + f"deepspeed: {{config: {name}}}").deepspeed.config
    assert content == SHIPPED[name]
    assert not {"bf16", "fp16", "amp", "torch_autocast"} & content.keys()
    assert content["zero_optimization"]["stage"] == int(name[4])


def test_a_deepspeed_path_is_read_from_beside_the_config_and_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}')
    content = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    assert load(MINIMAL, "deepspeed.config=mine.json", folder=tmp_path).deepspeed.config == content
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "near.json").write_text("{}")
    assert load(MINIMAL, "deepspeed.config=near.json").deepspeed.config == {}
    assert load(MINIMAL, "deepspeed.config={zero_optimization: {stage: 3}}").deepspeed.config is not None
    assert load(MINIMAL, "deepspeed.config=null").deepspeed.config is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"bf16": {"enabled": true}}', "deepspeed.config.bf16.enabled: would cast the adapter's float32 factors"),
        ('{"fp16": {"enabled": true}}', "deepspeed.config.fp16.enabled: would cast"),
        ('{"torch_autocast": {"enabled": true}}', "deepspeed.config.torch_autocast.enabled: would cast"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ('{"zero_optimization": 2}', "zero_optimization: expected an object, got 2"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "works with float16 weights only"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "zero_optimization.offload_param.device: nvme swaps parameters through buffers of one floating dtype",
        ),
        (
            '{"zero_optimization": {"stage": 3, "use_all_reduce_for_fetch_params": true}}',
            "use_all_reduce_for_fetch_params: gathers parameters of one dtype only; remove it",
        ),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}', "was never tried on a quantized base"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "tensor parallelism cannot split a quantized layer"),
        (
            '{"optimizer": {"type": "Adam"}}',
            "optimizer: the trainer makes it; remove the section",
        ),
        ('{"scheduler": {"type": "WarmupLR"}}', "remove the section and set training.lr_scheduler_type"),
        ('{"a": 1,}', "ds.json:1:9: not valid JSON"),
        ("[1]", "expected one JSON object, got list"),
        ("", "the file is empty"),
    ],
)
def test_an_unsafe_or_broken_deepspeed_file_is_refused(tmp_path, content, expected):
    (tmp_path / "ds.json").write_text(content)
    assert expected in problem(MINIMAL, "deepspeed.config=ds.json", folder=tmp_path)


def test_a_missing_deepspeed_file_names_the_shipped_ones():
    assert "no such file: zero_3; give the path" in problem(MINIMAL, "deepspeed.config=zero_3")
    assert "did you mean 'zero3'" in problem(MINIMAL, "deepspeed.config=zero_3")


@pytest.mark.parametrize("section", ["", "deepspeed:", "deepspeed: {config: zero2}"])
def test_runs_do_not_share_their_deepspeed_dictionary(section):
    load(MINIMAL + section).deepspeed.config["zero_optimization"]["stage"] = 0
    assert load(MINIMAL + section).deepspeed.config["zero_optimization"]["stage"] == 2
    assert SHIPPED["zero2"]["zero_optimization"]["stage"] == 2


def test_a_head_trained_whole_beside_the_adapter_is_refused_under_zero3_alone():
    run = MINIMAL + "deepspeed: {config: zero3}\n"
    words = problem(run, "adapter.modules_to_save=[lm_head]")
    assert "ZeRO-3 trains tensors of one dtype only; set deepspeed.config: zero2" in words
    load(MINIMAL, "adapter.modules_to_save=[lm_head]")
    load(run, "adapter.modules_to_save=[lm_head]", "model.dtype=float32")
