"""A classifier's run: scored on labelled rows before and after training and by `eval`; texts classified by it."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsr_scale import distributed
from lsr_scale.config import RunConfig
from lsr_scale.data.classification import tokenize_classification
from lsr_scale.data.formats import build_dataset, load_source, sentences
from lsr_scale.data.labels import Labels
from lsr_scale.data.rows import RowError
from lsr_scale.data.split import split_by_hash
from lsr_scale.data.tokenizer_setup import prepare_tokenizer
from lsr_scale.errors import UserError, printable
from lsr_scale.model.gather import reshard
from lsr_scale.run.confusion import draw_confusion
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.load import load_run_model, open_trained
from lsr_scale.scoring import classification
from lsr_scale.units import amount

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """Labelled rows that a classifier is scored on, and the outputs that it has for them.

    Attributes:
        name: What its scores and predictions are filed under.
        rows: sentence1, sentence2 and label, a class's number or a score.
        run: The run, its labels found.
    """

    name: str
    rows: "Dataset"
    run: RunConfig

    def score(self, outputs: np.ndarray) -> dict[str, float]:
        """Return the number of rows, the loss, and what `classification.measure` finds."""
        labels = np.array(self.rows["label"])
        loss = classification.loss(outputs, labels, self.run.training.get("label_smoothing_factor", 0.0))
        return {"num_examples": len(labels), "loss": loss, **classification.measure(outputs, labels)}

    def save(self, folder: RunFolder, outputs: np.ndarray, when: str) -> None:
        """Write every prediction, and draw the confusion matrix of classes.

        Raises:
            UserError: if a file cannot be written.
        """
        names = self.run.model.labels
        folder.write_predictions(self.name, when, self._lines(outputs))
        if names:
            counts = classification.confusion(outputs.argmax(-1), np.array(self.rows["label"]), len(names))
            draw_confusion(counts, names, folder.confusion(self.name, when), f"{self.name}, {when}")

    def _lines(self, outputs: np.ndarray) -> Iterator[dict[str, Any]]:
        names = self.run.model.labels
        for number, (row, answer) in enumerate(zip(self._texts(), answers(outputs, names), strict=True), 1):
            yield {"row": number, **row, **answer, "outputs": outputs[number - 1].tolist()}

    def _texts(self) -> Iterator[dict[str, Any]]:
        names = self.run.model.labels
        row: Any
        for row in self.rows:
            pair = {"text_pair": row["sentence2"]} if row["sentence2"] else {}
            yield {"text": row["sentence1"], **pair, "gold": names[row["label"]] if names else row["label"]}

    def read(self, folder: RunFolder, when: str, say: Say) -> np.ndarray | None:
        """Return the outputs that were saved for these rows, None where there are none; others are noted."""
        file = folder.predictions(self.name, when)
        if not file.is_file():
            return None
        try:
            saved = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            outputs = np.array([row["outputs"] for row in saved], dtype=np.float32)
            same = [{key: row[key] for key in now} for row, now in zip(saved, self._texts(), strict=True)]
            if same == list(self._texts()) and outputs.shape == (len(saved), self.run.model.num_labels):
                return outputs
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        say(f"note: {file} is left out: it is not of the rows that are held out now")
        return None


def answers(outputs: np.ndarray, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield for each row the class predicted and its probability, or of a regression the score."""
    if names:
        for row in classification.probabilities(outputs):
            yield {"predicted": names[int(row.argmax())], "probability": round(float(row.max()), 6)}
    else:
        yield from ({"predicted": float(value)} for value in outputs[:, 0])


def score_in_training(held_out: HeldOut, trainer: Any, folder: RunFolder, when: str, say: Say) -> dict[str, float]:
    """Return the scores of a model in training as it is, every prediction saved; every process takes part.

    Args:
        held_out: The run's held-out rows.
        trainer: The run's, whose eval_dataset they are.
        folder: The run's.
        when: "before" or "after".
        say: Told the scores in a line.
    """
    batch_size = trainer.args.per_device_eval_batch_size
    outputs = classification.outputs_of(
        trainer.model, trainer.processing_class, trainer.eval_dataset, batch_size, distribute=True
    )
    reshard(trainer.model)
    scores = held_out.score(outputs)
    if distributed.is_main():
        held_out.save(folder, outputs, when)
    say(f"{when} training: {held_out.name} {in_words(scores)}")
    return scores


def in_words(scores: dict[str, float]) -> str:
    """Return scores in a line."""
    shown = [f"{name} {value:.4f}" for name, value in scores.items() if name != "num_examples"]
    return f"{', '.join(shown)} on {amount(int(scores['num_examples']), 'row')}"


