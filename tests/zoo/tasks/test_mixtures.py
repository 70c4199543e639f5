import numpy as np
import pytest

from zoo.tasks import mixture, rates

SIZES = {"small": 10, "middle": 30, "large": 1000}


def test_rates_are_proportional_up_to_the_limit():
    # min(10, 60) = 10, min(30, 60) = 30, min(1000, 60) = 60: of 100
    assert rates(SIZES, limit=60) == pytest.approx({"small": 0.1, "middle": 0.3, "large": 0.6})
    assert rates(SIZES, limit=None)["large"] == pytest.approx(1000 / 1040)
    assert rates(SIZES, limit=1) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


def test_t5s_limit_is_the_default():
    assert rates({"a": 2**20, "b": 2**19}) == pytest.approx({"a": 0.5, "b": 0.5})


def test_the_drawn_tasks_have_the_rates():
    task, example = mixture(SIZES, 5000, limit=60)
    # The share of 5,000 draws has a standard deviation of at most sqrt(0.24 / 5000) = 0.007.
    shares = np.bincount(task, minlength=3) / 5000
    assert np.abs(shares - [0.1, 0.3, 0.6]).max() < 0.03
    assert task.dtype == example.dtype == np.int32
    assert all(0 <= example[n] < list(SIZES.values())[task[n]] for n in range(5000))


def test_every_example_comes_before_any_comes_again():
    task, example = mixture(SIZES, 2000, limit=60)
    for n, size in enumerate(SIZES.values()):
        rows = example[task == n]
        for first in range(0, len(rows) - size + 1, size):
            assert sorted(rows[first : first + size]) == list(range(size))
    small = example[task == 0]
    assert small[:10].tolist() != small[10:20].tolist()  # each pass has an order of its own


def test_the_same_seed_gives_the_same_examples():
    long, short = mixture(SIZES, 500, seed=3), mixture(SIZES, 200, seed=3)
    for a, b in zip(long, short, strict=True):
        np.testing.assert_array_equal(a[:200], b)
    assert (mixture(SIZES, 500, seed=4)[0] != long[0]).any()


def test_no_examples():
    task, example = mixture(SIZES, 0)
    assert len(task) == len(example) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 1), r"`sizes`.*sizes=\{\}"),
        (({"a": 0}, 1), "`sizes`.*sizes=.*'a': 0"),
        (({"a": 1.5}, 1), "`sizes`.*sizes=.*'a': 1.5"),
        ((SIZES, 1, 0), "`limit`.*limit=0"),
        ((SIZES, -1), "`count`.*count=-1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture(*arguments)
