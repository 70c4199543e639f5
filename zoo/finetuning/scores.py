"""What a model makes of a split, and the official metrics of it."""

import keras
import numpy as np

from zoo.tasks import metrics


def predict(model, batches):
    """What a model puts out.

    Args:
        model: of `num_classes` outputs.
        batches: `TokenBatches` that are not shuffled.

    Returns:
        `[examples, num_classes]` array, in the order of the examples.
    """
    order = batches.order
    rows = model.predict(batches, verbose=0)
    outputs = np.empty((len(batches.labels), rows.shape[-1]), rows.dtype)
    outputs[order[order >= 0]] = rows[order >= 0]
    return outputs


class OfficialMetrics(keras.callbacks.Callback):
    """Adds the task's official metrics on its validation splits to the logs of every epoch.

    It goes before `keras_moe.callbacks.RoutingMetrics`, because the order of the callbacks is the
    order in the log, where the many routing figures would hide the one that counts. The routing
    figures do not see its predictions: they were read when Keras' own evaluation ended.

    Args:
        task: a `Task`.
        splits: name -> pair of the `Examples` and their `TokenBatches`. The metrics of the first
            are named `val_<metric>`, those of others `<split>_<metric>`.
    """

    def __init__(self, task, splits):
        super().__init__()
        self.task = task
        self.splits = splits

    def on_epoch_end(self, epoch, logs=None):
        for number, (split, (examples, batches)) in enumerate(self.splits.items()):
            prefix = split if number else "val"
            scores = metrics.evaluate(self.task, examples, predict(self.model, batches))
            logs.update({f"{prefix}_{metric}": value for metric, value in scores.items()})
