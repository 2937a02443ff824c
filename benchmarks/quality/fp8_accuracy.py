"""Does training with products in FP8 or int8 lose accuracy? Real models, LSR-Adapt and LoRA, each paired with bf16.

    python -m benchmarks.quality.fp8_accuracy --model FOLDER --data DATA --out benchmarks/results/fp8_accuracy
    python -m benchmarks.quality.fp8_accuracy --table --out benchmarks/results/fp8_accuracy

FOLDER is a Transformers folder or a `builtin:` name, DATA a folder of `<task>/{train,test}.jsonl.gz`. An adapter on
every linear of an NF4 base is trained on ARC-E, ARC-C and OpenBookQA: whole examples packed to `--tokens` a step, the
answers supervised, AdamW, its rate falling linearly, steps replayed as `lsr-scale train` does. A seed has its own first
factors and its own order of examples, the same in bf16, FP8 and int8. All of a process's trainings share one base.

Every adapter is scored in bf16, as fused layers compute outside of training, so that what is compared is what was
learned: an example's loss is the negative log-likelihood of the right choice's tokens, which is what is trained, and it
is right if that choice is the likeliest. Differences are those of FP8 or int8 from bf16 on the same examples. Intervals
of a seed are those of `lsr_scale.scoring.paired`; over all seeds examples are resampled, each with its answers in all
seeds, since these are not independent. What another seed changes in bf16 is shown beside it. A line is added to
`trials.jsonl` after each training and its scores; what it has is not done again. Several models can be trained side by
side.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from benchmarks.command_line import recorded, script_parser
from benchmarks.models import LINEARS, SMOLLM2
from benchmarks.quality import trials
from benchmarks.quality.commonsense_data import JOINT
from benchmarks.speed.providers import EIGHT_BIT
from lsr_scale import files
from lsr_scale.adapters import peft_config
from lsr_scale.data.sources import load_rows
from lsr_scale.data.tasks import Example, examples
from lsr_scale.fused import fuse, unfuse
from lsr_scale.fused.cuda_graphs import StepGraphs, static_batch, static_loss
from lsr_scale.model import load_base, load_tokenizer
from lsr_scale.scoring.paired import Paired, paired_accuracy, paired_bootstrap
from lsr_scale.scoring.scorer import encode_pairs, score

TASKS = JOINT[:3]
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lsr": ({"rank": 16, "alpha": 32.0, "separation_rank": 16}, 2e-3),
    "lora": ({"rank": 16, "alpha": 32.0}, 5e-4),
}
LONGEST = 256  # tokens of an example; longer ones are left out
WARM_UP = 0.06  # of all steps
MAX_NORM = 1.0

Encoded = tuple[list[int], list[int]]


def read(data: Path, split: str, limit: int | None) -> dict[str, list[Example]]:
    """Return the examples of each task's split, the first so many."""
    return {task: examples(load_rows(str(data / task), split=split, limit=limit)) for task in TASKS}


def encoded(tokenizer: Any, rows: Sequence[Example]) -> list[Encoded]:
    """Return the tokens of each example's context and of its right choice, the end token behind it."""
    pairs = [(row.contexts[row.answer], row.continuations[row.answer]) for row in rows]
    return [(context, target + [tokenizer.eos_token_id]) for context, target in encode_pairs(tokenizer, pairs)]


