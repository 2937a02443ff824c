"""How much memory does a frozen base take in each process under ZeRO-3, while it is loaded and after a step?

    torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.sharding --model MODEL --out NAME.json

On GPUs or CPUs, whatever there is, for each `--quantization`. Every process loads the whole model, as one process
would, and then under each of `--stages`; random weights unless `--checkpoint` says that the model has some. Then its
adapter trains for three steps. Bytes are those of storages, not elements: of parameters as they stand, of the parts of
them that a process keeps, of quantization states and of everything else that the model refers to. Peaks are what lives
at once beyond what lived before: the allocator's on a GPU, every storage that an operation makes on a CPU.

`losses` are to be compared between stages, and between 1, 2 and more processes: all of them together see the same eight
rows in every step.
"""

import copy
import gc
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from benchmarks.command_line import script_parser
from benchmarks.models import LINEARS

OPTIONS: dict[str, dict[str, Any]] = {
    "lsr": {"rank": 4, "separation_rank": 4},
    "kron_lora": {"rank": 4},
    "lora": {"rank": 4},
}
ROWS, STEPS = 8, 3


def storage_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages that a model refers to, each once, but for those of trainable parameters.

    Reached are parameters, buffers and every other tensor in the attributes of parameters and modules: the parts that
    a process keeps, quantization states, int8's codes and scales, the states of bitsandbytes' layers, and whatever
    hooks refer to, such as what is being gathered.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Parameter) and value.requires_grad:
            return
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            visit(vars(value))
        elif isinstance(value, dict):
            for item in list(value.values()):
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif isinstance(value, FunctionType):
            visit([cell.cell_contents for cell in value.__closure__ or ()])
        elif type(value).__module__.startswith(("bitsandbytes", "lsr_scale")) and hasattr(value, "__dict__"):
            visit(vars(value))

    for module in model.modules():
        visit(vars(module))
    return sum(sizes.values())


