"""Moves and selections of rows. M rows, D width."""

import keras
from keras import ops


def top_k(x, k):
    """The `k` largest entries of the last axis, and where they stand; equal ones in order.

    PyTorch's own `topk` leaves the order of equal entries open, so that backends would disagree.

    Args:
        x: `[..., n]` tensor.
        k: integer, at most `n`; a scalar tensor where it is not known before run time.

    Returns:
        Tuple of values and int32 positions, both `[..., k]`, in descending order.
    """
    if isinstance(k, int) and k == 1:
        index = ops.argmax(x, axis=-1, keepdims=True)
        values = ops.take_along_axis(x, index, axis=-1)
    elif keras.backend.backend() == "torch":
        import torch

        values, index = torch.sort(x, dim=-1, descending=True, stable=True)
        values, index = values[..., :k], index[..., :k]
    else:
        values, index = ops.top_k(x, k)
    return values, ops.cast(index, "int32")


def take_rows(x_MD, index):
    """Rows of `x_MD` by position; a position past the last row gives a row of zeros.

    Args:
        x_MD: `[M, D]` tensor.
        index: integers of any shape, in `[0, M]`.

    Returns:
        Tensor of shape `index.shape + [D]`.
    """
    num_rows = ops.shape(x_MD)[0]
    taken = ops.take(x_MD, ops.minimum(index, num_rows - 1), axis=0)
    if keras.backend.backend() == "torch":  # in place: eager PyTorch would write all rows twice
        return taken.masked_fill_((index >= num_rows)[..., None], 0.0)
    return ops.where((index < num_rows)[..., None], taken, ops.zeros((), dtype=taken.dtype))


def add_rows(x_MD, index_M, num_rows):
    """Sums rows into `num_rows` places; a place past the last one is thrown away.

    Args:
        x_MD: `[M, D]` tensor.
        index_M: `[M]` integers in `[0, num_rows]`, where each row goes.
        num_rows: integer.

    Returns:
        `[num_rows, D]` tensor; a place that no row goes to is zero.
    """
    if keras.backend.backend() == "torch":
        # Keras' segment_sum is a scatter of single numbers on PyTorch; index_add adds whole rows.
        return x_MD.new_zeros((num_rows + 1, x_MD.shape[1])).index_add(0, index_M, x_MD)[:num_rows]
    return ops.segment_sum(x_MD, index_M, num_segments=num_rows + 1)[:num_rows]


def with_gradient(forward, backward):
    """A function of one or more tensors with a gradient of your own.

    Args:
        forward: function of the inputs.
        backward: function of the gradient of the output and of the inputs; returns the gradient of
            every input, a tuple where there are several.

    Returns:
        The function `forward`, differentiated by `backward`.
    """

    @ops.custom_gradient
    def function(*inputs):
        def gradient(*args, upstream=None):
            # PyTorch passes the saved inputs and `upstream=`; the others the gradient alone.
            return backward(args[0], *inputs) if upstream is None else backward(upstream, *args)

        return forward(*inputs), gradient

    return function
