"""How much memory and time does merging an adapter into a 7B take?

    python -m benchmarks.interop.merge_memory --work /a/folder/with/30/GB --out benchmarks/results/export/NAME.json

A folder of random bfloat16 weights in the model's shapes (in files of 5 GB, as they are published), a random LSR
adapter on all seven linears, and `lsr-scale export` in a process of its own, whose memory is read every 20 ms:
`anonymous_gib` is what the process holds, `resident_gib` adds the pages of files that it has mapped, which the system
may drop.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import ROOT
from benchmarks.command_line import new_file, script_parser
from benchmarks.models import LINEARS

FILE_BYTES = 5 * 10**9


def write_base(name: str, folder: Path, layers: int | None) -> int:
    """Write a folder of random weights in a model's shapes; return the number of parameters."""
    from lsr_scale.model import meta_model
    from lsr_scale.model.known_configs import known_config

    config = known_config(name)
    if config is None:
        raise SystemExit(f"--model {name}: its shapes are not known; see lsr_scale/model/known_configs.json")
    config.num_hidden_layers = layers or config.num_hidden_layers
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    noise: dict[tuple[int, ...], torch.Tensor] = {}
    size = files = parameters = 0
    generator = torch.Generator().manual_seed(0)

    def flush() -> None:
        nonlocal shard, size, files
        files += 1
        save_file(shard, folder / f"model-{files:05}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, f"model-{files:05}.safetensors"))
        shard, size = {}, 0

    for key, value in meta_model(config, dtype=torch.bfloat16).named_parameters():
        if tuple(value.shape) not in noise:
            noise[tuple(value.shape)] = (torch.randn(value.shape, generator=generator) * 0.02).bfloat16()
        shard[key] = noise[tuple(value.shape)].clone()
        parameters += value.numel()
        size += 2 * value.numel()
        if size > FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def write_adapter(base: Path, folder: Path, quantization: str) -> None:
    """Write a random LSR adapter of a base."""
    from transformers import AutoConfig

    from lsr_scale.adapters import METHODS, peft_config
    from lsr_scale.model import meta_model

    config = peft_config("lsr", {"target_modules": LINEARS, "rank": 16, "separation_rank": 16}, "CAUSAL_LM")
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors, shapes = {}, {}
    module: Any
    for name, module in meta_model(AutoConfig.from_pretrained(base)).named_modules():
        if name.rpartition(".")[2] in LINEARS:
            for factor, shape in (
                METHODS["lsr"].parameter_shapes(module.in_features, module.out_features, config).items()
            ):
                tensors[f"base_model.model.{name}.lsr_{factor}"] = torch.randn(shape) * 0.05
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            shapes[pattern] = [module.out_features, module.in_features]
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"name": str(base), "architecture": "random", "quantization": quantization, "config_sha256": ""}
    (folder / "base.json").write_text(json.dumps({**described, "linear_shapes": shapes}))


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command; return its seconds and the most memory it had."""
    began = time.perf_counter()
    most = {"RssAnon": 0, "VmRSS": 0}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in most:
                    most[name] = max(most[name], int(value.split()[0]))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
    gib = {name: round(value / 2**20, 3) for name, value in most.items()}
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "anonymous_gib": gib["RssAnon"], "resident_gib": gib["VmRSS"]}


def main(arguments: list[str] | None = None) -> int:
    """Write the model, export, and write the result."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="mistralai/Mistral-7B-v0.1", help="whose shapes")
    parser.add_argument("--layers", type=int, help="fewer layers: the most memory stays, the time falls")
    parser.add_argument("--quantization", default="nf4", help="of the base while it was trained: nf4, fp4, int8, none")
    parser.add_argument("--forms", nargs="+", default=["lora", "merged bfloat16"], help="--to, and --dtype behind it")
    parser.add_argument("--work", type=Path, required=True, help="a folder to make, use and remove again")
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.work.exists():
        parser.error(f"--work: {args.work} exists; it is made and removed again, give a new name")
    from lsr_scale import files

    cases: dict[str, Any] = {}
    try:
        parameters = write_base(args.model, args.work / "base", args.layers)
        write_adapter(args.work / "base", args.work / "adapter", args.quantization)
        for form in args.forms:
            kind, _, dtype = form.partition(" ")
            command = [sys.executable, "-m", "lsr_scale.cli", "export", str(args.work / "adapter"), "--to", kind]
            command += ["--out", str(args.work / "out"), "--no-verify", *(["--dtype", dtype] if dtype else [])]
            cases[form] = watched(command)
            cases[form]["bytes"] = sum(f.stat().st_size for f in (args.work / "out").glob("*.safetensors"))
            shutil.rmtree(args.work / "out")
            print(form, cases[form], flush=True)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    config = {"model": args.model, "layers": args.layers, "parameters": parameters, "quantization": args.quantization}
    files.write_json(args.out, {"env": files.environment(), "config": config, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
