"""Routing figures in `model.fit`, on every backend."""

import keras

from keras_moe import metrics
from keras_moe.reading import mixtures


class RoutingMetrics(keras.callbacks.Callback):
    """Adds each MoE layer's routing figures to the progress bar and the `history`, once per epoch.

    The layers count as they run, in weights of their own; the callback reads them when an epoch or
    an evaluation ends, so that a training step does not wait for it. For a layer named `moe` the
    logs gain `moe/dropped`, `moe/max_share`, `moe/dead` and `moe/entropy`, with expert choice also
    `moe/untaken` and `moe/experts_per_token` (see `keras_moe.metrics.figures`), and the same with
    `val_` before them for the validation data. Padding is not counted. Layers of one name are told
    apart as by `keras_moe.mixtures`.

    `model.evaluate` shows the figures in the progress bar, without `val_`; Keras keeps what it
    returns to itself, but `keras_moe.metrics.read(layer)` still has them afterwards.

    Example:

    ```python
    history = model.fit(x, y, callbacks=[keras_moe.callbacks.RoutingMetrics()])
    history.history["moe/dropped"]
    ```
    """

    def set_model(self, model):
        super().set_model(model)
        self.layers = mixtures(model)
        self.training_figures = self.validation_figures = None

    def on_epoch_begin(self, epoch, logs=None):
        self.validation_figures = {}
        self._reset()

    def on_epoch_end(self, epoch, logs=None):
        training = self._read("") if self.training_figures is None else self.training_figures
        self.training_figures = None
        logs.update(training | self.validation_figures)

    def on_test_begin(self, logs=None):
        self.training_figures = self._read("")
        self._reset()

    def on_test_end(self, logs=None):
        self.validation_figures = self._read("val_")
        if logs is not None:
            logs.update(self._read(""))

    def _reset(self):
        for layer in self.layers.values():
            for variable in layer.statistics:
                variable.assign(keras.ops.zeros(variable.shape))

    def _read(self, prefix):
        return {
            f"{prefix}{name}/{figure}": value
            for name, layer in self.layers.items()
            for figure, value in metrics.read(layer).items()
        }
