"""What FP8 loses in each layer of a real model on real text: outliers, underflow, errors of outputs and gradients.

    python -m benchmarks.quality.fp8_layers --model FOLDER --data GSM8K --out benchmarks/results/fp8_layers/NAME.json

FOLDER is a Transformers folder with a chat template or a `builtin:` name, GSM8K a folder of `train.jsonl.gz` with
`question` and `answer`, of which the answers are supervised; without one, the embedded conversations are read. e4m3 is
simulated, so that it takes no GPU that has it: values are rounded to it and multiplied in float32, and what comes out
is rounded to bfloat16. Two questions are asked of the same conversations and the same frozen base.

By itself: each group of linears gets the inputs and output gradients of the bf16 model, its products are computed with
rounded operands, and compared with the exact products of the weights in `--base`. A relative error is
|result - exact| / |exact| over all values, and of each token's row. Biases are no part of it. Recipes: `fp8_recipes`.

All together: every linear runs with rounded operands, so that errors add up over the layers, as each recipe has it, or
in FP8 in the forward pass only (`forward`). The gradient of an adapter's `up` factor at its start, `dY^T (X down^T)`,
and the loss are compared with those in float32.
"""

import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.models import SMOLLM2
from benchmarks.quality.fp8_recipes import RECIPES, Recipe, Round, exactly, rows, tensor
from benchmarks.speed.real_training import conversations, padded_batches
from lsr_scale import files
from lsr_scale.data import help_desk
from lsr_scale.kernels.fp8 import SMALLEST_NORMAL, power_of_two_scale
from lsr_scale.layers.frozen_linear import dequantize
from lsr_scale.model import load_base, load_tokenizer

GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
RANK = 16  # of the adapter whose gradient is compared


def relative(result: Tensor, exact: Tensor) -> float:
    """Return |result - exact| / |exact| over all values."""
    return float((result - exact).norm() / exact.norm())


def token_errors(result: Tensor, exact: Tensor) -> Tensor:
    """Return each row's relative error; NaN for a row of zeros."""
    return (result - exact).norm(dim=1) / exact.norm(dim=1)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which rows of a group's inputs are tokens, not padding, and each one's conversation, position and text."""

    mask: Tensor
    places: list[tuple[int, int, str]]

    def place(self, index: int) -> dict[str, Any]:
        """Return where a token is, and its text."""
        conversation, position, text = self.places[index]
        return {"conversation": conversation, "position": position, "token": text}

    def spread(self, values: Tensor) -> dict[str, Any]:
        """Return the median over tokens, the worst, and which that is; tokens without a value (NaN) are left out."""
        known = values[~values.isnan()]
        if not len(known):
            return {"median": None, "worst": None}
        worst = int(values.nan_to_num(-1.0).argmax())
        return {"median": float(known.median()), "worst": float(values[worst]), **self.place(worst)}


def describe(x: Tensor, rounded: Tensor, tokens: Tokens) -> dict[str, Any]:
    """Return how far rows reach (largest over root mean square), what underflows, and what rounding costs.

    Args:
        x: `[T, K]`, float32.
        rounded: `rows(x)`.
        tokens: What the rows are.
    """
    peaks = x.abs().amax(1)
    reach = tokens.spread(peaks / x.square().mean(1).sqrt())
    if reach["worst"] is not None:
        worst = next(
            i for i, place in enumerate(tokens.places) if place[:2] == (reach["conversation"], reach["position"])
        )
        reach["channel"] = int(x[worst].abs().argmax())
    scaled = x.abs() / power_of_two_scale(peaks)[:, None]
    nonzero = int((x != 0).sum())
    lost = (x != 0) & (rounded == 0)
    return {
        "largest": float(peaks.max()),
        "reach": reach,
        "underflow": int(((scaled < SMALLEST_NORMAL) & (x != 0)).sum()) / max(1, nonzero),
        "zeroed": int(lost.sum()) / max(1, nonzero),
        "error": relative(rounded, x),
        "token_error": tokens.spread(token_errors(rounded, x)),
    }


class RoundedWeights:
    """Weights that were rounded once, by group and how; kept in bfloat16.

    Which has room for a code times a power of two; the product with another scale it rounds, by 1/16 of e4m3's rounding
    at most.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, Round], Tensor] = {}

    def of(self, name: str, how: Round, weight: Tensor) -> Tensor:
        """Return a group's rounded weight in float32."""
        if (name, how) not in self.kept:
            self.kept[name, how] = how(weight).bfloat16()
        return self.kept[name, how].float()


