"""Values of variables on disk, on TensorFlow: `tf.train.Checkpoint`, each device its shards."""

import functools

import tensorflow as tf
from tensorflow.experimental import dtensor


def write(folder, variables):
    _checkpoint(variables).write(_prefix(folder))


def read(folder, variables):
    """Each device gets its part, wherever the file's parts were."""
    _checkpoint(variables).read(_prefix(folder)).assert_consumed()


def wait():
    """Until all processes are here."""
    if dtensor.num_clients() > 1:
        dtensor.barrier(_everywhere(), "keras_moe.ShardedBackup")


@functools.cache
def _everywhere():
    kind = dtensor.preferred_device_type()
    devices = ("all", dtensor.num_global_devices(kind))
    return dtensor.create_distributed_mesh([devices], device_type=kind)


def _checkpoint(variables):
    return tf.train.Checkpoint(**{name: variable.value for name, variable in variables.items()})


def _prefix(folder):
    folder.mkdir(exist_ok=True)
    return str(folder / "part")
