"""`ShardedBackup` on one device; on several and by several processes in test_runs.py."""

import contextlib
import importlib
import json
import pathlib
import shutil
import sys

import keras
import numpy as np
import pytest

from keras_moe.distribution import ShardedBackup
from tests.backend import numpy
from tests.keras_moe.distribution.runs import DIM, LENGTH, data, model_of, trained

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("PyTorch has no engine", allow_module_level=True)
pytestmark = pytest.mark.every_backend

EAGER = BACKEND == "tensorflow"  # it computes the same, and compiles nothing


class Killed(Exception):
    pass


def small_model(width=8):
    """A model with a seed, as quick to compile as can be."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(width),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(DIM),
    ]
    model = keras.Sequential([keras.Input((LENGTH, DIM)), *layers])
    model.compile(keras.optimizers.Adam(1e-2), "mse", run_eagerly=EAGER)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run that nothing stopped, and its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(small_model(), folder, keep=None), folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_after_every_epoch(whole):
    assert names(whole[1]) == ["epoch-1", "epoch-2", "epoch-3", "epoch-4"]


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_one(
    whole, tmp_path, monkeypatch, moment
):
    """While epoch 3 is written, and when it is, and has not got its name yet."""

    def killed(original):
        calls = []

        def call(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise Killed
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        if moment == "write":
            files = importlib.import_module(f"keras_moe.distribution.{BACKEND}_files")
            patch.setattr(files, "write", killed(files.write))
        else:
            patch.setattr(pathlib.Path, "rename", killed(pathlib.Path.rename))
        with pytest.raises(Killed):
            trained(small_model(), tmp_path)
    assert names(tmp_path) == ["epoch-1", "epoch-2", "new-epoch-3"]
    assert trained(small_model(), tmp_path) == pytest.approx(whole[0][2:], abs=1e-6)
    assert names(tmp_path) == ["epoch-3", "epoch-4"]  # the last two


def test_a_finished_run_is_not_run_again(whole):
    losses, folder = whole
    model = small_model()
    assert trained(model, folder) == []
    assert model.evaluate(*data(), 16, verbose=0) < losses[-1]


def test_some_epochs_alone(tmp_path):
    trained(small_model(), tmp_path, epochs=3, every=2, keep=1)
    assert names(tmp_path) == ["epoch-2"]


def test_all_that_a_step_changes_comes_back(tmp_path):
    """Weights, moments, the iteration, statistics of routers and the state of seeds."""
    trainee, restored = model_of(run_eagerly=EAGER), model_of()
    trained(trainee, tmp_path)
    assert ShardedBackup(tmp_path).restore(restored) == 4
    variables = zip(
        [*restored.variables, *restored.optimizer.variables],
        [*trainee.variables, *trainee.optimizer.variables],
        strict=True,
    )
    for mine, theirs in variables:
        np.testing.assert_allclose(numpy(mine), numpy(theirs), rtol=1e-5, atol=1e-6)
    assert int(restored.optimizer.iterations) == 8


def test_another_model(whole):
    received = (
        r"`folder`.*kernel' of shape \(8, 8\) in float32 in '.*epoch-4'.*kernel' of shape \(8, 12\)"
    )
    with pytest.raises(ValueError, match=received):
        trained(small_model(width=12), whole[1])


def test_a_model_with_more_variables(whole, tmp_path):
    changed(whole[1], tmp_path / "run", lambda saved: saved["variables"].pop())
    with pytest.raises(ValueError, match=r"`folder`.*\d+ variables in '.*', and \d+"):
        ShardedBackup(tmp_path / "run").restore(small_model())


def changed(source, folder, change):
    """A copy of checkpoints, the last of which says something else of itself."""
    shutil.copytree(source, folder)
    path = folder / "epoch-4" / "variables.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


@pytest.mark.skipif(BACKEND == "jax", reason="`fit` builds it on JAX")
def test_a_model_that_is_not_built(tmp_path):
    model = keras.Sequential([keras.layers.Dense(8)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="`model`.*'sequential"):
        trained(model, tmp_path)


def test_a_second_save_of_an_epoch_stopped_at_any_time_loses_nothing(tmp_path, monkeypatch):
    """Whichever renaming or deletion is the last that was done."""
    model = small_model()
    backup_of = ShardedBackup(tmp_path)
    for epoch in (2, 3, 3):
        backup_of.save(model, epoch)
    assert names(tmp_path) == ["epoch-2", "epoch-3"]
    for name in ("rename", "rmtree"):
        for number in range(4):
            done = []

            def stopped(original, done=done, number=number):
                def call(*arguments):
                    if len(done) == number:
                        raise Killed
                    done.append(arguments)
                    return original(*arguments)

                return call

            with monkeypatch.context() as patch:
                owner = pathlib.Path if name == "rename" else shutil
                patch.setattr(owner, name, stopped(getattr(owner, name)))
                with contextlib.suppress(Killed):
                    backup_of.save(model, 3)
            assert backup_of.restore(model) in (2, 3)


def test_a_run_that_began_anew_replaces_later_epochs(tmp_path):
    model, backup_of = small_model(), ShardedBackup(tmp_path, keep=1)
    for epoch in (4, 1):
        backup_of.save(model, epoch)
    assert names(tmp_path) == ["epoch-1"]


def test_another_backend(whole, tmp_path):
    changed(whole[1], tmp_path / "run", lambda saved: saved.update(backend="another"))
    with pytest.raises(ValueError, match=f"`folder`.*{BACKEND}.*another"):
        ShardedBackup(tmp_path / "run").restore(small_model())


def test_no_path():
    with pytest.raises(ValueError, match="`folder`.*gs://bucket/run"):
        ShardedBackup("gs://bucket/run")


@pytest.mark.parametrize("name", ["every", "keep"])
def test_arguments(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}`.*0"):
        ShardedBackup(tmp_path, **{name: 0})


@pytest.mark.skipif(BACKEND != "jax", reason="Orbax is JAX's")
def test_orbax_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delitem(sys.modules, "keras_moe.distribution.jax_files", raising=False)
    monkeypatch.delattr("keras_moe.distribution.jax_files", raising=False)
    with pytest.raises(ImportError, match=r"'orbax-checkpoint'.*\[checkpoints\]"):
        ShardedBackup(tmp_path)
