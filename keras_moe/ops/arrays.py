"""NumPy arrays as tensors."""

import math
import mmap

import keras
import numpy as np
from keras import ops

ALIGNMENT = 64  # bytes; JAX copies an array that begins anywhere else
LARGE = 2**20  # bytes


def empty(shape, dtype):
    """A new NumPy array whose memory every backend that can takes over in `adopt`.

    Args:
        shape: tuple of integers.
        dtype: of NumPy.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= LARGE and hasattr(mmap, "MAP_PRIVATE"):
        # NumPy's own has huge pages, which the system fills with zeros first: that is slower than
        # to read a file into small ones.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, dtype).reshape(shape)
    memory = np.empty(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def adopt(array):
    """A tensor of a NumPy array that is not used otherwise.

    On a CPU it has the array's memory, on TensorFlow and JAX if that begins as `empty` makes it.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.device_put(array, may_alias=True)
    is_bfloat16 = array.dtype.name == "bfloat16"  # which neither of the others knows as NumPy's
    if backend == "tensorflow":
        import tensorflow as tf

        if array.size == 0 or array.ctypes.data % ALIGNMENT:
            return ops.convert_to_tensor(array)
        bits = array.view(np.int16) if is_bfloat16 else array
        tensor = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
        return tf.bitcast(tensor, tf.bfloat16) if is_bfloat16 else tensor
    import torch

    if is_bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return ops.convert_to_tensor(torch.from_numpy(array))


def transposed(array):
    """A tensor of a NumPy array's transpose, by the backend, which is faster at it than NumPy.

    Args:
        array: of two axes at least, the last two of which change places.

    Returns:
        Tuple of the tensor and whether it has memory of its own, so that the array is free again.
    """
    tensor = ops.swapaxes(adopt(array), -1, -2)
    backend = keras.backend.backend()
    if backend == "jax":
        return tensor.block_until_ready(), True
    if backend == "tensorflow":
        import tensorflow as tf

        # A GPU may still be copying; and nothing moves where an axis has length 1.
        return tensor, 1 not in array.shape[-2:] and not tf.config.list_physical_devices("GPU")
    return tensor, False
