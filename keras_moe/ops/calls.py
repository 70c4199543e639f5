"""Calls of whole layers, each on its own rows of slots.

R rows of slots, C slots per row, M = R*C slots in all, D width.
"""

import keras
from keras import ops

from keras_moe.ops.products import _compiles, _spans, _torch_spans


def call_by_row(layers, x_RCD, row_expert=None):
    """Calls every row's layer on that row of slots.

    Args:
        layers: list of Keras layers from `[slots, in]` to `[slots, out]`.
        x_RCD: `[rows, slots, in]` tensor.
        row_expert: `[rows]` integers, the layer of each row, in ascending order; a row of number
            `len(layers)` is nobody's. `None` when row `e` is layer `e`'s.

    Returns:
        `[rows, slots, out]` tensor.
    """
    if row_expert is None:
        return ops.stack([layer(x_RCD[row]) for row, layer in enumerate(layers)])
    backend = keras.backend.backend()
    if backend == "torch":
        return _torch_call_by_span(layers, x_RCD, row_expert)
    if backend == "jax":
        return _scan_rows(layers, x_RCD, row_expert)
    if not _compiles():
        return _tensorflow_call_by_span(layers, x_RCD, row_expert)
    branches = [lambda x_CD, layer=layer: layer(x_CD) for layer in layers]
    return ops.map(lambda row: ops.switch(row[0], branches, row[1]), (row_expert, x_RCD))


def _torch_call_by_span(layers, x_RCD, row_expert):
    """`call_by_row` in PyTorch, which knows at run time what is whose: one call per busy layer."""
    import torch

    rows, slots, dim = x_RCD.shape
    x_MD = x_RCD.reshape(-1, dim)
    spans = _torch_spans(_spans(row_expert, len(layers)), slots)
    outputs = [layers[expert](x_MD[start:end]) for expert, start, end in spans]
    y_MF = torch.cat(outputs or [layers[0](x_MD[:0])])
    nobodys = y_MF.new_zeros((len(x_MD) - len(y_MF), y_MF.shape[1]))
    return torch.cat([y_MF, nobodys]).reshape(rows, slots, -1)


def _tensorflow_call_by_span(layers, x_RCD, row_expert):
    """`call_by_row` in TensorFlow without XLA, which takes any shape: one call per busy layer."""
    import tensorflow as tf

    rows, slots, dim = ops.shape(x_RCD)
    x_MD = tf.reshape(x_RCD, (-1, dim))
    symbolic = layers[0](keras.KerasTensor((None, x_RCD.shape[2]), x_RCD.dtype))
    width, dtype = symbolic.shape[-1], symbolic.dtype

    def call(layer, start, end):
        y_MF = tf.cond(
            start < end,
            lambda: layer(x_MD[start * slots : end * slots]),
            lambda: tf.zeros((0, width), dtype),
        )
        return tf.ensure_shape(y_MF, (None, width))

    start_E, end_E = _spans(row_expert, len(layers))
    outputs = [call(layer, start_E[e], end_E[e]) for e, layer in enumerate(layers)]
    nobodys = (rows - tf.reduce_max(end_E)) * slots
    outputs.append(tf.zeros((nobodys, width), dtype))
    return tf.reshape(tf.concat(outputs, axis=0), (rows, slots, width))


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
