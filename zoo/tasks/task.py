"""The tasks, one row each: what goes in, what comes out, and how it is scored.

The nine tasks of GLUE (Wang et al., 2019, https://arxiv.org/abs/1804.07461, table 1) and the eight
of SuperGLUE (Wang et al., 2019, https://arxiv.org/abs/1905.00537, table 1) carry the names,
features and class order of TensorFlow Datasets. `acceptability` is generated here and needs no data
at all.
"""

import dataclasses
import difflib
from collections.abc import Callable

from zoo.tasks import forms


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: The name, which is also the TensorFlow Datasets name unless `dataset` says another.
        inputs: The names of the one or two texts of a row, in reading order.
        labels: The names of the classes of a row in label order, or `None` for a score to regress.
        metrics: The official metrics.
        primary: The metric that chooses the best checkpoint; higher is better.
        validation: The labelled held-out splits.
        test: The test splits; those of GLUE and SuperGLUE carry no labels (all -1).
        dataset: The TensorFlow Datasets name.
        features: The features of an example, other than its label and `idx`; by default the
            inputs.
        form: A function from the features of an example to its `zoo.tasks.forms.Row`s; `None`
            where an example is one row of the inputs.
        grouping: "one" where one of the rows of a question is its answer, "each" where each of
            them is right or wrong, `None` where rows have nothing to do with each other.
        template: The features that T5 reads, in its order (Raffel et al., 2020,
            https://arxiv.org/abs/1910.10683, appendix D); `None` where its form is another.
        words: T5's words for the labels, which are also the class names of TensorFlow Datasets;
            by default the labels.
    """

    name: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    primary: str
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    dataset: str = ""
    features: tuple[str, ...] = ()
    form: Callable | None = None
    grouping: str | None = None
    template: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()

    def __post_init__(self):
        for field, default in (
            ("dataset", self.name),
            ("features", self.inputs),
            ("words", self.labels or ()),
        ):
            object.__setattr__(self, field, getattr(self, field) or default)

    @property
    def num_classes(self):
        """The width of the output: one per class, 1 for a score."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def splits(self):
        """All splits, training first."""
        return ("train", *self.validation, *self.test)

    @property
    def grouped(self):
        """Whether several rows can be one question."""
        return self.grouping is not None

    def rows(self, features):
        """The rows that a classifier reads of an example.

        Args:
            features: A dict of the task's features, `label` and `idx`.

        Returns:
            A list of `zoo.tasks.forms.Row`.
        """
        if self.form is not None:
            return self.form(features)
        texts = tuple(features[name] for name in self.inputs)
        return [forms.Row(texts, features["label"], features["idx"])]


_SENTENCES = ("sentence1", "sentence2")
_NLI = ("premise", "hypothesis")
_ENTAILED = ("entailment", "not_entailment")
_BOOLEAN = ("False", "True")
_ACCURACY = (("accuracy",), "accuracy")
_REVERSED_NLI = _NLI[::-1]  # T5 sorts the names of the features.


def _glue(name, inputs, labels, metrics, primary, template=None, **options):
    return Task(
        f"glue/{name}", inputs, labels, metrics, primary, template=template or inputs, **options
    )


def _super_glue(name, inputs, labels, metrics, primary, **options):
    return Task(f"super_glue/{name}", inputs, labels, metrics, primary, **options)


_GLUE = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "matthews"),
    _glue("sst2", ("sentence",), ("negative", "positive"), *_ACCURACY),
    _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "f1"),
    _glue(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "f1",
    ),
    _glue("stsb", _SENTENCES, None, ("pearson", "spearman"), "spearman"),
    _glue(
        "mnli",
        _NLI,
        ("entailment", "neutral", "contradiction"),
        *_ACCURACY,
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
        template=_REVERSED_NLI,
    ),
    _glue("qnli", ("question", "sentence"), _ENTAILED, *_ACCURACY),
    _glue("rte", _SENTENCES, _ENTAILED, *_ACCURACY),
    # TensorFlow Datasets orders these classes the other way round than QNLI's and RTE's.
    _glue("wnli", _SENTENCES, _ENTAILED[::-1], *_ACCURACY),
)