class Observer:
    """Measures the groups of a model's layers by themselves, as a forward and a backward pass go through them."""

    def __init__(self, model: nn.Module, tokens: Tokens, weights: "RoundedWeights | None" = None) -> None:
        self.tokens = tokens
        self.weights = RoundedWeights() if weights is None else weights
        self.measured: dict[str, dict[str, Any]] = {}
        self.gradients: dict[str, dict[str, Tensor]] = {}
        self.handles = []
        for name, linears in groups(model):
            self.measured[name] = {}
            for short, linear in linears.items():
                self.handles.append(linear.register_forward_hook(self._hook(name, short, linears)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str, short: str, linears: dict[str, nn.Linear]) -> Any:
        def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if short == next(iter(linears)):
                self._inputs(name, inputs[0].detach()[self.tokens.mask].float(), linears)
            output.register_hook(lambda grad: self._gradient(name, short, grad, linears))

        return take

    @torch.no_grad()
    def _inputs(self, name: str, x: Tensor, linears: dict[str, nn.Linear]) -> None:
        weight, parts = matrix(linears)
        exact = x @ weight.t()
        entry = self.measured[name]
        entry["input"] = describe(x, rows(x), self.tokens)
        error = relative(self.weights.of(name, tensor, weight), weight)
        entry["weight"] = {"largest": float(weight.abs().max()), "error": error}
        entry["output"] = {}
        for recipe_name, recipe in RECIPES.items():
            if recipe_name == "e5m2":
                continue  # the same in this direction
            result = (recipe.inputs(x) @ self.weights.of(name, recipe.weights, weight).t()).bfloat16().float()
            entry["output"][recipe_name] = compared(result, exact, self.tokens)
            if recipe_name == "rows":
                of_each = {
                    short: relative(mine, its)
                    for short, mine, its in zip(linears, result.split(parts, 1), exact.split(parts, 1), strict=True)
                }
                entry["output"]["rows"]["linears"] = of_each

    @torch.no_grad()
    def _gradient(self, name: str, short: str, grad: Tensor, linears: dict[str, nn.Linear]) -> None:
        waiting = self.gradients.setdefault(name, {})
        waiting[short] = grad[self.tokens.mask].float()
        if len(waiting) < len(linears):
            return
        grads = self.gradients.pop(name)
        dy = torch.cat([grads[short] for short in linears], 1)
        weight, _ = matrix(linears)
        exact = dy @ weight
        entry = self.measured[name]
        entry["gradient"] = describe(dy, rows(dy), self.tokens)
        entry["input_gradient"] = {
            recipe_name: compared(
                (recipe.gradients(dy) @ self.weights.of(name, recipe.weights, weight)).bfloat16().float(),
                exact,
                self.tokens,
            )
            for recipe_name, recipe in RECIPES.items()
        }


def compared(result: Tensor, exact: Tensor, tokens: Tokens) -> dict[str, Any]:
    """Return the relative error over all values, and of tokens."""
    return {"error": relative(result, exact), "token_error": tokens.spread(token_errors(result, exact))}


def groups(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Linear]]]:
    """Return each group's linears by their last names, as `("12.down", {"down_proj": ...})`, layer by layer."""
    decoder: Any = model.get_decoder()  # pyright: ignore[reportCallIssue]
    for index, layer in enumerate(decoder.layers):
        named = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        for group, shorts in GROUPS.items():
            yield f"{index}.{group}", {short: named[short] for short in shorts}


def matrix(linears: dict[str, nn.Linear]) -> tuple[Tensor, list[int]]:
    """Return a group's weights `[N, K]` in float32, as they are in the quantized base, and how many rows each has."""
    parts = [dequantize(linear, torch.float32) for linear in linears.values()]
    return torch.cat(parts), [len(part) for part in parts]


