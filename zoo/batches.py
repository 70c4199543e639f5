"""Tokenised examples in batches of a few lengths: short texts cost little, few steps compile.

L lengths that a batch may have, of which K are chosen.
"""

import keras
import numpy as np


class TokenBatches(keras.utils.PyDataset):
    """Batches of examples of like length, each cut to the shortest length that holds them.

    Every batch has the same size and one of `lengths`, so that a compiled step meets only so many
    shapes. While training, examples and batches are shuffled, anew by `shuffle`, and fewer than
    `batch_size` examples, which fill no batch, sit the epoch out; otherwise the last batch is
    filled up with rows of padding, and `order` says which example each row is.

    Args:
        token_ids: `[examples, length]` integers.
        padding_mask: `[examples, length]` booleans.
        labels: `[examples]` array.
        batch_size: rows per batch.
        lengths: ascending lengths; the last is that of `token_ids`.
        shuffle_seed: integer; `None` keeps the order and every example.
    """

    def __init__(self, token_ids, padding_mask, labels, batch_size, lengths, shuffle_seed=None):
        super().__init__()
        self.token_ids = token_ids
        self.padding_mask = padding_mask
        self.labels = labels
        self.batch_size = batch_size
        self.lengths = lengths
        self.shuffle_seed = shuffle_seed
        self.shuffle(0)

    def shuffle(self, epoch):
        """Deals the examples out to batches; each epoch has an order of its own."""
        count = self.padding_mask.sum(axis=1)
        order = np.arange(len(count))
        if self.shuffle_seed is not None:
            generator = np.random.default_rng((self.shuffle_seed, epoch))
            generator.shuffle(order)
        bucket = np.searchsorted(self.lengths, count[order])
        self.batches = []  # (length, positions of the examples)
        members = order[:0]
        for number, length in enumerate(self.lengths):
            # What fills no batch while training goes along with the next longer examples.
            members = np.concatenate([members, order[bucket == number]])
            while len(members) >= self.batch_size or (
                len(members) > 0 and self.shuffle_seed is None
            ):
                batch, members = np.split(members, [self.batch_size])
                self.batches.append((length, batch))
        if self.shuffle_seed is not None:
            generator.shuffle(self.batches)
        # On TensorFlow Keras takes the shapes to expect from the first two batches.
        others = [n for n, batch in enumerate(self.batches) if batch[0] != self.batches[0][0]]
        if others:
            self.batches.insert(1, self.batches.pop(others[0]))

    @property
    def order(self):
        """The example in each row of all batches, -1 for a row of padding."""
        rows = np.full((len(self.batches), self.batch_size), -1)
        for row, (_, batch) in zip(rows, self.batches, strict=True):
            row[: len(batch)] = batch
        return rows.reshape(-1)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        length, batch = self.batches[index]
        missing = self.batch_size - len(batch)
        weight = np.pad(np.ones(len(batch), "float32"), (0, missing))
        rows = np.pad(batch, (0, missing), mode="edge")
        mask = self.padding_mask[rows, :length] & (weight[:, None] > 0)
        x = {
            "token_ids": self.token_ids[rows, :length].astype("int32"),
            "padding_mask": mask.astype("int32"),
        }
        return x, self.labels[rows], weight


def few_lengths(counts, most, multiple=8):
    """The lengths of batches that pad examples least.

    Args:
        counts: tokens of each example.
        most: how many lengths there may be.
        multiple: of which each length is one, but for the last, which is the longest example's.

    Returns:
        Ascending list of integers.
    """
    counts = np.maximum(counts, 1)
    lengths = np.arange(multiple, max(counts) + multiple, multiple)
    lengths[-1] = max(counts)
    fits_L = np.searchsorted(np.sort(counts), lengths, side="right")  # examples up to each length
    # By dynamic programming: tokens of all examples up to the length that is the last of K.
    tokens_L, choices = fits_L * lengths, []
    for _ in range(most - 1):
        tokens_LL = tokens_L[:, None] + (fits_L - fits_L[:, None]) * lengths  # before, and last
        tokens_LL[np.tril_indices(len(lengths), -1)] = np.iinfo(tokens_LL.dtype).max
        choices.append(np.argmin(tokens_LL, axis=0))
        tokens_L = np.min(tokens_LL, axis=0)
    chosen = [len(lengths) - 1]
    for choice in reversed(choices):
        chosen.append(choice[chosen[-1]])
    return sorted({int(lengths[number]) for number in chosen})
