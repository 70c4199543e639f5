"""The tasks, one row each: what goes in, what comes out, and how it is scored.

The nine GLUE tasks (Wang et al., 2019, https://arxiv.org/abs/1804.07461, table 1) carry the
names, features and class order of TensorFlow Datasets. `acceptability` is generated here and
needs no data at all.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: The name, which for GLUE is also the TensorFlow Datasets name.
        inputs: The one or two text features, in reading order.
        labels: The class names in label order, or `None` for a score to regress.
        metrics: The official metrics.
        primary: The metric that chooses the best checkpoint; higher is better.
        validation: The labelled held-out splits.
        test: The test splits; those of GLUE carry no labels (all -1).
    """

    name: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    primary: str
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)

    @property
    def num_classes(self):
        """The width of the output: one per class, 1 for a score."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def splits(self):
        """All splits, training first."""
        return ("train", *self.validation, *self.test)


_SENTENCES = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")

_ROWS = (
    Task(
        "acceptability",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
        "matthews",
    ),
    Task("glue/cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "matthews"),
    Task("glue/sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "accuracy"),
    Task("glue/mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "f1"),
    Task(
        "glue/qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "f1",
    ),
    Task("glue/stsb", _SENTENCES, None, ("pearson", "spearman"), "spearman"),
    Task(
        "glue/mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        "accuracy",
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    Task("glue/qnli", ("question", "sentence"), _ENTAILED, ("accuracy",), "accuracy"),
    Task("glue/rte", _SENTENCES, _ENTAILED, ("accuracy",), "accuracy"),
    # TensorFlow Datasets orders these classes the other way round than QNLI's and RTE's.
    Task("glue/wnli", _SENTENCES, _ENTAILED[::-1], ("accuracy",), "accuracy"),
)

TASKS = {task.name: task for task in _ROWS}


# How `zoo.finetune` trains from scratch on two CPU cores; what a task does not name it takes from
# the first row.
_RECIPES = {
    "default": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.2},
    "acceptability": {"epochs": 6, "learning_rate": 2e-3, "dropout": 0.1},
    "glue/sst2": {"epochs": 2},
}


def recipe(task):
    """The defaults of `zoo.finetune` for a task.

    Args:
        task: The name of a task, or a `Task`.

    Returns:
        A dict of `epochs`, `batch_size`, `learning_rate` and `dropout`.
    """
    return _RECIPES["default"] | _RECIPES.get(get(task).name, {})


def get(task):
    """Looks a task up.

    Args:
        task: The name of a task, or a `Task`, which is returned as it is.

    Returns:
        The `Task`.

    Raises:
        ValueError: If there is no task of that name.
    """
    if isinstance(task, Task):
        return task
    if task in TASKS:
        return TASKS[task]
    # Without the "glue/" that most have in common: it alone would make any two of them near.
    short = {name.removeprefix("glue/"): name for name in TASKS}
    nearest = difflib.get_close_matches(str(task).lower().removeprefix("glue/"), short, n=1)
    hint = f" (did you mean {short[nearest[0]]!r}?)" if nearest else ""
    raise ValueError(f"`task` must be one of {list(TASKS)}{hint}. Received: task={task!r}")