# Of two metrics the F1 is the primary, as with MRPC and QQP: one example of CB in sixteen is
# neutral, which accuracy alone would let a model forget; MultiRC's exact match asks for several
# answers at once, and stays near 0 long after F1a has begun to rise; ReCoRD's F1 gives credit for
# a part of a name.
_SUPER_GLUE = (
    _super_glue(
        "boolq", ("question", "passage"), _BOOLEAN, *_ACCURACY, template=("passage", "question")
    ),
    _super_glue(
        "cb",
        _NLI,
        ("entailment", "contradiction", "neutral"),
        ("accuracy", "macro_f1"),
        "macro_f1",
        template=_REVERSED_NLI,
    ),
    _super_glue(
        "copa",
        ("premise", "choice"),
        _BOOLEAN,
        *_ACCURACY,
        features=("premise", "choice1", "choice2", "question"),
        form=forms.copa,
        grouping="one",
        template=("choice1", "choice2", "premise", "question"),
        words=("choice1", "choice2"),
    ),
    _super_glue(
        "multirc",
        ("question", "paragraph"),
        _BOOLEAN,
        ("f1a", "exact_match"),
        "f1a",
        features=("paragraph", "question", "answer"),
        form=forms.multirc,
        grouping="each",
        template=("question", "answer", "paragraph"),
    ),
    _super_glue(
        "record",
        ("query", "passage"),
        _BOOLEAN,
        ("token_f1", "exact_match"),
        "token_f1",
        features=("passage", "query", "entities", "answers"),
        form=forms.record,
        grouping="one",
    ),
    _super_glue("rte", _NLI, _ENTAILED, *_ACCURACY, template=_REVERSED_NLI),
    _super_glue(
        "wic",
        _SENTENCES,
        _BOOLEAN,
        *_ACCURACY,
        features=("word", *_SENTENCES, "start1", "start2", "end1", "end2"),
        form=forms.wic,
        template=(*_SENTENCES, "word"),
    ),
    # In "wsc.fixed", which T5 takes, the nouns have the case that they have in the text; they are
    # what a text-to-text model learns to write.
    _super_glue(
        "wsc",
        ("text", "span1_text"),
        _BOOLEAN,
        *_ACCURACY,
        dataset="super_glue/wsc.fixed",
        features=("text", "span1_text", "span1_index", "span2_text", "span2_index"),
        form=forms.wsc,
    ),
)

_ACCEPTABILITY = Task(
    "acceptability",
    ("sentence",),
    ("unacceptable", "acceptable"),
    ("matthews", "accuracy"),
    "matthews",
    template=("sentence",),
)

TASKS = {task.name: task for task in (_ACCEPTABILITY, *_GLUE, *_SUPER_GLUE)}

SUITES = {
    "glue": tuple(task.name for task in _GLUE),
    "superglue": tuple(task.name for task in _SUPER_GLUE),
}


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
    hint = " or ".join(map(repr, _near(str(task).lower())))
    hint = f" (did you mean {hint}?)" if hint else ""
    raise ValueError(f"`task` must be one of {list(TASKS)}{hint}. Received: task={task!r}")


def _near(name):
    """The tasks that may be meant: both of a short name that both suites have."""
    suite, _, name = name.rpartition("/")
    # Without the suite, which most have in common: it alone would make any two of them near.
    short = {known: known.rpartition("/")[2] for known in TASKS}
    among = [known for known in TASKS if known.rpartition("/")[0] == suite] if suite else []
    among = among or list(TASKS)
    name = name.partition(".")[0]  # "wsc.fixed" is what TensorFlow Datasets has of "wsc"
    nearest = difflib.get_close_matches(name, [short[known] for known in among], n=1)
    return [known for known in among if short[known] in nearest]