class _RoundedProduct(torch.autograd.Function):
    """`x W^T` and its input gradient as a recipe has them; the weight is rounded already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, layer: nn.Linear) -> Tensor:
        ctx.weight, ctx.recipe, ctx.layer = weight, recipe, layer
        return (recipe.inputs(x.flatten(0, -2).float()) @ weight.float().t()).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        weight = dequantize(ctx.layer, grad.dtype) if ctx.recipe.gradients is exactly else ctx.weight
        grad_x = ctx.recipe.gradients(grad.flatten(0, -2).float()) @ weight.float()
        return grad_x.view(*grad.shape[:-1], -1).to(grad.dtype), None, None, None


TOGETHER = {
    "bf16": None,
    **{name: RECIPES[name] for name in ("rows", "amax", "amax_all", "blocks")},
    "forward": Recipe(rows, tensor, exactly),
    "float32": None,
}


def all_together(
    model: Any,
    batches: list[dict[str, Tensor]],
    recipe: Recipe | None,
    rounded: RoundedWeights | None = None,
) -> dict[str, Any]:
    """Return each conversation's loss, and for each linear the gradient of an adapter's `up` factor at its start.

    Args:
        model: The base, whose linears compute in their dtype.
        batches: The conversations.
        recipe: How the linears' products are computed instead.
        rounded: Weights of before; more are added.
    """
    gradients: dict[str, Tensor] = {}
    rounded = RoundedWeights() if rounded is None else rounded
    handles = []
    for name, linears in groups(model):
        in_features = next(iter(linears.values())).in_features
        down = torch.randn(RANK, in_features, generator=torch.Generator().manual_seed(in_features))
        weight, parts = matrix(linears)
        weights: Any = [None] * len(parts)
        if recipe:
            weights = rounded.of(name, recipe.weights, weight).bfloat16().split(parts)
        for (short, linear), own in zip(linears.items(), weights, strict=True):
            take = _taker(gradients, f"{name}.{short}", down.to(weight.device), own, recipe)
            handles.append(linear.register_forward_hook(take))
    losses: list[float] = []
    for batch in batches:
        loss, of_each = losses_of(model, batch)
        losses += of_each.tolist()
        loss.backward()
    for handle in handles:
        handle.remove()
    return {"losses": losses, "gradients": gradients}


def _taker(gradients: dict[str, Tensor], key: str, down: Tensor, weight: Tensor | None, recipe: Recipe | None) -> Any:
    """Return a linear's hook, which computes its product as the recipe has it, and adds up `dY^T (X down^T)`."""

    def run(linear: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]
        if weight is not None:
            output = _RoundedProduct.apply(x, weight, recipe, linear)  # pyright: ignore
            output = output if linear.bias is None else output + linear.bias.to(output.dtype)
        xa = (x.detach().float() @ down.t()).flatten(0, -2)

        def take(grad: Tensor) -> None:
            d_up = grad.flatten(0, -2).float().t() @ xa
            gradients[key] = gradients[key] + d_up if key in gradients else d_up

        output.register_hook(take)
        return output

    return run


