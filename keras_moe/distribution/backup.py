"""Checkpoints of a run on several devices, each process writing what it has."""

import json
import re
import shutil
from pathlib import Path

import keras

from keras_moe.distribution.cluster import agreed, by_first, everyones

_SAVED = re.compile(r"epoch-(\d+)")
_NAMES = "variables.json"


class ShardedBackup(keras.callbacks.Callback):
    """Saves a run after its epochs, and resumes it, like `keras.callbacks.BackupAndRestore`.

    Without gathering a weight that devices share: every process writes and reads the parts that its
    devices have. A run may go on with another mesh, or without one on a single device. `fit` begins
    after the last epoch that was saved whole; with `steps_per_epoch` an epoch is as short as you
    like. The checkpoints stay when `fit` ends. The order of the data is the caller's: what Keras
    shuffles begins anew (`shuffle=False` does not).

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
        folder: a path, of this run alone.
        every: epochs from one checkpoint to the next.
        keep: checkpoints that are kept, the last ones; `None`: all.

    Raises:
        ValueError: if an argument is out of range, on PyTorch, or, by `fit`, if the model is not
            built, or the folder holds the checkpoints of another model or backend.
        ImportError: if Orbax is missing on JAX.
    """

    def __init__(self, folder, every=1, keep=2):
        from keras_moe.routing.base import positive_integer  # here: routers import this package

        super().__init__()
        positive_integer("every", every)
        positive_integer("keep", keep, optional=True)
        if "://" in str(folder):
            raise ValueError(f"`folder` must be a path. Received: {folder}")
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

        Those of later epochs, of a run that began anew, are deleted.

        Args:
            model: a compiled Keras model.
            epoch: epochs that it was trained for.

        Raises:
            ValueError: if the processes do not see one folder.
            OSError: if the disk is full, say; the checkpoints before are whole.
        """
        variables = _variables(model)
        beside = self.folder / f"new-epoch-{epoch}"
        by_first(self._begin, beside, variables)
        if not all(everyones((beside / _NAMES).is_file())):
            raise ValueError(
                "`folder` must be one that all processes see. "
                f"Received: {str(self.folder)!r}, of which some see another"
            )
        self._files.write(beside / "state", variables)
        by_first(self._end, beside, epoch)

    def _begin(self, beside, variables):
        for left in (*self.folder.glob("new-epoch-*"), *self.folder.glob("old-epoch-*")):
            shutil.rmtree(left)  # of a run that was stopped
        beside.mkdir(parents=True)
        described = {"backend": keras.backend.backend(), "variables": _shapes(variables)}
        (beside / _NAMES).write_text(json.dumps(described))

    def _end(self, beside, epoch):
        """Renames first what is to be deleted: what has its name is whole."""
        others = [number for number in self._saved() if number < epoch]
        kept = others[1 - self.keep :] if self.keep and self.keep > 1 else []
        kept = others if self.keep is None else kept
        old = []
        for number in set(self._saved()) - {epoch, *kept}:
            old.append((self.folder / f"epoch-{number}", self.folder / f"old-epoch-{number}"))
        done = self.folder / f"epoch-{epoch}"
        if done.exists():
            done.rename(self.folder / f"old-epoch-{epoch}")
        beside.rename(done)
        for path, renamed in old:
            path.rename(renamed)
        for path in self.folder.glob("old-epoch-*"):
            shutil.rmtree(path)

    def restore(self, model):
        """Reads the last checkpoint; all processes must call it.

        Args:
            model: a compiled and built Keras model.

        Returns:
            The epochs that it was trained for; `None`: there is no checkpoint.

        Raises:
            ValueError: if it is of another model or backend, or the processes do not see one
                folder.
        """
        saved = self._saved()
        if agreed("folder", saved[-1] if saved else 0) == 0:
            return None
        folder = self.folder / f"epoch-{saved[-1]}"
        variables = _variables(model)
        described = json.loads((folder / _NAMES).read_text())
        if described["backend"] != keras.backend.backend():
            raise ValueError(
                f"`folder` must hold checkpoints of the backend {keras.backend.backend()}. "
                f"Received: those of {described['backend']} in {str(folder)!r}"
            )
        _compare(described["variables"], _shapes(variables), folder)
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
