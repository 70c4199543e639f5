import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_moe.ops import adopt, empty, transposed
from tests.backend import numpy

pytestmark = pytest.mark.every_backend

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "int32"])


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3), (), (5, 0), (600, 1000)])
def test_adopt(dtype, shape):
    array = empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype
    array[...] = np.arange(array.size).reshape(shape)
    tensor = adopt(array)
    assert tuple(tensor.shape) == shape
    assert array.dtype.name in str(tensor.dtype)
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(tensor, "float32")), array)


def is_of(tensor, array):
    """Whether a tensor has the memory of an array: what is written there is seen."""
    before = array.reshape(-1)[0].copy()
    array.reshape(-1)[0] = before + 1
    first = numpy(ops.cast(tensor, "float32")).reshape(-1)[0]
    array.reshape(-1)[0] = before
    return first == before + 1


@DTYPES
@pytest.mark.parametrize("shape", [(30, 7), (600, 1000)])
def test_memory_is_shared(dtype, shape):
    array = empty(shape, dtype)
    array[...] = 3
    assert is_of(adopt(array), array)


def test_an_array_that_begins_anywhere_is_adopted_as_well():
    array = empty((1 + 30 * 7,), "float32")[1:].reshape(30, 7)
    array[...] = np.arange(30 * 7).reshape(30, 7)
    np.testing.assert_array_equal(numpy(adopt(array)), array)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3), (2, 600, 1000), (5, 1), (1, 5), (2, 5, 1)])
def test_transposed(dtype, shape):
    array = empty(shape, dtype)
    array[...] = np.arange(array.size).reshape(shape) % 100
    expected = array.swapaxes(-1, -2).copy()
    tensor, is_free = transposed(array)
    assert array.dtype.name in str(tensor.dtype)
    if is_free:
        array[...] = 0
    np.testing.assert_array_equal(numpy(ops.cast(tensor, "float32")), expected)
    moves = {"torch": False, "jax": True, "tensorflow": 1 not in shape[-2:]}
    assert is_free == moves[keras.backend.backend()]


def test_a_variable_that_has_adopted_an_array_trains():
    array = empty((4, 1), "float32")
    array[...] = 1.0
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign(adopt(array))
    model.compile("sgd", "mse")
    for _ in range(2):  # on JAX a step gives the memory of its variables away
        model.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
    assert abs(model.predict(np.ones((1, 4)), verbose=0)).max() < 3.9
