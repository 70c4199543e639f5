"""The folder of a run, with stubs of models; the trainers' own tests train real ones."""

import json
import shutil
import threading
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe.distribution import cluster
from tests.backend import numpy
from tests.zoo.disk import Disk, Killed, each_step, full
from zoo import runs
from zoo.batches import TokenBatches
from zoo.layers import Dropout
from zoo.runs import EpochLine, Run, SaveRun, SeedEpochs, StopAtNaN, replacing

SETTINGS = {"task": "glue/cola", "epochs": 4, "seed": 0}
METRICS = ("val_score", "val_other")
SCORES = (0.1, 0.5, 0.3, 0.4)  # of each epoch; the second one is the best


class Model:
    """A stub of a model and of its optimizer. Its weights are the epochs that it was trained on."""

    trainable_variables = ()

    def __init__(self):
        self.optimizer = self
        self.epochs = []

    def build(self, variables):
        pass

    def count_params(self):
        return 7

    def save_weights(self, path):
        path.write_text(json.dumps(self.epochs))

    def load_weights(self, path):
        self.epochs = json.loads(path.read_text())

    def save_to_preset(self, folder):
        Path(folder).mkdir(exist_ok=True)
        for name in ("config.json", "weights.json"):
            (Path(folder) / name).write_text(json.dumps(self.epochs))


def opened(folder, **options):
    """A run, and a new model that has its weights."""
    run, model = Run(folder, SETTINGS, METRICS, **options), Model()
    run.open(model)
    return run, model


def logs(epoch):
    return {"loss": np.float32(0.5), "val_score": SCORES[epoch], "val_other": 1}


def train(folder, restart=False):
    """Trains as the trainers do.

    Returns:
        List of the epochs that it trained. They are numbered from 0.
    """
    run = Run(folder, SETTINGS, METRICS, restart=restart)
    trained = []
    if not run.finished:
        model = Model()
        run.of_data(examples=8)
        run.open(model)
        for epoch in range(run.epoch, len(SCORES)):
            model.epochs.append(epoch)
            trained.append(epoch)
            run.save(model, logs(epoch), seconds=1.26)
        run.finish(model, model)
    return trained


def read(folder):
    return json.loads((folder / "results.json").read_text())


def names(folder):
    return {path.name for path in folder.iterdir()}


def epochs_in(folder):
    """Number of epochs that a run has saved."""
    return len(read(folder)["history"]) if (folder / "results.json").exists() else 0


def is_finished(folder):
    return (folder / "results.json").exists() and read(folder)["finished"]


