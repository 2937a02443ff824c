"""Which initialization lets LSR-Adapt train at one learning rate for any rank and separation rank? A sweep on SmolLM2.

LSR's update is a product of four factors; under Adam each entry moves by about the learning rate a step, whatever its
neighbours' size, so the size at which a factor starts decides how fast the product moves. The sweep varies that size
(`gain`, on the left output factor, whose right partner starts at zero, and `tilt`, the imbalance of the two input
factors), the scaling, rank, separation rank and learning rate, with LoRA beside it, and records the loss and the
accuracy on held-out training rows (10 % by hash; no test row is read).

    python -m benchmarks.quality.parametrization --data DATA_FOLDER --out benchmarks/results/parametrization/NAME.json

Each run is captured in a CUDA graph, with the modules of one shape stacked, so that a run of a few hundred steps takes
seconds. The arithmetic is the library's: `Lsr.init_parameters` and `Lsr.materialize`.
"""

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command_line import new_file, script_parser
from benchmarks.models import LINEARS, SMOLLM2
from lsr_scale.adapters.methods.kron_lora import KronLora, KronLoraConfig
from lsr_scale.adapters.methods.lsr import Lsr, LsrConfig
from lsr_scale.data.sources import load_rows
from lsr_scale.data.tasks import examples
from lsr_scale.model.builtin import ensure_converted
from lsr_scale.scoring.scorer import encode_pairs

TASKS = ("arc_easy", "arc_challenge", "openbookqa")
BATCH, LENGTH = 32, 80


