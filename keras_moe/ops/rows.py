"""Moves and selections of rows. M rows, D width."""

import keras
from keras import ops

from keras_moe.distribution.active import active, by_groups
from keras_moe.ops.gradients import with_gradient
from keras_moe.ops.sizes import as_number


def top_k(x, k):
    """The `k` largest entries of the last axis, and where they stand; equal ones in order.

    PyTorch's own `topk` leaves the order of equal entries open, so that backends would disagree.

    Args:
        x: `[..., n]` tensor of floats, of 32 bits at most.
        k: integer, at most `n`; a scalar tensor where it is not known before run time.

    Returns:
        Tuple of values and int32 positions, both `[..., k]`, in descending order.
    """
    if active() is not None:  # row by row: the compiler would gather all rows on every device
        rows = ops.reshape(x, (-1, x.shape[-1]))
        found = by_groups(lambda rows: top_k(rows, k), rows)
        return tuple(ops.reshape(part, (*ops.shape(x)[:-1], k)) for part in found)
    if isinstance(k, int) and k == 1:
        index = ops.argmax(x, axis=-1, keepdims=True)
        values = take_entries(x, index, axis=-1)
    elif keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import largest_places

        index = largest_places(x, k)
        values = take_entries(x, index)
    elif keras.backend.backend() == "jax":
        from keras_moe.ops.jax_top_k import largest_places

        index = largest_places(x, k)
        values = take_entries(x, index)
    else:
        values, index = ops.top_k(x, k)
    return values, ops.cast(index, "int32")


def argsort(x):
    """The places of the entries of the last axis in ascending order, int32; equal ones in order.

    Args:
        x: `[..., n]` tensor.

    Returns:
        `[..., n]` int32.
    """
    if keras.backend.backend() == "torch":
        from keras_moe.ops.torch_only import argsort

        return argsort(x)
    return ops.cast(ops.argsort(x, axis=-1), "int32")


def take_entries(x, index, axis=-1):
    """`keras.ops.take_along_axis`, which PyTorch cannot export with a free batch size.

    Args:
        x: tensor.
        index: integers, shaped like `x` but for one axis, not negative.
        axis: integer, this axis.

    Returns:
        Tensor shaped like `index`.
    """
    if keras.backend.backend() == "torch":
        return x.gather(axis % x.ndim, index.long())  # not every reader of ONNX counts backwards
    return ops.take_along_axis(x, index, axis=axis)


def take_rows(x_MD, index):
    """Rows of `x_MD` by position; a position past the last row gives a row of zeros.

    Args:
        x_MD: `[M, D]` tensor.
        index: integers of any shape, in `[0, M]`.

    Returns:
        Tensor of shape `index.shape + [D]`.
    """
    if keras.backend.backend() != "torch":
        return _take_rows(x_MD, index)
    from keras_moe.ops.torch_only import take_rows

    def backward(upstream, x_MD, index):
        rows = ops.reshape(upstream, (-1, x_MD.shape[-1])), ops.reshape(index, (-1,))
        return [lambda: add_rows(*rows, x_MD.shape[0]), None]

    return with_gradient(take_rows, backward, _take_rows)(x_MD, index)


def _take_rows(x_MD, index):
    num_rows = ops.shape(x_MD)[0]
    if isinstance(num_rows, int) or keras.backend.backend() != "tensorflow":
        taken = ops.take(x_MD, ops.minimum(index, as_number(num_rows - 1)), axis=0)
    else:  # TensorFlow stops where there is no row to take
        taken = _take_rows_if_any(x_MD, index, num_rows)
    past = ops.expand_dims(index >= num_rows, -1)
    return ops.where(past, ops.zeros((), dtype=taken.dtype), taken)


def _take_rows_if_any(x_MD, index, num_rows):
    import tensorflow as tf

    shape = (*ops.shape(index), x_MD.shape[1])
    return tf.cond(
        num_rows > 0,
        lambda: tf.gather(x_MD, tf.minimum(index, num_rows - 1)),
        lambda: tf.zeros(shape, x_MD.dtype),
    )


