import itertools
import threading
import time

import numpy as np
import pytest

from zoo.pretraining.feed import Feed, Heldout
from zoo.pretraining.objectives import Masked
from zoo.pretraining.text import Blocks


def numbered(most=None):
    for number in itertools.count() if most is None else range(most):
        yield f"batch {number}", number + 1


def test_places_are_those_of_the_batches_that_were_used():
    feed = Feed(numbered(), ahead=3)
    stream = feed.stream()
    assert [next(stream) for _ in range(5)] == [f"batch {number}" for number in range(5)]
    assert feed.place(2) == 2 and feed.place(3) == 5
    feed.close()
    assert list(stream) == []


def test_batches_are_made_ahead_but_not_all_of_them():
    made, before = [], set(threading.enumerate())

    def noted():
        for pair in numbered():
            made.append(threading.current_thread().name)
            yield pair

    feed = Feed(noted(), ahead=3)
    next(feed.stream())
    for _ in range(500):
        if len(made) >= 5:
            break
        time.sleep(0.01)
    time.sleep(0.1)  # time for a sixth
    assert made == ["feed"] * 5  # one taken, three that wait, one that finds no room
    feed.close()
    assert set(threading.enumerate()) <= before


def test_the_end_and_errors_reach_the_other_side():
    assert list(Feed(numbered(4), ahead=2).stream()) == [f"batch {number}" for number in range(4)]

    def failing():
        yield "batch", 1
        raise ValueError("A text must be readable.")

    stream = Feed(failing()).stream()
    assert next(stream) == "batch"
    with pytest.raises(ValueError, match="readable"):
        next(stream)


def test_a_feed_that_was_not_begun_can_be_closed():
    Feed(numbered()).close()


class TestHeldout:
    def held_out(self, corpus, batch_size, batches):
        objective = Masked(8, 99, (2, 30))
        tokenizer = lambda texts: [[ord(x) - 95 for x in text] for text in texts]  # noqa: E731
        blocks = Blocks(corpus, tokenizer, 1, objective, 1, 1)
        return Heldout(blocks, {"batch_size": batch_size, "heldout_batches": batches})

    def test_other_batch_sizes_have_the_same_blocks(self, corpus):
        fours, sixes = (self.held_out(corpus, *sizes) for sizes in ((4, 3), (6, 2)))
        assert (len(fours), len(sixes)) == (3, 2)
        for index in range(3):
            one, other = (
                np.concatenate([held[n][0]["token_ids"] for n in range(len(held))])
                for held in (fours, sixes)
            )
            np.testing.assert_array_equal(one, other)
            assert fours[index][1].shape == (4, 1) and fours[index][2].shape == (4, 1)

    def test_a_short_text_is_not_taken_twice(self, corpus):
        """510 tokens are 63 blocks of 8, and 12 batches of 5."""
        assert len(self.held_out(corpus, 5, 50)) == 12

    def test_too_short(self, corpus):
        with pytest.raises(ValueError, match="`heldout`.*64.*8.*a.jsonl"):
            self.held_out(corpus, 64, 1)
