"""Does the best learning rate of LSR-Adapt move with the width of a layer? A linear teacher, minutes on a CPU.

    python -m benchmarks.quality.width --out benchmarks/results/parametrization/width-cpu.json

A layer of width n (in = out) is to learn a fixed update of rank 4 on Gaussian inputs: `y = scaling * up down x`
against `y* = W* x` with W* of that rank and outputs of unit variance, AdamW, 300 steps of 256 rows, cosine schedule.
Real layers see structured inputs and gradients; this isolates what a sweep on a single model cannot show.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command_line import new_file, script_parser
from lsr_scale import files
from lsr_scale.adapters.methods.lsr import Lsr, LsrConfig

RATES = [2.0**-k for k in range(12, 4, -1)]
STEPS, ROWS, TEACHER_RANK = 300, 256, 4


def draw(method: str, width: int, rank: int, terms: int) -> tuple[dict[str, Tensor], float]:
    """Return freshly initialized factors and the scaling."""
    if method == "lora":
        down = torch.empty(rank, width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        return {"down": down, "up": torch.zeros(width, rank)}, 2.0
    config = LsrConfig(rank=rank, separation_rank=terms)
    params = {name: torch.empty(shape) for name, shape in Lsr.parameter_shapes(width, width, config).items()}
    Lsr.init_parameters(params, config)
    return params, config.scaling


def final_loss(method: str, width: int, rank: int, terms: int, rate: float, seed: int) -> float:
    """Return the mean squared error over the last tenth of the steps; the outputs have variance 1."""
    torch.manual_seed(seed)
    teacher_up = torch.randn(width, TEACHER_RANK) / TEACHER_RANK**0.5
    teacher_down = torch.randn(TEACHER_RANK, width) / width**0.5
    params, scaling = draw(method, width, rank, terms)
    leaves = [value.requires_grad_() for value in params.values()]
    optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        x = torch.randn(ROWS, width)
        down, up = (params["down"], params["up"]) if method == "lora" else Lsr.materialize(params)
        y = (x @ down.T) @ up.T * scaling
        loss = (y - (x @ teacher_down.T) @ teacher_up.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-STEPS // 10 :]
    return sum(tail) / len(tail)


def main() -> None:
    """Sweep and write the JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width in args.widths:
        for method, rank, terms in (("lora", 16, 0), ("lsr", 16, 16), ("lsr", 4, 16), ("lsr", 16, 48)):
            by_rate = {rate: final_loss(method, width, rank, terms, rate, seed=0) for rate in RATES}
            best = min(by_rate, key=lambda rate: by_rate[rate] if math.isfinite(by_rate[rate]) else math.inf)
            row = {"method": method, "width": width, "rank": rank, "separation_rank": terms}
            rows.append({**row, "best_rate": best, "loss": by_rate[best], "loss_by_rate": list(by_rate.items())})
            print(json.dumps({**row, "best_rate": best, "loss": round(by_rate[best], 5)}), flush=True)
            files.write_json(args.out, {"env": files.environment(), "rows": rows})


if __name__ == "__main__":
    main()
