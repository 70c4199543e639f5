"""Two processes of two devices against one process of four, and runs that change devices."""

import shutil

import h5py
import keras
import numpy as np
import pytest

from tests.keras_moe.distribution import runs, several

if keras.backend.backend() == "torch":
    pytest.skip("no engine joins processes", allow_module_level=True)

RUN = ("-m", "tests.keras_moe.distribution.runs")


def launched(devices, *arguments, processes=1):
    """What each of the processes prints."""
    return several.launched(*RUN, devices, *arguments, processes=processes, devices=devices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return launched(4, folder / "one")[0]


@pytest.fixture(scope="module")
def two(folder):
    (folder / "weights").mkdir()
    return launched(2, folder / "two", folder / "weights", processes=2)


def test_processes_change_nothing(one, two):
    assert len(one["losses"]) == runs.EPOCHS
    assert one["losses"][-1] < 0.8 * one["losses"][0]
    for process in two:
        assert process["devices"] == one["devices"] == 4
        for name in ("losses", "evaluated", "predicted"):
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
    x, y = runs.data()
    evaluated = loaded.evaluate(x, y, 16, verbose=0)
    np.testing.assert_allclose(evaluated, two[0]["evaluated"], rtol=0, atol=1e-5)


def taken_up(folder, run):
    """A copy of a run as it was after two epochs, stopped while it wrote the third."""
    shutil.copytree(folder / run / "epoch-2", folder / f"{run}-again" / "epoch-2")
    shutil.copytree(folder / run / "epoch-3", folder / f"{run}-again" / "new-epoch-3")
    return folder / f"{run}-again"


def test_two_processes_saved_and_two_of_fewer_devices_go_on(folder, one, two):
    for process in launched(1, taken_up(folder, "two"), processes=2):
        assert process["devices"] == 2
        np.testing.assert_allclose(process["losses"], one["losses"][2:], rtol=0, atol=1e-5)


def test_four_devices_saved_and_one_goes_on(folder, one):
    again = taken_up(folder, "one")
    losses = runs.trained(runs.model_of(), again, keep=None)
    np.testing.assert_allclose(losses, one["losses"][2:], rtol=0, atol=1e-5)
    assert sorted(path.name for path in again.iterdir()) == ["epoch-2", "epoch-3", "epoch-4"]
