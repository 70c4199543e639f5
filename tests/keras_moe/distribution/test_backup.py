"""`ShardedBackup` on one device; on several and by several processes in test_runs.py."""

import contextlib
import json
import shutil
import sys

import keras
import numpy as np
import pytest

from keras_moe.distribution import ShardedBackup, backup
from tests.backend import numpy
from tests.keras_moe.distribution.runs import data, model_of, trained

TORCH = keras.backend.backend() == "torch"


@pytest.mark.skipif(not TORCH, reason="there are files")
def test_where_no_weights_are_shared(tmp_path):
    with pytest.raises(
        ValueError, match="`ShardedBackup` must be used on JAX or TensorFlow.*Backu"
    ):
        ShardedBackup(tmp_path)


if TORCH:
    pytest.skip("no sharded files", allow_module_level=True)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run that nothing stopped, and its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return trained(model_of(), folder, keep=None), folder


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
            files = backup._files()
            patch.setattr(files, "write", killed(files.write))
        else:
            patch.setattr(backup.Path, "rename", killed(backup.Path.rename))
        with pytest.raises(Killed):
            trained(model_of(), tmp_path)
    assert names(tmp_path) == ["epoch-1", "epoch-2", "new-epoch-3"]
    assert trained(model_of(), tmp_path) == pytest.approx(whole[0][2:], abs=1e-6)
    assert names(tmp_path) == ["epoch-3", "epoch-4"]  # the last two


def test_a_finished_run_is_not_run_again(whole):
    model = model_of()
    assert trained(model, whole[1]) == []
    assert model.evaluate(*data(), 16, verbose=0) < whole[0][-1]


def test_some_epochs_alone(tmp_path):
    trained(model_of(), tmp_path, epochs=3, every=2, keep=1)
    assert names(tmp_path) == ["epoch-2"]


def test_all_that_a_step_changes_comes_back(whole):
    """Weights, moments, the iteration, statistics of routers and the state of seeds."""
    one, other = model_of(), model_of()
    assert ShardedBackup(whole[1]).restore(one) == 4
    trained(other)
    variables = zip(
        [*one.variables, *one.optimizer.variables],
        [*other.variables, *other.optimizer.variables],
        strict=True,
    )
    for mine, theirs in variables:
        np.testing.assert_allclose(numpy(mine), numpy(theirs), rtol=1e-5, atol=1e-6)
    assert int(one.optimizer.iterations) == 8


def test_another_model(whole):
    with pytest.raises(
        ValueError,
        match=r"`folder` must hold checkpoints of this model. Received: .*kernel_in' of shape "
        r"\(8, 8, 16\) in float32 in '.*epoch-4', and .*kernel_in' of shape \(8, 8, 12\)",
    ):
        trained(model_of(hidden_dim=12), whole[1])


def test_a_model_with_more_variables(whole, tmp_path):
    changed(whole[1], tmp_path / "run", lambda saved: saved["variables"].pop())
    with pytest.raises(
        ValueError, match=r"of this model. Received: \d+ variables in '.*', and \d+"
    ):
        ShardedBackup(tmp_path / "run").restore(model_of())


def changed(source, folder, change):
    """A copy of checkpoints, the last of which says something else of itself."""
    shutil.copytree(source, folder)
    path = folder / "epoch-4" / "variables.json"
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="`fit` builds it on JAX")
def test_a_model_that_is_not_built(tmp_path):
    model = keras.Sequential([keras.layers.Dense(8)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="`model` must be built before `fit` to be restored."):
        trained(model, tmp_path)


def test_a_second_save_of_an_epoch_stopped_at_any_time_loses_nothing(tmp_path, monkeypatch):
    """Whichever renaming or deletion is the last that was done."""
    model = model_of()
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
                owner = backup.Path if name == "rename" else backup.shutil
                patch.setattr(owner, name, stopped(getattr(owner, name)))
                with contextlib.suppress(Killed):
                    backup_of.save(model, 3)
            assert backup_of.restore(model) in (2, 3)


def test_a_run_that_began_anew_replaces_later_epochs(tmp_path):
    model, backup_of = model_of(), ShardedBackup(tmp_path, keep=1)
    for epoch in (4, 1):
        backup_of.save(model, epoch)
    assert names(tmp_path) == ["epoch-1"]


def test_another_backend(whole, tmp_path):
    changed(whole[1], tmp_path / "run", lambda saved: saved.update(backend="another"))
    with pytest.raises(ValueError, match="of the backend .*. Received: those of another in"):
        ShardedBackup(tmp_path / "run").restore(model_of())


def test_no_path():
    with pytest.raises(ValueError, match="`folder` must be a path. Received: gs://bucket/run"):
        ShardedBackup("gs://bucket/run")


@pytest.mark.parametrize("name", ["every", "keep"])
def test_arguments(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        ShardedBackup(tmp_path, **{name: 0})


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Orbax is JAX's")
def test_orbax_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delitem(sys.modules, "keras_moe.distribution.jax_files", raising=False)
    monkeypatch.delattr("keras_moe.distribution.jax_files", raising=False)
    with pytest.raises(ImportError, match=r"needs the package 'orbax-checkpoint'.*\[checkpoints\]"):
        ShardedBackup(tmp_path)
