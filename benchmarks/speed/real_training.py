"""A real model fine-tuned by this library, by Unsloth and by PEFT on the same rows: do the losses agree, who is faster?

    python -m benchmarks.speed.real_training --model FOLDER --data GSM8K \\
        --out benchmarks/results/real_training/NAME.json

FOLDER is a Transformers folder with a chat template, GSM8K a folder of `train.jsonl.gz` and `test.jsonl.gz` with
`question` and `answer`. Every provider is given the same batches in the same order, only the answers supervised; the
same frozen base, the same first LoRA factors, and the same AdamW. Rows are `packed`, conversations one after another
in blocks of `--length` tokens, so that everyone computes the same and nothing is padding; or `padded`: conversations of
odd lengths, padded to the longest of their batch, tokens counted without the padding. A step is forward, loss, backward
and optimizer in a bare loop; `*_graphs` replay it as `lsr-scale train` does. Each provider lives in a process of its
own, and they take turns of `--turn` steps, so that a busy machine is everyone's.

The held-out loss is over the same rows for everyone, each with its own forward pass. `loss_rms_from_float32` is the
root mean square, over the steps, of the difference from PEFT's LoRA computed in float32 on the same weights: how far
bfloat16 moves a curve. `loss_rms_from_bf16` and `loss_mean_from_bf16_last_50` compare each `X_fp8` and
`X_int8` with `X` where both train: how far 8 bits move a curve, and whether it drifts. Where the data are over, they
come again in another order.
"""

import gzip
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command_line import new_file, recorded, script_parser
from benchmarks.speed.providers import PROVIDERS, bf16_of, compute_of, find_provider
from benchmarks.speed.workers import Worker, last_line, say, start_all

# nothing heavy is imported here: each worker imports this file first, and Unsloth wants to come before Transformers
DEFAULT_PROVIDERS = [
    *("lora_graphs", "lora", "unsloth_lora", "peft_lora_liger", "peft_lora", "peft_lora_float32"),
    *("lsr_graphs", "kron_lora_graphs"),
    *("lora_graphs_fp8", "lsr_graphs_fp8", "lora_graphs_int8", "lsr_graphs_int8"),
]
REFERENCE = "peft_lora_float32"
# LoRA's rate is the one of Unsloth's and PEFT's examples; a Kronecker factor needs a larger one
RATES = {"lsr": 2e-3, "kron_lora": 1e-3}
LORA_RATE = 2e-4
WARM_UP = 5  # steps of a turn whose times do not count: compilation, the allocator


def rate_of(provider: str) -> float:
    """Return a provider's learning rate: its method's."""
    return RATES.get(bf16_of(provider).removesuffix("_graphs"), LORA_RATE)


