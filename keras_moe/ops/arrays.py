"""NumPy arrays as tensors."""

import keras
import numpy as np
from keras import ops


def adopt(array):
    """A tensor of a NumPy array that is not used otherwise.

    PyTorch takes the array's memory over; the other backends copy it.
    """
    if keras.backend.backend() != "torch":
        return ops.convert_to_tensor(array)
    import torch

    if array.dtype.name == "bfloat16":  # which PyTorch does not know as NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return ops.convert_to_tensor(torch.from_numpy(array))
