"""Does a model train whose 4-bit base is larger than a GPU? ZeRO-3, cards held to a size, a kill, a resume.

    python -m benchmarks.robustness.large_model --model llama2-70b --gpus 2 --card-gib 24 --out large_model/NAME.json

The weights are random, written to `--folder` one decoder layer after the other: in NF4 with double quantization, as a
checkpoint that was quantized before, or with `--stored bfloat16` as they usually are, of which every one is quantized
and sharded when it is read. Two runs of the training command (`lsr_scale.launch` under torchrun, ZeRO-3, activations
recomputed, runs add in a fixed order): one undisturbed, the other killed with SIGKILL after a checkpoint and resumed.
Their adapters are compared by SHA-256. `limited_launch` lets no process allocate more than a card has and notes its
peak, which is to be within 10 % of `plan`'s. `start_and_end_s` are the seconds without steps and saves, most of which
load the base. Of more processes than there are GPUs several share one, by NCCL from 2.30 on and CUDA MPS: all of it is
as on as many GPUs but the speed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import LINEARS, MODELS, model_values
from benchmarks.processes import kill_all
from benchmarks.robustness.limited_launch import PEAKS
from benchmarks.speed.trainer_overhead import write_model, write_rows
from benchmarks.speed.workers import say
from lsr_scale.run.metrics import read_metrics

POLL_S = 0.2
SAID = 3_000  # characters of a failed run's words
STD = 0.02  # of weights
NUM_CHANNELS = 64  # of NCCL on a GPU: blocks of all processes, which wait for each other, so all must find a place


def write_weights(folder: Path, stored: str, device: str) -> int:
    """Write a model's random weights beside its configuration, a file a decoder layer; return their bytes."""
    from safetensors.torch import save_file

    from lsr_scale.model import load_config, meta_model, quantization_config
    from lsr_scale.planning.sizes import quantized_layers

    config = load_config(str(folder))
    model = meta_model(config, dtype=torch.bfloat16)
    quantized = {f"{name}.weight" for name in quantized_layers(model)} if stored == "nf4" else set()
    torch.manual_seed(0)
    parts: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:3]), []).append((name, parameter.shape))
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts.values()):
        tensors = {
            key: value for name, shape in names for key, value in _stored(name, shape, name in quantized, device)
        }
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    if quantized:
        quantizer = quantization_config("nf4", True, torch.bfloat16, None)
        assert quantizer is not None
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content["quantization_config"] = quantizer.to_dict()
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return total