class Training:
    """One provider, trained over several turns; see `workers.work`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.provider = find_provider(config["provider"])(config)
        self.config = config
        self.step = 0

    def build(self) -> None:
        """Load the base, adapt it, and give LoRA's factors the start that they have everywhere."""
        import torch

        from benchmarks.speed.providers.base import start_alike

        self.provider.build()
        if self.provider.mode is None:
            self.provider.checkpoint(self.config["mode"])
            self.provider.mode = self.config["mode"]
        named = sorted((n, p) for n, p in self.provider.model.named_parameters() if p.requires_grad)
        start_alike(self.provider.model, self.config["seed"])
        data = torch.load(self.config["batches"], weights_only=True)
        self.train, self.held_out = data["train"], data["held_out"]
        rate = rate_of(self.config["provider"])
        on_gpu = self.provider.device.type == "cuda"
        self.optimizer = torch.optim.AdamW([p for _, p in named], lr=rate, weight_decay=0.0, fused=on_gpu)

    def free_memory(self) -> None:
        """Give what the allocator has cached to the other processes; what is trained stays, and its graphs."""
        import torch

        torch.cuda.empty_cache()

    def loss_with_gradients(self, batch: dict[str, Any]) -> Any:
        """Return a batch's mean loss per supervised token; the parameters have its gradients then."""
        if self.provider.replays:
            return self.provider.loss_of(self.provider.prepared(batch, longest=self.config["longest"]))
        loss = self.loss(batch)
        loss.backward()
        return loss

    def loss(self, batch: dict[str, Any]) -> Any:
        """Return a batch's mean loss per supervised token."""
        import torch

        on_device = {name: values.to(self.provider.device, non_blocking=True) for name, values in batch.items()}
        with torch.autocast(self.provider.device.type, torch.bfloat16, enabled=self.provider.autocast):
            return self.provider.model(**on_device).loss

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train a number of steps, or score the held-out rows.

        Returns:
            `losses` and `step_ms` of the steps, their `tokens`, `peak_memory_gib`; or `held_out_loss`.
        """
        import torch

        if request.get("score"):
            self.provider.model.eval()
            total = count = 0.0
            with torch.no_grad():
                for batch in self.held_out:
                    supervised = int((batch["labels"][:, 1:] >= 0).sum())
                    total += float(self.loss(batch)) * supervised
                    count += supervised
            self.provider.model.train()
            return {"held_out_loss": total / count}
        if self.provider.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        batches = self.train[self.step : self.step + request["steps"]]
        losses, marks = [], [self.provider.mark()]
        for batch in batches:
            loss = self.loss_with_gradients(batch)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            marks.append(self.provider.mark())
        self.provider.synchronize()
        self.step += len(batches)
        from benchmarks.speed.providers.base import elapsed_ms

        peak = torch.cuda.max_memory_allocated() / 2**30 if self.provider.device.type == "cuda" else None
        return {
            "losses": [float(loss) for loss in losses],
            "step_ms": [elapsed_ms(begin, end) for begin, end in itertools.pairwise(marks)],
            "tokens": [tokens_of(batch) for batch in batches],
            "peak_memory_gib": peak,
            "trainable_parameters": sum(p.numel() for p in self.provider.model.parameters() if p.requires_grad),
            "notes": list(self.provider.notes),
        }


def conversations(path: Path, tokenizer: Any, most: int) -> list[tuple[list[int], int]]:
    """Return each row's token ids under the chat template, and how many of them are the question's."""
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            asked = [{"role": "user", "content": row["question"]}]
            both = [*asked, {"role": "assistant", "content": row["answer"]}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            text = tokenizer.apply_chat_template(both, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            rows.append((ids[:most], len(tokenizer(prompt, add_special_tokens=False).input_ids)))
    return rows


def tokens_of(batch: dict[str, Any]) -> int:
    """Return how many tokens of a batch are not padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def packed_batches(rows: list[tuple[list[int], int]], size: int, length: int) -> list[dict[str, Any]]:
    """Return batches of so many blocks of conversations one after another; the incomplete last one is left out."""
    import torch

    ids = [token for tokens, _ in rows for token in tokens]
    labels = [label for tokens, prompt in rows for label in [-100] * min(prompt, len(tokens)) + tokens[prompt:]]
    count = len(ids) // (size * length)
    shape = (count, size, length)
    cut = [torch.tensor(values[: count * size * length]).view(shape) for values in (ids, labels)]
    return [{"input_ids": block, "labels": supervised} for block, supervised in zip(*cut, strict=True)]


