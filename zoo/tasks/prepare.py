"""From the official raw GLUE files to directories that plain `tfds.load` opens, offline."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from zoo.extras import quiet_datasets, require
from zoo.tasks import raw
from zoo.tasks.task import TASKS, get


class Prepared(NamedTuple):
    """What `prepare` did; as a string it is the summary to print.

    Attributes:
        task: The name of the task.
        directory: Where `tfds.load` finds it.
        rows: A dict from split to its number of rows.
        fresh: False where it had been prepared before and nothing was done.
        missing: The test splits that the raw files do not have.
    """

    task: str
    directory: str
    rows: dict[str, int]
    fresh: bool
    missing: tuple[str, ...]

    def __str__(self):
        verb = "prepared" if self.fresh else "already prepared, nothing done"
        lines = [f"{self.task}: {verb} in {self.directory}"]
        lines += [f"  {split}: {rows:,} rows" for split, rows in self.rows.items()]
        lines += [f"  {split}: left out, no raw file" for split in self.missing]
        return "\n".join(lines)


class _LocalFiles:
    """A download manager for TFDS's GLUE builder whose downloads are all here already."""

    downloaded_size = 0

    def __init__(self, folder, scratch):
        self._folder = folder
        self._scratch = scratch

    def download_and_extract(self, url):
        """The folder that holds `CoLA/` and so on, whichever of them is asked for."""
        del url
        return str(self._folder)

    def download(self, urls):
        """The three files of MRPC, under the builder's own names for them."""
        return {name: str(self._scratch / name) for name in urls}


@quiet_datasets()
def prepare(task, source, data_dir, force=False):
    """Prepares a GLUE task from its official raw files.

    All files are checked before anything is written, and the finished directory is moved into
    place in one step: whatever goes wrong, `data_dir` stays as it was.

    Args:
        task: A GLUE `Task` or the name of one.
        source: The folder that holds the official raw files as `CoLA/train.tsv` and so on.
        data_dir: The TensorFlow Datasets directory to write to.
        force: Prepares again what had been prepared before.

    Returns:
        A `Prepared`.

    Raises:
        ValueError: If the task has no raw files, or they are not as in the official ones, or
            `data_dir` cannot be written to.
        ImportError: If TensorFlow Datasets is not installed.
    """
    task = get(task)
    if task.name == "acceptability":
        raise ValueError(
            "`task` must be a GLUE task, for this one is generated and needs no preparing. "
            f"Received: task={task.name!r}"
        )
    tfds = require("tensorflow_datasets")
    data_dir = Path(data_dir).expanduser()
    present = tfds.builder(task.name, data_dir=str(data_dir))
    if present.is_prepared() and not force:
        rows = {split: info.num_examples for split, info in present.info.splits.items()}
        return _prepared(task, present.data_dir, rows, fresh=False)
    _check_folder(data_dir)
    source = Path(source).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        rows = raw.check(present.builder_config, source, scratch)
        files = _LocalFiles(source, Path(scratch))
        with _staging(data_dir) as stage:
            built = _build(tfds.builder(task.name, data_dir=str(stage)), files, rows)
            _move(built, Path(present.data_dir), stage / "replaced")
    return _prepared(task, present.data_dir, rows, fresh=True)


@quiet_datasets()
def tasks_in(source):
    """The GLUE tasks that a folder has training data of, and those that it has not.

    Args:
        source: The folder that holds the official raw files as `CoLA/train.tsv` and so on.

    Returns:
        Tuple of the list of those that it has, and a dict from the name of each other one to the
        file that is missing.

    Raises:
        ValueError: If there are none.
        ImportError: If TensorFlow Datasets is not installed.
    """
    tfds = require("tensorflow_datasets")
    found, left_out = [], {}
    for name in TASKS:
        if name != "acceptability":
            folder = tfds.builder(name).builder_config.data_dir
            paths = [Path(source).expanduser() / folder / file for file in raw.TRAINING_FILES]
            if any(path.is_file() for path in paths):
                found.append(name)
            else:
                left_out[name] = f"{folder}/{raw.TRAINING_FILES[0]}"
    if not found:
        raise ValueError(
            "`source` must hold official GLUE files such as CoLA/train.tsv. "
            f"Received: source={str(source)!r}"
        )
    return found, left_out


def _check_folder(data_dir):
    there = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            "`data_dir` must be a folder that can be written to. "
            f"Received: data_dir={str(data_dir)!r}"
        )


def _prepared(task, directory, rows, fresh):
    missing = tuple(split for split in task.splits if split not in rows)
    return Prepared(task.name, str(directory), rows, fresh, missing)


@contextlib.contextmanager
def _staging(data_dir):
    """A folder on the same file system as `data_dir`, which TFDS does not look into."""
    absent = [path for path in (data_dir, *data_dir.parents) if not path.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=data_dir) as stage:
            yield Path(stage)
    except BaseException:
        for path in absent:
            with contextlib.suppress(OSError):  # Not empty: someone else uses it by now.
                path.rmdir()
        raise


def _build(builder, files, rows):
    """Lets TFDS's own builder write the splits that have raw files; returns their folder."""
    split_generators = builder._split_generators
    builder._make_download_manager = lambda **_: files
    builder._split_generators = lambda manager: [
        split for split in split_generators(manager) if str(split.name) in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # It would announce the staging folder.
        builder.download_and_prepare()
    written = {split: info.num_examples for split, info in builder.info.splits.items()}
    if written != rows:
        raise ValueError(
            "`source` must give as many rows as TensorFlow Datasets reads from it. "
            f"Received: {rows} in the raw files, {written} read"
        )
    return Path(builder.data_dir)


def _move(built, target, replaced):
    """Moves the finished folder into place; an older one survives if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, replaced)
    try:
        os.replace(built, target)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, target)
        raise
