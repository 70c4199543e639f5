"""From official raw files to directories that plain `tfds.load` opens, offline."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from zoo.extras import quiet_datasets, require
from zoo.files import is_file, read_json
from zoo.tasks import raw, raw_files, raw_superglue
from zoo.tasks.task import SUITES, get

# In a prepared folder: what of it is not as in the official files.
_REMARKS = "raw_files.json"


class Prepared(NamedTuple):
    """What `prepare` did; as a string it is the summary to print.

    Attributes:
        task: The name of the task.
        directory: Where `tfds.load` finds it.
        rows: A dict from split to its number of rows.
        fresh: False where it had been prepared before and nothing was done.
        missing: The splits that the raw files do not have.
        partial: The splits that are not from the official files. What is measured with them is
            to be called partial.
        repeated: A dict from split to how many lines were left out because they repeat others.
    """

    task: str
    directory: str
    rows: dict[str, int]
    fresh: bool
    missing: tuple[str, ...]
    partial: tuple[str, ...] = ()
    repeated: dict[str, int] = {}

    def __str__(self):
        verb = "prepared" if self.fresh else "already prepared, nothing done"
        lines = [f"{self.task}: {verb} in {self.directory}"]
        for split, rows in self.rows.items():
            mark = " (partial: not the official file)" if split in self.partial else ""
            if split in self.repeated:
                mark += f" (left out: {self.repeated[split]} repeated)"
            lines.append(f"  {split}: {rows:,} rows{mark}")
        for split in self.missing:
            note = ", so it can be evaluated but not trained on" if split == "train" else ""
            lines.append(f"  {split}: left out, no raw file{note}")
        return "\n".join(lines)


class _LocalFiles:
    """A download manager for TFDS's builders whose downloads are all here already."""

    downloaded_size = 0

    def __init__(self, scratch):
        self._scratch = scratch

    def download_and_extract(self, url):
        """Some folder: each split is told its file later."""
        del url
        return str(self._scratch)

    def download(self, urls):
        """The three files of MRPC, under the builder's own names for them."""
        return {name: str(self._scratch / name) for name in urls}


