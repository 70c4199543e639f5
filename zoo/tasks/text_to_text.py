"""Tasks as text to text: T5's templates and words.

The forms are those of T5 (Raffel et al., 2020, https://arxiv.org/abs/1910.10683, section 2.4 and
appendix D), as its released code has them (https://github.com/google-research/
text-to-text-transfer-transformer, `t5/data/preprocessors.py`): the name of the task, the features
by name, and a word for the label. Four tasks have a form of their own:

* STS-B: the score, rounded to the nearest 0.2.
* MultiRC: HTML is left out.
* ReCoRD: an entity. To train, an example is there once for each right one.
* WSC: the noun that the *pronoun* is. To train, only examples whose noun is right can be used.

One departure: to score, ReCoRD's examples are here once, where T5 repeats them and later counts
the first of each. WNLI has the plain form here; T5 neither trains on it nor scores it so, but
takes a model of WSC.
"""

from typing import NamedTuple

import numpy as np

from zoo.tasks import data, forms, spans
from zoo.tasks.task import get

UNKNOWN = "<unk>"  # T5's target where there is no label.


class TextRow(NamedTuple):
    """What a text-to-text model reads and writes.

    Attributes:
        input: The text to read.
        target: The text to write.
        label: The class or the score, -1 for none.
        id: What the submission calls the example.
        answers: The texts that are right, where the metric compares texts.
    """

    input: str
    target: str
    label: float
    id: int | tuple[int, ...]
    answers: tuple[str, ...] = ()


class TextExamples(NamedTuple):
    """Inputs and targets, row by row.

    Attributes:
        inputs: A list of `str`.
        targets: A list of `str`; "<unk>" where there is no label.
        labels: A NumPy array, int32 classes or float32 scores; -1 where there is no label.
        groups: A NumPy int32 array, the number of each row's question from 0.
        ids: A list of what the submission calls each row's example, see `zoo.tasks.Examples`.
        answers: A list of the right answers of each row, tuples of `str`; those of WSC are its
            noun, of ReCoRD all right entities, of others there are none.
    """

    inputs: list[str]
    targets: list[str]
    labels: np.ndarray
    groups: np.ndarray
    ids: list
    answers: list[tuple[str, ...]]


def load_text(task, split, data_dir=None):
    """Loads one split of a task as text to text.

    Args:
        task: A `Task` or the name of one.
        split: One of `task.splits`. Of "train" there are the rows to train on.
        data_dir: The TensorFlow Datasets directory; `None` for its default one.

    Returns:
        The `TextExamples`.

    Raises:
        ValueError, FileNotFoundError, ImportError: As `zoo.tasks.load`.
    """
    task = get(task)
    training = split == "train"
    rows = [
        row
        for features in data.features(task, split, data_dir)
        for row in text_to_text(task, features, training)
    ]
    groups, order = data.group([row.id for row in rows], task)
    rows = [rows[n] for n in order]
    return TextExamples(
        [row.input for row in rows],
        [row.target for row in rows],
        np.array([row.label for row in rows], dtype="int32" if task.words else "float32"),
        groups,
        [row.id for row in rows],
        [row.answers for row in rows],
    )


def text_to_text(task, features, training=False):
    """What a text-to-text model reads and writes of an example.

    Args:
        task: A `Task` or the name of one.
        features: A dict of the task's features, `label` and `idx`, see `zoo.tasks.data.features`.
        training: Whether to train on: of ReCoRD a row for each right entity, of WSC none where
            the noun is wrong.

    Returns:
        A list of `TextRow`s, of one but for these two.
    """
    task = get(task)
    if task.name in _FORMS:
        return _FORMS[task.name](features, training)
    label = features["label"]
    parts = [task.name.rpartition("/")[2]]
    for name in task.template:
        parts += [f"{name}:", features[name]]
    text = " ".join(parts)
    if task.name == "super_glue/multirc":
        text = forms.without_markup(text)
    if not task.words:
        target = UNKNOWN if label < 0 else _rounded(label)
    else:
        target = UNKNOWN if label < 0 else task.words[label]
    return [TextRow(text, target, label, features["idx"])]


def _rounded(score):
    """The nearest of 0.0, 0.2 ... 5.0, halves to the even fifth, in float32 as T5 has it."""
    return f"{np.rint(np.float32(score) * np.float32(5)) / np.float32(5):.1f}"


def _record(features, training):
    passage = forms.without_highlights(features["passage"])
    entities = ", ".join(features["entities"])
    text = f"record query: {features['query']} entities: {entities} passage: {passage}"
    answers = features["answers"]
    label = 1 if answers else -1
    targets = answers[: None if training else 1] or (UNKNOWN,)
    return [TextRow(text, target, label, features["idx"], answers) for target in targets]


def _wsc(features, training):
    label, noun = features["label"], features["span1_text"]
    if training and label != 1:
        return []
    text = features["text"].rstrip()
    place = spans.find(text, features["span2_text"], features["span2_index"])
    if place is not None:
        start, end = place
        after = text[end:]
        space = " " if after and not after[0].isspace() else ""  # T5 has words between spaces.
        text = f"{text[:start]}*{features['span2_text']}*{space}{after}"
    return [TextRow(f"wsc: {text}", noun, label, features["idx"], (noun,))]


_FORMS = {"super_glue/record": _record, "super_glue/wsc": _wsc}