def contents(folder):
    """Results and preset of a finished run, wherever its folder is."""
    results = Run(folder, SETTINGS, METRICS).results
    assert results.pop("preset") == str(folder / "preset")
    return results, {path.name: path.read_text() for path in (folder / "preset").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == [0, 1, 2, 3]
    return folder


class TestNewRun:
    def test_keeps_results_and_the_weights_of_its_last_and_best_epoch(self, tmp_path):
        run, model = opened(tmp_path / "new" / "run")
        assert names(run.folder) == set()
        for epoch, kept in enumerate(({1}, {2}, {2, 3}, {2, 4})):
            model.epochs.append(epoch)
            run.save(model, logs(epoch), seconds=1.26, place={"line": epoch})
            assert run.epoch == epoch + 1 and not run.finished
            assert names(run.folder) == {
                "results.json",
                *(f"epoch-{number}.weights.h5" for number in kept),
            }
            assert read(run.folder) == run.results
        assert run.results["settings"] == SETTINGS
        assert run.results["metrics"] == list(METRICS)
        assert run.results["parameters"] == model.count_params()
        assert run.results["history"] == [
            {
                "epoch": epoch + 1,
                "seconds": 1.3,
                "place": {"line": epoch},
                "loss": 0.5,
                "val_score": score,
                "val_other": 1.0,
            }
            for epoch, score in enumerate(SCORES)
        ]
        assert run.results["best"] == run.results["history"][1]
        run.finish(model, model)
        assert run.finished and read(run.folder) == run.results
        assert names(run.folder) == {"preset", "results.json"}
        assert run.results["preset"] == str(run.folder / "preset")
        assert contents(run.folder)[1] == dict.fromkeys(("config.json", "weights.json"), "[0, 1]")

    def test_last_epoch_is_the_best_if_asked_for(self, tmp_path):
        run, model = opened(tmp_path, last=True)
        for epoch in range(3):
            model.epochs.append(epoch)
            run.save(model, logs(epoch), seconds=1.0)
            assert names(tmp_path) == {"results.json", f"epoch-{epoch + 1}.weights.h5"}
        run.finish(model, model)
        assert run.results["best"] == run.results["history"][2]
        assert set(contents(tmp_path)[1].values()) == {"[0, 1, 2]"}

    def test_first_of_two_equal_epochs_is_the_best(self, tmp_path):
        run, model = opened(tmp_path)
        for _ in range(2):
            run.save(model, logs(0), seconds=1.0)
        assert run.results["best"]["epoch"] == 1

    def test_settings_may_be_numbers_of_numpy(self, tmp_path):
        numbers = {"epochs": np.int64(4), "seed": np.uint32(0), "rate": np.float64(0.5)}
        for _ in range(2):  # written and compared
            run = Run(tmp_path, SETTINGS | numbers, METRICS)
            if run.epoch == 0:
                run.save(Model(), logs(0), seconds=1.0)
        assert read(tmp_path)["settings"] == SETTINGS | {"rate": 0.5}


class TestInterrupted:
    """Every run comes to the same end as a run that nothing interrupted."""

    @pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, full])
    def test_at_any_step(self, whole, tmp_path, error):
        for disk in each_step(error):
            folder = tmp_path / str(disk.number)
            with disk:
                train(folder)
            if error is full:
                assert not any(name.startswith("new-") for name in names(folder))
            saved, finished = epochs_in(folder), is_finished(folder)
            assert train(folder) == list(range(saved, len(SCORES)))
            assert contents(folder) == contents(whole)
            # A run that is killed while it tidies up is finished, and is not opened again.
            assert finished or names(folder) == names(whole)

    @given(st.lists(st.integers(1, 30), max_size=6))
    @settings(deadline=None, max_examples=30)
    def test_again_and_again(self, whole, tmp_path_factory, steps):
        folder = tmp_path_factory.mktemp("run")
        for number in steps:
            with Disk(Killed(), number):
                train(folder)
        train(folder)
        assert contents(folder) == contents(whole)

    @pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, full])
    def test_no_epoch_is_lost(self, tmp_path, error):
        """A saved epoch stays, whatever fails while the next one is saved."""
        for disk in each_step(error):
            folder = tmp_path / str(disk.number)
            run, model = opened(folder)
            for epoch in range(2):
                model.epochs.append(epoch)
                run.save(model, logs(epoch), seconds=1.0)
            before = read(folder)
            model.epochs.append(2)
            with disk:
                run.save(model, logs(2), seconds=1.0)
            run, model = opened(folder)
            assert run.epoch in (2, 3) and model.epochs == list(range(run.epoch))
            if run.epoch == 2:
                assert run.results == before


