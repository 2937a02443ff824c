"""How much of the base's speed is left when every row of a batch has its own adapter, out of a thousand in memory?

    python -m benchmarks.speed.many_adapters --out benchmarks/results/many_adapters/NAME.json

A model of random weights in bfloat16, LSR-Adapt on all seven linears, `--resident` adapters loaded from a folder into
an `AdapterBank`, batches of `--rows` rows whose adapters all differ. Two ways to use them: a forward over the prompts,
and the generation of `--new` tokens by transformers' `generate`. Each is timed in turns: the base alone (the model
without adapters), and the batch with `adapter_names`. `ratio` is the second's tokens/s over the first's. Generation is
timed by `lsr_scale.Decoder` too, whose decoding step is a CUDA graph: `decoder_base` and `decoder_rows`, both in
`ratio` over the base by `generate`, and one over the other as `decoder`; `step_ms` is what one such step takes. Beside
them, `peft_lora`: as many of PEFT's LoRA adapters in one model as there are rows, through PEFT's own `adapter_names`,
which loops over them: one round. After `--time-limit` no round begins but the first of what is not measured yet.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import new_file, script_parser
from benchmarks.models import LINEARS, TINY

OPTIONS: dict[str, dict[str, Any]] = {"lsr": {"rank": 16, "separation_rank": 16}, "lora": {"rank": 16}}


def model_of(name: str, device: torch.device) -> Any:
    """Return a model of random weights, in evaluation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lsr_scale.model.known_configs import known_config

    config = AutoConfig.for_model(**TINY) if name == "tiny" else known_config(name)
    if config is None:
        raise SystemExit(f"--model {name}: its shapes are not known; see lsr_scale/model/known_configs.json")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def adapted(base: Any, method: str, names: list[str]) -> Any:
    """Return the base with some adapters whose updates are not zero."""
    from peft import get_peft_model

    from lsr_scale.adapters import peft_config

    config = peft_config(method, {"target_modules": LINEARS, **OPTIONS[method]}, "CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    disturb(model)
    return model.eval()


def disturb(model: Any) -> None:
    """Move all factors from their start."""
    with torch.no_grad():
        for factor in (p for name, p in model.named_parameters() if "lsr_" in name or "lora_" in name):
            factor.add_(torch.randn_like(factor) * 0.01)


def write_adapters(model: Any, folder: Path, names: list[str], files: int = 8) -> None:
    """Save as many adapters as there are names; a few files, linked: what is in them costs no time."""
    for index, name in enumerate(names):
        if index < files:
            disturb(model)
            model.save_pretrained(folder / name)
            continue
        (folder / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(folder / names[index % files] / file, folder / name / file)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the time of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(
    ways: dict[str, Callable[[], Any]], rounds: int, tokens: int, device: torch.device, end: float
) -> dict[str, Any]:
    """Return tokens/s of each way, timed in turns after one call each, and their ratios to `base`.

    After `end`, in `time.monotonic`'s seconds, no round begins but the first.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for name, function in ways.items():
            taken = seconds(function, device)
            print(
                f"  {number or 'warm-up'} {name}: {taken:.3f} s, {tokens / taken:,.0f} tokens/s",
                flush=True,
            )
            if number:
                times[name].append(taken)
    speeds = {name: tokens / statistics.median(taken) for name, taken in times.items()}
    ratios = {name: speed / speeds["base"] for name, speed in speeds.items() if name != "base"}
    return {"tokens_per_s": speeds, "ratio": ratios, "seconds": times}


def step_ms(decoder: Any, device: torch.device, steps: int = 50) -> float:
    """Return the milliseconds of a decoding step at the last place that a generation got to."""
    step = next(reversed(decoder.steps.values()))
    last = step.place - 1

    def run() -> None:
        for _ in range(steps):
            step.place.copy_(last)
            step.run()

    return min(seconds(run, device) for _ in range(3)) * 1e3 / steps


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Load, measure and write the result."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default="meta-llama/Llama-3.2-1B", help="whose shapes; or tiny")
    add("--resident", type=int, default=1000, help="adapters in memory")
    add("--rows", type=int, default=64, help="rows of a batch, each with an adapter of its own")
    add("--prompt", type=int, default=128, help="tokens of a prompt")
    add("--new", type=int, default=128, help="tokens to generate")
    add("--rounds", type=int, default=3)
    add("--time-limit", type=float, default=600, help="seconds")
    add("--without-peft", action="store_true", help="leave out PEFT's LoRA")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    if args.rows > args.resident:
        parser.error(f"--rows: {args.rows} rows of different adapters need as many --resident, not {args.resident}")
    from lsr_scale import AdapterBank, Decoder, files

    end = time.monotonic() + args.time_limit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = model_of(args.model, device)
    vocabulary = base.config.vocab_size
    ids = torch.randint(3, vocabulary, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    names = [f"user-{index:04d}" for index in range(args.resident)]
    batch = names[:: args.resident // args.rows][: args.rows]
    free: dict[str, Any] = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False}
    free["pad_token_id"] = 0

    def ways_of(model: Any) -> dict[str, dict[str, Callable[[], Any]]]:
        def without(function: Callable[[], Any]) -> Any:
            with model.disable_adapter():
                return function()

        forward = lambda **k: model(input_ids=ids, use_cache=False, logits_to_keep=1, **k)  # noqa: E731
        generate = lambda **k: model.generate(input_ids=ids, **free, **k)  # noqa: E731
        return {
            kind: {"base": lambda f=f: without(f), "rows": lambda f=f: f(adapter_names=batch)}
            for kind, f in (("forward", forward), ("generation", generate))
        }

    tokens = {"forward": ids.numel(), "generation": args.rows * args.new}
    rows: dict[str, Any] = {}
    config = {name: value for name, value in vars(args).items() if name != "out"}
    with tempfile.TemporaryDirectory(prefix="many-adapters-") as folder:
        model = adapted(base, "lsr", ["default"])
        write_adapters(model, Path(folder), names)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        bank = AdapterBank(model, folder, memory_gib=1.0 * args.resident * adapter_gib(model) * 1.0001 + 1e-6)
        loading = seconds(lambda: [bank.load(name) for name in names], device)
        assert len(bank.slots) == args.resident
        resident = (torch.cuda.memory_allocated() - before) / 2**30 if device.type == "cuda" else None
        load_ms = 1e3 * loading / args.resident
        print(f"{args.resident} adapters loaded, {load_ms:.1f} ms each", flush=True)
        rows["lsr"] = {"adapter_bytes": bank.adapter_bytes, "resident_gib": resident, "load_ms": load_ms}
        ways = ways_of(model)
        decoders = {"decoder_base": Decoder(model, max_steps=1), "decoder_rows": Decoder(model, max_steps=1)}
        decode: dict[str, Any] = {"input_ids": ids, "max_new_tokens": args.new, "eos_token_id": [], "pad_token_id": 0}

        def decoded_base() -> Any:
            with model.disable_adapter():
                return decoders["decoder_base"].generate(**decode)

        ways["generation"] |= {
            "decoder_base": decoded_base,
            "decoder_rows": lambda: decoders["decoder_rows"].generate(**decode, adapter_names=batch),
        }
        for kind in tokens:
            print(f"lsr {kind}", flush=True)
            rows["lsr"][kind] = measure(ways[kind], args.rounds, tokens[kind], device, end)
            files.write_json(args.out, {"env": files.environment(), "config": config, "rows": rows})
        generation = rows["lsr"]["generation"]
        speeds = generation["tokens_per_s"]
        generation["ratio"]["decoder"] = speeds["decoder_rows"] / speeds["decoder_base"]
        generation["step_ms"] = {name: step_ms(decoder, device) for name, decoder in decoders.items()}
        print(f"  a decoding step: {generation['step_ms']} ms", flush=True)
        for decoder in decoders.values():
            decoder.clear()
    files.write_json(args.out, {"env": files.environment(), "config": config, "rows": rows})
    if not args.without_peft:
        base = model.unload()
        model = adapted(base, "lora", batch)
        rows["peft_lora"] = {}
        for kind, ways in ways_of(model).items():
            print(f"peft_lora {kind}", flush=True)
            rows["peft_lora"][kind] = measure(ways, 1, tokens[kind], device, end)
        files.write_json(args.out, {"env": files.environment(), "config": config, "rows": rows})
    for name, row in rows.items():
        for kind in tokens:
            speeds = {way: round(speed) for way, speed in row[kind]["tokens_per_s"].items()}
            ratios = {way: round(ratio, 3) for way, ratio in row[kind]["ratio"].items()}
            print(f"{name} {kind}: {speeds} tokens/s, over the base's {ratios}")
    return 0


def adapter_gib(model: Any) -> float:
    """Return the GiB of a model's factors in float32."""
    return 4 * sum(p.numel() for name, p in model.named_parameters() if "lsr_" in name) / 2**30


if __name__ == "__main__":
    sys.exit(main())
