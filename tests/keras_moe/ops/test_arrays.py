import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_moe.ops import adopt, empty

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


@DTYPES
@pytest.mark.parametrize("shape", [(30, 7), (600, 1000)])
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow copies")
def test_memory_is_shared(dtype, shape):
    array = empty(shape, dtype)
    tensor = adopt(array)
    if keras.backend.backend() == "jax":
        assert tensor.unsafe_buffer_pointer() == array.ctypes.data
    else:
        assert tensor.data_ptr() == array.ctypes.data


def test_a_variable_that_has_adopted_an_array_trains():
    array = empty((4, 1), "float32")
    array[...] = 1.0
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign(adopt(array))
    model.compile("sgd", "mse")
    for _ in range(2):  # on JAX a step gives the memory of its variables away
        model.fit(np.ones((8, 4)), np.zeros(8), verbose=0)
    assert abs(model.predict(np.ones((1, 4)), verbose=0)).max() < 3.9
