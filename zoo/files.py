"""Folders that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


def require_absent(folder):
    """Refuses a folder that is there.

    Raises:
        ValueError: if it is.
    """
    if Path(folder).exists():
        raise ValueError(f"`folder` must not be there yet. Received: folder={str(folder)!r}")


@contextlib.contextmanager
def written_whole(folder):
    """A folder to write to, beside the one it becomes when nothing failed.

    Args:
        folder: path; it must not be there yet.

    Raises:
        ValueError: if the folder is there.
    """
    folder = Path(folder)
    require_absent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        beside.chmod(0o755)
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
