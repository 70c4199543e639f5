"""Documents as blocks of tokens, and those as batches.

B blocks of a batch, W blocks of a window, L tokens of a block.

Nothing is drawn that does not depend on seed, epoch and place alone, and nothing is kept but one
window of blocks: whoever knows the place of a batch goes on with the next one.
"""

import zlib

import numpy as np

from keras_moe.routing.base import positive_integer
from zoo.pretraining.mixture import mixture, start
from zoo.pretraining.sources import size

LETTERS = 200_000  # that are tokenised at a time


class Blocks:
    """Batches of an objective, made of packed documents, from any place on.

    Documents follow one another, each with the end token behind it, and are cut into blocks; a
    model attends, and routes, across the end tokens in a block. A window of blocks at a time is
    shuffled. What the end of an epoch has beyond whole batches is left out.

    Args:
        names: list of sources, see `zoo.pretraining.sources.sources`.
        tokenizer: function of a list of texts to a list of lists of token ids.
        end: id of the token that ends a text.
        objective: of `zoo.pretraining.objectives`.
        batch_size: blocks.
        window: blocks that are shuffled together, whole batches.
        seed: integer.

    Raises:
        ValueError: if an argument is out of range, or a source cannot be read.
    """

    def __init__(self, names, tokenizer, end, objective, batch_size, window=8192, seed=0):
        positive_integer("batch_size", batch_size)
        positive_integer("window", window)
        if window % batch_size:
            raise ValueError(
                f"`window` must be a multiple of the batch size, {batch_size}. "
                f"Received: window={window}"
            )
        self.names = list(names)
        self.sizes = {name: size(name) for name in self.names}
        self.tokenizer = tokenizer
        self.end = end
        self.objective = objective
        self.batch_size = batch_size
        self.window = window
        self.seed = seed

    def start(self, epoch=0):
        """The place of the first batch of an epoch, as JSON can keep it.

        `read` is the place in the mixture of sources of the document in which the window begins,
        and `skip` how many of its tokens are in windows before.
        """
        read = start(self.names)
        return {"epoch": epoch, "window": 0, "batch": 0, "read": read, "skip": 0}

    def batches(self, place=None):
        """Endless batches from a place on.

        Args:
            place: of the first batch; `None`: the start.

        Yields:
            Pairs of a batch, as the objective has it, and the place of the next one.

        Raises:
            ValueError: if a source cannot be read, or all of them make no batch.
        """
        place = place or self.start()
        while True:
            full = 0
            for place_of_window, blocks_WL in self._windows(place):
                full += len(blocks_WL) // self.batch_size
                yield from self._shuffled(place_of_window, blocks_WL)
            if full == 0:
                raise ValueError(
                    f"The texts must make {self.batch_size} blocks of {self.objective.block} "
                    f"tokens or more. Received: {', '.join(self.names)}"
                )
            place = self.start(place["epoch"] + 1)

    def _shuffled(self, place, blocks_WL):
        """Batches of a window, but for those before the place, and the place after each."""
        order_W = self._rng("order", place["epoch"], place["window"]).permutation(len(blocks_WL))
        for batch in range(place["batch"], len(blocks_WL) // self.batch_size):
            rows_B = order_W[batch * self.batch_size : (batch + 1) * self.batch_size]
            noise = self._rng("noise", place["epoch"], place["window"], batch)
            yield self.objective(blocks_WL[np.sort(rows_B)], noise), {**place, "batch": batch + 1}

    def _rng(self, purpose, *numbers):
        # Numbers alone would not do: a seed sequence takes (1, 2) and (1, 2, 0) for the same.
        return np.random.default_rng((zlib.crc32(purpose.encode()), self.seed, *numbers))

    def _windows(self, place):
        """Windows of blocks of the rest of an epoch, and the place of the first batch of each."""
        size, skip = self.window * self.objective.block, place["skip"]
        parts, held = [], 0
        for read, tokens in self._documents(place):
            parts.append(tokens[skip:])
            held += len(tokens) - skip
            skip = 0
            if held < size:
                continue
            packed = np.concatenate(parts)
            while len(packed) >= size:
                yield place, packed[:size].reshape(self.window, -1)
                packed = packed[size:]  # all of it is of the last document
                place = self.start(place["epoch"]) | {
                    "window": place["window"] + 1,
                    "read": read,
                    "skip": len(tokens) - len(packed),
                }
            parts, held = [packed], len(packed)
        full = held // self.objective.block
        if full:
            packed = np.concatenate(parts)
            yield place, packed[: full * self.objective.block].reshape(full, -1)

    def _documents(self, place):
        """The place in the mixture before each document, and its tokens."""
        names = self._rng("files", place["epoch"]).permutation(self.names).tolist()
        group, letters = [], 0
        for document in mixture(names, self.sizes, place["read"]):
            group.append(document)
            letters += len(document[1])
            if letters >= LETTERS:
                yield from self._tokens(group)
                group, letters = [], 0
        yield from self._tokens(group)

    def _tokens(self, group):
        ids = self.tokenizer([text for _, text in group]) if group else []
        for (read, _), tokens in zip(group, ids, strict=True):
            yield read, np.array([*tokens, self.end], "int32")