class TestRestart:
    def test_deletes_the_old_run_and_nothing_else(self, whole, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        for name in ("epoch-9.weights.h5", "new-results.json", "new-epoch-9.weights.h5"):
            (folder / name).write_text("of the old run")
        for name in ("preset", "new-preset", "new-corpus", "checkpoints"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "file").write_text("in a folder")
        (folder / "notes.txt").write_text("of the user")
        run = Run(folder, SETTINGS | {"seed": 1}, METRICS, restart=True)
        assert run.epoch == 0 and not run.finished and run.restart
        assert read(folder)["finished"]  # until the new run is opened
        run.open(Model())
        assert names(folder) == {"notes.txt", "new-corpus", "checkpoints"}
        assert train(folder) == [0, 1, 2, 3]
        assert contents(folder) == contents(whole)

    @pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
    @pytest.mark.parametrize("restart_again", [True, False])
    def test_interrupted_at_any_step(self, whole, tmp_path, error, restart_again):
        """Without another restart the old run may have stayed, but only whole."""
        run, model = opened(tmp_path / "old")
        for _ in range(3):
            model.epochs.append(9)  # tells the old run's files from the new run's
            run.save(model, logs(0), seconds=1.0)
        run.finish(model, model)
        allowed = [contents(whole)] if restart_again else [contents(whole), contents(run.folder)]
        for disk in each_step(error):
            folder = tmp_path / str(disk.number)
            shutil.copytree(run.folder, folder)
            with disk:
                opened(folder, restart=True)
            try:
                train(folder, restart_again)
            except ValueError as refused:
                assert not restart_again and "`output`" in str(refused)
            else:
                assert contents(folder) in allowed


class TestFolder:
    @pytest.mark.parametrize("restart", [True, False])
    def test_must_be_a_folder(self, tmp_path, restart):
        (tmp_path / "file").write_text("of the user")
        with pytest.raises(ValueError, match="`output`.*file"):
            Run(tmp_path / "file", SETTINGS, METRICS, restart=restart)
        assert (tmp_path / "file").read_text() == "of the user"

    @pytest.mark.parametrize("restart", [True, False])
    def test_preset_that_no_run_created_is_not_replaced(self, tmp_path, restart):
        (tmp_path / "preset").mkdir()
        with pytest.raises(ValueError, match=f"`output`.*{tmp_path}"):
            Run(tmp_path, SETTINGS, METRICS, restart=restart)
        assert names(tmp_path) == {"preset"}

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            '{"settings": {}}',
            json.dumps(dict.fromkeys(("settings", "metrics", "finished", "history", "best"))),
            '{"settings": {}, "metrics": [], "finished": false, "history": {}, "best": null}',
        ],
    )
    def test_damaged_results_are_refused(self, tmp_path, text):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=f"`output`.*{tmp_path}"):
            Run(tmp_path, SETTINGS, METRICS)
        assert (tmp_path / "results.json").read_text() == text
        assert train(tmp_path, restart=True) == [0, 1, 2, 3]

    @pytest.mark.parametrize("weights", [None, "[0"])
    def test_missing_or_damaged_weights_are_refused(self, tmp_path, weights):
        run, model = opened(tmp_path)
        run.save(model, logs(0), seconds=1.0)
        path = tmp_path / "epoch-1.weights.h5"
        path.unlink() if weights is None else path.write_text(weights)
        before = read(tmp_path)
        with pytest.raises(ValueError, match=path.name):
            opened(tmp_path)
        with pytest.raises(ValueError, match=path.name):
            run.finish(model, model)
        assert read(tmp_path) == before

    def test_finished_run_may_be_moved(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "moved")
        run = Run(tmp_path / "moved", SETTINGS, METRICS)
        assert run.finished and run.results["preset"] == str(tmp_path / "moved" / "preset")
        assert train(tmp_path / "moved") == []

    def test_unfinished_run_may_be_moved(self, whole, tmp_path):
        run, model = opened(tmp_path / "run")
        model.epochs.append(0)
        run.save(model, logs(0), seconds=1.26)
        shutil.move(tmp_path / "run", tmp_path / "moved")
        assert train(tmp_path / "moved") == [1, 2, 3]
        assert contents(tmp_path / "moved") == contents(whole)

    def test_finished_run_that_lost_its_preset_is_refused(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "preset")
        with pytest.raises(ValueError, match="`output`.*run'"):
            Run(tmp_path / "run", SETTINGS, METRICS)
        assert train(tmp_path / "run", restart=True) == [0, 1, 2, 3]
        assert contents(tmp_path / "run") == contents(whole)