def embedding_lookup(table_MD, index):
    """Rows of a weight by position, of which many may be the same.

    The gradient is one tensor, on every backend. TensorFlow's own is a list of rows, which Keras'
    optimizers square one by one: a row that was taken twice would get another second moment than
    elsewhere, and an Adam step several times as long. It is summed in float32 at least: the sum of
    a common token's gradients would soon stand still in bfloat16.

    Args:
        table_MD: `[M, D]` tensor or variable.
        index: integers of any shape, in `[0, M)`.

    Returns:
        Tensor of shape `index.shape + [D]`.
    """
    if keras.backend.backend() != "tensorflow":
        table_MD = ops.convert_to_tensor(table_MD)
        wide = keras.backend.result_type(table_MD.dtype, "float32")
        return ops.cast(ops.take(ops.cast(table_MD, wide), index, axis=0), table_MD.dtype)

    def forward(table_MD, index):
        return ops.take(table_MD, index, axis=0)

    def backward(upstream, table_MD, index):
        num_rows, dim = table_MD.shape
        rows = ops.reshape(upstream, (-1, dim)), ops.reshape(index, (-1,))
        return [lambda: add_rows(*rows, num_rows), None]

    return with_gradient(forward, backward)(table_MD, index)


def sum_rows(x_MD, index_TK, weight_M=None):
    """Sums K rows for every place, in float32 at least where they are several.

    Args:
        x_MD: `[M, D]` tensor.
        index_TK: `[T, K]` integers in `[0, M]`; M adds nothing.
        weight_M: `[M]` tensor, what each row is multiplied by; `None`: nothing.

    Returns:
        `[T, D]` tensor like `x_MD`.
    """
    k = index_TK.shape[1]
    dtype = x_MD.dtype if k == 1 else keras.backend.result_type(x_MD.dtype, "float32")
    total_TD = None
    for choice in range(k):
        index_T = index_TK[:, choice]
        row_TD = ops.cast(take_rows(x_MD, index_T), dtype)
        if weight_M is not None:
            row_TD *= ops.cast(take_rows(weight_M[:, None], index_T), dtype)
        total_TD = row_TD if total_TD is None else total_TD + row_TD
    return ops.cast(total_TD, x_MD.dtype)


def add_rows(x_MD, index_M, num_rows):
    """Sums rows into `num_rows` places, in float32 at least; one past the last is thrown away.

    Args:
        x_MD: `[M, D]` tensor.
        index_M: `[M]` integers in `[0, num_rows]`, where each row goes.
        num_rows: integer.

    Returns:
        `[num_rows, D]` tensor like `x_MD`; a place that no row goes to is zero.
    """
    dtype = x_MD.dtype
    x_MD = ops.cast(x_MD, keras.backend.result_type(dtype, "float32"))
    if keras.backend.backend() == "torch":
        # Keras' segment_sum is a scatter of single numbers on PyTorch; index_add adds whole rows.
        sums_ND = x_MD.new_zeros((num_rows + 1, x_MD.shape[1])).index_add(0, index_M, x_MD)
    else:
        sums_ND = ops.segment_sum(x_MD, index_M, num_segments=num_rows + 1)
    return ops.cast(sums_ND[:num_rows], dtype)


def count_entries(index_M, size):
    """How often each number occurs.

    Args:
        index_M: `[M]` integers in `[0, size)`.
        size: integer.

    Returns:
        `[size]` int32.
    """
    one_M = ops.ones_like(index_M, dtype="int32")
    if keras.backend.backend() == "torch":  # where Keras writes in place, which `vmap` refuses
        return one_M.new_zeros((size,)).index_add(0, index_M, one_M)
    return ops.segment_sum(one_M, index_M, size)


def write_entries(value_M, index_M, size, empty):
    """A vector with values in given places.

    Args:
        value_M: `[M]` integers.
        index_M: `[M]` int32 in `[0, size)`. What a place holds that occurs twice is not defined.
        size: integer, the length of the vector.
        empty: integer, what a place holds that does not occur.

    Returns:
        `[size]` int32.
    """
    value_M = ops.cast(value_M, "int32")
    if keras.backend.backend() == "torch":  # where Keras writes in place, which `vmap` refuses
        return value_M.new_full((size,), empty).scatter(0, index_M.long(), value_M)
    index_M1 = ops.expand_dims(index_M, 1)
    return ops.scatter_update(ops.full((size,), empty, dtype="int32"), index_M1, value_M)


def put_rows(x, rows, first, axis):
    """A tensor in which some rows are replaced by others.

    Args:
        x: tensor; where PyTorch keeps no gradients it is written into, and not to be used any more.
        rows: tensor like `x`, but shorter along one axis.
        first: integer or scalar tensor, where the first of them goes; all of them must find room.
        axis: integer.

    Returns:
        Tensor like `x`.
    """
    if keras.backend.backend() == "torch":  # where Keras' own update takes a dozen operations
        import torch

        place = ops.arange(rows.shape[axis], dtype="int64") + first
        is_free = x.is_contiguous() and not torch.is_grad_enabled()  # or entries may share memory
        return (x.index_copy_ if is_free else x.index_copy)(axis, place, rows)
    start = [0] * len(x.shape)
    start[axis] = first
    return ops.slice_update(x, start, rows)
