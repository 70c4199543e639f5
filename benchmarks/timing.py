"""Steps of `model.fit` and calls of a compiled layer, timed in turn."""

import time

import keras
import numpy as np
from keras import ops

from keras_moe.callbacks import RoutingMetrics

VOCABULARY = 8192


class StepTimes(keras.callbacks.Callback):
    """When each step of a `fit` was over, its result awaited."""

    def on_epoch_begin(self, epoch, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.ends.append(time.perf_counter())


def token_table(width):
    """A fixed random table that makes tokens of numbers: a step copies next to no data."""
    table = keras.layers.Embedding(
        VOCABULARY, width, embeddings_initializer="random_normal", trainable=False
    )
    table.build()
    return table


def token_numbers(tokens):
    """`[sequences, length]` integers, as different as the table allows."""
    return np.arange(tokens, dtype="int32").reshape(-1, min(64, tokens)) % VOCABULARY


def framed(layer, table, length):
    """A model of the layer between a table of tokens and a head that makes one figure of a token.

    The layer sits behind a norm that learns, as in a Transformer, so that the gradient of its
    inputs is needed. The head is a mean of squares: its gradient differs in every entry, or a
    compiler might simplify the layer's own.
    """
    numbers = keras.Input((length,), dtype="int32")
    outputs = layer(keras.layers.RMSNormalization()(table(numbers)))
    return keras.Model(numbers, ops.mean(ops.square(outputs), axis=-1))


def fit_step(layer, tokens, width, steps=3):
    """A function that runs a few steps of `model.fit` and returns the seconds of the fastest.

    The first step is not counted: it has the start of the epoch in it. The optimizer is plain SGD,
    which reads and writes each weight once: what a costlier one adds is the price of parameters,
    not of the layer.
    """
    numbers = np.concatenate([token_numbers(tokens)] * steps)
    model = framed(layer, token_table(width), numbers.shape[1])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    targets, batch = np.ones(numbers.shape, "float32"), len(numbers) // steps
    times = StepTimes()

    def run():
        callbacks = [times, RoutingMetrics()]
        model.fit(numbers, targets, batch, verbose=0, shuffle=False, callbacks=callbacks)
        return float(np.min(np.diff(times.ends)))

    return run


def inference_step(layer, x, times=20):
    """A function that calls the layer a few times, without Keras around it: seconds of one call."""
    layer.build(x.shape)
    call = compiled(layer)
    x = ops.convert_to_tensor(x)

    def run():
        start = time.perf_counter()
        for _ in range(times):
            ops.convert_to_numpy(call(x))
        return (time.perf_counter() - start) / times

    return run


def compiled(layer):
    """The layer as a function of its inputs, compiled where `model.predict` would do it."""
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def call(trainable, others, x):
            return layer.stateless_call(trainable, others, x)[0]

        variables = [
            [v.value for v in group]
            for group in (layer.trainable_variables, layer.non_trainable_variables)
        ]
        return lambda x: call(*variables, x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(layer)
    import torch

    return torch.no_grad()(layer)


def interleaved(steps, rounds, slow=50):
    """Seconds of every contestant in every round, after one round of warming up: name -> list.

    A contestant that is over `slow` times slower than the first runs in two rounds only.
    """
    warm = {name: step() for name, step in steps.items()}
    limit = slow * next(iter(warm.values()))
    seconds = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            if number < 2 or warm[name] <= limit:
                seconds[name].append(step())
    return seconds