class TestSettings:
    @pytest.mark.parametrize(
        ("old", "new", "name"),
        [
            ({"epochs": 3}, {"epochs": 4}, "epochs=3.*epochs=4"),
            ({}, {"preset": "runs/mine"}, "preset=None.*preset='runs/mine'"),
            ({}, {"mix_layers": True}, "mix_layers=None.*mix_layers=True"),
            ({"mix_layers": True}, {}, "mix_layers=True.*mix_layers=None"),
            ({"mix_layers": False}, {}, "mix_layers=False.*mix_layers=None"),
        ],
    )
    def test_run_with_other_settings_is_refused(self, tmp_path, old, new, name):
        Run(tmp_path, old, METRICS).save(Model(), logs(0), seconds=1.0)
        before = read(tmp_path)
        with pytest.raises(ValueError, match=f"`output`.*{name}"):
            Run(tmp_path, new, METRICS)
        assert read(tmp_path) == before
        assert Run(tmp_path, new, METRICS, restart=True).results["settings"] == new

    @pytest.mark.parametrize("value", [None, False])
    def test_run_of_a_version_that_did_not_have_a_setting(self, tmp_path, value):
        Run(tmp_path, SETTINGS, METRICS).save(Model(), logs(0), seconds=1.0)
        run = Run(tmp_path, SETTINGS | {"mix_layers": value}, METRICS)
        assert run.epoch == 1
        run.save(Model(), logs(1), seconds=1.0)
        assert read(tmp_path)["settings"] == SETTINGS | {"mix_layers": value}

    def test_run_of_a_version_that_had_another_setting(self, tmp_path):
        Run(tmp_path, SETTINGS | {"old": None}, METRICS).save(Model(), logs(0), seconds=1.0)
        assert Run(tmp_path, SETTINGS, METRICS).epoch == 1

    def test_other_data_is_refused(self, tmp_path):
        run, model = opened(tmp_path)
        run.of_data(examples=8)
        run.of_data(examples=9)  # nothing was trained on the eight
        run.save(model, logs(0), seconds=1.0)
        run = Run(tmp_path, SETTINGS, METRICS)
        run.of_data(examples=9, partial=[])  # `partial` is new
        assert run.results["examples"] == 9 and run.results["partial"] == []
        with pytest.raises(ValueError, match="`output`.*examples=9.*examples=8"):
            run.of_data(examples=8)
        assert read(tmp_path)["examples"] == 9


@pytest.mark.parametrize("seed", [-1, 0.5, 2**32, "1"])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"`seed`.*seed={seed}"):
        runs.check_seed_and_rate({"seed": seed, "learning_rate": 1.0})


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_learning_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=f"`learning_rate`.*learning_rate={rate}"):
        runs.check_seed_and_rate({"seed": 0, "learning_rate": rate})


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.uint32(3)])
def test_seed_and_learning_rate_in_range(seed):
    runs.check_seed_and_rate({"seed": seed, "learning_rate": 1e-9})


class TestReplacing:
    def test_file_and_folder(self, tmp_path):
        for text in ("old", "new"):
            with replacing(tmp_path / "file") as path:
                path.write_text(text)
                assert (tmp_path / "file").exists() == (text == "new")
            with replacing(tmp_path / "folder") as path:
                path.mkdir()
                (path / text).write_text(text)
        assert (tmp_path / "file").read_text() == "new"
        assert names(tmp_path / "folder") == {"new"} and names(tmp_path) == {"file", "folder"}

    def test_error_keeps_the_old_file(self, tmp_path):
        (tmp_path / "file").write_text("old")
        with pytest.raises(KeyError), replacing(tmp_path / "file") as path:
            path.write_text("new")
            raise KeyError
        assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == {"file"}

    def test_error_before_anything_is_written(self, tmp_path):
        with pytest.raises(KeyError), replacing(tmp_path / "file"):
            raise KeyError
        assert names(tmp_path) == set()

    def test_error_of_hdf5_is_one_of_the_disk(self, tmp_path):
        """HDF5 raises a RuntimeError when it closes a file on a full disk."""
        said = pytest.raises(OSError, match="weights.h5.*id ref count")
        with said, replacing(tmp_path / "weights.h5") as path:
            path.write_text("half")
            raise RuntimeError("Can't decrement id ref count")
        assert names(tmp_path) == set()