def padded_batches(rows: list[tuple[list[int], int]], size: int, pad: int) -> list[dict[str, Any]]:
    """Return batches of so many rows, padded on the right to the longest of each; a last incomplete one is left out."""
    import torch

    batches = []
    for first in range(0, len(rows) - size + 1, size):
        part = rows[first : first + size]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.full((size, longest), pad)
        labels = torch.full((size, longest), -100)
        mask = torch.zeros(size, longest, dtype=torch.long)
        for row, (tokens, prompt) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
            mask[row, : len(tokens)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def write_batches(given: Any, path: Path) -> None:
    """Tokenize the data once and write everyone's batches."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train = conversations(given.data / "train.jsonl.gz", tokenizer, given.length)
    generator = torch.Generator().manual_seed(given.seed)
    held_out = conversations(given.data / "test.jsonl.gz", tokenizer, given.length)

    def batches(rows: list[tuple[list[int], int]], most: int) -> list[dict[str, Any]]:
        if given.layout == "packed":
            return packed_batches(rows, given.rows, given.length)[:most]
        return padded_batches(rows, given.rows, pad)[:most]

    rows: list[tuple[list[int], int]] = []
    while len(made := batches(rows, given.steps)) < given.steps:
        before = len(rows)
        rows += [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        if len(rows) == before:
            raise SystemExit(f"--data: {given.data} has no rows to train on")
    data = {"train": made, "held_out": batches(held_out, given.held_out)}
    torch.save(data, path)


def summary(turns: list[dict[str, Any]], scores: list[float]) -> dict[str, Any]:
    """Return a provider's row: its curve, and the median speed of the steps that count."""
    losses = [loss for turn in turns for loss in turn["losses"]]
    timed = [pair for turn in turns for pair in list(zip(turn["step_ms"], turn["tokens"], strict=True))[WARM_UP:]]
    speed = statistics.median(1e3 * tokens / ms for ms, tokens in timed) if timed else None
    peaks = [turn["peak_memory_gib"] for turn in turns if turn["peak_memory_gib"] is not None]
    return {
        "status": "ok",
        "trainable_parameters": turns[-1]["trainable_parameters"],
        "tokens_per_s": speed,
        "peak_memory_gib": max(peaks, default=None),
        "held_out_loss_before": scores[0],
        "held_out_loss_after": scores[-1],
        "losses": losses,
        "step_ms": [ms for turn in turns for ms in turn["step_ms"]],
        "notes": turns[-1]["notes"],
    }


def add_differences(rows: dict[str, dict[str, Any]]) -> None:
    """Add to LoRA's rows how far their losses are from float32's, to those in 8 bits how far from bf16's; speeds."""
    exact, ours = rows.get(REFERENCE, {}).get("losses"), rows.get("lora_graphs", {}).get("tokens_per_s")
    for name, row in rows.items():
        if row["status"] != "ok":
            continue
        if exact and "lora" in name and not name.startswith("kron"):
            add_difference(row, exact, "float32")
        bf16 = rows.get(bf16_of(name), {}) if compute_of(name) != "bf16" else {}
        if bf16.get("status") == "ok":
            add_difference(row, bf16["losses"], "bf16")
            row["held_out_from_bf16"] = row["held_out_loss_after"] - bf16["held_out_loss_after"]
            row["speed_over_bf16"] = row["tokens_per_s"] and row["tokens_per_s"] / bf16["tokens_per_s"]
        if ours and row["tokens_per_s"]:
            row["lora_graphs_over_it"] = ours / row["tokens_per_s"]


def add_difference(row: dict[str, Any], losses: list[float], name: str) -> None:
    """Add to a row the root mean square of its losses minus others, and the mean of that over the last 50 steps."""
    differences = [a - b for a, b in zip(row["losses"], losses, strict=True)]
    row[f"loss_rms_from_{name}"] = math.sqrt(statistics.fmean(d * d for d in differences))
    row[f"loss_mean_from_{name}_last_50"] = statistics.fmean(differences[-50:])


COLUMNS = {
    "parameters": ("trainable_parameters", ","),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "GiB": ("peak_memory_gib", ".2f"),
    "held-out": ("held_out_loss_after", ".4f"),
    "rms": ("loss_rms_from_float32", ".4f"),
    "from bf16": ("loss_rms_from_bf16", ".4f"),
    "last 50": ("loss_mean_from_bf16_last_50", "+.4f"),
    "ours over it": ("lora_graphs_over_it", ".2f"),
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = ["provider".ljust(18) + "".join(f"{head:>13}" for head in COLUMNS)]
    for name, row in rows.items():
        if row["status"] != "ok":
            lines.append(f"{name:<18}{row['status']}: {row['detail'][:90]}")
            continue
        cells = ("" if row.get(key) is None else f"{row[key]:{form}}" for key, form in COLUMNS.values())
        lines.append(name.ljust(18) + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def train_all(given: Any, config: dict[str, Any], logs: Path) -> dict[str, dict[str, Any]]:
    """Train every provider in turns, and return a row for each."""
    ended = time.monotonic() + given.time_limit
    left = lambda: ended - time.monotonic()  # noqa: E731
    workers = {
        name: Worker(
            "benchmarks.speed.real_training:Training",
            [given.checkpointing],
            {**config, "provider": name},
            logs / f"{given.out.stem}.{name}.log",
        )
        for name in given.providers
    }
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    scores: dict[str, list[float]] = {name: [] for name in workers}
    try:
        start_all(list(workers.values()), min(300.0, left()))
        for first in range(0, given.steps + 1, given.turn):
            for name, worker in workers.items():
                if first in (0, given.steps):
                    reply = worker.ask({"score": True}, left())
                    scores[name].append(reply.get("held_out_loss", math.nan))
                    say(f"{name}: held-out loss {scores[name][-1]:.4f} {last_line(reply)}")
                if first < given.steps:
                    reply = worker.ask({"steps": given.turn}, left())
                    if reply["status"] == "ok":
                        turns[name].append(reply)
        broken = {name: worker.broken for name, worker in workers.items() if worker.broken}
    finally:
        for worker in workers.values():
            worker.stop()
    rows = {}
    for name in workers:
        whole = sum(len(turn["losses"]) for turn in turns[name]) == given.steps
        failure = broken.get(name) or {"status": "error", "detail": "not all steps were made; see its log"}
        rows[name] = summary(turns[name], scores[name]) if whole else failure
    add_differences(rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Train every provider and write the JSON; return 0 if all of them went through."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    listed = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    add("--model", required=True, help="Transformers folder of a real model with a chat template")
    add("--data", type=Path, required=True, help="folder of train.jsonl.gz and test.jsonl.gz: question, answer")
    add("--providers", type=listed, default=DEFAULT_PROVIDERS, help=f"of {', '.join(PROVIDERS)}; comma between")
    add("--base", default="nf4", choices=["nf4", "bf16"])
    add("--steps", type=int, default=150)
    add("--turn", type=int, default=50, help="steps of a provider before the next has its turn")
    add("--layout", default="packed", choices=["packed", "padded"])
    add("--rows", type=int, default=8, help="blocks a step, or conversations")
    add("--length", type=int, default=1024, help="tokens of a block, or at most of a conversation")
    add("--held-out", type=int, default=16, help="batches of the test set that are scored before and after")
    add("--checkpointing", default="none", choices=["none", "full"])
    add("--seed", type=int, default=0)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--time-limit", type=float, default=1800.0, help="seconds for everything")
    add("--out", type=new_file, required=True)
    given = parser.parse_args(arguments)
    if given.steps % given.turn:
        parser.error(f"--steps {given.steps} is not a multiple of --turn {given.turn}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(given.model).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        batches = Path(scratch) / "batches.pt"
        write_batches(given, batches)
        config = {
            **{"folder": str(folder), "model": folder.name, "base": given.base, "device": given.device},
            **{"seed": given.seed, "points": [[given.rows * given.length, given.length]]},
            "longest": given.length,
            **{"without_autocast": [], "batches": str(batches), "steps": given.steps, "warmup": 0},
            "values": {"model_type": json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]},
        }
        rows = train_all(given, config, given.out.parent)
    from benchmarks.speed.measurement import environment
    from lsr_scale import files

    paths = {str(given.model): folder.name, str(given.data): given.data.name}  # where they lie is this machine's affair
    shown = [paths.get(word, word) for word in arguments or sys.argv[1:]]
    kept = {key: value for key, value in vars(given).items() if key not in ("out", "model", "data")}
    content = {
        "env": environment(files.environment()),
        "command": recorded("speed.real_training", shown, given.out),
        "config": {**kept, "model": folder.name, "data": given.data.name, "rates": {**RATES, "lora": LORA_RATE}},
        "rows": rows,
    }
    files.write_json(given.out, content)
    print(table(rows))
    return int(any(row["status"] != "ok" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
