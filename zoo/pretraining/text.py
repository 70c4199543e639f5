"""Documents of text files or TensorFlow Datasets, as blocks of tokens, and those as batches.

Nothing is drawn that does not depend on seed, epoch and place alone, and nothing is kept but one
window of blocks: whoever knows the place of a batch goes on with the next one.
"""

import glob
import gzip
import json
import zlib
from pathlib import Path

import numpy as np

from keras_moe.routing.base import positive_integer
from zoo.extras import quiet_datasets, require

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
TFDS = "tfds:"


def sources(patterns):
    """The files and data sets that patterns name, each once.

    Args:
        patterns: list of paths or glob patterns of files, of which each line is a document
            (`.txt`) or an object with one in `text` (`.jsonl`), either gzipped or not; or
            "tfds:NAME", or "tfds:NAME:SPLIT", a data set of TensorFlow Datasets with a feature
            `text`, "tfds:c4/en", say.

    Returns:
        Sorted list of strings.

    Raises:
        ValueError: if a pattern names nothing, or a file of another kind.
    """
    found = set()
    for pattern in map(str, patterns):
        files = [pattern] if pattern.startswith(TFDS) else glob.glob(pattern)
        if not files:
            raise ValueError(f"`corpus` must name files that are there. Received: {pattern}")
        for file in files:
            if not file.startswith(TFDS) and not file.endswith(SUFFIXES):
                raise ValueError(
                    f"`corpus` must name files that end in {', '.join(SUFFIXES)}. Received: {file}"
                )
        found.update(files)
    if not found:
        raise ValueError(f"`corpus` must name one file or more. Received: {patterns!r}")
    return sorted(found)


def documents(source, first=0):
    """The texts of one source, from the number `first` on.

    Raises:
        ValueError: if it cannot be read, or is not of the form that it should be.
    """
    if source.startswith(TFDS):
        yield from _dataset(source, first)
        return
    opened = gzip.open if source.endswith(".gz") else open
    number = 0
    try:
        with opened(source, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number >= first:
                    yield json.loads(line)["text"] if ".jsonl" in source else line.rstrip("\n")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`corpus` must be readable text. Received: {source}, line {number + 1}: {error}"
        ) from error


def _dataset(source, first):
    tfds = require("tensorflow_datasets")
    name, split = _named(source)
    with quiet_datasets():
        dataset = tfds.load(name, split=split, shuffle_files=False)
    for example in dataset.skip(first).as_numpy_iterator():
        yield example["text"].decode()


def _named(source):
    """Name and split of a data set."""
    name, _, split = source.removeprefix(TFDS).partition(":")
    return name, split or "train"


def interleaved(names):
    """Documents of several sources in turns, so that all of them end at about the same time.

    The next document is one of the source of which the smallest share has been read: characters,
    over the bytes of all of it, on disk.

    Args:
        names: list of sources.

    Yields:
        Texts.
    """
    sizes = [_size(name) for name in names]
    shares = [0.0] * len(names)
    texts = [documents(name) for name in names]
    while min(shares) < float("inf"):
        number = shares.index(min(shares))
        text = next(texts[number], None)
        if text is None:
            shares[number] = float("inf")
        else:
            shares[number] += (len(text) + 1) / sizes[number]
            yield text


def _size(source):
    if not source.startswith(TFDS):
        return max(1, Path(source).stat().st_size)
    name, split = _named(source)
    with quiet_datasets():
        return require("tensorflow_datasets").builder(name).info.splits[split].num_bytes


class Blocks:
    """Batches of an objective, made of packed documents, from any place on.

    Documents follow one another, each with the end token behind it, and are cut into blocks. A
    window of blocks at a time is shuffled. Of the last window of an epoch what fills no batch is
    left out.

    Args:
        names: list of sources, see `sources`.
        tokenizer: function of a text to a list of token ids.
        end: id of the token that ends a text.
        objective: of `zoo.pretraining.objectives`.
        batch_size: blocks.
        window: blocks that are shuffled together.
        seed: integer.
    """

    def __init__(self, names, tokenizer, end, objective, batch_size, window=8192, seed=0):
        positive_integer("batch_size", batch_size)
        positive_integer("window", window)
        if window < batch_size:
            raise ValueError(
                f"`window` must be at least the batch size, {batch_size}. Received: window={window}"
            )
        self.names = list(names)
        self.tokenizer = tokenizer
        self.end = end
        self.objective = objective
        self.batch_size = batch_size
        self.window = window
        self.seed = seed

    def start(self):
        """The place of the first batch, as JSON can keep it."""
        return {"epoch": 0, "documents": 0, "rest": 0, "window": 0, "batch": 0}

    def batches(self, place=None):
        """Endless pairs of a batch, as the objective has it, and the place of the next one."""
        place = dict(place or self.start())
        while True:
            batches = 0
            for place_of_window, blocks in self._windows(place):
                full = len(blocks) // self.batch_size
                batches += full
                rng = self._rng(place_of_window)
                order = rng.permutation(len(blocks))
                for number in range(full):
                    rows = order[number * self.batch_size : (number + 1) * self.batch_size]
                    if number >= place_of_window["batch"]:
                        after = {**place_of_window, "batch": number + 1}
                        noise = self._rng(place_of_window, number)
                        yield self.objective(blocks[np.sort(rows)], noise), after
            if batches == 0:
                raise ValueError(
                    f"`corpus` must hold {self.batch_size} blocks of {self.objective.block} tokens "
                    f"or more. Received: {', '.join(self.names)}"
                )
            place = {**self.start(), "epoch": place["epoch"] + 1}

    def _rng(self, place, *more):
        return np.random.default_rng((self.seed, place["epoch"], place["window"], *more))

    def _windows(self, place):
        """Windows of blocks of the rest of an epoch, and the place of the first batch of each."""
        texts = interleaved(self.names)
        place, rest = dict(place), []
        for _ in range(place["documents"]):
            text = next(texts)
        if place["rest"]:  # what the window before left of its last document
            rest = self._tokens(text)[-place["rest"] :]
        size = self.window * self.objective.block
        parts, held = [np.array(rest, "int32")], len(rest)
        read = place["documents"]
        for text in texts:
            tokens = self._tokens(text)
            parts.append(np.array(tokens, "int32"))
            read, held = read + 1, held + len(tokens)
            while held >= size:
                packed = np.concatenate(parts)
                yield place, packed[:size].reshape(self.window, -1)
                held -= size
                place = {
                    "epoch": place["epoch"],
                    "documents": read,
                    "rest": held,
                    "window": place["window"] + 1,
                    "batch": 0,
                }
                parts = [packed[size:]]
        packed = np.concatenate(parts)
        full = len(packed) // self.objective.block
        if full:
            yield place, packed[: full * self.objective.block].reshape(full, -1)

    def _tokens(self, text):
        return [*self.tokenizer(text), self.end]
