"""What the checks of GLUE's and SuperGLUE's raw files share: which file, and what is wrong."""

from pathlib import Path
from typing import NamedTuple

PARTIAL = "partial"  # The sub-folder of files that are not the official ones.


class RawFile(NamedTuple):
    """A checked file.

    Attributes:
        path: Where it is, or a copy without repeated lines.
        rows: How many examples it gives.
        partial: Whether it is not the official one.
        repeated: How many lines were left out because they are there before.
    """

    path: Path
    rows: int
    partial: bool = False
    repeated: int = 0


def folder_of(source, name, suite):
    """The folder of a task.

    Raises:
        ValueError: If it is not there.
    """
    folder = Path(source) / name
    if not folder.is_dir():
        raise ValueError(
            f"`source` must hold the folder {name!r} of the official {suite} files. "
            f"Received: source={str(source)!r}"
        )
    return folder


def find(folder, name, partial):
    """The file of a split: the official one, else one of a similar name among the partial ones.

    Args:
        folder: The folder of the task.
        name: The official name, as "train.tsv"; "partial/train_1st_half.tsv" is similar.
        partial: Whether partial files will do.

    Returns:
        Tuple of the path, or `None`, and whether it is partial.

    Raises:
        ValueError: If several partial files could be meant.
    """
    if (folder / name).is_file():
        return folder / name, False
    stem, _, suffix = name.rpartition(".")
    found = sorted((folder / PARTIAL).glob(f"{stem}*.{suffix}")) if partial else []
    if len(found) > 1:
        raise ValueError(
            f"`source` must hold one partial file for {name!r}. "
            f"Received: {found[0].name!r} and {found[1].name!r} in {str(folder / PARTIAL)!r}"
        )
    return (found[0], True) if found else (None, False)


def missing(folder, name, suite):
    """The error of a file that is not there."""
    return ValueError(
        f"`source` must hold the file {name!r} of the official {suite} files. "
        f"Received: a folder {str(folder)!r} without it"
    )


def wrong(path, line, expected, received):
    """The error of a line."""
    return ValueError(
        f"Line {line} of {str(path)!r} in `source` must have {expected}. Received: {received}"
    )


def check(folder, names, partial, suite, read):
    """Finds and checks the files of the splits.

    Training and test files may be missing; the validation files too if there is partial data
    to train on.

    Args:
        folder: The folder of the task.
        names: A dict from split to the official name of its file.
        partial: Whether partial files will do.
        suite: "GLUE" or "SuperGLUE".
        read: A function that checks one file, of its path and whether labels are needed; it
            returns a `RawFile`.

    Returns:
        A dict from split to its `RawFile`.

    Raises:
        ValueError: If a file is missing or not as it should be.
    """
    found = {split: find(folder, name, partial) for split, name in names.items()}
    labelled = [split for split in names if not split.startswith("test")]
    some = partial and any(found[split][0] for split in labelled)
    for split in labelled:
        if split != "train" and not some and found[split][0] is None:
            raise missing(folder, names[split], suite)
    return {
        split: read(path, split in labelled)._replace(partial=from_partial)
        for split, (path, from_partial) in found.items()
        if path is not None
    }
