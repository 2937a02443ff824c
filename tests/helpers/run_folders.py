"""Run folders written by hand, file by file: what a run leaves, without the run."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "model": {"name": "some/base-7b", "task": "causal_lm", "quantization": "nf4"},
    "adapter": {"method": "lsr", "rank": 16, "separation_rank": 16, "init": None},
    "data": {"train": [{"path": "arc_easy", "format": "auto"}], "validation": []},
    "training": {"output_dir": "runs/x", "learning_rate": 5e-4, "num_train_epochs": 1, "memory": "auto"},
    "deepspeed": {"config": {"zero_optimization": {"stage": 2}}},
    "eval": {"tasks": [{"path": "arc_easy"}]},
}
RESULTS = {
    "method": "lsr",
    "model": "some/base-7b",
    "trainable_parameters": 4_096_000,
    "adapter_bytes": 16_400_000,
    "steps": 40,
    "final_loss": 1.2345,
    "tokens_per_s": 17_719.0,
    "peak_memory_gib": 28.1,
    "training_s": 3725.0,
    "wall_s": 4000.0,
    "num_processes": 1,
}
ENVIRONMENT = {"lsr_scale": "0.1.0", "torch": "2.13.0", "gpus": ["NVIDIA H100 80GB HBM3"], "cpu": "x86_64, 26 cores"}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with nested changes applied."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return result


def choice_rows(right: list[bool], first: int = 0) -> list[dict[str, Any]]:
    """Return predictions of questions numbered from `first` on: right or wrong."""
    return [
        {
            "id": f"q-{first + number}",
            "answer": 0,
            "log_likelihoods": [-1.0, -2.0],
            "choice": 0 if hit else 1,
            "choice_norm": 0 if hit else 1,
            "question_sha256": f"{first + number:064x}",
        }
        for number, hit in enumerate(right)
    ]


def class_rows(outputs: list[list[float]], labels: list[float]) -> list[dict[str, Any]]:
    """Return a classifier's predictions."""
    pairs = enumerate(zip(outputs, labels, strict=True), 1)
    return [{"row": number, "label": label, "outputs": values} for number, (values, label) in pairs]


def losses(num: int = 40, offset: float = 0.0, every: int = 10) -> list[dict[str, Any]]:
    """Return rows of metrics: a loss that falls, and an evaluation each so many steps, lowest before the last."""
    rows: list[dict[str, Any]] = []
    for step in range(1, num + 1):
        loss = 1 + offset + math.exp(-step / 10) + 0.1 * math.sin(step)
        rows.append({"step": step, "wall_s": float(step), "loss": loss, "tokens_per_s": 17_000.0, "memory_gib": 28.0})
        if every and step % every == 0:
            rows.append({"step": step, "eval_loss": loss + 0.1 + (0.5 if step == num else 0)})
    return rows


def rewards(num: int = 40, offset: float = 0.0, every: int = 10) -> list[dict[str, Any]]:
    """Return GRPO's rows of metrics: losses about 0, a reward that rises, evaluations whose highest is not the last."""
    rows = losses(num, every=every)
    for row in rows:
        reward = offset + 1 - math.exp(-row["step"] / 10) - (0.5 if row["step"] == num else 0)
        row |= {"loss": 0.0, "reward": reward} if "loss" in row else {"eval_loss": 0.0, "eval_reward": reward}
    return rows


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    answers: dict[str, list[dict[str, Any]]] | None = None,
    environment: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    finished: bool = True,
) -> Path:
    """Write a run's folder; what is given changes the defaults, `answers` are rows by file such as "arc_easy-after"."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, config or {}), sort_keys=False))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT | (environment or {})))
    source = {"path": "arc_easy", "split": "train", "sha256": "ab" * 32, "num_rows": 2251}
    (folder / "data.json").write_text(json.dumps(data or {"train": [source], "validation": []}))
    if finished:
        (folder / "results.json").write_text(json.dumps(RESULTS | (results or {})))
    write_lines(folder / "metrics.jsonl", losses() if metrics is None else metrics)
    for name, rows in (answers or {}).items():
        write_lines(folder / "eval" / f"{name}.jsonl", rows)
    if samples is not None:
        write_lines(folder / "samples.jsonl", samples)
    return folder


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