class Peak:
    """The most bytes that lived at once beyond those that lived before; `bytes` is known when `peak_of` ends."""

    bytes = 0


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Watch what lives."""
    from lsr_scale.planning.memory import LiveBytes

    class Allocated(LiveBytes):
        def _count(self, storage: torch.UntypedStorage) -> None:
            if storage.device.type != "meta":
                super()._count(storage)

    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with Allocated([]) as live:
        yield peak
    peak.bytes = max(live.peaks.values())


def filled_in(stage: str, rows: int) -> dict[str, Any]:
    """Return a shipped DeepSpeed configuration with what the trainer would fill in."""
    from lsr_scale.config.deepspeed import SHIPPED

    config = copy.deepcopy(SHIPPED[stage])
    config |= {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": rows, "gradient_clipping": 0.0}
    config["gradient_accumulation_steps"] = 1
    config["zero_optimization"] |= {"reduce_bucket_size": 50_000_000}
    return config


def load(model: str, quantization: str, checkpoint: bool, sharding: Any = None) -> tuple[Any, Peak, float]:
    """Load a base, whole or sharded; return it, what lived at once meanwhile, and the seconds."""
    from lsr_scale.model import load_base, local_device

    begun = time.perf_counter()
    with peak_of(local_device()) as peak:
        options: dict[str, Any] = {"quantization": quantization, "random_weights": not checkpoint, "sharding": sharding}
        base = load_base(model, dtype="bfloat16", **options)
    return base, peak, time.perf_counter() - begun


def whole_sizes(model: str, quantization: str, checkpoint: bool = False) -> dict[str, int]:
    """Return what one process holds of a model by itself, and what lives at once while it is loaded, in bytes."""
    whole, peak, _ = load(model, quantization, checkpoint)
    return {"whole_bytes": storage_bytes(whole), "whole_load_peak_bytes": peak.bytes}


def measure(
    model: str,
    quantization: str,
    *,
    method: str = "lsr",
    stage: str = "zero3",
    fused: bool = True,
    checkpoint: bool = False,
    tokens: int = 512,
    whole: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Return what this process holds of a model under a stage, and the losses of the first steps.

    Args:
        model: A name or folder, as `model.name` in a run.
        quantization: As in a run.
        method: The adapter's.
        stage: Name of a shipped DeepSpeed configuration.
        fused: Fuse the layers, all of their activations recomputed; else each linear by itself.
        checkpoint: The model has weights.
        tokens: In a row.
        whole: What `whole_sizes` found.
    """
    import deepspeed
    import peft

    from lsr_scale import adapters, distributed
    from lsr_scale.config import engine_config, offloads_parameters
    from lsr_scale.fused import fuse
    from lsr_scale.model import local_device
    from lsr_scale.model.shard import Sharding

    whole = whole or whole_sizes(model, quantization, checkpoint)
    device, world = local_device(), distributed.world_size()
    rows = ROWS // world
    config = filled_in(stage, rows)
    sharding = Sharding(offloads_parameters(config)) if stage.startswith("zero3") else None
    base, load_peak, load_s = load(model, quantization, checkpoint, sharding)
    loaded_bytes = storage_bytes(base)

    base.enable_input_require_grads()  # as the trainer does
    torch.manual_seed(0)
    options = adapters.peft_config(method, {"target_modules": LINEARS, **OPTIONS[method]}, "CAUSAL_LM")
    adapted: Any = peft.get_peft_model(base, options).train()
    if fused:
        report = fuse(adapted, "full")
        assert not report.unfused, str(report)
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=adapted, config=engine_config(config), optimizer=torch.optim.AdamW(factors, lr=1e-3)
    )
    torch.manual_seed(0)
    vocabulary = adapted.config.get_text_config().vocab_size
    batch = torch.randint(0, vocabulary, (ROWS, tokens))
    mine = batch[distributed.rank() * rows : (distributed.rank() + 1) * rows].to(device)
    losses: list[float] = []
    begun = time.perf_counter()
    with peak_of(device) as step_peak:
        for _ in range(STEPS):
            loss = engine(input_ids=mine, labels=mine).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float().clone()
            torch.distributed.all_reduce(mean)
            losses.append(mean.item() / world)
    steps_s = time.perf_counter() - begun
    after = storage_bytes(adapted)
    engine.destroy()
    return {
        **whole,
        "loaded_bytes": loaded_bytes,
        "load_peak_bytes": load_peak.bytes,
        "after_step_bytes": after,
        "step_peak_bytes": step_peak.bytes,
        "after_step_of_whole": round(after / whole["whole_bytes"], 4),
        "load_peak_of_whole": round(load_peak.bytes / whole["whole_bytes"], 4),
        "losses": losses,
        "load_s": round(load_s, 2),
        "steps_s": round(steps_s, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", required=True, help="hub name with known shapes, or a folder")
    parser.add_argument("--quantization", nargs="+", default=["nf4", "int8", "none"])
    parser.add_argument("--method", default="lsr", choices=list(OPTIONS))
    parser.add_argument("--layers", type=int, help="this many layers instead of the model's own")
    parser.add_argument("--stages", nargs="+", default=["zero3"], help="names of shipped DeepSpeed configurations")
    parser.add_argument("--unfused", action="store_true", help="do not fuse")
    parser.add_argument("--checkpoint", action="store_true", help="the model has weights; random ones otherwise")
    parser.add_argument("--tokens", type=int, default=512, help="in a row")
    parser.add_argument("--out", type=Path)
    options, _ = parser.parse_known_args()  # the launcher's --local_rank

    from lsr_scale import cli, distributed, files
    from lsr_scale.model import load_config

    cli.quiet_libraries(debug=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # alone, without a launcher
        with socket.create_server(("127.0.0.1", 0)) as free:
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    distributed.start(use_deepspeed=True)
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    content = {"options": chosen, "processes": distributed.world_size(), "environment": files.environment()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sharding-") as folder:
        model = options.model
        if options.layers:
            shorter: Any = load_config(model)
            shorter.num_hidden_layers = options.layers
            shorter.save_pretrained(folder)
            model = folder
        for quantization in options.quantization:
            whole = whole_sizes(model, quantization, options.checkpoint)
            for stage in options.stages:
                mine = measure(
                    model,
                    quantization,
                    method=options.method,
                    stage=stage,
                    fused=not options.unfused,
                    checkpoint=options.checkpoint,
                    tokens=options.tokens,
                    whole=whole,
                )
                rows.append({"base": quantization, "stage": stage, "by_rank": distributed.gather([mine])})
                if not distributed.is_main():
                    continue
                for rank, row in enumerate(rows[-1]["by_rank"]):
                    share, most = row["after_step_of_whole"], row["load_peak_of_whole"]
                    shares = f"{share:.3f} of {row['whole_bytes']:,} bytes after a step, {most:.3f} at most in load"
                    print(f"{quantization} {stage} rank {rank}: {shares}; losses {row['losses']}", flush=True)
                if options.out:
                    files.write_json(options.out, content | {"rows": rows})
    distributed.stop()


if __name__ == "__main__":
    main()
