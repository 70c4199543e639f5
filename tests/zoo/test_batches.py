import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.batches import TokenBatches, few_lengths

LENGTHS = (4, 8)


@pytest.fixture
def examples():
    count = np.array([3, 8, 4, 5, 1, 2, 4, 7, 3, 6, 2])
    mask = np.arange(8) < count[:, None]
    token_ids = np.where(mask, np.arange(1, 12)[:, None] * 10, 0)
    return token_ids, mask, np.arange(11, dtype="float32")


def rows(batches):
    return [batches[i] for i in range(len(batches))]


def test_evaluation_keeps_every_example_once_and_order_names_it(examples):
    batches = TokenBatches(*examples, batch_size=3, lengths=LENGTHS)
    order = batches.order
    assert sorted(order[order >= 0]) == list(range(11))
    labels = np.concatenate([labels for _, labels, _ in rows(batches)])
    weights = np.concatenate([weight for _, _, weight in rows(batches)])
    assert labels[order >= 0].tolist() == order[order >= 0].tolist()
    assert weights.tolist() == (order >= 0).tolist()


def test_batches_are_cut_to_the_shortest_length_that_holds_them(examples):
    # Seven texts of at most 4 tokens make three batches of three, four longer ones make two.
    batches = TokenBatches(*examples, batch_size=3, lengths=LENGTHS)
    shapes = [x["token_ids"].shape for x, _, _ in rows(batches)]
    assert sorted(shapes) == [(3, 4), (3, 4), (3, 4), (3, 8), (3, 8)]
    for x, labels, weight in rows(batches):
        for tokens, mask, label, w in zip(
            x["token_ids"], x["padding_mask"], labels, weight, strict=True
        ):
            if w:
                assert tokens[mask > 0].tolist() == [(label + 1) * 10] * int(mask.sum())
                assert mask.sum() == examples[1][int(label)].sum()
            else:
                assert mask.sum() == 0


def test_first_two_batches_differ_in_length(examples):
    """On TensorFlow Keras takes the shapes to expect from them."""
    for seed in (None, 0, 1, 2):
        batches = TokenBatches(*examples, batch_size=2, lengths=LENGTHS, shuffle_seed=seed)
        assert batches.batches[0][0] != batches.batches[1][0]


def test_training_order_depends_on_seed_and_epoch_alone(examples):
    def orders(seed, epochs):
        batches = TokenBatches(*examples, batch_size=2, lengths=LENGTHS, shuffle_seed=seed)
        result = []
        for epoch in epochs:
            batches.shuffle(epoch)
            result.append(batches.order.tolist())
        return result

    straight = orders(0, range(4))
    assert straight[2:] == orders(0, (2, 3))
    assert straight[0] != straight[1]
    assert straight != orders(1, range(4))
    assert all(len(set(order)) == 10 and -1 not in order for order in straight)  # 11 is odd


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 4))
def test_no_other_few_lengths_pad_less(counts, most):
    def padded(lengths):
        return sum(min(length for length in lengths if length >= count) for count in counts)

    lengths = few_lengths(counts, most, multiple=4)
    longest = max([1, *counts])
    allowed = {min(length, longest) for length in range(4, longest + 4, 4)}
    assert lengths == sorted(set(lengths)) and len(lengths) <= most
    assert set(lengths) <= allowed and lengths[-1] == longest
    others = (
        {*some, longest}
        for number in range(min(most, len(allowed)))
        for some in itertools.combinations(allowed - {longest}, number)
    )
    assert padded(lengths) == min(padded(some) for some in others)


def test_few_lengths_are_multiples_of_eight_by_default():
    assert few_lengths([3, 9, 9, 30, 31], 3) == [8, 16, 31]
