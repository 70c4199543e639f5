"""What `fit` takes: batches of training text made in a thread, and held-out batches that stay."""

import collections
import itertools
import queue
import threading

import keras
import numpy as np


class Feed:
    """Batches for `fit`, made in a thread of their own, and the place after each.

    This is no `tf.data`, which would look ahead as well: here the place of a batch comes with it,
    and so a checkpoint knows it whatever `fit` has taken before it needs it, on every backend.
    While a device computes the batches of one window those of the next are made, as far as they
    find room.

    Args:
        batches: pairs of a batch and the place of the next one.
        ahead: batches that are made before they are taken, at most.
    """

    def __init__(self, batches, ahead=128):
        self.places = collections.deque()
        self._batches = batches
        self._made = queue.Queue(ahead)
        self._closed = False
        self._thread = threading.Thread(target=self._make, name="feed", daemon=True)

    def stream(self):
        """The batches, to be taken once.

        Raises:
            Exception: whatever was raised where they are made.
        """
        self._thread.start()
        while (pair := self._made.get()) is not None:
            if isinstance(pair, Exception):
                raise pair
            batch, place = pair
            self.places.append(place)
            yield batch

    def place(self, steps):
        """The place after so many more steps."""
        for _ in range(steps):
            place = self.places.popleft()
        return place

    def close(self):
        """Ends the stream and the thread."""
        self._closed = True
        while self._thread.is_alive() or not self._made.empty():
            try:
                self._made.get(timeout=0.05)
            except queue.Empty:
                continue
        self._made.put(None)

    def _make(self):
        try:
            for pair in self._batches:
                self._made.put(pair)
                if self._closed:
                    return
            self._made.put(None)
        except Exception as error:
            self._made.put(error)


class Heldout(keras.utils.PyDataset):
    """The first batches of a text, the same each time, and for runs of another seed or batch size.

    Args:
        blocks: `Blocks` in batches and windows of one, in the order of the text.
        settings: of the run.

    Raises:
        ValueError: if they make no batch.
    """

    def __init__(self, blocks, settings):
        super().__init__()
        size = settings["batch_size"]
        rows = itertools.islice(blocks.batches(), size * settings["heldout_batches"])
        # Not the next time round: a short text has fewer.
        rows = [row for row, _ in itertools.takewhile(lambda x: x[1]["epoch"] == 0, rows)]
        if len(rows) < size:
            raise ValueError(
                f"`heldout` must make {size} blocks of {blocks.objective.block} tokens or more. "
                f"Received: {', '.join(blocks.names)}"
            )
        self.batches = [
            keras.tree.map_structure(lambda *x: np.concatenate(x), *rows[first : first + size])
            for first in range(0, len(rows) - size + 1, size)
        ]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]
