"""Functions that PyTorch records; on the other backends they stay as they are."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, LayerExperts, MixtureOfExperts, SwitchRouter
from keras_moe.ops import put_rows, recorded
from tests.backend import numpy

X = np.arange(6, dtype="float32").reshape(2, 3)
only_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch records")


def tensor(x):
    return ops.convert_to_tensor(x, x.dtype.name)


def no_gradient(function):
    """The function, called as in inference."""
    if keras.backend.backend() != "torch":
        return function
    import torch

    return torch.no_grad()(function)


class Counted:
    """A function that says how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_the_same_results():
    def function(x, pair):
        return ops.cumsum(x, axis=0) * pair[0], (ops.max(pair[1]), x.shape[0] * pair[1])

    again = no_gradient(recorded(function))
    for scale in (1.0, -2.0, 3.0):
        x, pair = tensor(scale * X), (tensor(X + scale), tensor(X[0]))
        first, (second, third) = again(x, pair)
        np.testing.assert_allclose(numpy(first), np.cumsum(scale * X, axis=0) * (X + scale))
        np.testing.assert_allclose(numpy(second), 2)
        np.testing.assert_allclose(numpy(third), 2 * X[0])


@only_torch
def test_python_runs_twice_for_every_shape_and_dtype():
    """Once as it is, and once to be recorded."""
    function = Counted(lambda x: x + 1)
    again = no_gradient(recorded(function))
    for x in (X, X[:1], 2 * X, X[:1], X.astype("int32"), 3 * X, -X[:1]):
        np.testing.assert_array_equal(numpy(again(tensor(x))), x + 1)
    assert function.calls == 5


@only_torch
def test_few_recordings_are_kept(monkeypatch):
    from keras_moe.ops import torch_recording

    monkeypatch.setattr(torch_recording, "MOST", 2)
    function = Counted(lambda x: x + 1)
    again = no_gradient(recorded(function))
    for length, calls in ((1, 1), (1, 2), (2, 3), (1, 3), (3, 4), (1, 4), (2, 5)):
        x = np.ones(length, "float32")
        np.testing.assert_array_equal(numpy(again(tensor(x))), x + 1)
        assert function.calls == calls


@pytest.mark.parametrize("expanded", [False, True])
def test_what_is_written_into(expanded):
    """As a cache, which is given away at every call; rows that share their memory come apart."""

    def function(cache, row, place):
        cache = put_rows(cache, row, place, axis=0)
        return ops.sum(cache, axis=0), cache

    again, expected = no_gradient(recorded(function)), np.zeros((4, 3))
    for place in range(4):
        if expanded or place == 0:
            expected[...] = 0
            cache = tensor(np.zeros((1, 3), "float32"))
            cache = ops.broadcast_to(cache, (4, 3)) if expanded else ops.tile(cache, (4, 1))
        total, cache = again(cache, tensor(X[:1] + place), tensor(np.array(place, "int32")))
        expected[place] = X[0] + place
        np.testing.assert_array_equal(numpy(total), expected.sum(axis=0))
        np.testing.assert_array_equal(numpy(cache), expected)


LOOKS = {
    "int": lambda x: x[: int(x[0, 1])].sum(),
    "list": lambda x: x * x.tolist()[0][0],
    "bool": lambda x: x if x[0, 0] > 1 else -x,
    "slice": lambda x: ops.slice(x, (0, ops.cast(x[0, 0], "int32")), (2, 1)),
    "index": lambda x: x[:, ops.cast(x[0, 0], "int64")],
    "equal": lambda x: x if bool((x == 1).all()) else -x,
    "shape of a selection": lambda x: x * x[x > 1].shape[0],
    "where": lambda x: x * ops.nonzero(x - 1)[0].shape[0],
}


@only_torch
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_looks_at_numbers_is_called_as_it_is(look):
    function = Counted(look)
    again = no_gradient(recorded(function))
    for number in (1.0, 2.0, 1.0):
        x = np.full((2, 3), number, "float32")
        np.testing.assert_array_equal(numpy(again(tensor(x))), numpy(look(tensor(x))))
    assert function.calls == 4  # the second time once more, to record it


@only_torch
def test_copies_stay_copies():
    def function(x):
        import torch

        return x.to(torch.float32, copy=True).add_(1), x.float()

    again, x = no_gradient(recorded(function)), tensor(X)
    for _ in range(3):
        more, same = again(x)
        np.testing.assert_array_equal(numpy(more), X + 1)
        np.testing.assert_array_equal(numpy(same), X)


@only_torch
def test_threads_that_record_at_once():
    def work(number):
        again = no_gradient(recorded(lambda x: ops.cumsum(x, axis=0) * number))
        return [numpy(again(tensor(X[:rows]))) for rows in (1, 2, 1, 2, 1, 2)][-2:]

    with ThreadPoolExecutor(4) as pool:
        for number, (one, two) in enumerate(pool.map(work, range(8))):
            np.testing.assert_array_equal(one, X[:1] * number)
            np.testing.assert_array_equal(two, np.cumsum(X, axis=0) * number)


@only_torch
def test_errors_are_not_hidden():
    def function(x):
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        recorded(function)(tensor(X))


def test_variables_have_the_values_of_now():
    variable = keras.Variable(X)
    again = no_gradient(recorded(lambda x: x * variable))
    for scale in (1.0, 3.0, 2.0):
        variable.assign(scale * X)
        np.testing.assert_array_equal(numpy(again(tensor(X))), scale * X * X)


def test_constants_that_are_written_into_start_anew():
    """What is always the same is made once, unless an operation, or one on its view, changes it."""

    def function(x):
        counts = ops.arange(3, dtype="float32")
        if keras.backend.backend() == "torch":
            counts.reshape(3, 1)[0] += 5.0
        else:
            counts = counts + np.array([5.0, 0.0, 0.0], "float32")
        return x + counts, counts

    again = no_gradient(recorded(function))
    for _ in range(3):
        result, counts = again(tensor(X))
        np.testing.assert_array_equal(numpy(result), X + [5.0, 1.0, 2.0])
        np.testing.assert_array_equal(numpy(counts), [5.0, 1.0, 2.0])


@pytest.mark.parametrize("bank", ["feed-forward", "layers"])
def test_mixtures(bank):
    """Other tokens than those of the recording go to other experts."""
    experts = FeedForwardExperts(4, 6)
    if bank == "layers":  # which look at their spans
        experts = LayerExperts([keras.layers.Dense(5) for _ in range(4)])
    layer = MixtureOfExperts(experts, SwitchRouter(eval_capacity_factor=None))
    layer.build((None, None, 5))
    rng = np.random.default_rng(0)
    layer.router.kernel.assign(rng.normal(size=(5, 4)))

    def outputs(x):
        return layer.outputs_and_routing(x)[0]

    again = no_gradient(recorded(outputs))
    for _ in range(3):
        x = tensor(rng.normal(size=(2, 7, 5)).astype("float32"))
        np.testing.assert_allclose(numpy(again(x)), numpy(outputs(x)), rtol=1e-5, atol=1e-6)