def evaluate_classifier(
    folder: RunFolder,
    run: RunConfig,
    sources: Sequence[str] | None = None,
    limit: int | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Score a classifier's run as training does, in batches of `per_device_eval_batch_size`.

    Args:
        folder: The run's folder, with an adapter.
        run: Its configuration.
        sources: Files or folders of labelled rows, each scored by itself; None takes the run's held-out rows.
        limit: Only the first so many rows of each.
        base: The base model's name, where it lies elsewhere than when the run began.

    Raises:
        UserError: if there are no rows, or a label that the classifier has no output for.
    """
    if not sources and not run.data.has_validation:
        raise UserError(
            f"{folder.path}: the run has no held-out rows (data.validation); give some: lsr-scale eval "
            f"{shlex.quote(str(folder.path))} --data FILE"
        )
    loaded: dict[str, Any] = {}
    options: dict[str, Any] = {"model_task": "seq_cls", "labels": Labels.of_model(run.model)}
    for source in sources or ():
        loaded[unique_name(stem(source), loaded)] = build_dataset([source], None, **options)[0]
    if not sources and run.data.validation_split:
        rows, _ = build_dataset(run.data.train, "train", **options)
        _, loaded["validation"] = split_by_hash(rows, run.data.validation_split)
    elif not sources:
        loaded["validation"] = build_dataset(run.data.validation, "validation", **options)[0]
    model, tokenizer = _load(folder, base)
    results: dict[str, dict[str, float]] = {}
    for name, rows in loaded.items():
        held_out = HeldOut(name, rows.select(range(min(limit or len(rows), len(rows)))), run)
        outputs = _outputs(run, model, tokenizer, held_out.rows)
        scores = held_out.score(outputs)
        results[name] = {key: round(value, 6) if isinstance(value, float) else value for key, value in scores.items()}
        with noting_unwritable():
            held_out.save(folder, outputs, f"eval-{folder.adapter_name()}")
    return {"run": str(folder.path), "scored": folder.adapter_name(), "classification": results}


def classify(
    path: str | Path,
    texts: Sequence[str] = (),
    pairs: Sequence[str] = (),
    data: Sequence[str] = (),
    limit: int | None = None,
    base: str | None = None,
) -> list[dict[str, Any]]:
    """Classify texts, or the rows of files, with a run's adapter.

    Args:
        path: The folder of a classifier's run.
        texts: Texts.
        pairs: The second sentence of each, for a classifier of pairs.
        data: Files or folders of rows with texts; labels are not needed, nor looked at.
        limit: Only the first so many rows of each file.
        base: The base model's name, where it lies elsewhere than when the run began.

    Returns:
        For each text `{"text", "text_pair"?, "predicted", "probability", "probabilities": {name: ...}}`, or of a
        regression `{"text", "text_pair"?, "predicted"}`.

    Raises:
        UserError: for a run that is no classifier's, a row without a text, or nothing to classify.
    """
    folder, run = open_trained(path, tasks=("seq_cls",))
    if pairs and len(pairs) != len(texts):
        raise UserError(f"--pair: expected as many as there are of --text, {len(texts)}, got {len(pairs)}")
    rows: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"--text: text {number + 1} is empty; give a text to classify")
        rows.append({"sentence1": text, "sentence2": pairs[number] if pairs else ""})
    for source in data:
        loaded = load_source(source, None)
        for index, row in enumerate(loaded.rows[:limit]):
            try:
                rows.append(sentences(row))
            except RowError as error:
                raise UserError(f"{loaded.where(index)}: {error}") from None
    if not rows:
        raise UserError('nothing to classify; give --text "..." or --data FILE')
    from datasets import Dataset

    model, tokenizer = _load(folder, base)
    outputs = _outputs(run, model, tokenizer, Dataset.from_list(rows))
    names, found = run.model.labels, []
    for row, answer, values in zip(rows, answers(outputs, names), classification.probabilities(outputs), strict=True):
        pair = {"text_pair": row["sentence2"]} if row["sentence2"] else {}
        rounded = (round(float(value), 6) for value in values)
        every = {"probabilities": dict(zip(names, rounded, strict=True))} if names else {}
        found.append({"text": row["sentence1"], **pair, **answer, **every})
    return found


def _load(folder: RunFolder, base: str | None) -> tuple[Any, Any]:
    """Return a run's model and its tokenizer, which can pad."""
    model, tokenizer, _ = load_run_model(folder.checkpoint or folder.path, tasks=("seq_cls",), base=base)
    prepare_tokenizer(tokenizer, "classification")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _outputs(run: RunConfig, model: Any, tokenizer: Any, rows: "Dataset") -> np.ndarray:
    encoded = tokenize_classification(rows, tokenizer, run.training["max_length"])
    outputs = classification.outputs_of(model, tokenizer, encoded, run.training["per_device_eval_batch_size"])
    classification.check_finite(outputs)
    return outputs


def stem(path: str) -> str:
    """Return the end of a source's path, without what says its format."""
    from lsr_scale.data.readers import suffix

    name = Path(path).name
    return name.removesuffix(suffix(Path(name)) or "") or name


def unique_name(plain: str, names: Any) -> str:
    """Return a name, numbered where it is among others already."""
    name, number = plain, 1
    while name in names:
        number += 1
        name = f"{plain}-{number}"
    return name


@contextmanager
def noting_unwritable() -> Iterator[None]:
    """Print a note where predictions cannot be written: the scores are valid all the same."""
    try:
        yield
    except UserError as error:
        print(printable(f"note: the predictions are not written: {error}"), file=sys.stderr, flush=True)
