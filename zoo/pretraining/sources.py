"""Documents of text files and of TensorFlow Datasets, from any place on.

A place in a source is a number: bytes of the text of a file, examples of a data set.
"""

import contextlib
import glob
import gzip
import io
import os
import zlib

from zoo.files import parse_json
from zoo.pretraining import datasets
from zoo.pretraining.datasets import TFDS

LINES = (".txt", ".txt.gz")
OBJECTS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
HEAD = 2**20  # bytes of a gzipped file that tell how well it is packed


def sources(patterns, argument="corpus", data_dir=None):
    """The files and data sets that patterns name, each once.

    Args:
        patterns: one or a list of paths or glob patterns of files, of which each line is a document
            (`.txt`) or an object with one in `text` (`.jsonl`, `.json`), either gzipped or not; or
            "tfds:NAME", or "tfds:NAME:SPLIT", a data set of TensorFlow Datasets with a feature
            `text`, "tfds:c4/en", say, that is prepared; nothing is downloaded.
        argument: what errors call the patterns.
        data_dir: folder of TensorFlow Datasets; `None`: its default one.

    Returns:
        List of strings: whole paths, sorted, then data sets, "tfds:FOLDER:SPLIT", sorted.

    Raises:
        ValueError: if a pattern names nothing, or a file of another kind.
        ImportError: if TensorFlow Datasets is not installed, and one is named.
    """
    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
    files, prepared = {}, set()
    for pattern in map(os.fspath, patterns):
        if pattern.startswith(TFDS):
            prepared.add(datasets.found(pattern, argument, data_dir))
            continue
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
        if not found:
            raise ValueError(f"`{argument}` must name files that are there. Received: {pattern}")
        for file in sorted(found):
            if not file.endswith(LINES + OBJECTS):
                raise ValueError(
                    f"`{argument}` must name files that end in {', '.join(LINES + OBJECTS)}. "
                    f"Received: {file}"
                )
            files.setdefault(os.path.realpath(file), os.path.abspath(file))
    if not files and not prepared:
        raise ValueError(f"`{argument}` must name one file or more. Received: {patterns!r}")
    return sorted(files.values()) + sorted(prepared)


def check_apart(corpus, heldout):
    """Raises a ValueError if a source, or examples of a data set, are in both lists."""
    trained_on = {os.path.realpath(name) for name in corpus}
    both = [
        name
        for name in heldout
        if os.path.realpath(name) in trained_on
        or (name.startswith(TFDS) and any(datasets.overlap(name, other) for other in corpus))
    ]
    if both:
        raise ValueError(
            f"`heldout` must not be what a model is trained on. Received: {', '.join(both)}"
        )


def described(argument, names):
    """What tells one list of sources from another, wherever it is kept, for the settings of a run.

    Returns:
        Dictionary of names, below the folder that all files are in, to bytes of files on disk or
        examples of data sets; each name begins with the argument's.
    """
    files = [name for name in names if not name.startswith(TFDS)]
    folder = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    found = {os.path.relpath(file, folder): os.path.getsize(file) for file in files}
    found |= {datasets.title(name): datasets.size(name)[1] for name in names[len(files) :]}
    return {f"{argument} {name}": amount for name, amount in found.items()}


def documents(source, first=0):
    """The texts of one source, but for empty ones, each with the place after it.

    Args:
        source: of `sources`.
        first: place to begin at.

    Yields:
        Pairs of a string and an integer.

    Raises:
        ValueError: if the source cannot be read, or is not of the form that it should be.
    """
    if source.startswith(TFDS):
        yield from datasets.documents(source, first)
        return
    with _explained(source), _opened(source) as file:
        file.seek(first)
        for line in file:
            begin, first = first, first + len(line)
            text = _text(source, line, begin)
            if text.strip():
                yield text, first


def _opened(file):
    return gzip.open(file) if file.endswith(".gz") else open(file, "rb")


@contextlib.contextmanager
def _explained(file):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"A text must be readable. Received: {file}: {error}") from error


def _text(file, line, begin):
    """The document in a line, which begins at a place."""
    try:
        text = line.decode("utf-8").strip("\r\n")
        if text.strip() and file.endswith(OBJECTS):
            text = parse_json(text)["text"]
            if not isinstance(text, str):
                raise TypeError(f"`text` is {text!r}")
        # JSON can spell halves of letters, which no tokenizer takes.
        return text.encode("utf-8", "replace").decode("utf-8")
    except (ValueError, KeyError, TypeError) as error:
        what = "an object with a string `text`" if file.endswith(OBJECTS) else "UTF-8"
        raise ValueError(
            f"Each line must be {what}. Received: {file}, line {_number(file, begin)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _number(file, begin):
    """Number of the line that begins at a place, from 1."""
    number = 1
    with _opened(file) as lines:
        while lines.tell() < begin:
            lines.readline()
            number += 1
    return number


def size(source):
    """How much text a source has, and the place of its end, as one can know before it is read.

    Of a gzipped file it is an estimate, by how well its first megabyte is packed.

    Returns:
        Pair of bytes and a place, at least 1 each.
    """
    if source.startswith(TFDS):
        return datasets.size(source)
    found = max(1, _unpacked(source))
    return found, found


def _unpacked(file):
    on_disk = os.path.getsize(file)
    if not file.endswith(".gz"):
        return on_disk
    with open(file, "rb") as packed:
        head = packed.read(HEAD)
    found = 0
    with _explained(file), gzip.open(io.BytesIO(head)) as text, contextlib.suppress(EOFError):
        while part := text.read1():
            found += len(part)
    return found * on_disk // max(1, len(head))