def packed(rows: Sequence[Encoded], tokens: int, epochs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Return batches of whole examples one after another, up to so many tokens each, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for _ in range(epochs):
        for index in torch.randperm(len(rows), generator=generator).tolist():
            context, target = rows[index]
            size = len(context) + len(target)
            if size > LONGEST:
                continue
            if len(ids) + size > tokens:
                tensors = (torch.tensor(values)[None] for values in (ids, labels, positions))
                yield static_batch(*tensors, longest=LONGEST)
                ids, labels, positions = [], [], []
            ids += context + target
            labels += [-100] * len(context) + target
            positions += range(size)


class Trainer:
    """A base with an adapter, trained again and again from the first factors of a seed."""

    def __init__(self, base: Any, method: str, seeds: int) -> None:
        from peft import get_peft_model

        options, self.rate = METHODS[method]
        self.starts: list[list[Tensor]] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            config = peft_config(method, {"target_modules": LINEARS, **options}, "CAUSAL_LM")
            self.model: Any = get_peft_model(base, config)
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.starts.append([p.detach().clone() for p in self.parameters])
            if seed < seeds - 1:
                self.model.unload()

    def fuse(self, compute: str) -> str:
        """Compute the base's products in "bf16", "fp8" or "int8" from here on; return what runs how.

        Raises:
            RuntimeError: if some fall back: they would be compared with themselves.
        """
        unfuse(self.model)
        report = fuse(self.model, compute=compute)  # pyright: ignore[reportArgumentType]
        if report.unfused or report.not_eight_bit:
            raise RuntimeError(f"compute {compute}: {report}")
        self.graphs = StepGraphs(self.model.get_base_model()) if self.parameters[0].is_cuda else None
        return str(report)

    def train(self, seed: int, batches: Sequence[dict[str, Any]]) -> list[float]:
        """Train from a seed's first factors, in place: graphs read them there. Return every step's loss."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.starts[seed], strict=True):
                parameter.copy_(value)
        self.model.train()
        device = self.parameters[0].device
        optimizer = torch.optim.AdamW(self.parameters, lr=self.rate, weight_decay=0.0, fused=device.type == "cuda")
        warm_up = max(1, round(WARM_UP * len(batches)))
        losses = []
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min((step + 1) / warm_up, (len(batches) - step) / len(batches))
            count = float(batch["weights"].sum())
            moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
            if self.graphs is None:
                loss = static_loss(self.model.get_base_model(), moved) / count
                loss.backward()
            else:
                loss, gradients = self.graphs.replay(moved, count)
                self.graphs.add_to_grads(gradients)
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).tolist()


def scored(model: Any, tokenizer: Any, test: dict[str, list[Example]], batch_tokens: int) -> dict[str, Any]:
    """Return, by task, whether each example is right and the loss of its right choice."""
    everything = [row for rows in test.values() for row in rows]
    predictions = iter(score(model, tokenizer, everything, batch_tokens=batch_tokens).predictions)
    of_tasks = {}
    for task, rows in test.items():
        mine = list(itertools.islice(predictions, len(rows)))
        of_tasks[task] = {
            "right": "".join(str(int(p.choice == p.answer)) for p in mine),
            "losses": [round(-p.log_likelihoods[p.answer], 3) for p in mine],
        }
    return of_tasks


def run(given: Any) -> None:
    """Do all trainings of a model that are not done yet."""
    began = time.monotonic()
    say = lambda what: print(f"{time.monotonic() - began:6.1f} s  {name_of(given.model)}: {what}", flush=True)  # noqa: E731
    model = name_of(given.model)
    done = trials.load(given.out)
    tokenizer: Any = load_tokenizer(given.model)
    test = read(given.data, "test", given.limit)
    train = read(given.data, "train", given.limit)
    rows = encoded(tokenizer, [row for task in train.values() for row in task])
    orders = {seed: list(packed(rows, given.tokens, given.epochs, seed)) for seed in range(given.seeds)}
    say(f"{len(rows)} examples, {len(orders[0])} steps; {sum(map(len, test.values()))} to score")
    base = load_base(given.model, quantization=given.base, dtype="bfloat16", device=torch.device(given.device))
    about = {
        "model": model,
        **{key: vars(given)[key] for key in ("base", "tokens", "epochs", "limit")},
        "command": recorded("quality.fp8_accuracy", given.shown),
        "env": files.environment(),
    }
    if f"{model}-base" not in done:
        trials.add(given.out, f"{model}-base", {**about, "tasks": scored(base, tokenizer, test, given.batch_tokens)})
        say("the base is scored")
    for method in given.methods:
        missing = {
            compute: [s for s in range(given.seeds) if f"{model}-{method}-{compute}-seed{s}" not in done]
            for compute in dict.fromkeys(("bf16", *given.computes))
        }
        if not any(missing.values()):
            continue
        trainer = Trainer(base, method, given.seeds)
        for compute, seeds in missing.items():
            if not seeds:
                continue
            report = trainer.fuse(compute)
            say(f"{method} {compute}: {report}")
            for seed in seeds:
                start = time.monotonic()
                losses = trainer.train(seed, orders[seed])
                seconds = round(time.monotonic() - start, 1)
                result = {
                    **about,
                    **{"method": method, "options": METHODS[method][0], "learning_rate": METHODS[method][1]},
                    **{"compute": compute, "seed": seed, "steps": len(losses), "train_s": seconds, "fused": report},
                    "adapter_parameters": sum(p.numel() for p in trainer.parameters),
                    "curve": [round(loss, 4) for loss in losses],
                    "tasks": scored(trainer.model, tokenizer, test, given.batch_tokens),
                }
                trials.add(given.out, f"{model}-{method}-{compute}-seed{seed}", result)
                end = statistics.fmean(losses[-20:])
                share = accuracy(result)
                say(f"{method} {compute} seed {seed}: {seconds} s, last losses {end:.4f}, accuracy {share:.4f}")
        unfuse(trainer.model)
        base = trainer.model.unload()


def name_of(model: str) -> str:
    """Return what a model is called in the results."""
    return Path(model).name.removeprefix("builtin:")


def right(result: dict[str, Any]) -> list[bool]:
    """Return whether each example of all tasks is right."""
    return [bit == "1" for task in result["tasks"].values() for bit in task["right"]]


def losses_of(result: dict[str, Any]) -> list[float]:
    """Return the loss of each example of all tasks."""
    return [loss for task in result["tasks"].values() for loss in task["losses"]]


def accuracy(result: dict[str, Any]) -> float:
    """Return the share of examples of all tasks that are right."""
    return statistics.fmean(right(result))


def resampled(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Paired:
    """Compare means over seeds and examples, resampling examples: `[seeds][examples]` of each compute."""
    one, two = (np.asarray(values, dtype=float).mean(0) for values in (first, second))
    return paired_bootstrap(lambda index: (float(one[index].mean()), float(two[index].mean())), len(one))


Results = dict[int, dict[str, Any]]


def by_compute(done: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, Results, Results]]:
    """Return each model, method and compute with its results in bf16 and in that by seed, of the seeds that both have.

    FP8 and int8 of a model and method come one after the other.
    """
    kinds = dict.fromkeys((r["model"], r["method"]) for r in done.values() if "method" in r)
    for (model, method), compute in itertools.product(kinds, EIGHT_BIT):
        mine = [r for r in done.values() if (r["model"], r.get("method")) == (model, method)]
        first, second = ({r["seed"]: r for r in mine if r["compute"] == each} for each in ("bf16", compute))
        seeds = sorted(first.keys() & second.keys())
        if seeds:
            yield model, method, compute, {seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds}


def summary(done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons: for each model, method and `compute` one of every seed, and one of all (`seed` None).

    Each has the mean `accuracy` and `loss` in bf16 and in that, the `Paired` of accuracies (`right`) and of losses
    (`losses`); that of all seeds also what other seeds change in bf16: the mean number of answers that two of them do
    not share (`between_seeds`), and that the two computes do not (`between_computes`).
    """
    rows = []
    for model, method, compute, first, second in by_compute(done):
        about = {"model": model, "method": method, "compute": compute}
        for seed, mine in first.items():
            theirs = second[seed]
            pair = {
                "right": paired_accuracy(right(mine), right(theirs)),
                "losses": resampled([losses_of(mine)], [losses_of(theirs)]),
            }
            rows.append({**about, "seed": seed, **means([mine], [theirs]), **pair})
        one, two = list(first.values()), list(second.values())
        differing = lambda a, b: sum(x != y for x, y in zip(right(a), right(b), strict=True))  # noqa: E731
        seeds = [differing(a, b) for a, b in itertools.combinations(one, 2)]
        rows.append(
            {
                **{**about, "seed": None, **means(one, two)},
                "right": resampled([right(r) for r in one], [right(r) for r in two]),
                "losses": resampled([losses_of(r) for r in one], [losses_of(r) for r in two]),
                "between_seeds": statistics.fmean(seeds) if seeds else None,
                "between_computes": statistics.fmean(differing(a, b) for a, b in zip(one, two, strict=True)),
            }
        )
    return rows


def means(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean accuracy and loss of the results in bf16, and of those beside them."""
    return {
        "accuracy": [statistics.fmean(map(accuracy, results)) for results in (first, second)],
        "loss": [statistics.fmean(statistics.fmean(losses_of(r)) for r in results) for results in (first, second)],
    }


def table(done: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the comparisons as a table's rows, head first."""
    head = ["model", "method", "compute", "seed", "accuracy: base", "bf16", "8 bits", "change, points", "95 %"]
    head += ["gained, lost", "p", "loss: bf16", "8 bits", "change", "95 %"]
    lines = [[*head, "answers that differ: 8 bits", "another seed"]]
    for row in summary(done):
        base = done.get(f"{row['model']}-base")
        points, losses = row["right"], row["losses"]
        between = [row.get("between_computes", points.gained), row.get("between_seeds")]
        between[0] = points.gained + points.lost if row["seed"] is not None else between[0]
        lines.append(
            [
                *(row["model"], row["method"], row["compute"], "all" if row["seed"] is None else str(row["seed"])),
                f"{100 * accuracy(base):.2f}" if base else "",
                *(f"{100 * share:.2f}" for share in row["accuracy"]),
                f"{100 * points.difference:+.2f}",
                f"{100 * points.low:+.2f} to {100 * points.high:+.2f}",
                "" if points.p is None else f"{points.gained}, {points.lost}",
                "" if points.p is None else f"{points.p:.2f}",
                *(f"{loss:.4f}" for loss in row["loss"]),
                f"{losses.difference:+.4f}",
                f"{losses.low:+.4f} to {losses.high:+.4f}",
                *("" if value is None else f"{value:.0f}" for value in between),
            ]
        )
    return lines


def plot(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the paired differences with their intervals: of each seed, and of all; accuracy beside loss."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summary(done)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.4 + 0.3 * len(rows)), sharey=True)
    for place, row in enumerate(rows):
        for axis, key, factor in ((axes[0], "right", 100), (axes[1], "losses", 1)):
            pair, whole = row[key], row["seed"] is None
            middle = factor * pair.difference
            ends = [[middle - factor * pair.low], [factor * pair.high - middle]]
            color = f"C{EIGHT_BIT.index(row['compute'])}"
            look = {"color": color if whole else "C7", "fmt": "D" if whole else "o", "capsize": 3, "markersize": 5}
            axis.errorbar([middle], [place], xerr=ends, **look)
    names = [
        f"{r['model']}, {r['method']}, {r['compute']}, {'all seeds' if r['seed'] is None else f'''seed {r['seed']}'''}"
        for r in rows
    ]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("accuracy, less that of bf16, points")
    axes[1].set_xlabel("loss of the right choice, less that of bf16, nats")
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle("Trained with products in 8 bits and in bf16, scored alike; 95 % intervals", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Train and score what is missing, or print the table and draw the plot of what is there."""
    parser = script_parser(__doc__)
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="Transformers folder of a real model, or builtin: name")
    add("--data", type=Path, help="folder of <task>/{train,test}.jsonl.gz")
    add("--base", default="nf4", choices=["nf4", "fp4", "int8", "none"])
    add("--methods", type=listed, default=list(METHODS), help=f"of {', '.join(METHODS)}; comma between")
    help_text = f"of {', '.join(EIGHT_BIT)}, comma between; each is paired with bf16"
    add("--computes", type=listed, default=list(EIGHT_BIT), help=help_text)
    add("--seeds", type=int, default=3)
    add("--tokens", type=int, default=4096, help="at most, of a step")
    add("--epochs", type=int, default=3)
    add("--batch-tokens", type=int, default=16384, help="of a forward pass when scoring")
    add("--limit", type=int, help="rows of each file: is it wired up?")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--table", action="store_true", help="train nothing; print the table, draw the plot")
    add("--out", type=Path, required=True, help="folder of trials.jsonl")
    given = parser.parse_args(arguments)
    for name, known in (("methods", METHODS), ("computes", ("bf16", *EIGHT_BIT))):
        for each in getattr(given, name):
            if each not in known:
                parser.error(f"--{name}: there is no {each!r}, but {', '.join(known)}")
    words = arguments or sys.argv[1:]
    given.shown = [Path(word).name if word.startswith(("/", "~", ".")) else word for word in words]
    if not given.table:
        if given.data is None:
            parser.error("--data is needed")
        run(given)
        return 0
    done = trials.load(given.out)
    plot(done, given.out / "differences.png")
    lines = table(done)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
