import importlib
import inspect
import json
import re

import pytest

from lsr_scale.config.deepspeed import (
    COMMON,
    SHIPPED,
    engine_config,
    offloads_optimizer,
    offloads_parameters,
    without_effect,
)
from lsr_scale.config.deepspeed_file import _KNOWN
from tests.helpers.run_text import CONFIGS, MINIMAL, load, problem


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
    content = {**COMMON, "zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    assert load(MINIMAL, "deepspeed.config=mine.json", folder=tmp_path).deepspeed.config == content
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "near.json").write_text("{}")
    plain = {**COMMON, "zero_optimization": {"stage": 0}}
    assert load(MINIMAL, "deepspeed.config=near.json").deepspeed.config == plain, "what is left out is auto"
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
            "zero_optimization.offload_param.device: shards of a frozen base are never held on nvme; set it to cpu",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}',
            "zero_optimization.offload_optimizer.device: the optimizer is never held on nvme; set it to cpu",
        ),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "offload_param: expected an object, got 'cpu'"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "tensor parallelism cannot split a quantized layer"),
        (
            '{"optimizer": {"type": "Adam"}}',
            "optimizer: the trainer makes it; remove the section",
        ),
        ('{"scheduler": {"type": "WarmupLR"}}', "remove the section and set training.lr_scheduler_type"),
        (
            '{"zero_optimizaton": {"stage": 2}}',
            "zero_optimizaton: DeepSpeed knows no such setting; did you mean",
        ),
        (
            '{"zero_optimization": {"stge": 2}}',
            "zero_optimization.stge: DeepSpeed knows no such setting; did you mean",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "lots"}}',
            "reduce_bucket_size: Input should be a valid integer, unable to parse string as an integer, got 'lots'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}',
            "zero_optimization.offload_param.device: Input should be 'none', 'cpu' or 'nvme', got 'gpu'",
        ),
        (
            '{"zero_optimization": {"stage": 2, "cpu_offload": true}}',
            "DeepSpeed's name of old; write offload_optimizer",
        ),
        ('{"train_batch_size": 16}', "train_batch_size: expected auto, got 16: it depends on the number of processes"),
        (
            '{"train_micro_batch_size_per_gpu": 5}',
            "train_micro_batch_size_per_gpu: is 5, but training.per_device_train_batch_size is 8; set that one",
        ),
        ('{"gradient_clipping": 0.5}', "gradient_clipping: is 0.5, but training.max_grad_norm is 1.0; set that one"),
        ('{"managed_gradient_accumulation": false}', "managed_gradient_accumulation: the trainer leaves accumulation"),
        (
            '{"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}',
            "allgather_bucket_size: nobody fills in auto here; write a value",
        ),
        ('{"a": 1,}', "ds.json:1:9: not valid JSON"),
        ("[1]", "expected one JSON object, got list"),
        ("", "the file is empty"),
    ],
)
def test_an_unsafe_or_broken_deepspeed_file_is_refused(tmp_path, content, expected):
    (tmp_path / "ds.json").write_text(content)
    assert expected in problem(MINIMAL, "deepspeed.config=ds.json", folder=tmp_path)


def test_what_a_deepspeed_file_leaves_open_is_not_null(tmp_path):
    zero = {"stage": 1, "offload_optimizer": None, "reduce_bucket_size": "auto"}
    for content, expected in (
        ({"gradient_clipping": 1.0, "zero_optimization": zero}, {"stage": 1, "reduce_bucket_size": "auto"}),
        ({"optimizer": None}, {"stage": 0}),
    ):
        (tmp_path / "ds.json").write_text(json.dumps(content))
        assert (
            load(MINIMAL, "deepspeed.config=ds.json", folder=tmp_path).deepspeed.config["zero_optimization"] == expected
        )


def test_a_missing_deepspeed_file_names_the_shipped_ones():
    assert "no such file: zero_3; give the path" in problem(MINIMAL, "deepspeed.config=zero_3")
    assert "did you mean 'zero3'" in problem(MINIMAL, "deepspeed.config=zero_3")


@pytest.mark.parametrize("section", ["", "deepspeed:", "deepspeed: {config: zero2}"])
def test_runs_do_not_share_their_deepspeed_dictionary(section):
    load(MINIMAL + section).deepspeed.config["zero_optimization"]["stage"] = 0
    assert load(MINIMAL + section).deepspeed.config["zero_optimization"]["stage"] == 2
    assert SHIPPED["zero2"]["zero_optimization"]["stage"] == 2


def test_stage_3_is_deepspeeds_stage_2_for_what_trains():
    offload = {"device": "cpu"}
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": 5, "offload_param": offload}
    given = {"gradient_clipping": 1.0, "zero_optimization": {**zero, "offload_optimizer": offload}}
    told = {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": offload}
    quiet = {"timers": {"throughput": {"enabled": False}}}
    assert engine_config(given) == {**quiet, "gradient_clipping": 1.0, "zero_optimization": told}
    assert engine_config({**given, "timers": {}})["timers"] == {}, "whoever wants DeepSpeed's timer has it"
    assert given["zero_optimization"]["stage"] == 3, "left as it was"
    assert without_effect(given) == ["stage3_prefetch_bucket_size"]
    assert offloads_optimizer(given)
    del zero["offload_param"]
    on_gpu = {"communication_data_type": "fp32", "zero_optimization": {**zero, "overlap_comm": True}}
    names = ["stage3_prefetch_bucket_size", "overlap_comm", "communication_data_type", "reduce_bucket_size"]
    assert without_effect(on_gpu) == names
    assert offloads_parameters(given)
    assert not offloads_parameters(SHIPPED["zero3"])
    assert offloads_parameters(SHIPPED["zero3_offload"])
    for name in ("zero0", "zero1", "zero2"):
        assert engine_config(SHIPPED[name]) == {**quiet, **SHIPPED[name]}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_used(name):
    assert without_effect(SHIPPED[name]) == []


def test_every_name_that_deepspeed_reads_is_known():
    constants = importlib.import_module("deepspeed.runtime.constants")
    source = inspect.getsource(importlib.import_module("deepspeed.runtime.config"))
    read = re.findall(r"(?:get_scalar_param\(param_dict, |param_dict\.get\()([A-Z_]+)", source)
    names = {getattr(constants, name) for name in read if hasattr(constants, name)}
    assert len(names) > 10
    assert names <= set(_KNOWN)
