"""Checkpoints of a run on several devices, each process writing what it has."""

import json
import re
import shutil
from pathlib import Path

import keras

from keras_moe.distribution.cluster import barrier, process_id

_SAVED = re.compile(r"epoch-(\d+)")


class ShardedBackup(keras.callbacks.Callback):
    """Saves a run after its epochs, and resumes it, as `keras.callbacks.BackupAndRestore` does.

    Without gathering a weight that devices share: every process writes and reads the parts that its
    devices have. A run may go on with another mesh, or on one device. `fit` begins after the last
    epoch that was saved whole; with `steps_per_epoch` an epoch is as short as you like.

    The files are Orbax's on JAX (`pip install 'keras-moe[checkpoints]'`), those of
    `tf.train.Checkpoint` on TensorFlow. Several processes must see the same folder.

    Example:

    ```python
    with keras_moe.distribution.ExpertParallel(experts=8).scope():
        model = build()
        model.compile("adam", loss)
        backup = keras_moe.distribution.ShardedBackup("runs/first")
        model.fit(batches, epochs=100, steps_per_epoch=500, callbacks=[backup])
    ```

    Args:
        folder: of this run alone.
        every: epochs from one checkpoint to the next.
        keep: checkpoints that are kept, the last ones; `None`: all.

    Raises:
        ValueError: if an argument is out of range, on PyTorch, or, by `fit`, if the folder holds
            the checkpoints of another model.
    """

    def __init__(self, folder, every=1, keep=2):
        from keras_moe.routing.base import positive_integer  # here: routers import this package

        super().__init__()
        positive_integer("every", every)
        positive_integer("keep", keep, optional=True)
        self.folder = Path(folder).absolute()
        self.every = every
        self.keep = keep
        self._files = _files()

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(
                "`model` must be built before `fit` to be restored. "
                f"Received: the model {self.model.name!r}, not built"
            )
        epoch = self.restore(self.model)
        if epoch is not None:
            self.model._initial_epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self.save(self.model, epoch + 1)

    def save(self, model, epoch):
        """Writes a checkpoint, beside and then renamed; all processes must call it.

        Args:
            model: a compiled Keras model.
            epoch: epochs that it was trained for.
        """
        variables = _variables(model)
        done, beside = self.folder / f"epoch-{epoch}", self.folder / f"new-epoch-{epoch}"
        first = process_id() == 0
        if first:
            for left in self.folder.glob("new-epoch-*"):  # of a run that was stopped
                shutil.rmtree(left)
            beside.mkdir(parents=True)
            (beside / "variables.json").write_text(json.dumps(_shapes(variables)))
        barrier()
        self._files.write(beside / "state", variables)
        barrier()
        if first:
            shutil.rmtree(done, ignore_errors=True)
            beside.rename(done)
            for old in self._saved()[: -self.keep if self.keep else 0]:
                shutil.rmtree(self.folder / f"epoch-{old}")
        barrier()

    def restore(self, model):
        """Reads the last checkpoint; all processes must call it.

        Args:
            model: a compiled and built Keras model.

        Returns:
            The epochs that it was trained for; `None`: there is no checkpoint.

        Raises:
            ValueError: if it is of another model.
        """
        saved = self._saved()
        if not saved:
            return None
        folder = self.folder / f"epoch-{saved[-1]}"
        variables = _variables(model)
        _compare(json.loads((folder / "variables.json").read_text()), _shapes(variables), folder)
        self._files.read(folder / "state", variables)
        return saved[-1]

    def _saved(self):
        """Epochs of which there is a whole checkpoint."""
        found = (_SAVED.fullmatch(path.name) for path in self.folder.glob("epoch-*"))
        return sorted(int(name[1]) for name in found if name)


def _variables(model):
    """All that a step reads and writes, but for metrics, in the order in which it was made."""
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if hasattr(model, "jax_state_sync") and getattr(model, "_jax_state", None):
        model.jax_state_sync()
    kept = [*model.variables]
    if model.optimizer is not None:
        known = {id(variable) for variable in kept}
        kept += [variable for variable in model.optimizer.variables if id(variable) not in known]
    metrics = {id(variable) for variable in model.metrics_variables}
    kept = [variable for variable in kept if id(variable) not in metrics]
    return {f"{number:05}": variable for number, variable in enumerate(kept)}


def _shapes(variables):
    """Path, shape and dtype of each, less the numbers that Keras gives the layers of a process."""
    return [
        [re.sub(r"_\d+(?=/|_|$)", "", v.path), list(v.shape), str(v.dtype)]
        for v in variables.values()
    ]


def _compare(saved, own, folder):
    for of_file, of_model in zip(saved, own, strict=False):
        if of_file != of_model:
            raise ValueError(
                "`folder` must hold checkpoints of this model. Received: "
                f"{_described(of_file)} in {str(folder)!r}, and {_described(of_model)} in the model"
            )
    if len(saved) != len(own):
        raise ValueError(
            "`folder` must hold checkpoints of this model. "
            f"Received: {len(saved)} variables in {str(folder)!r}, and {len(own)} in the model"
        )


def _described(entry):
    path, shape, dtype = entry
    return f"{path!r} of shape {tuple(shape)} in {dtype}"


def _files():
    """The module that writes and reads on this backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        from keras_moe.distribution import jax_files

        return jax_files
    if backend == "tensorflow":
        from keras_moe.distribution import tensorflow_files

        return tensorflow_files
    raise ValueError(
        "`ShardedBackup` must be used on JAX or TensorFlow, which have weights that devices share. "
        f"Received: the backend {backend}; use `keras.callbacks.BackupAndRestore`"
    )
