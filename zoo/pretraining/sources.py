"""Documents of text files and of TensorFlow Datasets, from any place on, and mixed.

A place in a source is a number: bytes of the text of a file, examples of a data set.
"""

import contextlib
import glob
import gzip
import heapq
import io
import json
import os
import zlib

from zoo.extras import quiet_datasets, require

LINES = (".txt", ".txt.gz")
OBJECTS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TFDS = "tfds:"
READERS = 32  # files that are open at a time
HEAD = 2**20  # bytes of a gzipped file that tell how well it is packed


def sources(patterns, argument="corpus"):
    """The files and data sets that patterns name, each once.

    Args:
        patterns: one or a list of paths or glob patterns of files, of which each line is a document
            (`.txt`) or an object with one in `text` (`.jsonl`, `.json`), either gzipped or not; or
            "tfds:NAME", or "tfds:NAME:SPLIT", a data set of TensorFlow Datasets with a feature
            `text`, "tfds:c4/en", say.
        argument: what errors call the patterns.

    Returns:
        List of strings: whole paths, sorted, then data sets, sorted.

    Raises:
        ValueError: if a pattern names nothing, or a file of another kind.
    """
    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
    files, datasets = {}, set()
    for pattern in map(os.fspath, patterns):
        if pattern.startswith(TFDS):
            datasets.add(pattern)
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
    if not files and not datasets:
        raise ValueError(f"`{argument}` must name one file or more. Received: {patterns!r}")
    return sorted(files.values()) + sorted(datasets)


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
        yield from _dataset(source, first)
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
            text = json.loads(text)["text"]
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


def _dataset(source, first):
    tfds = require("tensorflow_datasets")
    name, split = _named(source)
    with quiet_datasets():
        dataset = tfds.load(name, split=split, shuffle_files=False)
    for number, example in enumerate(dataset.skip(first).as_numpy_iterator(), first + 1):
        text = example["text"].decode("utf-8", "replace")
        if text.strip():
            yield text, number


def _named(source):
    """Name and split of a data set."""
    name, _, split = source.removeprefix(TFDS).partition(":")
    return name, split or "train"


def size(source):
    """How much text a source has, and the place of its end, as one can know before it is read.

    Of a gzipped file it is an estimate, by how well its first megabyte is packed.

    Returns:
        Pair of bytes and a place, at least 1 each.
    """
    if not source.startswith(TFDS):
        found = max(1, _unpacked(source))
        return found, found
    name, split = _named(source)
    with quiet_datasets():
        info = require("tensorflow_datasets").builder(name).info.splits[split]
    return max(1, info.num_bytes), max(1, info.num_examples)


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


def start(names):
    """The first place in a mixture."""
    return [[0, 0] for _ in names[:READERS]]


def mixture(names, sizes, read=None):
    """Documents of several sources in turns, so that all of them end at about the same time.

    Readers, at most 32, have the sources dealt to them and read one after another. The next
    document is one of the reader that has read the smallest share of what it was dealt.

    Args:
        names: list of sources.
        sizes: dictionary of what `size` says of each.
        read: for each reader how many sources it is through, and its place in the next one.

    Yields:
        Pairs of such a list, before the document, and a text.
    """
    read = [list(place) for place in read or start(names)]
    dealt = [names[number :: len(read)] for number in range(len(read))]
    readers = [_in_turn(*pair) for pair in zip(dealt, read, strict=True)]
    heap = [(_share(dealt[number], sizes, *read[number]), number) for number in range(len(read))]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        found = next(readers[number], None)
        if found is not None:
            text, place = found
            yield [list(place) for place in read], text
            read[number] = place
            heapq.heappush(heap, (_share(dealt[number], sizes, *place), number))


def _in_turn(names, place):
    """Documents of one source after another, and the place after each."""
    done, first = place
    for number, name in enumerate(names[done:], done):
        for text, after in documents(name, first):
            yield text, [number, after]
        first = 0


def _share(names, sizes, done, place):
    whole = sum(sizes[name][0] for name in names)
    share = sum(sizes[name][0] for name in names[:done])
    if place:
        in_bytes, end = sizes[names[done]]
        share += in_bytes * place / end
    return share / whole
