"""One object for experts over many devices, whatever the backend."""

import contextlib

import keras

from keras_moe.distribution.active import activate


class ExpertParallel:
    """Shards experts over devices; see `keras_moe.distribution.tensorflow_engine`.

    Args:
        data: copies of the experts; `None`: as many as there are devices for.
        experts: devices that the experts of one copy lie on.
        model: devices that share one expert's hidden units.
        devices: names of the devices; `None`: all.
    """

    def __init__(self, data=None, experts=1, model=1, devices=None):
        if keras.backend.backend() != "tensorflow":
            raise ValueError("`ExpertParallel` must be used on TensorFlow here.")
        from keras_moe.distribution.tensorflow_engine import TensorFlowEngine

        self.engine = TensorFlowEngine(data, experts, model, devices)

    @contextlib.contextmanager
    def scope(self):
        """Within: build, compile, fit, evaluate, predict, save."""
        with activate(self), self.engine.scope():
            yield self

    def gathered(self, x):
        """`x` whole on every device."""
        return self.engine.gathered(x)

    def seats_for_all(self, tokens):
        """Slots per expert that seat all tokens of a group; `None`: experts have what they need."""
        return self.engine.seats_for_all(tokens)

    def exchange(self, experts, x_GSD, routing, training=False):
        """Dispatch, experts and combine."""
        return self.engine.exchange(experts, x_GSD, routing, training)

    def assert_sharded(self, model):
        """Raises unless experts' weights and their moments are sharded."""
        self.engine.assert_sharded(model)

    def describe(self, model):
        """A table of weights, shapes, layouts and bytes per device."""
        return self.engine.describe(model)
