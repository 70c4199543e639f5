"""Values of variables on disk, on TensorFlow: `tf.train.Checkpoint`, each device its shards."""

import tensorflow as tf


def write(folder, variables):
    _checkpoint(variables).write(_prefix(folder))


def read(folder, variables):
    """Each device gets its part, wherever the file's parts were."""
    _checkpoint(variables).read(_prefix(folder)).assert_consumed()


def _checkpoint(variables):
    return tf.train.Checkpoint(**{name: variable.value for name, variable in variables.items()})


def _prefix(folder):
    folder.mkdir(exist_ok=True)
    return str(folder / "part")
