"""Functions that PyTorch runs without Python between their steps."""

import keras


def recorded(function):
    """A function of tensors that PyTorch records, and repeats from then on.

    Eager PyTorch spends more time between the operations of a small step than in them. TensorFlow
    and JAX compile what calls the function, and get it as it is.

    For inference: what it returns is of PyTorch's inference mode. And for functions that do the
    same whatever the tensors hold, and change nothing; one that looks at a tensor's numbers on the
    way is called as it is. A variable that the function uses may get other values, but must stay
    the same object; other settings that it reads are those of the first call.

    Args:
        function: of tensors and tuples of tensors, nested the same at every call, to the same.

    Returns:
        The function. It is recorded anew for every combination of shapes, dtypes and devices, when
        it is called with them for the second time; the recordings used last are kept.
    """
    if keras.backend.backend() != "torch":
        return function
    from keras_moe.ops.torch_recording import Recorded

    return Recorded(function)