class PairedLinear(nn.Linear):
    """A frozen linear layer plus a (down, up) pair that someone else sets before every forward."""

    pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T`, plus the pair's update if one is set."""
        y = functional.linear(x, self.weight)
        if self.pair is None:
            return y
        return y + functional.linear(functional.linear(x, self.pair[0]), self.pair[1])


def encoded(tokenizer: Any, data: Path, tasks: Sequence[str] = TASKS, length: int = LENGTH) -> tuple[list, list[tuple]]:
    """Return training pairs (ids, first supervised index) and, per held-out question, all choices with the answer.

    What is longer than `length` tokens loses its beginning.
    """
    train, held_out = [], []
    for task in tasks:
        for example in examples(load_rows(str(data / task), split="train", task=task)):
            pairs = encode_pairs(tokenizer, list(zip(example.contexts, example.continuations, strict=True)))
            pairs = [((c + t)[-length:], max(1, min(len(c), length - len(t)))) for c, t in pairs]
            digest = int(hashlib.sha1((task + example.contexts[0]).encode()).hexdigest(), 16)
            if digest % 10 == 0:
                held_out.append((pairs, example.answer, example.normalizers))
            else:
                ids, start = pairs[example.answer]
                train.append(((ids + [tokenizer.eos_token_id])[-length:], start))
    return train, held_out


def padded(pairs: list, device: torch.device | str, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Return ids and labels (-100 where nothing is supervised), right-padded to `length` tokens."""
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full((len(pairs), length), -100)
    for row, (tokens, start) in enumerate(pairs):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return ids.to(device), labels.to(device)


class Trainee:
    """The model with stacked factors: one materialization per shape, one captured step."""

    length = LENGTH  # tokens of a row

    def __init__(self, model: nn.Module, setting: dict[str, Any], seed: int) -> None:
        self.model = model
        self.groups: list[tuple[list[PairedLinear], dict[str, Tensor], Any, float]] = []
        torch.manual_seed(seed)
        by_shape: dict[tuple[int, int], list[PairedLinear]] = {}
        for module in model.modules():
            if isinstance(module, PairedLinear):
                by_shape.setdefault((module.in_features, module.out_features), []).append(module)
        for (in_features, out_features), modules in by_shape.items():
            drawn = [self._draw(in_features, out_features, setting) for _ in modules]
            stacked = {k: torch.stack([d[0][k] for d in drawn]).cuda().requires_grad_() for k in drawn[0][0]}
            self.groups.append((modules, stacked, drawn[0][1], drawn[0][2]))
        self.parameters = [p for _, stacked, _, _ in self.groups for p in stacked.values()]
        self.rate_ratios = [1.0] * len(self.parameters)
        self.num_parameters = sum(p.numel() for p in self.parameters)

    @staticmethod
    def _draw(in_features: int, out_features: int, setting: dict[str, Any]) -> tuple[dict, Any, float]:
        rank = setting["rank"]
        if setting["method"] == "lora":
            down = torch.empty(rank, in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            return {"down": down, "up": torch.zeros(out_features, rank)}, None, setting["alpha"] / rank
        if setting["method"] == "kron_lora":
            method, config = KronLora, KronLoraConfig(rank=rank, left_out=setting["left_out"], alpha=setting["alpha"])
        else:
            config = LsrConfig(rank=rank, separation_rank=setting["separation_rank"], alpha=setting["alpha"])
            method = Lsr
        params = {k: torch.empty(s) for k, s in method.parameter_shapes(in_features, out_features, config).items()}
        method.init_parameters(params, config)
        if method is Lsr:
            terms = setting["separation_rank"]
            fan = params["up_left"].shape[1] * params["up_left"].shape[2]
            params["up_left"].normal_(0.0, terms**-0.5 * setting["gain"] * (fan / terms) ** setting["power"])
            params["down_left"].mul_(setting["tilt"])
            params["down_right"].div_(setting["tilt"])
        return params, method, config.scaling

    def set_pairs(self) -> None:
        """Materialize every group's factors and hand each layer its pair."""
        for modules, stacked, method, scaling in self.groups:
            down, up = (stacked["down"], stacked["up"]) if method is None else method.materialize(stacked)
            downs, ups = down.bfloat16().unbind(), (up * scaling).bfloat16().unbind()
            for module, down_of_it, up_of_it in zip(modules, downs, ups, strict=True):
                module.pair = down_of_it, up_of_it

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of each row's supervised tokens."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        # flattened: with the classes in a middle dimension the loss is several times slower
        each = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return each.view(labels.shape[0], -1).sum(-1)


class _Eager:
    """Stands for a graph on a CPU."""

    def __init__(self, function: Callable[..., Tensor], static: tuple[Tensor, ...]) -> None:
        self.function, self.static = function, static
        self.out = function(*static)

    def replay(self) -> None:
        self.out.copy_(self.function(*self.static))


def captured(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """Warm `function` up on a side stream and capture it."""
    static = tuple(value.clone() for value in inputs)
    if not inputs[0].is_cuda:
        eager = _Eager(function, static)
        return eager, static, eager.out
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)
    return graph, static, out


def run(
    trainee: "Trainee",
    setting: dict[str, Any],
    train: list,
    held_out: list,
    epochs: float,
    seed: int,
    batch: int = BATCH,
) -> dict[str, Any]:
    """Train one setting and evaluate it."""
    started = time.perf_counter()
    device = trainee.parameters[0].device
    on_gpu = device.type == "cuda"
    rates = {ratio: torch.tensor(0.0, device=device) for ratio in set(trainee.rate_ratios)}
    pairs = list(zip(trainee.parameters, trainee.rate_ratios, strict=True))
    groups = [{"params": [p for p, r in pairs if r == ratio], "lr": rate} for ratio, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, capturable=on_gpu, fused=on_gpu)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        trainee.set_pairs()
        loss = trainee.losses(ids, labels).sum() / (labels[:, 1:] != -100).sum()
        for parameter in trainee.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainee.parameters, 1.0, foreach=True)
        optimizer.step()
        return torch.stack([loss.detach(), norm])

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = int(len(train) * epochs) // batch
    stream = list(itertools.islice(itertools.cycle(order), steps * batch))
    ids, labels = padded([train[i] for i in stream], device, trainee.length)
    backup = [p.detach().clone() for p in trainee.parameters]
    graph, (static_ids, static_labels), out = captured(step, ids[:batch], labels[:batch])
    with torch.no_grad():
        for parameter, value in zip(trainee.parameters, backup, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    history = []
    warmup = max(1, steps // 20)
    for index in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, index - warmup) / max(1, steps - warmup)))
        for ratio, rate in rates.items():
            rate.fill_(ratio * setting["lr"] * min(1.0, (index + 1) / warmup) * cosine)
        rows = slice(index * batch, (index + 1) * batch)
        static_ids.copy_(ids[rows])
        static_labels.copy_(labels[rows])
        graph.replay()
        history.append(out.clone())
    losses = torch.stack(history)[:, 0].cpu()
    del graph
    scores = evaluate(trainee, held_out)
    return {
        **setting,
        "seed": seed,
        "steps": steps,
        "trainable_parameters": trainee.num_parameters,
        "train_loss_last_fifth": losses[-steps // 5 :].mean().item(),
        **scores,
        "wall_s": time.perf_counter() - started,
    }


def evaluate(trainee: Trainee, held_out: list) -> dict[str, float]:
    """Return the held-out answers' mean loss per token and the accuracies."""
    with torch.no_grad():
        trainee.set_pairs()
        rows = [pair for pairs, _, _ in held_out for pair in pairs]
        rows += [rows[-1]] * (-len(rows) % 128)
        ids, labels = padded(rows, next(trainee.model.parameters()).device, trainee.length)
        graph, (static_ids, static_labels), out = captured(trainee.losses, ids[:128], labels[:128])
        batch_losses = []
        for index in range(0, len(rows), 128):
            static_ids.copy_(ids[index : index + 128])
            static_labels.copy_(labels[index : index + 128])
            graph.replay()
            batch_losses.append(out.clone())
        nll = torch.cat(batch_losses).cpu()
        tokens = (labels[:, 1:] != -100).sum(-1).cpu()
    first, right, right_norm, right_nll, right_tokens = 0, 0, 0, 0.0, 0
    for pairs, answer, normalizers in held_out:
        own = nll[first : first + len(pairs)]
        right += int(own.argmin()) == answer
        right_norm += int((own / torch.tensor(normalizers)).argmin()) == answer
        right_nll += own[answer].item()
        right_tokens += int(tokens[first + answer])
        first += len(pairs)
    n = len(held_out)
    return {
        "held_out_loss": right_nll / right_tokens,
        "held_out_accuracy": right / n,
        "held_out_accuracy_norm": right_norm / n,
        "held_out_rows": n,
    }


def settings(stage: str) -> list[dict[str, Any]]:
    """Return the grid of a stage of the sweep."""
    lsr = {"method": "lsr", "gain": 1.0, "power": 0.0, "tilt": 1.0}
    sizes = [(4, 16), (16, 4), (16, 16), (16, 48)]
    grid: list[dict[str, Any]] = []
    if stage == "first":
        grid += [
            {"method": "lora", "rank": r, "alpha": 2.0 * r, "lr": lr}
            for r, lrs in ((8, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)), (2, (1e-3, 2e-3, 4e-3, 8e-3)))
            for lr in lrs
        ]
        for lr in (2e-3, 4e-3, 8e-3, 1e-3):
            grid += [
                {**lsr, "power": power, "rank": r, "separation_rank": s, "alpha": 2.0 * r, "lr": lr}
                for power in (0.0, 0.25, 0.5)
                for r, s in sizes
            ]
    return grid


def main() -> None:
    """Run a stage and write its JSON."""
    parser = script_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=new_file, required=True, help="the JSON to write; must not exist yet")
    parser.add_argument("--stage", default="first")
    parser.add_argument("--settings", type=Path, help="a JSON list of settings instead of a stage's grid")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = ensure_converted(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.cuda()
    model.eval().requires_grad_(False)
    train, held_out = encoded(tokenizer, args.data)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in LINEARS:
            module.__class__ = PairedLinear
    grid = json.loads(args.settings.read_text()) if args.settings else settings(args.stage)
    rows = []
    empty = Trainee(model, {"method": "lora", "rank": 1, "alpha": 0.0}, 0)
    rows.append({"method": "zero_shot", **evaluate(empty, held_out)})
    print(json.dumps(rows[-1]), flush=True)
    for setting in grid:
        try:
            rows.append(
                {
                    "status": "ok",
                    **run(Trainee(model, setting, args.seed), setting, train, held_out, args.epochs, args.seed),
                }
            )
        except RuntimeError as error:
            rows.append({"status": "error", "error": str(error)[:200], **setting})
        short = {k: round(v, 5) if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(json.dumps(short), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        env = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        config = {"epochs": args.epochs, "seed": args.seed, "batch": BATCH, "length": LENGTH, "train_rows": len(train)}
        args.out.write_text(json.dumps({"env": env, "config": config, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
