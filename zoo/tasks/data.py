"""Examples of a task's split: generated, or through plain `tfds.load`."""

import socket
import sys
import urllib.request
from typing import NamedTuple

import numpy as np

from zoo.extras import quiet_datasets, require
from zoo.tasks import acceptability
from zoo.tasks.task import get

_GLUE_HOST = "dl.fbaipublicfiles.com"


class Examples(NamedTuple):
    """Labelled texts.

    Attributes:
        texts: A tuple of one or two lists of `str`, as the task has inputs.
        labels: A NumPy array, int32 classes or float32 scores; -1 where there is no label.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray


def load(task, split, data_dir=None):
    """Loads one split of a task.

    Args:
        task: A `Task` or the name of one.
        split: One of `task.splits`.
        data_dir: The TensorFlow Datasets directory; `None` for its default one. Unused by
            `acceptability`, which is generated.

    Returns:
        The `Examples`, in the order that `tfds.load` gives.

    Raises:
        ValueError: If the task or the split is unknown, or the split was not prepared.
        FileNotFoundError: If the data is neither there nor can be downloaded.
        ImportError: If TensorFlow Datasets is not installed.
    """
    task = get(task)
    if split not in task.splits:
        raise ValueError(
            f"`split` must be one of {list(task.splits)} for {task.name!r}. "
            f"Received: split={split!r}"
        )
    if task.name == "acceptability":
        rows = acceptability.generate()[split]
        texts = ([row.sentence for row in rows],)
        return Examples(texts, np.array([row.label for row in rows], dtype="int32"))
    table = _table(task, split, data_dir)
    texts = tuple([text.decode() for text in np.asarray(table[name])] for name in task.inputs)
    dtype = "float32" if task.labels is None else "int32"
    return Examples(texts, np.asarray(table["label"]).astype(dtype))


def _table(task, split, data_dir):
    """The whole split as one dict of columns."""
    tfds = require("tensorflow_datasets")

    def through_tfds(download):
        with quiet_datasets(bars=sys.stderr.isatty()):  # a download may take minutes
            return tfds.load(
                task.name, split=split, data_dir=data_dir, download=download, batch_size=-1
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
            socket.getaddrinfo(_GLUE_HOST, 443)
        return through_tfds(download=True)
    except Exception as error:  # Whatever a download may raise.
        raise FileNotFoundError(
            f"`data_dir` must hold {task.name!r}, which could not be downloaded either; run "
            "`python -m zoo prepare --from DIR --data-dir OUT` on a folder DIR of the official "
            f"GLUE files and pass OUT as `data_dir`. Received: data_dir={_text(data_dir)}"
        ) from error


def _text(path):
    return None if path is None else repr(str(path))
