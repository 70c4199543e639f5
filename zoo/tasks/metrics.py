"""The official GLUE metrics, by scikit-learn and SciPy."""

import numpy as np

from zoo.extras import require
from zoo.tasks.task import get


def evaluate(task, labels, outputs):
    """Scores what a model puts out for labelled examples.

    A constant prediction says nothing about the labels: its correlations are 0.

    Args:
        task: A `Task` or the name of one.
        labels: The true classes, or scores, `[n]`.
        outputs: The logits, `[n, num_classes]`, or for regression the scores, `[n, 1]`.

    Returns:
        A dict from the name of each of the task's metrics to a float.

    Raises:
        ValueError: If the shapes do not fit, a label is missing (-1, as in the test splits of
            GLUE), or an output is not finite.
    """
    task = get(task)
    labels = np.asarray(labels)
    outputs = np.asarray(outputs, dtype="float64")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"`labels` must have shape [n] with n > 0. Received: labels.shape={labels.shape}"
        )
    if outputs.shape != (len(labels), task.num_classes):
        raise ValueError(
            f"`outputs` must have shape {(len(labels), task.num_classes)} for {task.name!r}. "
            f"Received: outputs.shape={outputs.shape}"
        )
    if labels.min() < 0 or (task.labels and labels.max() >= task.num_classes):
        raise ValueError(
            f"`labels` must be {_allowed(task)} for {task.name!r}, and the test splits of GLUE "
            f"have none (-1). Received: labels from {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(outputs).all():
        bad = outputs[~np.isfinite(outputs)]
        raise ValueError(
            f"`outputs` must be finite. Received: {len(bad)} that are not, {bad[0]} the first"
        )
    predictions = outputs[:, 0] if task.labels is None else outputs.argmax(axis=-1)
    return {name: float(_METRICS[name](labels, predictions)) for name in task.metrics}


def _allowed(task):
    return "scores of at least 0" if task.labels is None else f"below {task.num_classes} and >= 0"


def _accuracy(labels, predictions):
    return require("sklearn.metrics").accuracy_score(labels, predictions)


def _f1(labels, predictions):
    return require("sklearn.metrics").f1_score(labels, predictions, zero_division=0.0)


def _unless_constant(correlation):
    """Wraps a correlation, which is 0/0 when either side is constant, to be 0 there."""

    def guarded(labels, predictions):
        constant = np.ptp(labels) == 0 or np.ptp(predictions) == 0
        return 0.0 if constant else correlation(labels, predictions)

    return guarded


@_unless_constant
def _matthews(labels, predictions):
    return require("sklearn.metrics").matthews_corrcoef(labels, predictions)


@_unless_constant
def _pearson(labels, predictions):
    return require("scipy.stats").pearsonr(labels, predictions).statistic


@_unless_constant
def _spearman(labels, predictions):
    return require("scipy.stats").spearmanr(labels, predictions).statistic


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
