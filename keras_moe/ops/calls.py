"""Calls of whole layers, each on its own rows of slots.

R rows of slots, C slots per row, M = R*C slots in all, D width, F width of the outputs, E layers.
"""

import functools

import keras
from keras import ops

from keras_moe.ops.products import _compiles, _spans


def call_by_row(layers, x_RCD, width, row_expert=None, training=False):
    """Calls every row's layer on that row of slots.

    Args:
        layers: list of Keras layers from `[slots, in]` to `[slots, width]`.
        x_RCD: `[rows, slots, in]` tensor.
        width: integer, the width of the layers' outputs.
        row_expert: `[rows]` integers, the layer of each row, in ascending order; a row of number
            `len(layers)` is nobody's and comes out as zero. `None` when row `e` is layer `e`'s.
        training: boolean.

    Returns:
        `[rows, slots, width]` tensor of the dtype of `x_RCD`.
    """
    if row_expert is None:
        return ops.stack([_call(layer, x_RCD[row], training) for row, layer in enumerate(layers)])
    call = {
        "jax": _jax_call_by_row,
        "tensorflow": _xla_call_by_row if _compiles() else _tensorflow_call_by_span,
        "torch": _torch_call_by_span,
    }[keras.backend.backend()]
    return call(layers, x_RCD, width, row_expert, training)


def _call(layer, x_CD, training):
    return ops.cast(layer(x_CD, training=training), x_CD.dtype)


def _torch_call_by_span(layers, x_RCD, width, row_expert, training):
    """`call_by_row` in PyTorch, which knows at run time what is whose: one call per busy layer."""
    import torch

    rows, slots, dim = x_RCD.shape
    x_MD = x_RCD.reshape(-1, dim)
    spans = torch.stack(_spans(row_expert, len(layers)), dim=1).tolist()
    outputs = [
        _call(layer, x_MD[start * slots : end * slots], training)
        for layer, (start, end) in zip(layers, spans, strict=True)
        if start < end
    ]
    _, end = spans[-1]
    nobodys = x_MD.new_zeros(((rows - end) * slots, width))
    return torch.cat([*outputs, nobodys]).reshape(rows, slots, width)


def _tensorflow_call_by_span(layers, x_RCD, width, row_expert, training):
    """`call_by_row` in TensorFlow without XLA, which takes any shape: one call per busy layer."""
    import tensorflow as tf

    rows, slots, dim = ops.shape(x_RCD)
    x_MD = tf.reshape(x_RCD, (-1, dim))

    def call(layer, start, end):
        y_MF = tf.cond(
            start < end,
            lambda: _call(layer, x_MD[start * slots : end * slots], training),
            lambda: tf.zeros((0, width), x_RCD.dtype),
        )
        return tf.ensure_shape(y_MF, (None, width))

    start_E, end_E = _spans(row_expert, len(layers))
    outputs = [call(layer, start_E[e], end_E[e]) for e, layer in enumerate(layers)]
    nobodys = tf.zeros(((rows - end_E[-1]) * slots, width), x_RCD.dtype)
    return tf.reshape(tf.concat([*outputs, nobodys], axis=0), (rows, slots, width))


def _xla_call_by_row(layers, x_RCD, width, row_expert, training):
    """`call_by_row` in TensorFlow with XLA, which wants to know every shape: one call per row."""
    import tensorflow as tf

    def nobodys(x_CD):
        return tf.zeros((ops.shape(x_CD)[0], width), x_CD.dtype)

    branches = [*(functools.partial(_call, layer, training=training) for layer in layers), nobodys]
    # Not `ops.map`: it calls the first row's layer once more, to learn the shape.
    return tf.map_fn(
        lambda row: ops.switch(row[0], branches, row[1]),
        (row_expert, x_RCD),
        fn_output_signature=tf.TensorSpec((x_RCD.shape[1], width), x_RCD.dtype),
    )


def _jax_call_by_row(layers, x_RCD, width, row_expert, training):
    """`call_by_row` in JAX: a loop over each layer's rows, with a gradient that is one too.

    JAX's own gradient would add up the weights of all layers at every row. This one calls the
    layers again. What they keep (seeds, statistics) is carried from row to row both times.
    """
    import jax
    from jax import lax

    def call(layer, weights, state, x_CD):
        values = [
            *zip(layer.trainable_variables, weights, strict=True),
            *zip(layer.non_trainable_variables, state, strict=True),
        ]
        with keras.StatelessScope(values) as scope:
            y_CF = _call(layer, x_CD, training)
        return y_CF, [scope.get_current_value(v) for v in layer.non_trainable_variables]

    def forward(x_RCD, weights, states, spans):
        x_RCD = ops.convert_to_tensor(x_RCD)
        y_RCF, updated = ops.zeros((*x_RCD.shape[:2], width), x_RCD.dtype), []
        for layer, own, state, start, end in zip(layers, weights, states, *spans, strict=True):

            def of_row(row, carried, layer=layer, own=own):
                y_RCF, state = carried
                y_CF, state = call(layer, own, state, x_RCD[row])
                return y_RCF.at[row].set(y_CF), state

            y_RCF, state = lax.fori_loop(start, end, of_row, (y_RCF, state))
            updated.append(state)
        return y_RCF, updated

    def backward(inputs, upstream):
        x_RCD, weights, states, spans = inputs
        upstream_RCF, _ = upstream
        x_RCD = ops.convert_to_tensor(x_RCD)
        by_x_RCD, by_weights = ops.zeros_like(x_RCD), []
        for layer, own, state, start, end in zip(layers, weights, states, *spans, strict=True):

            def of_row(row, carried, layer=layer, own=own):
                by_x_RCD, by_own, state = carried

                def of_inputs(own, x_CD):
                    return call(layer, own, state, x_CD)

                _, gradients, state = jax.vjp(of_inputs, own, x_RCD[row], has_aux=True)
                more, by_x_CD = gradients(upstream_RCF[row])
                by_own = [a + b for a, b in zip(by_own, more, strict=True)]
                return by_x_RCD.at[row].set(by_x_CD), by_own, state

            carried = by_x_RCD, [ops.zeros_like(w) for w in own], state
            by_x_RCD, by_own, _ = lax.fori_loop(start, end, of_row, carried)
            by_weights.append(by_own)
        return by_x_RCD, by_weights, None, None

    call_all = jax.custom_vjp(forward)
    call_all.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    weights = [[ops.convert_to_tensor(v) for v in one.trainable_variables] for one in layers]
    states = [[ops.convert_to_tensor(v) for v in one.non_trainable_variables] for one in layers]
    y_RCF, updated = call_all(x_RCD, weights, states, _spans(row_expert, len(layers)))
    for layer, state in zip(layers, updated, strict=True):
        for variable, value in zip(layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
    return y_RCF
