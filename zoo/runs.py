"""The folder of a run: what it is, how far it is, its weights; written whole or not at all."""

import contextlib
import json
import math
import numbers
import os
import shutil
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

from keras_moe.distribution import ExpertParallel
from keras_moe.distribution.cluster import agreed, barrier, num_processes, process_id
from zoo.files import is_file, read_json
from zoo.presets import explained


def devices(mesh):
    """The `ExpertParallel` of a run; `None`: it has one device.

    Args:
        mesh: dictionary of its arguments, or `None`.

    Raises:
        ValueError: if there is none for several processes.
    """
    if mesh:
        return ExpertParallel(**mesh)
    if num_processes() > 1:
        raise ValueError(
            "`mesh` must be the devices of all processes. "
            f"Received: mesh={mesh}, and {num_processes()} processes"
        )
    return None


def check_seed_and_rate(settings):
    """Refuses a `seed` or a `learning_rate` that is out of range.

    Raises:
        ValueError: if one is.
    """
    seed, rate = settings["seed"], settings["learning_rate"]
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:  # NumPy's range
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1}. Received: seed={seed}")
    if not 0 < rate < float("inf"):
        raise ValueError(
            f"`learning_rate` must be a positive number. Received: learning_rate={rate}"
        )


class SeedEpochs(keras.callbacks.Callback):
    """Makes each epoch's order and noise depend on its number alone, so that runs can be resumed.

    Keras does not save the state of its seed generators, and calls `on_epoch_end` of a dataset more
    often than there are epochs.

    Args:
        seed: integer.
        batches: the training data, a `TokenBatches`; `None`: its order is no matter of epochs.
    """

    def __init__(self, seed, batches=None):
        super().__init__()
        self.seed = seed
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        if self.batches is not None:
            self.batches.shuffle(epoch)
        generator = np.random.default_rng((self.seed, epoch))
        for variable in self.model.variables:
            if variable.name == "seed_generator_state":
                state = np.array([generator.integers(2**32), 0], "uint32")
                variable.assign(keras.ops.convert_to_tensor(state))


class SaveRun(keras.callbacks.Callback):
    """Writes the run to disk after every epoch.

    Args:
        run: a `Run`.
        more: function without arguments of what else to note, a dictionary for JSON.
    """

    def __init__(self, run, more=dict):
        super().__init__()
        self.run = run
        self.more = more

    def on_train_begin(self, logs=None):
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.monotonic() - self.started
        self.started = time.monotonic()
        self.run.save(self.model, logs, seconds, **self.more())


