"""Folders that are written whole or not at all, and files whose errors name them."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

# Bytes of JSON: a parsed text may need 30 times its size. No file of settings, index or tokenizer
# of the supported families is half as large.
MOST = 16 * 2**20
KINDS = {dict: "a JSON object", list: "a JSON list", object: "JSON"}


def is_file(path):
    """Whether a file is there.

    Returns:
        `True` for a file or a link to one; `False` if nothing has that name.

    Raises:
        ValueError: if the name belongs to a folder, a broken link or a device, which an optional
            file must not be: the file would be taken for missing.
    """
    path = Path(path)
    if os.path.isfile(path):  # unlike `Path.is_file` for a name that the file system refuses, too
        return True
    if os.path.lexists(path):
        kind = "folder" if path.is_dir() else "broken link" if path.is_symlink() else "device"
        raise ValueError(f"{path.name!r} must be a file. Received: a {kind}, {str(path)!r}")
    return False


def parse_json(text):
    """Parses JSON, as `str` or as UTF-8 in `bytes`.

    Raises:
        ValueError: if the text is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path, kind=dict):
    """Reads a JSON file.

    Args:
        path: path of the file.
        kind: `dict`, `list` or `object`, the type that the content must have.

    Raises:
        ValueError: if there is no such file, the file is larger than 16 MiB, or its content is not
            JSON of that kind. The error names the file.
    """
    path = Path(path)
    if not is_file(path):
        raise ValueError(f"{path.name!r} must be a file. Received: nothing, at {str(path)!r}")
    with path.open("rb") as file:
        text = file.read(MOST + 1)
    try:
        if len(text) > MOST:
            raise ValueError(f"it is larger than {MOST:,} bytes")
        content = parse_json(text)
        if not isinstance(content, kind):
            raise ValueError(f"it is of type {type(content).__name__}")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path.name!r} must hold {KINDS[kind]}. Received: {str(path)!r}, but {reason}"
        ) from error
    return content


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
