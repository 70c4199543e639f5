"""Several tasks at once: whose example comes next."""

import numpy as np

T5_LIMIT = 2**19  # The best one for a model that is trained on all tasks at once, table 11 of T5.


def rates(sizes, limit=T5_LIMIT):
    """The share of each task, proportional to its examples up to an artificial limit.

    `r_m = min(e_m, K) / sum_n min(e_n, K)` (Raffel et al., 2020,
    https://arxiv.org/abs/1910.10683, section 3.5.2): a task larger than K is treated as if it had
    K examples, so that the small ones are seen at all.

    Args:
        sizes: A dict from the names of tasks to how many training examples they have.
        limit: K, a positive number; `None` for none.

    Returns:
        A dict from the names to floats that add up to 1.

    Raises:
        ValueError: If there is no task, a size is not a positive integer or the limit not
            positive.
    """
    if not sizes or any(not isinstance(n, int | np.integer) or n < 1 for n in sizes.values()):
        raise ValueError(
            "`sizes` must have a positive number of examples for each of at least one task. "
            f"Received: sizes={sizes}"
        )
    if limit is not None and not limit > 0:
        raise ValueError(f"`limit` must be positive or None. Received: limit={limit}")
    counted = {name: size if limit is None else min(size, limit) for name, size in sizes.items()}
    total = sum(counted.values())
    return {name: size / total for name, size in counted.items()}


def mixture(sizes, count, limit=T5_LIMIT, seed=0):
    """Draws the examples to train on from several tasks.

    The task of each example is drawn by the `rates`. A task's examples come in random order, all
    of them before any comes again. The first examples are the same whatever the `count`.

    Args:
        sizes: A dict from the names of tasks to how many training examples they have.
        count: How many examples to draw.
        limit: See `rates`.
        seed: An integer; the same one gives the same examples.

    Returns:
        Tuple of two int32 arrays `[count]`: which task, by its place in `sizes`, and which of its
        examples.

    Raises:
        ValueError: If `count` is negative, and as `rates`.
    """
    shares = rates(sizes, limit)
    if count < 0:
        raise ValueError(f"`count` must be at least 0. Received: count={count}")
    ends = np.cumsum(list(shares.values()))
    ends[-1] = 1.0  # Rounding may leave it a little below.
    drawn = np.random.default_rng([seed, 0]).random(count)
    task = np.searchsorted(ends, drawn, side="right").astype("int32")
    example = np.empty(count, dtype="int32")
    for n, size in enumerate(sizes.values()):
        rng = np.random.default_rng([seed, 1, n])
        places = np.flatnonzero(task == n)
        passes = [rng.permutation(size) for _ in range(-(-len(places) // size))]
        if passes:
            example[places] = np.concatenate(passes)[: len(places)]
    return task, example
