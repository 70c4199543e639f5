import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_moe.ops import adopt


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "int32"])
def test_adopt(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = adopt(array)
    assert tuple(tensor.shape) == (2, 3)
    assert array.dtype.name in str(tensor.dtype)
    if keras.backend.backend() == "torch":
        array[0, 0] = 9  # memory that is shared
        tensor_0 = ops.convert_to_numpy(ops.cast(tensor, "float32"))[0, 0]
        assert tensor_0 == 9
        array[0, 0] = 0
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(tensor, "float32")), np.arange(6).reshape(2, 3)
    )
