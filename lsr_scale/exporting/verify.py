"""The proof before an export is called done: logits of what was written against those of the adapter as trained.

The base is held as in training and computed in float32, so that what remains is the export's own error.
"""

import contextlib
import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from lsr_scale.adapters import TASK_TYPES
from lsr_scale.adapters.save_and_load import load_adapter
from lsr_scale.data.tasks import Example
from lsr_scale.errors import UserError
from lsr_scale.exporting.source import WRAPPER, AdapterSource
from lsr_scale.layers.frozen_linear import dequantized, freeze_quantized
from lsr_scale.model import chosen_dtype, load_base, load_config, load_tokenizer, local_device, read_tokenizer
from lsr_scale.scoring.accuracy import TaskScore, mcnemar
from lsr_scale.scoring.scorer import score
from lsr_scale.screen import Progress
from lsr_scale.units import amount

PROMPTS = (
    "Question: Which is heavier, a feather or a brick?\nAnswer:",
    "The capital of France is",
    "def add(a, b):\n    return",
    "Water boils at a temperature of",
)
# relative error of the logits (Frobenius) that an export without loss may have, by the dtype of what was written
EXACT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# of the machine's memory at most, for dequantized weights: a container may have less than it is told
MAX_DENSE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How near logits are to those of the adapter as trained, over a few prompts."""

    max_difference: float
    relative_error: float  # ||got - trained|| / ||trained||
    share_of_effect: float  # ||got - trained|| / ||trained - base without adapter||
    same_next_token: float  # share of positions
    positions: int
    prompts: int
    is_classifier: bool = False
    # by task: questions, accuracy trained and exported, and how many are answered otherwise, newly right, newly wrong
    accuracy: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """Return it in words."""
        what = "label the same for" if self.is_classifier else "next token the same at"
        where = "texts" if self.is_classifier else "positions"
        share = 100 * self.share_of_effect
        of_effect = f"{share:,.0f}" if share >= 1000 else f"{share:.3g}"
        return (
            f"logits of {amount(self.prompts, 'prompt')} differ by {self.max_difference:.2g} at most, relatively "
            f"{self.relative_error:.2g} ({of_effect} % of what the adapter changes); {what} "
            f"{100 * self.same_next_token:.1f} % of {self.positions} {where}"
        )

    def accuracy_lines(self) -> list[str]:
        """Return the change of accuracy in words, a line a task."""
        return [
            f"{task}: {100 * row['trained']:.1f} % as trained, {100 * row['exported']:.1f} % exported, of "
            f"{amount(row['questions'], 'question')}; {row['answered_otherwise']} answered otherwise "
            f"({row['newly_right']} newly right, {row['newly_wrong']} newly wrong)"
            for task, row in self.accuracy.items()
        ]


def compare(got: list[Tensor], trained: list[Tensor], base: list[Tensor]) -> Agreement:
    """Return the agreement of logits `[tokens, vocabulary]` of a few prompts.

    Raises:
        UserError: if logits are not finite.
    """
    one, two, zero = (torch.cat(logits).double() for logits in (got, trained, base))
    if not torch.isfinite(one).all():
        raise UserError("the exported model's logits are not finite; nothing was exported")
    if not torch.isfinite(two).all() or not two.norm() > 0:
        raise UserError("the adapter as trained gives logits that are zero or not finite: it diverged; train it again")
    difference = (one - two).norm()
    return Agreement(
        float((one - two).abs().max()),
        float(difference / two.norm()),
        float(difference / (two - zero).norm().clamp_min(1e-30)),
        float((one.argmax(-1) == two.argmax(-1)).double().mean()),
        len(one),
        len(got),
    )


class Reference:
    """The adapter as trained on its own base, and its logits."""

    def __init__(
        self,
        source: AdapterSource,
        base_name: str | None = None,
        tasks: dict[str, list[Example]] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Load the base that the run, or base.json, names.

        Args:
            source: The adapter.
            base_name: Another name of its base.
            tasks: Questions by task, to compare accuracies on too.
            progress: Shows what is being compared.

        Raises:
            UserError: if neither names one, or it cannot be loaded.
        """
        self.source, self._progress = source, progress or Progress(quiet=True)
        self.section = base_section(source, base_name)
        self._progress.stage(f"verifying: loading {self.section['name']} ({self.section['quantization']})")
        self.model: Any = in_float32(load_base(**self.section, head_from_adapter=True))
        self.tokenizer: Any = None
        with contextlib.suppress(UserError):  # random token ids do as well
            if source.tokenizer is not None:
                self.tokenizer = read_tokenizer(source.tokenizer)
            else:
                self.tokenizer = load_tokenizer(self.section["name"], revision=self.section["revision"])
        self.prompts = self._prompts()
        self._progress.stage("verifying: the base without the adapter")
        self.without = self.logits(self.model)
        untouched = checksums(self.model)
        self._progress.stage("verifying: the adapter as trained")
        self.model, _ = load_adapter(self.model, source.folder)
        self.trained = self.logits(self.model)
        self.tasks = tasks if tasks and self.tokenizer is not None else {}
        self.trained_scores = self._scores(self.model)
        self.model = _without_adapter(self.model)
        if checksums(self.model) != untouched:
            raise UserError(f"{source.folder}: loading it changes the base's own weights; nothing was exported")

    def _prompts(self) -> list[Tensor]:
        if self.tokenizer is not None:
            encoded = [self.tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
            if all(ids.numel() for ids in encoded):  # Transformers makes an empty one where a folder has none
                return encoded
            self.tokenizer = None
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(self.model.config.vocab_size, (1, 16), generator=generator) for _ in range(4)]

    @property
    def is_classifier(self) -> bool:
        """Whether the logits are a classifier's."""
        return self.section["task"] == "seq_cls"

    @torch.no_grad()
    def logits(self, model: Any) -> list[Tensor]:
        """Return the logits `[tokens, vocabulary]`, of a classifier `[1, labels]`, of every prompt, float32."""
        model.eval()
        device = next(model.parameters()).device
        prompts = self._progress.over(self.prompts, len(self.prompts), "prompt", brief=True)
        logits = [model(input_ids=ids.to(device)).logits[0].float().cpu() for ids in prompts]
        return [one if one.dim() == 2 else one[None] for one in logits]  # a classifier's have no positions

    def of_adapter(self, folder: Path) -> Agreement:
        """Return the agreement of an adapter folder, loaded by PEFT onto the same base."""
        from peft import PeftModel

        self._progress.stage("verifying: what was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = PeftModel.from_pretrained(self.model, str(folder))
        agreement = self._of(model)
        self.model = _without_adapter(model)
        return agreement

    def of_model(self, folder: Path) -> Agreement:
        """Return the agreement of a whole model's folder, safetensors or one GGUF, loaded by Transformers."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GgufConfig

        auto_class: Any = AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM

        self._progress.stage("verifying: what was written")
        options: dict[str, Any] = {"use_safetensors": True}
        for file in folder.glob("*.gguf"):
            options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
            config = load_config(self.section["name"], self.section["revision"])
            # Transformers reads no head_dim off Qwen3's GGUF; Mistral is a llama there, and refused with its own
            if config.model_type != "mistral":
                options["config"] = config
        with contextlib.redirect_stderr(io.StringIO()):  # a plain tqdm bar, which no setting turns off
            model: Any = auto_class.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32, **options)
        return self._of(in_float32(model))

    def _of(self, model: Any) -> Agreement:
        agreement = compare(self.logits(model), self.trained, self.without)
        return dataclasses.replace(agreement, is_classifier=self.is_classifier, accuracy=self._changes(model))

    def _scores(self, model: Any) -> dict[str, TaskScore]:
        batch_tokens = self.source.run.eval.batch_tokens if self.source.run else 4096
        return {
            task: score(model, self.tokenizer, examples, batch_tokens=batch_tokens)
            for task, examples in self._progress.over(self.tasks.items(), len(self.tasks), "task")
        }

    def _changes(self, model: Any) -> dict[str, dict[str, Any]]:
        """Return what `Agreement.accuracy` holds."""
        rows = {}
        for task, exported in self._scores(model).items():
            trained = self.trained_scores[task]
            newly_right, newly_wrong, _ = mcnemar(trained, exported)
            pairs = zip(trained.predictions, exported.predictions, strict=True)
            rows[task] = {
                "questions": exported.num_examples,
                "trained": trained.accuracy,
                "exported": exported.accuracy,
                "answered_otherwise": sum(one.choice != other.choice for one, other in pairs),
                "newly_right": newly_right,
                "newly_wrong": newly_wrong,
            }
        return rows


def _without_adapter(model: Any) -> Any:
    """Return a model without its adapter, as it was loaded: PEFT alone would leave the fully trained modules in it."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    own = {name.removeprefix(WRAPPER): wrapper.original_module for name, wrapper in wrappers.items()}
    base = model.unload()
    for name, module in own.items():
        base.set_submodule(name, module)
    return base


def checksums(model: Any) -> dict[str, float]:
    """Return the sum of each parameter, float64: whether a base is the one that it was."""
    return {name: float(value.detach().double().sum()) for name, value in model.named_parameters()}


def questions_of(source: AdapterSource, limit: int = 200) -> dict[str, list[Example]]:
    """Return the first questions of each task that a run evaluates on, `eval.limit` of them where that is smaller.

    Raises:
        UserError: if it is no run, names no tasks, or they cannot be read.
    """
    from lsr_scale.run.evaluate import load_tasks

    if source.run is None or not source.run.eval.tasks:
        raise UserError(f"{source.folder}: no run that names tasks (eval.tasks), so there is no accuracy to compare")
    return {task: examples[:limit] for task, examples in load_tasks(source.run.eval).items()}


def base_section(source: AdapterSource, base_name: str | None) -> dict[str, Any]:
    """Return the arguments of `load_base` for the base that an adapter was trained on.

    Raises:
        UserError: if nothing names it, or it is no language model.
    """
    if source.run is not None:
        section = source.run.model
        words = ("name", "revision", "task", "num_labels", "labels", "quantization", "double_quantization")
        values = {word: getattr(section, word) for word in (*words, "random_weights")}
        values["dtype"] = chosen_dtype(section.dtype, local_device())
        values["seed"] = source.run.training["seed"]
        return values if base_name is None else values | {"name": base_name}
    described = source.base or {}
    name = base_name or described.get("name") or source.config.base_model_name_or_path
    if not name:
        raise UserError(f"{source.folder}: nothing says which base it belongs to; name it: --base NAME")
    kind = described.get("quantization", "none")
    if kind not in ("nf4", "fp4", "int8", "none"):
        raise UserError(f"{source.folder}: base.json: quantization {kind!r} is none of nf4, fp4, int8, none")
    values = {"name": name, "revision": None, "quantization": kind, "dtype": "bfloat16"}
    values |= {"random_weights": False, "seed": 0}
    return values | _task_of(source)


def _task_of(source: AdapterSource) -> dict[str, Any]:
    """Return task and number of labels of the model that a bare adapter belongs to."""
    task = getattr(source.config.task_type, "value", source.config.task_type)
    if task in (None, TASK_TYPES["causal_lm"]):
        return {"task": "causal_lm", "num_labels": None}
    if task != TASK_TYPES["seq_cls"]:
        raise UserError(
            f"{source.folder}: task_type {task!r}: verify compares language models and classifiers; use --no-verify"
        )
    # of the head, fully trained: its last matrix has the fewest rows, one a label
    rows = [value.shape[0] for value in source.extra.values() if value.dim() == 2]
    if not rows:
        raise UserError(f"{source.folder}: a classifier without its head, which would start at random; use --no-verify")
    names = (source.base or {}).get("labels")
    labels = names if isinstance(names, list) and len(names) == min(rows) else None
    return {"task": "seq_cls", "num_labels": min(rows), "labels": labels}


def in_float32(model: Any) -> Any:
    """Return the model computing in float32, in place; quantized weights keep the values that training saw.

    Where there is room they are dequantized once, here, rather than in every forward pass.
    """
    freeze_quantized(model)
    torch.nn.Module.float(model)  # Transformers refuses it on a quantized model, whose codes it leaves alone
    quantized: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }
    num_bytes = 4 * sum(module.in_features * module.out_features for module in quantized.values())
    fits = num_bytes <= _room(next(model.parameters()).device)
    for name, module in quantized.items():
        if fits:
            model.set_submodule(name, dequantized(module, torch.float32))
        else:
            module.compute_dtype = torch.float32
    return model


def _room(device: torch.device) -> float:
    """Return how many bytes of dequantized weights a device has room for, beside all else."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return min(psutil.virtual_memory().available / 2, MAX_DENSE_BYTES)
