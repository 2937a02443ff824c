"""The benchmark of a base larger than a GPU, in its shortest form: a process on a CPU, a tiny model."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.models import TINY
from benchmarks.report import large_models
from benchmarks.robustness import large_model
from benchmarks.speed.trainer_overhead import write_model
from lsr_scale.layers.frozen_linear import FrozenLinear4bit
from lsr_scale.model import load_base
from tests.helpers.ranks import popen

CPU = torch.device("cpu")


@pytest.mark.parametrize("stored", ["nf4", "bfloat16"])
def test_weights_are_written_layer_by_layer_as_a_checkpoint_has_them(tmp_path, stored):
    write_model(tmp_path, TINY)
    size = large_model.write_weights(tmp_path, stored, "cpu")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 + 3, "a file each: layers, embedding, norm, head"
    assert size < sum(file.stat().st_size for file in files) < 1.5 * size
    model = load_base(str(tmp_path), device=CPU)
    linear = model.model.layers[1].mlp.up_proj
    assert isinstance(linear, FrozenLinear4bit)
    assert linear.weight.quant_state.nested
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_adapter(tmp_path, monkeypatch):
    out = tmp_path / "large.json"
    monkeypatch.setattr("subprocess.Popen", popen)
    words = [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--gpus",
        "1",
        "--steps",
        "5",
        "--save-steps",
        "2",
        "--seq-len",
        "32",
    ]
    assert large_model.main([*words, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["same_adapter"]
    assert result["whole"]["steps"] == 5
    assert result["killed_at"] >= 4
    assert result["whole"]["losses"][-1] == result["killed"]["losses"][-1]
    assert result["plan"]["total_gib"] > 0
    assert large_models.guide(tmp_path) == large_models.NOTHING
    (tmp_path / "large_model").mkdir()
    out.rename(tmp_path / "large_model" / "tiny-cpu.json")
    speed, killed = result["whole"]["tokens_per_s"], result["killed_at"]
    line = large_models.guide(tmp_path).splitlines()[-1]
    assert line.startswith(f"| tiny, weights on disk in nf4, 1 CPU process, 32 tokens each | {speed:,.0f} |  | ")
    assert line.endswith(f" | after step {killed}: the same adapter |")


def test_each_group_of_processes_that_share_a_gpu_has_an_mps_daemon_of_its_own(monkeypatch):
    commands = []

    def run(words, env, **options):
        commands.append((words[1:], options.get("input"), env["CUDA_MPS_PIPE_DIRECTORY"]))
        assert Path(env["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
        if options.get("input"):
            raise subprocess.TimeoutExpired(words, 10)  # its clients were killed

    monkeypatch.setattr("subprocess.run", run)
    shared = large_model.SharedGpus(4)
    first, second = shared.begin(), shared.begin()
    shared.end()
    shared.end()
    places = [env["CUDA_MPS_PIPE_DIRECTORY"] for env in (first, second)]
    assert [place for _, _, place in commands] == [places[0], places[0], places[1], places[1]]
    assert [words for words, said, _ in commands if not said] == [["-d"]] * 2
    assert not any(Path(place).exists() for place in places)
    assert (first["NCCL_MULTI_RANK_GPU_ENABLE"], first["NCCL_MAX_NCHANNELS"]) == ("1", "16")


@pytest.mark.parametrize(
    ("gpus", "said"),
    [(["NVIDIA H200"] * 4, "4 H200"), (["NVIDIA H200"], "4 processes that share 1 H200"), ([], "4 CPU processes")],
)
def test_processes_that_share_a_gpu_are_not_taken_for_as_many_gpus(gpus, said):
    assert large_models._cards({"env": {"gpus": gpus}, "config": {"gpus": 4}}) == said
