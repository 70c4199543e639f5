"""Two processes of two devices against one device, and runs that change devices."""

import h5py
import keras
import numpy as np
import pytest

from keras_moe.distribution import ExpertParallel, ShardedBackup
from tests.keras_moe.distribution import runs, several

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("PyTorch has no engine", allow_module_level=True)
pytestmark = pytest.mark.every_backend

EAGER = BACKEND == "tensorflow"  # on one device it computes the same, and compiles nothing


def launched(devices, *arguments):
    """What each of two processes prints."""
    program = ("-m", "tests.keras_moe.distribution.runs", devices, *arguments)
    return several.launched(*program, processes=2, devices=devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_one_device():
    """A model that was trained on one device, and its results."""
    return runs.run(run_eagerly=EAGER)


@pytest.fixture(scope="module")
def one(on_one_device):
    return on_one_device[1]


@pytest.fixture(scope="module")
def two(folder):
    (folder / "weights").mkdir()
    return launched(2, folder / "two", folder / "weights")


def test_processes_change_nothing(one, two):
    assert len(one["losses"]) == runs.EPOCHS
    assert one["losses"][-1] < 0.8 * one["losses"][0]
    for process in two:
        assert process["devices"] == 4
        for name in one:
            np.testing.assert_allclose(process[name], one[name], rtol=0, atol=1e-5, err_msg=name)


def values_in(path):
    values = {}

    def take(name, item):
        if isinstance(item, h5py.Dataset):
            values[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(take)
    return values


def test_each_process_saves_whole_weights(folder, two):
    first, second = (values_in(folder / "weights" / f"{i}.weights.h5") for i in range(2))
    assert first.keys() == second.keys()
    assert any(value.shape == (runs.EXPERTS, runs.DIM, 16) for value in first.values())
    assert any("optimizer" in name for name in first)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)
    loaded = keras.models.load_model(folder / "weights" / "1.keras")
    loaded.run_eagerly = EAGER
    predicted = loaded.predict(runs.data()[0], 16, verbose=0)
    np.testing.assert_allclose(predicted, two[0]["predicted"], rtol=0, atol=1e-5)


def test_two_processes_resume(one, two):
    for process in two:
        np.testing.assert_allclose(process["resumed"], one["losses"][2:], rtol=0, atol=1e-5)


def resumes_on_one_device(on_one_device, folder):
    model, results = on_one_device
    copy = runs.stopped(folder, folder.with_name(f"{folder.name}-on-one-device"))
    losses = runs.trained(model, copy, keep=None)
    np.testing.assert_allclose(losses, results["losses"][2:], rtol=0, atol=1e-5)
    assert sorted(path.name for path in copy.iterdir()) == ["epoch-2", "epoch-3", "epoch-4"]


def test_one_device_resumes_what_two_processes_saved(folder, on_one_device, two):
    resumes_on_one_device(on_one_device, folder / "two")


@pytest.mark.full
def test_one_device_resumes_what_four_devices_saved(folder, on_one_device, one):
    with ExpertParallel(data=1, experts=4).scope():
        _, four = runs.run(folder / "four")
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    resumes_on_one_device(on_one_device, folder / "four")


@pytest.mark.full
def test_two_processes_resume_on_fewer_devices(folder, one, two):
    model = runs.model_of(run_eagerly=EAGER)
    ShardedBackup(folder / "two").restore(model)
    evaluated = model.evaluate(*runs.data(), 16, verbose=0)
    for process in launched(1, runs.stopped(folder / "two", folder / "two-on-two-devices")):
        assert process["devices"] == 2
        np.testing.assert_allclose(process["losses"], one["losses"][2:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(process["predicted"], one["predicted"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(process["evaluated"], evaluated, rtol=0, atol=1e-5)
