"""Whole runs that take a second: tiny random models with a tokenizer, saved as a user's own folder would be."""

import functools
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lsr_scale.config import RunConfig, run_from_dict
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.train import train
from tests.helpers.tiny_models import SEVEN_LINEARS, tiny_llama

TOOLS = [
    *("a knife cuts bread", "a broom sweeps floors", "a needle sews cloth", "a hammer drives nails", "a saw cuts wood"),
    *(
        "a ladle serves soup",
        "a spade digs holes",
        "a kettle boils water",
        "a mop cleans tiles",
        "a rake gathers leaves",
    ),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Train a byte-level tokenizer on the sentences above: 300 tokens, nothing unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TOOLS, trainer)
    return tokenizer


def save_llama(folder: Path, chat: bool = False, pad_token: str | None = "<pad>", **changes: Any) -> Path:
    """Save a random LLaMA with its tokenizer: of one layer, in which a run takes two thirds of the time of two."""
    model = tiny_llama(**{"vocab_size": 304, "num_hidden_layers": 1, **changes})
    _save_with(model, byte_tokenizer(), folder, bos_token="<s>", eos_token="</s>", pad_token=pad_token)
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def save_classifier(folder: Path, kind: str) -> Path:
    """Save a random two-layer "bert" or "roberta" encoder, without a classifier's head, with a word tokenizer."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = sorted({word for sentence in TOOLS for word in sentence.split()})
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config_class, model_class = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
    }[kind]
    config = config_class(vocab_size=len(vocabulary), max_position_embeddings=64, pad_token_id=0, **sizes)
    encoder = model_class(config).base_model  # as published: no weights for the head
    special_tokens = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>")
    _save_with(encoder, tokenizer, folder, pad_token="<pad>", **special_tokens)
    return folder


def _save_with(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, **special_tokens: Any) -> None:
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **special_tokens)
    fast.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSONL and return the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def completions(num: int = 12) -> list[dict[str, Any]]:
    """Return prompt/completion rows of differing lengths."""
    sentences = [TOOLS[index % len(TOOLS)] for index in range(num)]
    return [
        {"prompt": " ".join(s.split()[:2]), "completion": " " + " ".join(s.split()[2:] * (1 + i % 3))}
        for i, s in enumerate(sentences)
    ]


def questions(num: int = 6) -> list[dict[str, Any]]:
    """Return multiple-choice rows in the uniform shape."""
    tools = [sentence.split()[1] for sentence in TOOLS]
    return [
        {
            "id": f"tools-{i}",
            "question": f"What {' '.join(TOOLS[i].split()[2:])}?",
            "choices": [tools[i], tools[(i + 3) % len(tools)], tools[(i + 7) % len(tools)]],
            "answer": 0,
        }
        for i in range(num)
    ]


def labelled(num: int = 16) -> list[dict[str, Any]]:
    """Return sentence pairs that are equal (1) or not (0)."""
    return [
        {"sentence1": TOOLS[i % 10], "sentence2": TOOLS[(i + 3 * (i % 2)) % 10], "label": 1 - i % 2} for i in range(num)
    ]


def tiny_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return a run on `save_llama`'s model and `completions`, all under `folder`; sections given are merged in.

    Six steps of two rows on an NF4 base, a checkpoint after every second one, scored before and after.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model"), "dtype": "bfloat16"},  # as processes on any machine
        "adapter": {"method": "lsr", "rank": 4, "separation_rank": 2, "target_modules": SEVEN_LINEARS},
        "data": {"train": [str(folder / "rows.jsonl")]},
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 8,
        },
        "eval": {"tasks": [str(folder / "questions.jsonl")]},
    }
    for name, section in sections.items():
        if name == "adapter" and section.get("method", "lsr") != "lsr":
            values[name] = {"target_modules": SEVEN_LINEARS}
        values[name] = values.get(name, {}) | section
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", completions())
        write_rows(folder / "questions.jsonl", questions())
    return run_from_dict(values)


def do(run: RunConfig, **options: Any) -> RunFolder:
    """Train quietly."""
    gc.freeze()  # every run collects garbage, and need not look through half a million objects of the libraries
    return train(run, quiet=True, **options)


def do_all_here(
    next_job: Callable[[], Any],
    call: Callable[..., Any],
    take: Callable[[Any, Any], None],
    jobs: int = 1,
    time_limit: float = math.inf,
    logs: Path | None = None,
) -> tuple[int, list[Any]]:
    """Stand in for `benchmarks/pool.py`'s `do_all`, without processes, which import for half a minute."""
    failed = 0
    while time_limit > 0 and (job := next_job()) is not None:
        try:
            result = call(*job.arguments)
        except Exception:
            failed += 1
        else:
            take(job, result)
    return failed, []


def factors(folder: RunFolder, part: str = "adapter") -> dict[str, torch.Tensor]:
    """Return the tensors of the saved adapter, or of a checkpoint by its name."""
    return load_file(folder.path / part / "adapter_model.safetensors")


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, every one of which must be whole."""
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def results(folder: RunFolder) -> dict[str, Any]:
    """Return results.json."""
    return json.loads(folder.results.read_text(encoding="utf-8"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two adapters are equal bit for bit, and not empty."""
    return first.keys() == second.keys() and len(first) > 0 and all(torch.equal(first[k], second[k]) for k in first)
