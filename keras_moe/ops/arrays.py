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

    PyTorch takes the array's memory over, and JAX on a CPU if it begins as `empty` makes it;
    elsewhere it is copied.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.device_put(array, may_alias=True)
    if backend == "tensorflow":
        return ops.convert_to_tensor(array)
    import torch

    if array.dtype.name == "bfloat16":  # which PyTorch does not know as NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return ops.convert_to_tensor(torch.from_numpy(array))
