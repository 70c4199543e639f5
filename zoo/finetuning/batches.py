"""A task's examples, read and tokenised once for all runs on it."""

import keras

from zoo.batches import TokenBatches, few_lengths
from zoo.tasks import data, validation_splits

LENGTHS = 3  # of batches: each is a compilation, and the fewer, the more padding


class TokenisedTask:
    """The splits of a task as token ids, each made when it is first asked for.

    `validation` names the splits to measure on, and `partial` those that are not the official ones,
    see `zoo.tasks.validation_splits`.

    Args:
        task: a `Task`.
        data_dir: TensorFlow Datasets directory, see `zoo.tasks.load`.
        max_length: tokens per example; longer ones are cut, and batches are at most as long.
        max_examples: only so many training examples; `None`: all.
    """

    def __init__(self, task, data_dir, max_length, max_examples=None):
        self.task = task
        self.data_dir = data_dir
        self.max_length = max_length
        self.max_examples = max_examples
        self.validation, self.partial = validation_splits(task, data_dir)
        self._examples = {}
        self._tokens = {}

    def examples(self, split):
        """The `Examples` of a split."""
        if split not in self._examples:
            examples = data.load(self.task, split, self.data_dir)
            if split == "train" and self.max_examples is not None:
                examples = data.Examples(  # in training they belong to no questions
                    tuple(column[: self.max_examples] for column in examples.texts),
                    examples.labels[: self.max_examples],
                )
            self._examples[split] = examples
        return self._examples[split]

    def batches(self, split, preprocessor, batch_size, shuffle_seed=None):
        """The `TokenBatches` of a split.

        Args:
            split: name of it.
            preprocessor: of a classifier; every call must hand over one that does the same.
            batch_size: rows per batch.
            shuffle_seed: see `TokenBatches`; `None` keeps the order and every example.

        Raises:
            ValueError: if there are not enough examples for one batch.
        """
        labels = self.examples(split).labels
        token_ids, mask = self._tokenised(split, preprocessor)
        lengths = few_lengths(mask.sum(axis=1), LENGTHS)
        token_ids, mask = token_ids[:, : lengths[-1]], mask[:, : lengths[-1]]
        batches = TokenBatches(token_ids, mask, labels, batch_size, lengths, shuffle_seed)
        if not len(batches):
            raise ValueError(
                f"`batch_size` must be at most the number of examples, {len(labels)}. "
                f"Received: batch_size={batch_size}"
            )
        return batches

    def _tokenised(self, split, preprocessor):
        if split not in self._tokens:
            texts = self.examples(split).texts
            # With `y` named, KerasHub does not take a pair of texts for texts and labels.
            tokens = preprocessor(texts if len(texts) > 1 else texts[0], y=None)
            token_ids, mask = (
                keras.ops.convert_to_numpy(tokens[name]) for name in ("token_ids", "padding_mask")
            )
            self._tokens[split] = token_ids, mask.astype(bool)
        return self._tokens[split]