class StopAtNaN(keras.callbacks.Callback):
    """Raises a FloatingPointError that says at which step the loss was not finite.

    It goes before the callbacks that read or save what an epoch made. An accelerator is not waited
    for at every step: some more may be under way when a loss becomes known.

    Args:
        run: a `Run`, which then has what it had.
    """

    async_safe = True  # Keras hands the losses over in threads, in any order

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_epoch_begin(self, epoch, logs=None):
        self.losses, self.checked = {}, 0

    def on_train_batch_begin(self, batch, logs=None):
        self._check()

    def on_train_batch_end(self, batch, logs=None):
        self.losses[batch] = float(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self._check()
        # What the last step of the epoch made of the weights.
        loss = float(logs.get("val_loss", 0.0))
        if not math.isfinite(loss):
            self._stop(loss, self.params["steps"])

    def _check(self):
        """Looks at the losses that follow those it has seen."""
        while (loss := self.losses.pop(self.checked, None)) is not None:
            self.checked += 1
            if not math.isfinite(loss):
                self._stop(loss, self.checked)

    def _stop(self, loss, steps):
        done = self.run.epoch * self.params["steps"]
        kept = f"the weights of step {done}" if done else "no weights yet"
        raise FloatingPointError(
            f"The loss must be finite. Received: {loss} at step {done + steps}; "
            f"{self.run.folder} has {kept}"
        )


class EpochLine(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, with each routing figure averaged over the layers.

    There are eight figures per sparse layer. `History` and `SaveRun` get them all: only what is
    shown at the end of an epoch is shortened. It goes after the callbacks that add to the logs.
    """

    async_safe = True  # as Keras' own bar

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self._shortened(logs))

    @staticmethod
    def _shortened(logs):
        short, figures = {}, {}
        for name, value in logs.items():
            layer, _, figure = name.rpartition("/")
            if layer:  # "moe_2/dropped" or "val_moe_2/dropped"
                prefix = "val_moe" if layer.startswith("val_") else "moe"
                figures.setdefault(f"{prefix}/{figure}", []).append(value)
            else:
                short[name] = value
        return short | {name: np.mean(values) for name, values in figures.items()}


class Run:
    """The folder of a run: `results.json`, and the weights that it names.

    `results.json` is the truth: weights are written first, then `results.json` is replaced in one
    step, then weights that it no longer names are deleted.

    Args:
        folder: where; made when first written to.
        settings: what the run is; a folder of other settings is refused.
        metric_names: names in the logs; the first chooses the best epoch.
        last: whether the last epoch is the best instead.
        restart: begins anew; the old run's files are deleted by `open`, not before.

    Raises:
        ValueError: if the folder cannot be one, or holds another run or a damaged one, or a preset
            that no run of its made.
    """

    WEIGHTS = "epoch-*.weights.h5"
    # A restart deletes these files. First it renames the old preset to new-preset: a preset without
    # results would be refused, and a preset that is half deleted would pass for a whole one.
    FILES = ("results.json", WEIGHTS, "new-results.json", "new-preset", f"new-{WEIGHTS}")

    def __init__(self, folder, settings, metric_names, restart=False, last=False):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` must be a folder. Received: output={str(folder)!r}")
        if (folder / "preset").exists() and not (folder / "results.json").exists():
            raise ValueError(
                "`output` must be a folder without a `preset` that is no run's, which this one "
                f"would replace. Received: output={str(folder)!r}"
            )
        # JSON has no numbers of NumPy's.
        settings = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in settings.items()
        }
        self.folder = folder
        self.restart = restart
        self.last = last
        self.results = None if restart else self._read()
        if self.results is None:
            self.results = {
                "settings": settings,
                "metrics": list(metric_names),
                "finished": False,
                "history": [],
                "best": None,
            }
        elif name := _first_difference(old := self.results["settings"], settings):
            raise ValueError(
                f"`output` holds another run, with {name}={old.get(name)!r}; give another "
                f"`output`, or `restart` to throw that run away. Received: output={str(folder)!r}, "
                f"{name}={settings.get(name)!r}"
            )
        else:  # with those that the version which began it did not have
            self.results["settings"] = settings

    def of_data(self, **facts):
        """Keeps what the run's data is, which an old run that goes on must have begun with.

        Raises:
            ValueError: if it began with other data.
        """
        for name, value in facts.items():
            old = self.results.get(name, value)
            if self.epoch and old != value:
                raise ValueError(
                    f"`output` holds a run on other data, with {name}={old!r}; give another "
                    f"`output`, or `restart` to throw that run away. Received: "
                    f"output={str(self.folder)!r}, data with {name}={value!r}"
                )
        self.results |= facts

    @property
    def epoch(self):
        """Epochs done."""
        return len(self.results["history"])

    @property
    def finished(self):
        return self.results["finished"]

    def open(self, model):
        """Makes the folder, deletes the run to be thrown away, or loads the one to go on with."""
        agreed("output", self.epoch)
        if process_id() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.restart:
                if (self.folder / "preset").is_dir():
                    _remove(self.folder / "new-preset")
                    os.replace(self.folder / "preset", self.folder / "new-preset")
                self._delete(*self.FILES)
        # In `fit` TensorFlow would build it while it traces the step, and trace it again.
        model.optimizer.build(model.trainable_variables)
        if self.epoch:
            path = self._weights(self.epoch)
            with explained(path):
                model.load_weights(path)

    def save(self, model, logs, seconds, **more):
        """Adds an epoch; the best one has the highest value of the first metric."""
        epoch = self.epoch + 1
        entry = {"epoch": epoch, "seconds": round(seconds, 1), **more}
        entry |= {name: float(value) for name, value in logs.items()}
        primary = self.results["metrics"][0]
        best = self.results["best"]
        if best is None or self.last or entry[primary] > best[primary]:
            best = entry
        with replacing(self._weights(epoch)) as path:
            model.save_weights(path)
        self.results["history"].append(entry)
        self.results |= {"best": best, "parameters": model.count_params()}
        self._write()
        if process_id() == 0:
            for path in self.folder.glob(self.WEIGHTS):
                if path not in (self._weights(epoch), self._weights(best["epoch"])):
                    path.unlink()

    def finish(self, model, classifier):
        """Saves the best epoch as a preset; the weights of single epochs are no longer needed."""
        path = self._weights(self.results["best"]["epoch"])
        with explained(path):
            model.load_weights(path)
        with replacing(self.folder / "preset") as path:
            classifier.save_to_preset(str(path))
        self.results |= {"finished": True, "preset": str(self.folder / "preset")}
        self._write()
        if process_id() == 0:
            self._delete(self.WEIGHTS)

    def _delete(self, *patterns):
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                _remove(path)

    def _weights(self, epoch):
        return self.folder / f"epoch-{epoch}.weights.h5"

    def _read(self):
        path = self.folder / "results.json"
        if not is_file(path):
            return None
        try:
            results = read_json(path)
            if not {"settings", "metrics", "finished", "history", "best"} <= set(results):
                raise ValueError("entries are missing")
            results["settings"].items(), results["history"][:0]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`output` must hold a run that can be read, but {path} is damaged; give another "
                "`output`, or `restart` to throw that run away."
            ) from error
        if results["finished"] and results.get("preset"):
            preset = self.folder / "preset"  # the folder may have been moved
            if not preset.is_dir():
                raise ValueError(
                    "`output` must hold a whole run, but the `preset` of this finished one is "
                    f"gone; `restart` makes it again. Received: output={str(self.folder)!r}"
                )
            results["preset"] = str(preset)
        return results

    def _write(self):
        with replacing(self.folder / "results.json") as path:
            path.write_text(json.dumps(self.results, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path):
    """A path to write to; what was written takes the place of `path` only when all went well.

    Of several processes, which write the same, it is what the first one wrote.
    """
    if process_id() == 0:
        beside = path.with_name(f"new-{path.name}")
        try:
            yield beside
        except BaseException as error:
            _remove(beside)  # the disk may be full: what is there stays, and gets the room back
            if isinstance(error, RuntimeError):  # so says HDF5 when it closes a file
                raise OSError(f"{path} could not be written: {error}") from error
            raise
        if beside.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
    barrier()


def _first_difference(old, new):
    """The first setting that differs; one that an old version did not have was None or False."""
    return next(
        (
            name
            for name in new | old
            if new.get(name) != old.get(name) and not (name not in old and new[name] is False)
        ),
        None,
    )


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
