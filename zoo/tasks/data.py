"""Examples of a task's split: generated, or through plain `tfds.load`."""

import socket
import sys
import urllib.request
from typing import NamedTuple

import numpy as np

from zoo.extras import quiet_datasets, require
from zoo.tasks import acceptability
from zoo.tasks.task import get

_HOST = "dl.fbaipublicfiles.com"  # of GLUE and SuperGLUE


class Examples(NamedTuple):
    """Labelled texts, row by row as a classifier reads them.

    Attributes:
        texts: A tuple of one or two lists of `str`, as the task has inputs.
        labels: A NumPy array, int32 classes or float32 scores; -1 where there is no label.
        groups: A NumPy int32 array, the number of each row's question from 0; the rows of one
            question stand together. `None` is every row by itself.
        ids: A list of what the submission calls each row's example: its number; of MultiRC
            `(paragraph, question, answer)`, of ReCoRD `(passage, query)`.
        candidates: A list of the answer that each row is about, where the metric compares texts
            (ReCoRD), else `None`.
        answers: A list of the right answers of each question, tuples of `str`, where there are
            candidates, else `None`.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    groups: np.ndarray | None = None
    ids: list | None = None
    candidates: list[str] | None = None
    answers: list[tuple[str, ...]] | None = None


def load(task, split, data_dir=None):
    """Loads one split of a task.

    Args:
        task: A `Task` or the name of one.
        split: One of `task.splits`.
        data_dir: The TensorFlow Datasets directory; `None` for its default one. Unused by
            `acceptability`, which is generated.

    Returns:
        The `Examples`, in the order that `tfds.load` gives; of a grouped task the questions are,
        by the first row of each.

    Raises:
        ValueError: If the task or the split is unknown, or the split was not prepared.
        FileNotFoundError: If the data is neither there nor can be downloaded.
        ImportError: If TensorFlow Datasets is not installed.
    """
    task = get(task)
    examples = features(task, split, data_dir)
    rows = [row for example in examples for row in task.rows(example)]
    groups, order = group([row.id for row in rows], task)
    rows = [rows[n] for n in order]
    dtype = "float32" if task.labels is None else "int32"
    candidates = answers = None
    if "answers" in task.features:
        candidates = [row.candidate for row in rows]
        right = {example["idx"]: example["answers"] for example in examples}
        answers = [right[row.id] for n, row in enumerate(rows) if not n or row.id != rows[n - 1].id]
    return Examples(
        tuple([row.texts[n] for row in rows] for n in range(len(task.inputs))),
        np.array([row.label for row in rows], dtype=dtype),
        groups,
        [row.id for row in rows],
        candidates,
        answers,
    )


def group(ids, task):
    """Brings the rows of each question together.

    Args:
        ids: A list of the rows' ids, see `Examples`.
        task: A `Task`.

    Returns:
        Tuple of an int32 array, the questions of the ordered rows, and the order, a list of
        indices. Without groups every row stays where it is.
    """
    if not task.grouped:
        return np.arange(len(ids), dtype="int32"), list(range(len(ids)))
    keys = [id[:2] if isinstance(id, tuple) else id for id in ids]
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    answer = [id[2] if isinstance(id, tuple) and len(id) > 2 else 0 for id in ids]
    order = sorted(range(len(ids)), key=lambda n: (number[keys[n]], answer[n]))
    return np.array([number[keys[n]] for n in order], dtype="int32"), order


def features(task, split, data_dir=None):
    """Loads the examples of a split as TensorFlow Datasets has them.

    Args:
        task: A `Task` or the name of one.
        split: One of `task.splits`.
        data_dir: As in `load`.

    Returns:
        A list of dicts of the task's features, `label` (but for ReCoRD) and `idx`: texts as `str`,
        several texts as a tuple of `str`, an `idx` of several numbers as a tuple.

    Raises:
        ValueError, FileNotFoundError, ImportError: As `load`.
    """
    task = get(task)
    if split not in task.splits:
        raise ValueError(
            f"`split` must be one of {list(task.splits)} for {task.name!r}. "
            f"Received: split={split!r}"
        )
    if task.name == "acceptability":
        rows = acceptability.generate()[split]
        return [
            {"sentence": row.sentence, "label": row.label, "idx": n} for n, row in enumerate(rows)
        ]
    table = _table(task, split, data_dir)
    names = [*task.features, *(["label"] if "label" in table else []), "idx"]
    columns = [_column(table[name]) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _column(values):
    """A column as a list of `str`, of tuples of `str`, of numbers or of tuples of numbers."""
    if isinstance(values, dict):
        known = ("paragraph", "passage", "question", "query", "answer")
        return list(zip(*(_column(values[name]) for name in known if name in values), strict=True))
    values = np.asarray(values)
    if values.ndim == 2:  # As many texts as the longest has; the others are filled up with b"".
        return [tuple(text.decode() for text in row if text) for row in values]
    if values.dtype.kind in "SO":
        return [text.decode() for text in values]
    return values.tolist()


def _table(task, split, data_dir):
    """The whole split as one dict of columns."""
    tfds = require("tensorflow_datasets")

    def through_tfds(download):
        with quiet_datasets(bars=sys.stderr.isatty()):  # a download may take minutes
            return tfds.load(
                task.dataset, split=split, data_dir=data_dir, download=download, batch_size=-1
            )

    try:
        return through_tfds(download=False)
    except AssertionError:  # What TFDS raises where nothing is prepared.
        pass
    except ValueError as error:
        if "Unknown split" not in str(error):
            raise
        raise ValueError(
            f"`split` must be one that was prepared for {task.name!r}; prepare it again from a "
            f"folder that has the raw file of this one. Received: split={split!r}, "
            f"data_dir={_text(data_dir)}"
        ) from error
    try:
        if not urllib.request.getproxies():
            # Without a network TFDS would retry for minutes; a look-up fails at once.
            socket.getaddrinfo(_HOST, 443)
        return through_tfds(download=True)
    except Exception as error:  # Whatever a download may raise.
        raise FileNotFoundError(
            f"`data_dir` must hold {task.name!r}, which could not be downloaded either; run "
            "`python -m zoo prepare --from DIR --data-dir OUT` on a folder DIR of the official "
            f"raw files and pass OUT as `data_dir`. Received: data_dir={_text(data_dir)}"
        ) from error


def _text(path):
    return None if path is None else repr(str(path))
