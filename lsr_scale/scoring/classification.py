"""A classifier's metrics as GLUE has them, under the names of `evaluate.load("glue")`.

Two classes: accuracy, F1 of class 1, macro F1, Matthews' correlation. More: the same without the F1 of class 1. One
output, a regression: Pearson's and Spearman's correlation. Accuracy alone would praise a constant answer (68.5 % on
CoLA); a constant answer has a correlation of 0.
"""

from typing import Any

import numpy as np
import torch

from lsr_scale import distributed
from lsr_scale.errors import UserError
from lsr_scale.units import amount


def measure_prediction(prediction: Any) -> dict[str, float]:
    """Return `measure` of an `EvalPrediction`: transformers' `compute_metrics`."""
    return measure(logits_of(prediction), prediction.label_ids)


def logits_of(prediction: Any) -> np.ndarray:
    """Return the logits of an `EvalPrediction`; some models return other tensors after them."""
    outputs = prediction.predictions
    return outputs[0] if isinstance(outputs, tuple) else outputs


def measure(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of a classifier by name, those of `config.training.evaluated`.

    Args:
        outputs: `[rows, num_labels]` logits; for one label its values, `[rows, 1]` or `[rows]`.
        labels: `[rows]` classes, or the values that one label should have.

    Raises:
        UserError: if an output is not finite: nothing can be said of such a model.
    """
    check_finite(outputs)
    if outputs.ndim == 1 or outputs.shape[-1] == 1:
        values, expected = outputs.reshape(-1).astype(np.float64), labels.astype(np.float64)
        return {"pearson": correlation(values, expected), "spearmanr": correlation(ranks(values), ranks(expected))}
    counts = confusion(outputs.argmax(-1), labels, outputs.shape[-1])
    f1 = f1_by_class(counts)
    scores = {"accuracy": float(np.trace(counts) / counts.sum())}
    if len(counts) == 2:
        scores["f1"] = float(f1[1])
    present = counts.sum(0) + counts.sum(1) > 0  # a class that is neither a label nor an answer is left out
    return {**scores, "f1_macro": float(f1[present].mean()), "matthews_correlation": matthews(counts)}


@torch.no_grad()  # not inference mode: a tensor that a module caches here must still serve training
def outputs_of(model: Any, tokenizer: Any, encoded: Any, batch_size: int, distribute: bool = False) -> np.ndarray:
    """Return the outputs of a classifier for every row, `[rows, num_labels]` float32, in the order of the rows.

    Args:
        model: The model; put into evaluation mode, and back afterwards.
        tokenizer: Its tokenizer, which pads.
        encoded: Rows as `data.classification.tokenize_classification` makes them.
        batch_size: Rows in one forward pass, those of similar length together.
        distribute: Deal the batches out to the processes of this run, equally many each, since a sharded model must be
            run by all of them together; every process must call this, and gets all rows once.
    """
    columns = [name for name in encoded.column_names if name in tokenizer.model_input_names]
    rows = encoded.select_columns(columns)[:]
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = distributed.group_rank_and_size() if distribute else (0, 1)
    batches += batches[:1] * (-len(batches) % size)  # repeated so that each process has equally many
    device = next(model.parameters()).device
    found: dict[int, list[float]] = {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches[rank::size]:
            inputs = tokenizer.pad({name: [rows[name][row] for row in batch] for name in columns}, return_tensors="pt")
            logits = model(**inputs.to(device)).logits.float().cpu()
            found |= dict(zip(batch, logits.reshape(len(batch), -1).tolist(), strict=True))
    finally:
        for module, training in modes:
            module.training = training
    if size > 1:
        found = dict(distributed.gather(list(found.items())))
    return np.array([found[row] for row in range(len(lengths))], dtype=np.float32)


def loss(outputs: np.ndarray, labels: np.ndarray, smoothing: float = 0.0) -> float:
    """Return the loss that training reports of an evaluation: mean cross-entropy in nats, or mean squared error.

    Args:
        outputs: `[rows, num_labels]`.
        labels: `[rows]` classes, or scores where there is one output.
        smoothing: `training.label_smoothing_factor`, which weighs the mean over all classes.
    """
    values = outputs.astype(np.float64)
    if values.shape[-1] == 1:
        return float(np.mean((values[:, 0] - labels) ** 2))
    log_probabilities = np.log(probabilities(outputs).clip(1e-300))
    right = log_probabilities[np.arange(len(labels)), labels]
    return float(-((1 - smoothing) * right + smoothing * log_probabilities.mean(-1)).mean())


def check_finite(outputs: np.ndarray) -> None:
    """Raise a UserError for outputs that are not finite: nothing can be said of such a model."""
    if bad := int((~np.isfinite(outputs)).reshape(len(outputs), -1).any(1).sum()):
        raise UserError(
            f"the classifier's outputs are not finite on {bad:,} of {amount(len(outputs), 'row')}: training diverged; "
            "lower training.learning_rate or resume from an earlier checkpoint"
        )


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Return the softmax of `[rows, num_labels]` logits, float64."""
    values = np.exp(outputs.astype(np.float64) - outputs.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def confusion(answers: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Return how often class i was answered as class j, `[num_labels, num_labels]`."""
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(counts, (labels, answers), 1)
    return counts


def f1_by_class(counts: np.ndarray) -> np.ndarray:
    """Return each class's harmonic mean of precision and recall, 0 where neither is defined."""
    return 2 * np.diag(counts) / np.maximum(1, counts.sum(0) + counts.sum(1))


def matthews(counts: np.ndarray) -> float:
    """Return Matthews' correlation of labels and answers, Gorodkin's for several classes; 0 if one is constant."""
    label, answer, total = counts.sum(1).astype(np.float64), counts.sum(0).astype(np.float64), float(counts.sum())
    spread = (total**2 - label @ label) * (total**2 - answer @ answer)
    return float((np.trace(counts) * total - label @ answer) / np.sqrt(spread)) if spread > 0 else 0.0


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation; 0 if one of the two is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1 on; equal ones share the mean of theirs."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]
