"""Does fused training have the losses of unfused training? One real model, one seed, 200 steps, three times.

    python -m benchmarks.robustness.loss_curve --out benchmarks/results/loss_curve/NAME.json   (a PNG beside it)

float32      unfused, computed in float32 on the same NF4 base: the reference
unfused      bfloat16, each linear by itself
fused        bfloat16, fused layers

All start from the same factors and see the same tokens (the embedded questions and their answers, shuffled by the
seed). bfloat16 moves a curve by some amount, which `unfused` minus `float32` shows; the fused curve may stray from
the reference by about as much, not more.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import get_peft_model

import lsr_scale
from benchmarks.command_line import new_file, script_parser
from benchmarks.models import LINEARS, SMOLLM2
from lsr_scale import files
from lsr_scale.adapters import peft_config
from lsr_scale.data import commonsense
from lsr_scale.model import load_base, load_tokenizer

KINDS = ("float32", "unfused", "fused")


def batches(steps: int, batch: int, length: int, seed: int) -> list[torch.Tensor]:
    """Return `steps` batches `[batch, length]` of the embedded questions with their answers, one after the other."""
    tokenizer = load_tokenizer(SMOLLM2)
    rows = commonsense.rows("train")
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch * length:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            row: Any = rows[index]
            text = f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}"
            stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return list(torch.tensor(stream[: steps * batch * length]).view(steps, batch, length))


def curve(kind: str, data: list[torch.Tensor], method: str, rate: float, seed: int) -> list[float]:
    """Train once and return the loss of every step."""
    dtype = "float32" if kind == "float32" else "bfloat16"
    torch.manual_seed(seed)
    options = {"target_modules": LINEARS, "rank": 16, **({"separation_rank": 16} if method == "lsr" else {})}
    model: Any = get_peft_model(load_base(SMOLLM2, dtype=dtype), peft_config(method, options, "CAUSAL_LM")).train()
    if kind == "fused":
        print(lsr_scale.fuse(model))
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=rate)
    device, losses = factors[0].device, []
    for batch in data:
        loss = model(input_ids=batch.to(device), labels=batch.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def differences(curves: dict[str, list[float]], last: int = 50) -> dict[str, dict[str, float]]:
    """Return how far the bfloat16 curves are from the reference: per step, and in the mean of the last steps."""
    reference = torch.tensor(curves["float32"])
    by_curve = {}
    for name in ("unfused", "fused"):
        difference = torch.tensor(curves[name]) - reference
        by_curve[name] = {
            "rms": float(difference.square().mean().sqrt()),
            "largest": float(difference.abs().max()),
            f"mean_of_last_{last}": float(difference[-last:].mean()),
        }
    return by_curve


def plot(curves: dict[str, list[float]], path: Path, title: str) -> None:
    """Draw the three curves, and below them their distance from the reference."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    for name, style in (("float32", "k-"), ("unfused", "C0-"), ("fused", "C1--")):
        upper.plot(curves[name], style, label=name, linewidth=1.2)
        if name != "float32":
            difference = [a - b for a, b in zip(curves[name], curves["float32"], strict=True)]
            lower.plot(difference, style, label=f"{name} - float32", linewidth=1)
    upper.set_title(title, fontsize=11)
    upper.set_ylabel("loss, nats per token")
    lower.set_ylabel("difference from float32")
    lower.set_xlabel("step")
    for axis in (upper, lower):
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def title_of(content: dict[str, Any]) -> str:
    """Return the plot's title: the model, the method, its rate, and the card."""
    config, gpus = content["config"], content["env"]["gpus"]
    card = f", {gpus[0].removeprefix('NVIDIA ')}" if gpus else ""
    model = config["model"].removeprefix("builtin:")
    return f"{model}, NF4, {config['method']}, learning rate {config['rate']:g}{card}"


def main() -> None:
    """Run the three, write the JSON and the plot."""
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="lsr")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = batches(args.steps, args.batch, args.length, args.seed)
    # a small model waits for launches: on a GPU the three go side by side
    workers = 3 if torch.cuda.is_available() else 1
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {kind: pool.submit(curve, kind, data, args.method, args.rate, args.seed) for kind in KINDS}
        curves = {kind: future.result() for kind, future in started.items()}
    for kind, losses in curves.items():
        print(f"{kind}: {losses[0]:.4f} -> {sum(losses[-20:]) / 20:.4f}", flush=True)
    config = {name: value for name, value in vars(args).items() if name != "out"} | {"model": SMOLLM2, "base": "nf4"}
    content = {"env": files.environment(), "config": config, "differences": differences(curves), "loss": curves}
    files.write_json(args.out, content)
    plot(curves, args.out.with_suffix(".png"), title_of(content))
    for name, values in content["differences"].items():
        print(name, {key: round(value, 5) for key, value in values.items()})


if __name__ == "__main__":
    main()
