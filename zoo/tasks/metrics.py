"""The official metrics of GLUE and SuperGLUE, by scikit-learn and SciPy."""

import numpy as np

from zoo.extras import require
from zoo.tasks import answers
from zoo.tasks.data import Examples
from zoo.tasks.task import get


def evaluate(task, labels, outputs, groups=None, examples=None):
    """Scores what a model puts out for labelled examples.

    A constant prediction says nothing about the labels: its correlations are 0.

    Args:
        task: A `Task` or the name of one.
        labels: The true classes, or scores, `[n]`; or the `Examples` that have them.
        outputs: The logits, `[n, num_classes]`, or for regression the scores, `[n, 1]`.
        groups: The question of each row, `[n]`, which a grouped task needs unless there are
            `examples`. COPA's choice is the row of a question with the largest margin of right
            over wrong, and so is ReCoRD's entity.
        examples: The `Examples`, which ReCoRD needs for its answers.

    Returns:
        A dict from the name of each of the task's metrics to a float, a fraction of 1.

    Raises:
        ValueError: If the shapes do not fit, a label is missing (-1, as in the test splits of
            GLUE), an output is not finite, or the questions of a grouped task are not known.
    """
    task = get(task)
    if isinstance(labels, Examples):
        examples, labels = labels, labels.labels
    if examples is not None and groups is None:
        groups = examples.groups
    labels = np.asarray(labels)
    outputs = check_outputs(task, outputs, labels.shape)
    if labels.min() < 0 or (task.labels and labels.max() >= task.num_classes):
        raise ValueError(
            f"`labels` must be {_allowed(task)} for {task.name!r}, and the test splits of GLUE "
            f"have none (-1). Received: labels from {labels.min()} to {labels.max()}"
        )
    if task.grouped:
        groups = check_groups(task, groups, len(labels))
    if task.grouping == "one":
        return _of_the_chosen(task, labels, answers.chosen(outputs, groups), examples)
    return score(task, labels, predictions(task, outputs), groups)


def predictions(task, outputs):
    """What a model says, row by row: classes `[n]`, or for regression scores `[n]`."""
    return outputs[:, 0] if task.labels is None else outputs.argmax(axis=-1)


def score(task, labels, predictions, groups=None):
    """Scores predictions, one per row.

    Args:
        task: A `Task`, but not one of those that choose one row per question.
        labels: The true classes, or scores, `[n]`.
        predictions: The same of the model; a class of -1 is none of the classes, and wrong.
        groups: The question of each row, where the task is grouped.

    Returns:
        As `evaluate`.
    """
    scores = {}
    for name in task.metrics:
        if name == "exact_match":
            scores[name] = _exact_match(labels, predictions, groups)
        else:
            scores[name] = float(_METRICS[name](labels, predictions))
    return scores


def check_outputs(task, outputs, shape):
    """The outputs as an array, if they fit and are finite.

    Args:
        task: A `Task`.
        outputs: See `evaluate`.
        shape: The shape of the labels.

    Raises:
        ValueError: See `evaluate`.
    """
    outputs = np.asarray(outputs, dtype="float64")
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"`labels` must have shape [n] with n > 0. Received: labels.shape={shape}")
    if outputs.shape != (shape[0], task.num_classes):
        raise ValueError(
            f"`outputs` must have shape {(shape[0], task.num_classes)} for {task.name!r}. "
            f"Received: outputs.shape={outputs.shape}"
        )
    if not np.isfinite(outputs).all():
        bad = outputs[~np.isfinite(outputs)]
        raise ValueError(
            f"`outputs` must be finite. Received: {len(bad)} that are not, {bad[0]} the first"
        )
    return outputs


def check_groups(task, groups, count):
    """The groups as an array, if there are as many as rows.

    Raises:
        ValueError: If there are not.
    """
    if groups is None:
        raise ValueError(
            f"`groups` or `examples` must say which rows are one question of {task.name!r}. "
            "Received: neither"
        )
    groups = np.asarray(groups)
    if groups.shape != (count,) or groups.dtype.kind not in "iu":
        raise ValueError(
            f"`groups` must be integers of shape {(count,)}. "
            f"Received: {groups.dtype} of shape {groups.shape}"
        )
    return groups


def _allowed(task):
    return "scores of at least 0" if task.labels is None else f"below {task.num_classes} and >= 0"


def _of_the_chosen(task, labels, rows, examples):
    if "token_f1" not in task.metrics:
        return {"accuracy": float(np.mean(labels[rows] == 1))}
    if examples is None or examples.candidates is None or examples.answers is None:
        raise ValueError(
            f"`examples` must have the candidates and the answers of {task.name!r}, which its "
            "metrics compare. Received: none"
        )
    if len(examples.answers) != len(rows):
        raise ValueError(
            f"`examples` must have the answers of {len(rows)} questions. "
            f"Received: of {len(examples.answers)}"
        )
    return answers.compare([examples.candidates[row] for row in rows], examples.answers)


def _accuracy(labels, predictions):
    return require("sklearn.metrics").accuracy_score(labels, predictions)


def _f1(labels, predictions):
    predictions = np.where(predictions < 0, 1 - labels, predictions)  # Neither class: wrong.
    return require("sklearn.metrics").f1_score(labels, predictions, zero_division=0.0)


def _macro_f1(labels, predictions):
    """The mean of the F1 of CB's three classes, whether or not they occur."""
    return require("sklearn.metrics").f1_score(
        labels, predictions, labels=range(3), average="macro", zero_division=0.0
    )


def _exact_match(labels, predictions, groups):
    """The share of questions without a wrong row."""
    wrong = np.unique(groups[labels != predictions])
    return float(1 - len(wrong) / len(np.unique(groups)))


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
    "f1a": _f1,  # of all answers, whatever their question
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
