"""A run that processes can share: `python -m tests.keras_moe.distribution.runs DEVICES FOLDER`.

It prints its losses as JSON.
"""

import contextlib
import json
import sys

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel, ShardedBackup

DIM, LENGTH, EXPERTS, EPOCHS = 8, 8, 8, 4


def model_of(hidden_dim=16):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, DIM))
    x = keras.layers.Dense(DIM, activation="relu")(inputs)
    for router in (
        keras_moe.SwitchRouter(capacity_factor=None, eval_capacity_factor=None, jitter=0.1, seed=1),
        keras_moe.ExpertChoiceRouter(inference="threshold"),
    ):
        experts = keras_moe.FeedForwardExperts(EXPERTS, hidden_dim, use_bias=True, seed=1)
        x = x + keras_moe.MixtureOfExperts(experts, router)(x)
    model = keras.Model(inputs, keras.layers.Dense(DIM)(x))
    model.compile(keras.optimizers.Adam(1e-2, epsilon=1e-3), "mse")
    return model


def data():
    x = np.random.default_rng(0).normal(size=(32, LENGTH, DIM)).astype("float32")
    return x, np.roll(x, 1, -1)


def trained(model, folder=None, epochs=EPOCHS, **options):
    """The losses of the epochs that were left to do."""
    backup = [] if folder is None else [ShardedBackup(folder, **options)]
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    history = model.fit(*data(), epochs=epochs, callbacks=backup, **options).history
    return history.get("loss", [])


def main(devices, folder, weights=None):
    """On all devices of all processes, which share the experts.

    Args:
        devices: of this process.
        folder: for the checkpoints.
        weights: folder for the whole weights at the end, of each process a file.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        kind = tf.config.LogicalDeviceConfiguration
        tf.config.set_logical_device_configuration(cpu, [kind()] * int(devices))
        tf.config.threading.set_inter_op_parallelism_threads(16)  # each device waits for the others
    with contextlib.ExitStack() as stack:
        count = len(ExpertParallel(experts=1).devices)
        # All along one axis: no process has all the experts.
        stack.enter_context(ExpertParallel(data=1, experts=count).scope())
        model = model_of()
        result = {"devices": count, "losses": trained(model, folder, keep=None)}
        if len(result["losses"]) == EPOCHS:  # one that goes on is asked for its losses alone
            x, y = data()
            result["evaluated"] = model.evaluate(x, y, 16, verbose=0)
            result["predicted"] = model.predict(x, 16, verbose=0)[:, 0, 0].tolist()
        if weights is not None:
            own = f"{weights}/{keras_moe.distribution.process_id()}"
            model.save_weights(f"{own}.weights.h5")
            model.save(f"{own}.keras")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