def _stored(name: str, shape: torch.Size, quantized: bool, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a checkpoint has of a parameter."""
    from bitsandbytes.functional import quantize_4bit

    if len(shape) == 1:
        yield (
            name,
            torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else torch.zeros(shape, dtype=torch.bfloat16),
        )
        return
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(STD)
    if not quantized:
        yield name, weight.cpu()
        return
    codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    yield name, codes.cpu()
    for key, value in state.as_dict(packed=True).items():
        yield f"{name}.{key}", value.cpu()


class SharedGpus:
    """CUDA MPS, by which the kernels of processes that share a GPU run at one time, and not in turns of milliseconds.

    Every group of processes has a daemon of its own: where a client was killed, later ones of the same daemon fail.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self._place = processes, ""

    def begin(self) -> dict[str, str]:
        """Start a daemon in the place of the one before; return the environment of the processes to be started."""
        self.end()
        self._place = tempfile.mkdtemp(prefix="mps-")
        environment = self._environment()
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
        return environment

    def end(self) -> None:
        """Stop the daemon, if there is one."""
        if not self._place:
            return
        quit_it: dict[str, Any] = {"input": "quit -t 1\n", "env": self._environment()}
        with contextlib.suppress(subprocess.TimeoutExpired):  # of one whose clients were killed
            subprocess.run(["nvidia-cuda-mps-control"], text=True, capture_output=True, timeout=10, **quit_it)
        shutil.rmtree(self._place, ignore_errors=True)
        self._place = ""

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **dict.fromkeys(("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"), self._place),
            **{"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MIN_NCHANNELS": "1"},
            "NCCL_MAX_NCHANNELS": str(max(1, NUM_CHANNELS // self.processes)),
        }


class Runs:
    """Starts the training command on several processes, and kills it."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        shared = args.device == "cuda" and args.gpus > torch.cuda.device_count()
        self.shared = SharedGpus(args.gpus) if shared else None

    def sections(self, name: str) -> dict[str, Any]:
        """Return a run, as its YAML file has it."""
        args = self.args
        return {
            "model": {"name": str(self.folder), "quantization": "nf4", "dtype": "bfloat16"},
            "adapter": {"method": "lsr", "rank": 4, "separation_rank": 8, "target_modules": LINEARS},
            "data": {"train": [str(self.folder / "rows.jsonl")]},
            "training": {
                **{"max_steps": args.steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
                **{"max_length": args.seq_len, "packing": True, "memory": "save", "full_determinism": True},
                **{"learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "steps", "save_steps": args.save_steps},
                **{"output_dir": str(self.folder / name), "report_to": "none"},
            },
            "eval": {"tasks": []},
            "deepspeed": {"config": "zero3"},
        }

    def start(self, name: str, resume: bool = False) -> "subprocess.Popen[str]":
        """Start a run."""
        config = self.folder / f"{name}.yaml"
        config.write_text(json.dumps(self.sections(name)), encoding="utf-8")  # JSON is YAML
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.args.gpus)]
        on_gpus = ["-m", "benchmarks.robustness.limited_launch", str(self.args.card_gib or 0)]
        words = on_gpus if self.args.device == "cuda" else [str(ROOT / "launch/train.py")]
        words += ["--config", str(config), "--quiet", *(["--resume", "auto"] if resume else [])]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        pipes["env"] = self.shared.begin() if self.shared else None
        return subprocess.Popen([sys.executable, *launcher, *words], **pipes, cwd=ROOT)

    def finish(self, name: str, resume: bool = False) -> dict[str, Any]:
        """Let a run end; return its hash, seconds and peaks.

        Raises:
            SystemExit: if it fails or takes longer than `--limit` seconds.
        """
        began = time.time()
        with self.start(name, resume) as process:
            try:
                _, said = process.communicate(timeout=self.args.limit)
            except subprocess.TimeoutExpired as error:
                raise SystemExit(f"{name}: took more than {self.args.limit:.0f} s") from error
            finally:
                kill_all(process)
        if process.returncode:
            raise SystemExit(f"{name}: failed:\n{said[:SAID]}")  # what the launcher says comes after
        output = self.folder / name
        rows = [row for row in read_metrics(output / "metrics.jsonl") if "tokens_per_s" in row]
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
        peaks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((output / PEAKS).glob("*.json"))]
        return {
            "sha256": hashlib.sha256(adapter).hexdigest(),
            "steps": results["steps"],
            "losses": [row["loss"] for row in rows],
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows[2:]),
            "seconds": round(time.time() - began, 1),
            # a resumed run's `wall_s` goes on from that of before
            **({} if resume else {"start_and_end_s": round(time.time() - began - rows[-1]["wall_s"], 1)}),
            "peak_gib": [round(peak["allocated"] / 2**30, 3) for peak in peaks],
            "reserved_gib": [round(peak["reserved"] / 2**30, 3) for peak in peaks],
        }

    def kill_after(self, name: str, step: int) -> int:
        """Start a run, kill all of it once it has logged a step, and return the last step that it logged.

        Raises:
            SystemExit: if it ends before, or takes longer than `--limit` seconds.
        """
        metrics, began = self.folder / name / "metrics.jsonl", time.monotonic()
        with self.start(name) as process:
            try:
                while not any(row["step"] >= step for row in read_metrics(metrics)):
                    if process.poll() is not None or time.monotonic() - began > self.args.limit:
                        said = process.stderr.read() if process.stderr and process.poll() is not None else "too slow"
                        raise SystemExit(f"{name}: was to be killed after step {step}: {said[:SAID]}")
                    time.sleep(POLL_S)
            finally:
                kill_all(process)
        return max(row["step"] for row in read_metrics(metrics))


def main(arguments: list[str] | None = None) -> int:
    """Write the weights, train, kill, resume, write the result; return 1 where the adapters differ."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default="llama2-70b", choices=[*MODELS, "tiny"])
    add("--layers", type=int, help="this many layers instead of the model's own")
    add("--stored", default="nf4", choices=["nf4", "bfloat16"], help="how the weights are on disk")
    add("--folder", type=Path, help="for weights and runs, several GB; weights that are there are taken")
    add("--gpus", type=int, default=2, help="processes; of more than there are GPUs several share one")
    add("--card-gib", type=float, help="memory that each process is held to")
    add("--seq-len", type=int, default=512, help="tokens of a GPU and step")
    add("--steps", type=int, default=20)
    add("--save-steps", type=int, default=10)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--limit", type=float, default=300.0, help="seconds for each start")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.save_steps + 2 > args.steps:
        parser.error(f"--save-steps: {args.save_steps} leaves no step to be killed in before the end, {args.steps}")
    from lsr_scale import api, files

    config = {name: value for name, value in vars(args).items() if name not in ("out", "limit", "folder")}
    config["command"] = recorded("robustness.large_model", arguments or sys.argv[1:], args.out)
    result: dict[str, Any] = {"env": files.environment(), "config": config}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="large-model-"))
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        if not (folder / "model.safetensors.index.json").exists():
            write_model(folder, model_values(args.model, args.layers))
            written = write_weights(folder, args.stored, args.device)
            say(f"{written / 2**30:.1f} GiB of weights written in {time.monotonic() - began:.0f} s")
        write_rows(folder / "rows.jsonl", args.steps * args.gpus, args.seq_len)
        runs = Runs(folder, args)
        if runs.shared:
            stack.callback(runs.shared.end)
        planned = api.plan(runs.sections("whole"), gpus=args.gpus)
        memory = planned.memory_gib
        result["plan"] = {
            "total_gib": memory.total,
            "loading_gib": memory.loading,
            "base_parameters": planned.base_parameters,
        }
        say(f"plan: {memory.total:.2f} GiB a GPU, {memory.loading:.2f} while it is loaded")
        for name in ("whole", "killed"):
            if name == "killed":
                result["killed_at"] = runs.kill_after(name, args.save_steps + 2)
            result[name] = runs.finish(name, resume=name == "killed")
            files.write_json(args.out, result)
            shown = {key: value for key, value in result[name].items() if key not in ("losses", "sha256")}
            say(f"{name}: {json.dumps(shown)}")
    result["same_adapter"] = result["whole"]["sha256"] == result["killed"]["sha256"]
    peak = max(result["whole"]["peak_gib"], default=0.0)
    result["peak_over_plan"] = round(peak / max(memory.total, memory.loading), 4) if peak else None
    files.write_json(args.out, result)
    say(f"the same adapter: {result['same_adapter']}; peak over plan: {result['peak_over_plan']}")
    return int(not result["same_adapter"])


if __name__ == "__main__":
    sys.exit(main())
