"""Does the guard of the separation condition number save a run that is lost without it?

    python -m benchmarks.robustness.condition_guard --out benchmarks/results/condition/NAME.json

Takes seconds, and leaves a PNG beside the JSON.

A constructed case: a small update made of ordinary terms. One linear layer learns a teacher of LSR-Adapt's own form, a
thousandth in size, with float16 factors; the terms of its `up` side start in pairs that cancel but for a tenth.
Four runs from the same start and data: without a guard, with `condition_guard: rescale`, with `fp32`, and with factors
in float32 from the start and no guard, which is what a run of this package has. `loss` is the mean square error over
that of no update. Adam on gradients of unit size, the rate by a cosine.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.command_line import new_file, script_parser
from lsr_scale import LsrConfig, files
from lsr_scale.adapters import METHODS
from lsr_scale.adapters.condition import TOLERANCE, conditions, kronecker_sums
from lsr_scale.training.callbacks.condition import ConditionCallback

WIDTH, RANK, TERMS, BATCH = 64, 4, 4, 256
OPTIONS: dict[str, Any] = {"target_modules": ["0"], "rank": RANK, "alpha": float(RANK), "separation_rank": TERMS}
SHAPES = METHODS["lsr"].parameter_shapes(WIDTH, WIDTH, LsrConfig(**OPTIONS))
KINDS: dict[str, dict[str, Any]] = {
    "float16, no guard": {"guard": "warn", "dtype": torch.float16},
    "float16, rescale": {"guard": "rescale", "dtype": torch.float16},
    "float16, fp32": {"guard": "fp32", "dtype": torch.float16},
    "float32, no guard": {"guard": "warn", "dtype": torch.float32},
}


def start(dtype: torch.dtype) -> Any:
    """Return the adapted layer: factors of size 1, the terms of `up` in pairs that cancel but for a tenth."""
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), LsrConfig(**OPTIONS))
    nn.init.zeros_(model.base_model.model[0].get_base_layer().weight)
    with torch.no_grad():
        for side in kronecker_sums(model):
            side.left.normal_()
            side.right.normal_()
            if side.side == "up":
                side.left[1::2] = side.left[::2] + 0.1 * side.left[1::2]
                side.right[1::2] = -side.right[::2] + 0.1 * side.right[1::2]
            for parameter in side.parameters:
                parameter.data = parameter.data.half().to(dtype)  # the same values in either dtype
    return model


def train(guard: Any, dtype: torch.dtype, steps: int, rate: float, size: float) -> dict[str, Any]:
    """Train once; return the losses, and gamma of the `up` side, at every tenth step."""
    model = start(dtype)
    generator = torch.Generator().manual_seed(1)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    teacher = size * METHODS["lsr"].delta_weight(params)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    callback = ConditionCallback(TOLERANCE, guard, lambda text: None)
    losses, gammas = [], []
    for step in range(steps):
        x = torch.randn(BATCH, WIDTH, generator=generator)
        wanted = x @ teacher.T
        loss = (model(x) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in optimizer.param_groups[0]["params"]:
            # to a root mean square of 1, so that Adam's squares fit into float16
            gradient = parameter.grad.float()
            parameter.grad = (gradient / gradient.square().mean().sqrt().clamp_min(1e-20)).to(parameter.dtype)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            losses.append(loss.item())
            gammas.append(float(conditions([side for side in kronecker_sums(model) if side.side == "up"])[0]))
            callback.on_log(None, None, None, logs={"loss": losses[-1]}, model=model, optimizer=optimizer)  # pyright: ignore
    return {"loss": losses, "gamma": gammas}


def draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw losses and condition numbers over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, values in curves.items():
        steps = range(0, 10 * len(values["loss"]), 10)
        left.plot(steps, values["loss"], label=name)
        right.plot(steps, values["gamma"], label=name)
    left.set(xlabel="step", ylabel="error over that of no update", yscale="log")
    right.set(xlabel="step", ylabel="gamma of the up side", yscale="log")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("LSR-Adapt from factors whose terms cancel: error and condition number", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Run the four, write the JSON and the plot."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--rate", type=float, default=1e-2)
    add("--size", type=float, default=1e-3, help="of the teacher, over an update of such factors")
    add("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    args = parser.parse_args(arguments)
    curves = {name: train(**kind, steps=args.steps, rate=args.rate, size=args.size) for name, kind in KINDS.items()}
    config = {"steps": args.steps, "rate": args.rate, "size": args.size, "tolerance": TOLERANCE}
    files.write_json(args.out, {"env": files.environment(), "config": config, "runs": curves})
    draw(curves, args.out.with_suffix(".png"))
    for name, values in curves.items():
        loss, gamma = values["loss"], values["gamma"]
        print(f"{name:20} loss {loss[0]:.3g} -> {loss[-1]:.3g}   gamma {gamma[0]:.4g} -> {gamma[-1]:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
