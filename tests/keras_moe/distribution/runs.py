"""A run that processes can share: `python -m tests.keras_moe.distribution.runs DEVICES FOLDER`.

It prints results as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import ExpertParallel, ShardedBackup, process_id
from keras_moe.distribution.cluster import by_first

DIM, LENGTH, EXPERTS, EPOCHS = 8, 8, 8, 4


def model_of(hidden_dim=16, run_eagerly=False):
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
    optimizer = keras.optimizers.Adam(1e-2, epsilon=1e-3)
    model.compile(optimizer, "mse", run_eagerly=run_eagerly)
    return model


def data():
    x = np.random.default_rng(0).normal(size=(32, LENGTH, DIM)).astype("float32")
    return x, np.roll(x, 1, -1)


def trained(model, folder=None, epochs=EPOCHS, **options):
    """Trains a model with a backup in a folder, and returns the losses of its epochs."""
    backup = [] if folder is None else [ShardedBackup(folder, **options)]
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    history = model.fit(*data(), epochs=epochs, callbacks=backup, **options).history
    return history.get("loss", [])


def stopped(folder, copy):
    """Copies the checkpoints of a run as they were when it was stopped while it wrote the third."""
    shutil.copytree(Path(folder) / "epoch-2", Path(copy) / "epoch-2")
    shutil.copytree(Path(folder) / "epoch-3", Path(copy) / "new-epoch-3")
    return copy


def run(folder=None, run_eagerly=False):
    """Makes and trains a model, and returns it with its results."""
    model = model_of(run_eagerly=run_eagerly)
    losses = trained(model, folder, keep=None)
    return model, {"losses": losses, "predicted": model.predict(data()[0], 16, verbose=0).tolist()}


def main(devices, folder, weights=None):
    """Runs on all devices of all processes, which share the experts.

    Args:
        devices: number of devices of this process.
        folder: folder for the checkpoints.
        weights: folder for the whole weights, in a file of each process. If it is given, the run
            resumes from its second epoch, too. If not, it is evaluated.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        kind = tf.config.LogicalDeviceConfiguration
        tf.config.set_logical_device_configuration(cpu, [kind()] * int(devices))
        tf.config.threading.set_inter_op_parallelism_threads(16)  # each device waits for the others
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    count = len(ExpertParallel(experts=1).devices)
    # All along one axis: no process has all the experts.
    with ExpertParallel(data=1, experts=count).scope():
        model, results = run(folder)
        results["devices"] = count
        if weights is None:
            results["evaluated"] = model.evaluate(*data(), 16, verbose=0)
        else:
            own = f"{weights}/{process_id()}"
            model.save_weights(f"{own}.weights.h5")
            model.save(f"{own}.keras")
            copy = f"{folder}-again"
            by_first(stopped, folder, copy)
            results["resumed"] = trained(model, copy, keep=None)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