class TestProcesses:
    def test_of_several_the_first_one_writes(self, whole, tmp_path, monkeypatch):
        """The processes are threads here. Each has its own model."""
        number = threading.local()
        barrier = threading.Barrier(2, timeout=30)
        monkeypatch.setattr(runs, "process_id", lambda: number.value)
        monkeypatch.setattr(runs, "barrier", barrier.wait)
        removed, trained = [], {}
        remove = Path.unlink

        def unlink(path, **options):
            removed.append(number.value)
            remove(path, **options)

        def work(process):
            number.value = process
            trained[process] = train(tmp_path / "run")

        monkeypatch.setattr(Path, "unlink", unlink)
        threads = [threading.Thread(target=work, args=[process]) for process in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        number.value = 0
        assert trained == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
        assert set(removed) == {0}
        assert contents(tmp_path / "run") == contents(whole)
        assert names(tmp_path / "run") == names(whole)

    def test_one_that_is_not_the_first_leaves_the_folder_as_it_is(
        self, whole, tmp_path, monkeypatch
    ):
        shutil.copytree(whole, tmp_path / "run")
        monkeypatch.setattr(runs, "process_id", lambda: 1)
        run, model = opened(tmp_path / "run", restart=True)
        run.save(model, logs(0), seconds=1.0)
        assert contents(tmp_path / "run") == contents(whole)
        opened(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_all_must_see_the_same_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cluster, "everyones", lambda value: [value, value + 1])
        with pytest.raises(ValueError, match="`output`.*0, 1"):
            opened(tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_several_need_a_mesh(self, monkeypatch):
        assert runs.devices(None) is None
        monkeypatch.setattr(runs, "ExpertParallel", dict)
        assert runs.devices({"data": 1, "experts": 2}) == {"data": 1, "experts": 2}
        monkeypatch.setattr(runs, "num_processes", lambda: 2)
        with pytest.raises(ValueError, match="`mesh`.*mesh=None.*2"):
            runs.devices(None)


def test_save_run_measures_each_epoch_and_notes_more(monkeypatch):
    saved = []
    run = types.SimpleNamespace(save=lambda *given, **more: saved.append((*given, more)))
    clock = types.SimpleNamespace(monotonic=lambda: clock.now, now=10.0)
    monkeypatch.setattr(runs, "time", clock)
    callback = SaveRun(run, lambda: {"place": len(saved)})
    callback.set_model(keras.Model())
    callback.on_train_begin()
    for epoch, clock.now in enumerate((12.0, 15.0)):
        callback.on_epoch_end(epoch, {"loss": 0.5})
    assert saved == [
        (callback.model, {"loss": 0.5}, 2.0, {"place": 0}),
        (callback.model, {"loss": 0.5}, 3.0, {"place": 1}),
    ]


class TestEpochLine:
    def test_routing_metrics_are_averaged_over_the_layers(self, capsys):
        line = EpochLine()
        line.set_params({"verbose": 2, "epochs": 1, "steps": 1})
        line.on_train_begin()
        line.on_epoch_begin(0)
        logs = {
            "loss": 2.0,
            "moe_2/dead": 0.0,
            "val_moe_2/dead": 3.0,
            "block/moe_4/dead": 1.0,
            "val_block/moe_4/dead": 4.0,
            "moe_2/entropy": 5.0,
            "validation_mismatched_accuracy": 0.5,
        }
        given = dict(logs)
        line.on_epoch_end(0, logs)
        shown = [part.strip() for part in capsys.readouterr().out.split(" - ") if ": " in part]
        assert shown == [
            "loss: 2.0000",
            "validation_mismatched_accuracy: 0.5000",
            "moe/dead: 0.5000",  # (0 + 1) / 2
            "val_moe/dead: 3.5000",  # (3 + 4) / 2
            "moe/entropy: 5.0000",
        ]
        assert logs == given  # other callbacks get them all


class TestStopAtNaN:
    """An epoch has 4 steps."""

    def begun(self, epoch):
        callback = StopAtNaN(types.SimpleNamespace(epoch=epoch, folder="runs/mine"))
        callback.set_params({"steps": 4})
        callback.on_epoch_begin(epoch)
        return callback

    @pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(
        ("epoch", "said"), [(0, "at step 2; runs/mine has no"), (2, "at step 10; .* step 8")]
    )
    def test_names_the_step_and_the_weights_that_are_kept(self, loss, epoch, said):
        callback = self.begun(epoch)
        for batch, value in enumerate((0.5, loss)):
            callback.on_train_batch_begin(batch)
            callback.on_train_batch_end(batch, {"loss": np.float32(value)})
        with pytest.raises(FloatingPointError, match=f"{loss} {said}"):
            callback.on_train_batch_begin(2)

    def test_losses_may_arrive_in_any_order(self):
        callback = self.begun(0)
        callback.on_train_batch_end(2, {"loss": float("nan")})
        callback.on_train_batch_end(0, {"loss": 0.5})
        callback.on_train_batch_begin(3)  # the loss of batch 1 is not known yet
        callback.on_train_batch_end(1, {"loss": float("inf")})
        with pytest.raises(FloatingPointError, match="inf at step 2;"):
            callback.on_epoch_end(0, {})

    def test_loss_of_the_last_step(self):
        callback = self.begun(0)
        for batch in range(4):
            callback.on_train_batch_end(batch, {"loss": 0.5 if batch < 3 else float("nan")})
        with pytest.raises(FloatingPointError, match="nan at step 4;"):
            callback.on_epoch_end(0, {"loss": 0.5, "val_loss": 0.5})

    def test_validation_loss_is_of_the_weights_after_the_last_step(self):
        with pytest.raises(FloatingPointError, match="nan at step 8; .* step 4"):
            self.begun(1).on_epoch_end(1, {"loss": 0.5, "val_loss": float("nan")})

    def test_finite_losses_pass_and_each_epoch_begins_anew(self):
        callback = self.begun(0)
        for epoch in range(2):
            callback.on_epoch_begin(epoch)
            for batch in range(4):
                callback.on_train_batch_begin(batch)
                callback.on_train_batch_end(batch, {"loss": 0.5})
            callback.on_epoch_end(epoch, {"loss": 0.5, "val_loss": 0.5})
            callback.on_epoch_end(epoch, {"loss": 0.5})


def test_seed_epochs_sets_order_and_noise_by_seed_and_epoch():
    order = []
    batches = types.SimpleNamespace(shuffle=order.append)
    model = keras.Sequential([keras.Input((4,)), *(Dropout(0.5) for _ in range(2))])

    def states(seed, epoch, batches=None):
        callback = SeedEpochs(seed, batches)
        callback.set_model(model)
        callback.on_epoch_begin(epoch)
        found = [numpy(v) for v in model.variables if v.name == "seed_generator_state"]
        assert len(found) == 2
        return [tuple(state.tolist()) for state in found]

    first = states(3, 0, batches)
    different = [*first, *states(3, 1, batches), *states(4, 0)]
    assert len(set(different)) == 6 and order == [0, 1]
    model(np.ones((2, 4)), training=True)  # moves the states
    assert states(3, 0) == first


class Recorded(keras.Model):
    """Hands the examples of each batch that it is trained on to `record`."""

    def train_step(self, *arguments):
        inputs, *_ = arguments[-1]  # on JAX the weights come before the batch
        self.record(numpy(inputs["token_ids"])[:, 0].tolist())
        return super().train_step(*arguments)


class At(keras.callbacks.Callback):
    """Calls a function of the model before a step of an epoch."""

    def __init__(self, epoch, step, function):
        super().__init__()
        self.epoch, self.step, self.function = epoch, step, function

    def on_epoch_begin(self, epoch, logs=None):
        self.is_epoch = epoch == self.epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.is_epoch and batch == self.step:
            self.function(self.model)


EPOCHS, STEPS = 3, 3


def fit(folder, batches, *callbacks):
    """Trains a small model with dropout on 12 examples.

    Args:
        folder: path of the run.
        batches: list that gets the examples of each batch.
        *callbacks: more callbacks.
    """
    keras.utils.set_random_seed(0)
    ids = np.arange(12)[:, None]
    labels = np.sin(np.arange(12.0))
    data = TokenBatches(ids, np.ones_like(ids, bool), labels, 4, [1], shuffle_seed=5)
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask")
    }
    x = keras.layers.Embedding(12, 4)(inputs["token_ids"])
    x = keras.layers.GlobalAveragePooling1D()(Dropout(0.5)(x))
    model = Recorded(inputs, keras.layers.Dense(1)(x))
    model.record = batches.append
    model.compile("adam", "mse", run_eagerly=True)
    run = Run(folder, SETTINGS, ["loss"], last=True)
    run.open(model)
    model.fit(
        data,
        epochs=EPOCHS,
        initial_epoch=run.epoch,
        shuffle=False,
        verbose=0,
        callbacks=[SeedEpochs(7, data), StopAtNaN(run), SaveRun(run), *callbacks],
    )
    run.finish(model, Model())
    return run.results["history"], [numpy(weight) for weight in model.trainable_variables]


class TestFit:
    """A resumed run of a real model sees the same batches and draws the same noise."""

    @pytest.fixture(scope="class")
    def undisturbed(self, tmp_path_factory):
        batches = []
        return batches, *fit(tmp_path_factory.mktemp("fit"), batches)

    def assert_same_end(self, undisturbed, folder):
        """Also checks the batches from the first epoch that is not saved."""
        whole, history, weights = undisturbed
        kept, batches = epochs_in(folder), []
        resumed_history, resumed_weights = fit(folder, batches)
        assert batches == whole[kept * STEPS :]
        assert [x["loss"] for x in resumed_history] == pytest.approx(
            [x["loss"] for x in history], rel=1e-5
        )
        for one, other in zip(weights, resumed_weights, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)

    def test_each_epoch_has_every_example_in_an_order_of_its_own(self, undisturbed):
        epochs = np.reshape(undisturbed[0], (EPOCHS, 12))
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs.tolist())
        assert len(set(map(tuple, epochs.tolist()))) == EPOCHS

    @pytest.mark.parametrize(
        "steps", [[(0, 1)], [(1, 0)], [(2, 2)], [(1, 2), (1, 0), (2, 1)]], ids=str
    )
    def test_interrupted(self, undisturbed, tmp_path, steps):
        def interrupt(model):
            raise KeyboardInterrupt

        for epoch, step in steps:
            with pytest.raises(KeyboardInterrupt):
                fit(tmp_path, [], At(epoch, step, interrupt))
            assert epochs_in(tmp_path) == epoch
        self.assert_same_end(undisturbed, tmp_path)

    def test_loss_that_is_not_finite(self, undisturbed, tmp_path):
        """Nothing of the epoch is saved; the second step of the second epoch is step 5."""

        def break_weights(model):
            weight = model.trainable_variables[0]
            weight.assign(weight * np.nan)

        with pytest.raises(FloatingPointError, match=f"nan at step 5; {tmp_path} .* step 3"):
            fit(tmp_path, [], At(1, 1, break_weights))
        assert epochs_in(tmp_path) == 1
        assert names(tmp_path) == {"results.json", "epoch-1.weights.h5"}
        self.assert_same_end(undisturbed, tmp_path)

    def test_weights_of_another_model_are_refused(self, tmp_path):
        (tmp_path / "results.json").write_text(
            json.dumps(
                Run(tmp_path, SETTINGS, ["loss"]).results | {"history": [{"epoch": 1, "loss": 0.5}]}
            )
        )
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save_weights(
            tmp_path / "epoch-1.weights.h5"
        )
        with pytest.raises(ValueError, match="epoch-1.weights.h5"):
            fit(tmp_path, [])