@quiet_datasets()
def prepare(task, source, data_dir, force=False, partial=False):
    """Prepares a task of GLUE or SuperGLUE from its official raw files.

    All files are checked before anything is written, and the finished directory is moved into
    place in one step: whatever goes wrong, `data_dir` stays as it was.

    Args:
        task: A `Task` or the name of one.
        source: The folder that holds the official raw files as `CoLA/train.tsv` or
            `BoolQ/train.jsonl` and so on.
        data_dir: The TensorFlow Datasets directory to write to.
        force: Prepares again what had been prepared before.
        partial: Takes files such as `MNLI/partial/train_sample.tsv` where the official ones are
            not there. `Prepared.partial` says so, now and whenever it is asked for again.

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
            "`task` must be a GLUE task or one of SuperGLUE: this one is generated, without raw "
            f"files. Received: task={task.name!r}"
        )
    present = prepared_in(task, data_dir)
    if present is not None and not force:
        return present
    tfds = require("tensorflow_datasets")
    data_dir = Path(data_dir).expanduser()
    _check_folder(data_dir)
    target = tfds.builder(task.dataset, data_dir=str(data_dir))
    source = Path(source).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        files = _check(task, target.builder_config, source, scratch, partial)
        with _staging(data_dir, Path(target.data_dir)) as stage:
            builder = tfds.builder(task.dataset, data_dir=str(stage))
            built = _build(builder, _LocalFiles(Path(scratch)), files)
            _remark(built, files)
            _move(built, Path(target.data_dir), stage / "replaced")
    return prepared_in(task, data_dir)._replace(fresh=True)


@quiet_datasets()
def prepared_in(task, data_dir=None):
    """What a TensorFlow Datasets directory holds of a task.

    Args:
        task: A `Task` or the name of one.
        data_dir: The directory; `None` for the default one.

    Returns:
        A `Prepared`, or `None` if the task is not prepared there, as `acceptability` never is.

    Raises:
        ImportError: If TensorFlow Datasets is not installed.
    """
    task = get(task)
    if task.name == "acceptability":
        return None
    data_dir = None if data_dir is None else str(Path(data_dir).expanduser())
    builder = require("tensorflow_datasets").builder(task.dataset, data_dir=data_dir)
    if not builder.is_prepared():
        return None
    rows = {split: info.num_examples for split, info in builder.info.splits.items()}
    missing = tuple(split for split in task.splits if split not in rows)
    found = Prepared(task.name, str(builder.data_dir), rows, False, missing)
    path = Path(builder.data_dir) / _REMARKS
    if not is_file(path):
        return found
    remarks = read_json(path)
    partial, repeated = remarks.get("partial"), remarks.get("repeated")
    if not isinstance(partial, list) or not isinstance(repeated, dict):
        raise ValueError(
            f"{_REMARKS!r} must have a list `partial` and an object `repeated`. Received: {path}"
        )
    return found._replace(partial=tuple(partial), repeated=repeated)


def validation_splits(task, data_dir=None):
    """The validation splits to measure a task on: all, or of partial data those that are there.

    Args:
        task: A `Task` or the name of one.
        data_dir: The TensorFlow Datasets directory; `None` for the default one.

    Returns:
        A tuple of names, and a tuple of the splits that are not the official ones.

    Raises:
        ImportError: If TensorFlow Datasets is not installed.
    """
    task = get(task)
    prepared = prepared_in(task, data_dir)
    if prepared is None or not prepared.partial:
        return task.validation, ()
    there = tuple(split for split in task.validation if split in prepared.rows)
    return there or task.validation, prepared.partial


@quiet_datasets()
def tasks_in(source, partial=False):
    """The tasks that a folder has labelled data of, and those that it has not.

    A task's files tell which suite it is of: `RTE/train.tsv` is GLUE's and `RTE/train.jsonl`
    SuperGLUE's.

    Args:
        source: The folder that holds the official raw files, see `prepare`.
        partial: As in `prepare`.

    Returns:
        Tuple of the list of those that it has, and a dict from the name of each other one of the
        suites that it has tasks of to the file that is missing.

    Raises:
        ValueError: If there are none.
        ImportError: If TensorFlow Datasets is not installed.
    """
    tfds = require("tensorflow_datasets")
    source = Path(source).expanduser()
    found, left_out = [], {}
    for suite in SUITES.values():
        absent = {}
        for name in suite:
            folder, names = _names(tfds.builder(get(name).dataset).builder_config)
            if any(raw_files.find(source / folder, file, partial)[0] for file in names):
                found.append(name)
            else:
                absent[name] = f"{folder}/{names[0]}"
                if any(raw_files.find(source / folder, file, True)[0] for file in names):
                    absent[name] += ", but files for the option `partial`"
        if len(absent) < len(suite):
            left_out |= absent
    if not found:
        raise ValueError(
            "`source` must hold official files of GLUE or SuperGLUE, such as CoLA/train.tsv or "
            f"CB/train.jsonl. Received: source={str(source)!r}"
        )
    return found, left_out


def _names(config):
    """The folder of a task and the names of its labelled files."""
    if hasattr(config, "data_dir"):
        names, folder, more = raw.names(config), config.data_dir, raw.OTHER_NAMES.get(config.name)
    else:
        names, folder, more = raw_superglue.FILES, raw_superglue.folder_name(config), None
    labelled = [file for split, file in names.items() if not split.startswith("test")]
    return folder, labelled + list(more or ())


def _check(task, config, source, scratch, partial):
    if task.name in SUITES["glue"]:
        return raw.check(config, source, scratch, partial)
    return raw_superglue.check(config, source, scratch, partial)


def _remark(built, files):
    partial = [split for split, file in files.items() if file.partial]
    repeated = {split: file.repeated for split, file in files.items() if file.repeated}
    if partial or repeated:
        remarks = {"partial": partial, "repeated": repeated}
        (built / _REMARKS).write_text(json.dumps(remarks) + "\n")


def _check_folder(data_dir):
    there = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            "`data_dir` must be a folder that can be written to. "
            f"Received: data_dir={str(data_dir)!r}"
        )


@contextlib.contextmanager
def _staging(data_dir, target):
    """A folder on the same file system as `data_dir`, which TFDS does not look into.

    If what is done with it fails, folders above `target` that were not there are removed.
    """
    absent = [path for path in target.parents if not path.exists()]
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=data_dir) as stage:
            yield Path(stage)
    except BaseException:
        for path in absent:
            with contextlib.suppress(OSError):  # Not empty: someone else uses it by now.
                path.rmdir()
        raise


def _build(builder, manager, files):
    """Lets TFDS's own builder write the splits that have raw files; returns their folder."""
    split_generators = builder._split_generators

    def with_files(manager):
        splits = [split for split in split_generators(manager) if str(split.name) in files]
        for split in splits:
            split.gen_kwargs["data_file"] = str(files[str(split.name)].path)
        return splits

    builder._make_download_manager = lambda **_: manager
    builder._split_generators = with_files
    with contextlib.redirect_stdout(io.StringIO()):  # It would announce the staging folder.
        builder.download_and_prepare()
    rows = {split: file.rows for split, file in files.items()}
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
