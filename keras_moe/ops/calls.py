"""Calls of whole layers, each on its own rows of slots.

R rows of slots, C slots per row, M = R*C slots in all, D width, F width of the outputs, E layers.
"""

import functools

import keras
from keras import ops

from keras_moe.ops.gradients import with_gradient
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

    from keras_moe.ops.torch_only import is_exporting, is_transforming

    if is_exporting() or is_transforming():  # where nobody knows yet what is whose
        return _torch_call_all(layers, x_RCD, width, row_expert, training)
    rows, slots, dim = x_RCD.shape
    x_MD = x_RCD.reshape(-1, dim)
    spans = torch.stack(_spans(row_expert, len(layers)), dim=1).tolist()
    outputs, idle_weights = [], []
    for layer, (start, end) in zip(layers, spans, strict=True):
        if start < end:
            outputs.append(_call(layer, x_MD[start * slots : end * slots], training))
        else:
            idle_weights.extend(variable.value for variable in layer.trainable_variables)
    _, end = spans[-1]
    nobodys = x_MD.new_zeros(((rows - end) * slots, width))
    y_RCF = torch.cat([*outputs, nobodys]).reshape(rows, slots, width)
    return _with_zero_gradients(y_RCF, idle_weights)


def _torch_call_all(layers, x_RCD, width, row_expert, training):
    """`call_by_row` with every layer called on all rows, those of other layers as zeros."""
    rows, slots, dim = x_RCD.shape
    y_RCF = x_RCD.new_zeros((rows, slots, width))
    for expert, layer in enumerate(layers):
        own_R11 = ops.reshape(row_expert == expert, (rows, 1, 1))
        x_MD = ops.reshape(ops.where(own_R11, x_RCD, 0.0), (rows * slots, dim))
        y_MF = _call(layer, x_MD, training)
        y_RCF = ops.where(own_R11, ops.reshape(y_MF, (rows, slots, width)), y_RCF)
    return y_RCF


def _with_zero_gradients(y, weights):
    """`y`, by which the weights get gradients of zero, not none at all.

    Without a gradient PyTorch's optimizers leave a weight and its moments as they are, and
    `DistributedDataParallel` waits for the gradient.
    """

    def gradients(upstream, y, *weights):
        return [lambda: upstream, *(lambda w=w: ops.zeros_like(w) for w in weights)]

    return (
        with_gradient(lambda y, *weights: y.view(y.shape), gradients)(y, *weights) if weights else y
    )


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

    weights, states = (
        [[ops.convert_to_tensor(variable) for variable in variables] for variables in of_layers]
        for of_layers in (
            [layer.trainable_variables for layer in layers],
            [layer.non_trainable_variables for layer in layers],
        )
    )
    _, structure = jax.tree.flatten((weights, states))

    def call(e, own, state, x_CD):
        layer = layers[e]
        values = [
            *zip(layer.trainable_variables, own, strict=True),
            *zip(layer.non_trainable_variables, state, strict=True),
        ]
        with keras.StatelessScope(values) as scope:
            y_CF = _call(layer, x_CD, training)
        return y_CF, [scope.get_current_value(v) for v in layer.non_trainable_variables]

    def each_layer(row_expert, flat):
        weights, states = jax.tree.unflatten(structure, flat)
        return zip(
            range(len(layers)), weights, states, *_spans(row_expert, len(layers)), strict=True
        )

    def forward(x_RCD, row_expert, *flat):
        y_RCF = ops.zeros((*x_RCD.shape[:2], width), x_RCD.dtype)
        for e, own, state, start, end in each_layer(row_expert, flat):

            def of_row(row, carried, e=e, own=own):
                y_RCF, state = carried
                y_CF, state = call(e, own, state, x_RCD[row])
                return y_RCF.at[row].set(y_CF), state

            y_RCF, _ = lax.fori_loop(start, end, of_row, (y_RCF, state))
        return y_RCF

    def backward(upstream_RCF, x_RCD, row_expert, *flat):
        @functools.cache
        def all_gradients():
            by_x_RCD, by_weights = ops.zeros_like(x_RCD), []
            for e, own, state, start, end in each_layer(row_expert, flat):

                def of_row(row, carried, e=e, own=own):
                    by_x_RCD, by_own, state = carried

                    def of_inputs(own, x_CD):
                        return call(e, own, state, x_CD)

                    _, gradients, state = jax.vjp(of_inputs, own, x_RCD[row], has_aux=True)
                    more, by_x_CD = gradients(upstream_RCF[row])
                    by_own = [a + b for a, b in zip(by_own, more, strict=True)]
                    return by_x_RCD.at[row].set(by_x_CD), by_own, state

                carried = by_x_RCD, [ops.zeros_like(w) for w in own], state
                by_x_RCD, by_own, _ = lax.fori_loop(start, end, of_row, carried)
                by_weights.extend(by_own)
            return by_x_RCD, *by_weights

        count = sum(map(len, weights))
        by_weights = [lambda i=i: all_gradients()[1 + i] for i in range(count)]
        by_states = [lambda state=state: ops.zeros_like(state) for state in flat[count:]]
        return [lambda: all_gradients()[0], None, *by_weights, *by_states]

    def plain(x_RCD, row_expert, *flat):
        weights, states = jax.tree.unflatten(structure, flat)

        def of_layer(e):
            def branch(states, x_CD):
                y_CF, state = call(e, weights[e], states[e], x_CD)
                return [*states[:e], state, *states[e + 1 :]], y_CF

            return branch

        def nobodys(states, x_CD):
            return states, ops.zeros((x_CD.shape[0], width), x_CD.dtype)

        def of_row(states, row):
            expert, x_CD = row
            return lax.switch(expert, [*map(of_layer, range(len(layers))), nobodys], states, x_CD)

        return lax.scan(of_row, states, (row_expert, x_RCD))[1]

    def updated(x_RCD, row_expert, *flat):
        for e, own, state, start, end in each_layer(row_expert, flat):

            def of_row(row, state, e=e, own=own):
                return call(e, own, state, x_RCD[row])[1]

            yield lax.fori_loop(start, end, of_row, state)

    inputs = (x_RCD, ops.convert_to_tensor(row_expert), *jax.tree.leaves((weights, states)))
    if any(states):  # XLA leaves out of these loops what the states do not depend on
        for layer, state in zip(layers, updated(*map(lax.stop_gradient, inputs)), strict=True):
            for variable, value in zip(layer.non_trainable_variables, state, strict=True):
                variable.assign(value)
    return with_gradient(forward, backward, plain)(*inputs)
