"""The YAML of a new run: what is set, why, and beside it, commented out, what people change most."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from lsr_scale.config import RunConfig, run_from_dict, yaml_text
from lsr_scale.errors import shortened
from lsr_scale.new_run.data_facts import DataFacts
from lsr_scale.new_run.model_facts import ModelFacts

# as in the shipped runs; what is large, and the second rate, are for models of a billion parameters or more
_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "lsr": {"rank": 16, "separation_rank": 16},
    "kron_lora": {"rank": 8, "left_in": 2, "left_out": 16, "dropout": 0.0},
    "lora_xs": {"rank": 32, "alpha": 64},  # its authors', as is the rate
}
_LARGE_OPTIONS = {**_OPTIONS, "lsr": {"rank": 4, "separation_rank": 8}}  # below LoRA's rank 1
_RATES = {"lora": (1e-3, 2e-4), "lsr": (2e-3, 2e-3), "kron_lora": (1e-3, 3e-4), "lora_xs": (2e-3, 2e-3)}
_BILLION = 10**9
_PLAIN = re.compile(r"[A-Za-z0-9_./~:@=-]+")
_WHAT = {
    "chat": "conversations or other texts to write",
    "classify": "texts and their labels",
    "commonsense": "multiple-choice questions",
}


def run_text(model: ModelFacts, data: DataFacts, method: str, file: str) -> tuple[str, RunConfig]:
    """Return the YAML of a run, and the run that it describes.

    Args:
        model: The base.
        data: What it is trained on.
        method: The adapter's.
        file: The name that the file is to have.
    """
    batch, accumulation = _batch(data.num_rows)
    quoted = shlex.quote(file)
    lines = [
        f"# {shortened(model.name, 60)} with {method}, trained on {_WHAT[data.kind]}. Written by lsr-scale init.",
        f"#   lsr-scale preview {quoted}   what of the rows is learned, as tokens, and what is cut",
        f"#   lsr-scale plan {quoted}      parameters, bytes, memory: does it fit?",
        f"#   lsr-scale train {quoted}     or on all GPUs: deepspeed --module lsr_scale.launch --config {quoted}",
        "# Any value can be set on the command line too: --set training.learning_rate=1e-4",
        *_model(model, data, method),
        *_adapter(model, method),
        *_data(data),
        *_training(model, data, method, batch, accumulation, file),
        *_eval(data),
        "# deepspeed:",
        "#   config: zero3        # of several GPUs each holds its part of the base too; zero2 by default",
    ]
    text = "\n".join(lines) + "\n"
    values, _ = yaml_text.parse(text, file)
    return text, run_from_dict(values, file)


def _model(model: ModelFacts, data: DataFacts, method: str) -> list[str]:
    lines = ["model:", f"  name: {_scalar(model.name)}"]
    if data.kind == "classify":
        lines += ["  task: seq_cls"]
        names = data.labels.names if data.labels else ()
        listed = f"[{', '.join(_scalar(name) for name in names)}]" if 0 < len(names) <= 12 else "[no, yes]"
        lines += [f"  # labels: {listed}   # found in the rows; class 0 first where their order matters"]
        lines += ["  # num_labels: 1   # for scores instead of classes"]
    if model.quantization:
        lines += [f"  quantization: {model.quantization}   # as its weights are already"]
    elif method in ("lokr", "tinylora"):
        lines += [f"  quantization: none   # PEFT's {method} takes no 4-bit base"]
    elif model.is_small_encoder:
        lines += ["  quantization: none   # nf4 for a large one", "  dtype: float32"]
    else:
        lines += ["  quantization: nf4   # or fp4, int8, none"]
    if data.kind == "chat":
        lines += ["  # chat_template: my.jinja   # in place of the tokenizer's own"]
    return lines


def _adapter(model: ModelFacts, method: str) -> list[str]:
    about = "of these the most accurate where its size fits; lsr and kron_lora go below its rank 1"
    lines = ["adapter:", f"  method: {method}" + (f"   # {about}" if method == "lora" else "")]
    options = (_OPTIONS if _is_small(model) else _LARGE_OPTIONS).get(method, {})
    lines += [f"  {name}: {value}" for name, value in options.items()]
    targets = model.targets if isinstance(model.targets, str) else f"[{', '.join(model.targets)}]"
    lines += [f"  target_modules: {targets}"]
    lines += ["  # dropout: 0.05"] if "dropout" not in options else []
    return lines


def _is_small(model: ModelFacts) -> bool:
    return model.num_parameters is not None and model.num_parameters < _BILLION


def _data(data: DataFacts) -> list[str]:
    lines = ["data:", "  train:", *(f"    - {_scalar(source)}" for source in data.sources)]
    if (share := data.validation_split) is not None and data.kind != "commonsense":
        lines += [f"  validation_split: {share}   # of {data.num_rows:,} rows, held out by their hash"]
    else:
        lines += ["  # validation_split: 0.05   # of the rows, held out by their hash"]
    return [*lines, "  # validation: [held_out.jsonl]   # in place of validation_split"]


def _training(model: ModelFacts, data: DataFacts, method: str, batch: int, accumulation: int, file: str) -> list[str]:
    small, large = _RATES.get(method, (1e-3, 2e-4))
    rate = _rate(small if _is_small(model) else large)
    lines = [
        "training:   # any field of TRL's SFTConfig, or of transformers' TrainingArguments",
        "  num_train_epochs: 3",
        f"  learning_rate: {rate}   # not tuned on your data: try half and twice of it",
        f"  per_device_train_batch_size: {batch}",
        f"  gradient_accumulation_steps: {accumulation}",
    ]
    if data.kind == "classify":
        lines += ["  max_length: 256   # tokens; longer rows are cut"]
    else:
        lines += ["  max_length: 1024   # tokens; longer rows are cut (preview counts them)"]
        lines += ["  # packing: true   # several rows in a sequence: faster where they are short"]
    if data.kind == "chat":
        lines += ["  # assistant_only_loss: false   # learn the user's turns as well"]
    lines += [
        "  logging_steps: 1" if data.num_rows is not None and data.num_rows < 1000 else "  logging_steps: 10",
        "  # early_stopping: {patience: 3}   # needs held-out rows",
        "  # memory: save   # recompute activations where memory is short",
    ]
    if method != "lora":
        lines += ["  # save_as_lora: true   # beside it PEFT's LoRA, exactly: loads without lsr_scale"]
    folder = _scalar(f"runs/{Path(file).stem.lstrip('.') or 'run'}")
    return [
        *lines,
        "  # report_to: tensorboard   # or wandb",
        f"  # output_dir: {folder}   # as by default, but never runs/...-2",
    ]


def _eval(data: DataFacts) -> list[str]:
    lines = ["eval:"]
    if data.kind == "commonsense":
        if data.held_out:
            lines += [
                f"  tasks: [{', '.join(_scalar(source) for source in data.held_out)}]   # scored before and after"
            ]
        else:
            lines += ["  tasks: []   # questions that are not trained on: held_out.jsonl, or arc_easy, piqa, ..."]
        return [*lines, "  limit: 200   # questions of each"]
    if data.kind == "classify":
        return ["# eval: accuracy, F1 and the rest are of the held-out rows"]
    if data.prompt is not None:
        text = _quoted(data.prompt)
        shown = f"[{{role: user, content: {text}}}]" if data.is_conversation else text
        whose = "not trained on" if data.validation_split is not None else "also trained on: add some that are not"
        about = "  prompts:   # completed before training, at each evaluation and after"
        return [*lines, about, f"    - {shown}   # of a row that is {whose}"]
    return [*lines, "  prompts: []   # completed before training, at each evaluation and after"]


def _batch(num_rows: int | None) -> tuple[int, int]:
    """Return rows a step on one GPU, and how many such make one: few rows are to make some steps still."""
    if num_rows is None or num_rows >= 2000:
        return 8, 2
    return (8, 1) if num_rows >= 200 else (4, 1)


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _scalar(text: str) -> str:
    """Return text as YAML takes it for text, on one line."""
    plain = _PLAIN.fullmatch(text) and yaml_text.parse(text, "")[0] == text
    return text if plain and not text.startswith(("-", "@", "~")) else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())