def losses_of(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean loss per supervised token with its graph, and that of each conversation."""
    inputs = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    chosen = labels >= 0
    each = nn.functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    conversation = torch.arange(len(labels))[:, None].expand_as(labels)[chosen]
    sums = torch.zeros(len(labels)).index_add(0, conversation, each.detach())
    return each.mean(), sums / chosen.sum(1)


def read_conversations(data: Path | None, tokenizer: Any, number: int, longest: int) -> list[tuple[list[int], int]]:
    """Return token ids and prompt lengths of the first conversations that fit, whole."""
    if data is not None:
        read = conversations(data / "train.jsonl.gz", tokenizer, longest + 1)
    else:
        read = []
        for row in help_desk.rows("train"):
            asked, answered = row["messages"][:-1], row["messages"]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            text = tokenizer.apply_chat_template(answered, tokenize=False)
            encoded = [tokenizer(words, add_special_tokens=False).input_ids for words in (text, prompt)]
            read.append((encoded[0], len(encoded[1])))
    return [row for row in read if len(row[0]) <= longest][:number]


def tokens_of(batch: dict[str, Tensor], tokenizer: Any) -> Tokens:
    """Return which positions of a padded batch are tokens, and what they are."""
    mask = batch["attention_mask"].bool()
    places = [(int(i), int(j), tokenizer.decode([int(batch["input_ids"][i, j])])) for i, j in mask.nonzero()]
    return Tokens(mask, places)


def gradient_errors(results: dict[str, dict[str, Any]], keys: list[str]) -> dict[str, float]:
    """Return how far the gradients of `up` of these linears are from those in float32, for each other way."""
    joined = {way: torch.cat([result["gradients"][key].flatten() for key in keys]) for way, result in results.items()}
    exact = joined.pop("float32")
    return {way: relative(gradient, exact) for way, gradient in joined.items()}


def measure(given: Any) -> dict[str, Any]:
    """Return everything about a model: `groups` by name, and `together`."""
    began = time.monotonic()
    say = lambda what: print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)  # noqa: E731
    tokenizer: Any = load_tokenizer(given.model)
    read = read_conversations(given.data, tokenizer, given.conversations, given.longest)
    if not read:
        raise SystemExit(f"--longest {given.longest}: no conversation is so short")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = torch.device(given.device)
    whole, *batches = (
        {key: values.to(device) for key, values in batch.items()}
        for size in (len(read), min(given.rows, len(read)))
        for batch in padded_batches(read, size, pad)
    )

    def load(dtype: str) -> Any:
        options: dict[str, Any] = {"quantization": given.base, "dtype": dtype, "device": device}
        return load_base(given.model, **options).eval()

    model = load("bfloat16")
    tokens = tokens_of(whole, tokenizer)
    say(f"{len(read)} conversations, {len(tokens.places)} tokens; every group by itself")
    rounded = RoundedWeights()
    observer = Observer(model, tokens, rounded)
    loss, _ = losses_of(model, whole)
    loss.backward()
    observer.close()
    del loss
    results = {}
    for way, recipe in TOGETHER.items():
        say(f"all together: {way}")
        if way == "float32":
            del model
            rounded.kept.clear()
            model = load(way)
        results[way] = all_together(model, batches, recipe, rounded)
    names = list(results["float32"]["gradients"])
    for name, entry in observer.measured.items():
        entry["up_gradient"] = gradient_errors(results, [key for key in names if key.startswith(f"{name}.")])
    say("done")
    return {
        "tokens": len(tokens.places),
        "supervised": int((whole["labels"][:, 1:] >= 0).sum()),
        "groups": observer.measured,
        "losses": {way: result["losses"] for way, result in results.items()},
        "up_gradient": gradient_errors(results, names),
        "wall_s": round(time.monotonic() - began, 1),
    }


def of_group(measured: dict[str, Any], group: str) -> list[dict[str, Any]]:
    """Return a group's entries, layer by layer."""
    return [entry for name, entry in measured.items() if name.partition(".")[2] == group]


def percent(value: float | None) -> str:
    """Return a share as percent."""
    return "" if value is None else f"{100 * value:.2f}"


def layer_rows(measured: dict[str, Any]) -> list[list[str]]:
    """Return a table's rows, head first: every group of every layer, by itself and all together."""
    head = ["group", "reach: median", "worst", "token", "channel", "x: underflow", "x", "W", "dY", "Y", "of a token"]
    lines = [[*head, "worst", "dX", "of a token", "worst", *(f"d up: {way}" for way in TOGETHER if way != "float32")]]
    for name, entry in measured.items():
        x, out, back = entry["input"], entry["output"]["rows"], entry["input_gradient"]["rows"]
        reach, gradient = x["reach"], entry["gradient"]
        lines.append(
            [
                *(name, f"{reach['median']:.1f}", f"{reach['worst']:.1f}"),
                *(f"{reach['position']} {reach['token']!r}", str(reach["channel"]), percent(x["underflow"])),
                *(percent(x["error"]), percent(entry["weight"]["error"]), percent(gradient["error"])),
                *(percent(out["error"]), percent(out["token_error"]["median"]), percent(out["token_error"]["worst"])),
                *(percent(back["error"]), percent(back["token_error"]["median"])),
                *(percent(back["token_error"]["worst"]), *map(percent, entry["up_gradient"].values())),
            ]
        )
    return lines


def group_rows(measured: dict[str, Any]) -> list[list[str]]:
    """Return a table's rows, head first: each group and recipe, median and worst of the layers."""
    head = ["group, recipe", "Y: median", "worst layer", "token: median", "worst", "dX: median", "worst layer"]
    lines = [[*head, "token: median", "worst"]]
    for group, recipe in itertools.product(GROUPS, RECIPES):
        cells = []
        for key in ("output", "input_gradient"):
            entries = [entry[key][recipe] for entry in of_group(measured, group) if recipe in entry[key]]
            if not entries:
                cells += [""] * 4
                continue
            errors = [entry["error"] for entry in entries]
            spreads = [entry["token_error"] for entry in entries]
            cells += [percent(statistics.median(errors)), percent(max(errors))]
            cells += [
                percent(statistics.median(s["median"] for s in spreads)),
                percent(max(s["worst"] for s in spreads)),
            ]
        lines.append([f"{group}, {recipe}", *cells])
    return lines


def aligned(lines: list[list[str]]) -> str:
    """Return a table's rows as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def exceeding(measured: dict[str, Any], limit: float) -> list[str]:
    """Return the groups whose outputs or input gradients have a larger relative error than `limit`."""
    return [
        name
        for name, entry in measured.items()
        if max(entry["output"]["rows"]["error"], entry["input_gradient"]["rows"]["error"]) > limit
    ]


def together_rows(measured: dict[str, Any]) -> list[list[str]]:
    """Return a table's rows, head first: what becomes of the loss and of the adapters' gradients, against float32."""
    exact = measured["losses"]["float32"]
    lines = [["all together", "loss", "change", "rms of a conversation", "d up, error"]]
    for way, losses in measured["losses"].items():
        moved = [mine - its for mine, its in zip(losses, exact, strict=True)]
        rms = math.sqrt(statistics.fmean(value * value for value in moved))
        cells = [f"{statistics.fmean(losses):.4f}", f"{statistics.fmean(moved):+.4f}", f"{rms:.4f}"]
        lines.append([way, *cells, percent(measured["up_gradient"].get(way))])
    return lines


def plot(measured: dict[str, Any], path: Path, title: str) -> None:
    """Draw errors and reach over the layers, a panel for each group."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, len(GROUPS), figsize=(14, 11), sharex=True, sharey="row", squeeze=False)
    styles = {
        "rows": ("C0", "-"),
        "amax": ("C4", "-"),
        "amax_all": ("C5", "--"),
        "blocks": ("C2", "-"),
        "tensor": ("C1", "--"),
        "e5m2": ("C3", ":"),
        "bf16": ("C7", "-"),
    }
    for column, group in enumerate(GROUPS):
        entries = of_group(measured, group)
        layers = range(len(entries))
        for row, key in enumerate(("output", "input_gradient")):
            axis = axes[row][column]
            for recipe, (color, line) in styles.items():
                if recipe in entries[0][key]:
                    errors = [100 * entry[key][recipe]["error"] for entry in entries]
                    axis.plot(layers, errors, line, color=color, label=recipe, linewidth=1.3)
            worst = [100 * entry[key]["rows"]["token_error"]["worst"] for entry in entries]
            axis.plot(layers, worst, ".", color="C0", label="rows, worst token", markersize=4)
            axis.set_yscale("log")
        axis = axes[2][column]
        for tokens, color, label in (("input", "C0", "x"), ("gradient", "C1", "dY")):
            reaches = [entry[tokens]["reach"] for entry in entries]
            axis.plot(layers, [reach["worst"] for reach in reaches], color=color, label=f"{label}, worst token")
            axis.plot(layers, [reach["median"] for reach in reaches], "--", color=color, label=f"{label}, median token")
        axis.set_yscale("log")
        axis = axes[3][column]
        for way, (color, line) in {**styles, "forward": ("black", ":")}.items():
            if way in entries[0]["up_gradient"]:
                errors = [100 * entry["up_gradient"][way] for entry in entries]
                axis.plot(layers, errors, line, color=color, label=way, linewidth=1.3)
        axis.set_yscale("log")
        axis.set_xlabel("layer")
        axes[0][column].set_title(group, fontsize=11)
    for axis in axes.flat:
        axis.grid(alpha=0.3, which="both")
    labels = ("error of Y, %", "error of dX, %", "largest / rms of a row", "all together: error of d up, %")
    for row, label in enumerate(labels):
        axes[row][0].set_ylabel(label)
        axes[row][-1].legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Measure a model, write the JSON and the picture, print the tables."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="Transformers folder of a real model with a chat template, or builtin: name")
    add("--data", type=Path, help="folder of train.jsonl.gz: question, answer; the embedded conversations by default")
    add("--base", default="nf4", choices=["nf4", "fp4", "int8", "none"])
    add("--conversations", type=int, default=12)
    add("--longest", type=int, default=256, help="tokens; longer conversations are left out")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--rows", type=int, default=4, help="conversations in a forward pass, all together")
    add("--out", type=new_file, required=True, help="the JSON; a PNG goes beside it")
    given = parser.parse_args(arguments)
    model = Path(given.model).name.removeprefix("builtin:")
    name = model if model != "model" else Path(given.model).resolve().parent.name
    measured = measure(given)
    shown = [word if not Path(word).exists() else Path(word).name for word in arguments or sys.argv[1:]]
    kept = {key: value for key, value in vars(given).items() if key not in ("out", "model", "data")}
    data = given.data.name if given.data else "builtin:chat"
    content = {
        "env": files.environment(),
        "command": recorded("quality.fp8_layers", shown, given.out),
        "config": {**kept, "model": name, "data": data},
        **measured,
    }
    files.write_json(given.out, content)
    plot(
        measured["groups"],
        given.out.with_suffix(".png"),
        f"{name}, {given.base} base, {measured['tokens']} tokens of {data}",
    )
    print(aligned(layer_rows(measured["groups"])), aligned(group_rows(measured["groups"])), sep="\n\n")
    for limit in (0.05, 0.1):
        print(f"more than {limit:.0%}: {', '.join(exceeding(measured['groups'], limit)) or 'none'}")
    print(aligned(together_rows(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
