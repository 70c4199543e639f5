"""Steps of `model.fit` and `model.predict`, timed in turn, and the ratios between them."""

import time

import keras
import numpy as np


class StepTimes(keras.callbacks.Callback):
    """When each step of a `fit` was over, its result awaited."""

    def on_epoch_begin(self, epoch, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.ends.append(time.perf_counter())


def fit_step(layer, x, metrics=True):
    """A function that runs a few steps of `model.fit` and returns the seconds of one.

    The layer sits behind a norm, as in a Transformer, so that the gradient of its inputs is needed.
    The optimizer is plain SGD, which reads and writes each weight once: what a costlier one adds
    is the price of parameters, not of the layer.
    """
    from keras_moe.callbacks import RoutingMetrics

    inputs = keras.Input(x.shape[1:])
    outputs = layer(keras.layers.RMSNormalization()(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    times, steps = StepTimes(), 3
    x = np.concatenate([x] * steps)
    callbacks = [times, RoutingMetrics()] if metrics else [times]

    def run():
        batch = len(x) // steps
        model.fit(x, x, batch, verbose=0, shuffle=False, callbacks=callbacks)
        return float(np.min(np.diff(times.ends)))

    return run


def predict_step(layer, x):
    """A function that runs one compiled inference and returns its seconds."""
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, layer(inputs))
    model.compile(jit_compile=keras.backend.backend() != "torch")

    def run(times=20):
        start = time.perf_counter()
        for _ in range(times):
            model.predict_on_batch(x)
        return (time.perf_counter() - start) / times

    return run


def interleaved(steps, rounds):
    """Seconds of every contestant in every round, after one round of warming up: name -> list."""
    for step in steps.values():
        step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return seconds


def ratio(seconds, name, base):
    """Quartiles of one contestant's time over another's, round by round."""
    return np.percentile(np.array(seconds[name]) / np.array(seconds[base]), (25, 50, 75))
