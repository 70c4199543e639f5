"""Products, selections and moves of rows that `keras.ops` lacks or does slowly.

The only file that names a backend.

Axes: M rows, D width, R rows of slots, C slots per row, E experts, F hidden.
"""

import keras
from keras import ops


def expert_product(x_RCD, kernel_EDF, row_expert=None):
    """Multiplies every row of slots by the kernel of its expert, in one batched product.

    Args:
        x_RCD: `[rows, slots, in]` tensor.
        kernel_EDF: `[experts, in, out]` tensor or variable.
        row_expert: `[rows]` integers, the expert of each row; `None` when row `e` is expert `e`.

    Returns:
        `[rows, slots, out]` tensor.
    """
    if row_expert is not None:
        kernel_EDF = ops.take(kernel_EDF, row_expert, axis=0)
    return ops.matmul(x_RCD, kernel_EDF)


def call_by_row(layers, x_RCD, row_expert=None):
    """Calls every row's layer on that row of slots.

    Args:
        layers: list of Keras layers from `[slots, in]` to `[slots, out]`.
        x_RCD: `[rows, slots, in]` tensor.
        row_expert: `[rows]` integers, the layer of each row; `None` when row `e` is layer `e`'s.

    Returns:
        `[rows, slots, out]` tensor.
    """
    if row_expert is None:
        return ops.stack([layer(x_RCD[row]) for row, layer in enumerate(layers)])
    backend = keras.backend.backend()
    if backend == "torch":
        # PyTorch knows the rows' layers at run time, and a loop is all there is to do.
        return ops.stack([layers[row_expert[row]](x_CD) for row, x_CD in enumerate(x_RCD)])
    if backend == "jax":
        return _scan_rows(layers, x_RCD, row_expert)
    branches = [lambda x_CD, layer=layer: layer(x_CD) for layer in layers]
    return ops.map(lambda row: ops.switch(row[0], branches, row[1]), (row_expert, x_RCD))


def _scan_rows(layers, x_RCD, row_expert):
    """`call_by_row` in JAX: what the layers keep (seeds, statistics) is carried from row to row."""

    def branch(number, layer):
        def call(state, x_CD):
            # Not `stateless_call`: it would not tell the layer whether it is training.
            values = [(v, ops.convert_to_tensor(v)) for v in layer.trainable_variables]
            values += zip(layer.non_trainable_variables, state[number], strict=True)
            with keras.StatelessScope(state_mapping=values) as scope:
                y_CD = layer(x_CD)
            updated = [scope.get_current_value(v) for v in layer.non_trainable_variables]
            return (*state[:number], updated, *state[number + 1 :]), y_CD

        return call

    branches = [branch(number, layer) for number, layer in enumerate(layers)]
    state = tuple(
        [ops.convert_to_tensor(v) for v in layer.non_trainable_variables] for layer in layers
    )
    state, y_RCD = ops.scan(
        lambda state, row: ops.switch(row[0], branches, state, row[1]), state, (row_expert, x_RCD)
    )
    for layer, updated in zip(layers, state, strict=True):
        for variable, value in zip(layer.non_trainable_variables, updated, strict=True):
            variable.assign(value)
    return y_RCD


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


def uniform(shape, minval, maxval, seed_generator):
    """Uniform float32 noise from `[minval, maxval)`.

    TensorFlow leaves the generator to XLA, whose choice on CPUs is 80 times slower than Philox
    (2 million numbers: 940 ms against 11), so there Philox is asked for by name.

    Args:
        shape: of the noise.
        minval: lower bound.
        maxval: upper bound.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor of `shape`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        seed = tf.bitcast(ops.cast(seed_generator.next(), "uint32"), "int32")
        return tf.random.stateless_uniform(shape, seed, minval, maxval, alg="philox")
    return keras.random.uniform(shape, minval, maxval, dtype="float32", seed=seed_generator)


def dropout(x, rate, seed_generator):
    """Zeroes a share `rate` of the entries and scales the others up, with the noise of `uniform`.

    Args:
        x: tensor.
        rate: in `[0, 1)`.
        seed_generator: a `keras.random.SeedGenerator`.

    Returns:
        Tensor like `x`.
    """
    kept = uniform(ops.shape(x), 0.0, 1.0, seed_generator) >= rate
    return x * ops.cast(ops.cast(kept, "float32") / (1.0 - rate), x.dtype)


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
    """A function of one tensor with a gradient of your own, for linear maps.

    Args:
        forward: function of the input.
        backward: function from the gradient of the output to the gradient of the input.

    Returns:
        The function `forward`, differentiated by `backward`.
    """

    @ops.custom_gradient
    def function(x):
        def gradient(*args, upstream=None):
            # PyTorch passes the saved inputs and `upstream=`; the others the gradient alone.
            return backward(args[0] if upstream is None else upstream)

        return forward(x), gradient

    return function
