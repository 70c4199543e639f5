import errno
import json
import shutil

import keras
import numpy as np
import pytest

import zoo
from tests.keras_moe.distribution.several import launched
from tests.zoo.finetuning.small import run
from tests.zoo.traces import counted_traces
from zoo import runs
from zoo.batches import TokenBatches
from zoo.finetuning import batches, scores
from zoo.finetuning import run as finetuning
from zoo.tasks.task import get


def test_results_and_preset(whole):
    results, folder = whole
    assert results["metrics"] == ["val_matthews"]
    assert [entry["epoch"] for entry in results["history"]] == list(range(1, 11))
    best = max(results["history"], key=lambda entry: entry["val_matthews"])
    assert results["best"]["val_matthews"] == best["val_matthews"] > 0.9
    assert {"loss", "val_loss", "val_accuracy", "moe_1/dropped", "val_moe_1/entropy"} <= set(best)
    assert json.loads((folder / "results.json").read_text()) == results
    assert sorted(path.name for path in folder.iterdir()) == ["preset", "results.json"]
    model = zoo.from_preset(results["preset"])
    scores = model.predict(["a bad film", "a great film"], verbose=0)
    assert scores.argmax(axis=-1).tolist() == [0, 1]


@pytest.mark.parametrize("model", ["expert_choice", "dense"])
def test_other_models(tmp_path, model):
    """And the step is traced once; PyTorch traces nothing, and has four steps."""
    with counted_traces() as traces:
        assert np.isfinite(run(tmp_path, model=model)["best"]["val_loss"])
    assert len(traces) == (4 if keras.backend.backend() == "torch" else 1)


def test_scores_to_regress(tmp_path):
    results = run(tmp_path, task="glue/stsb")
    assert results["metrics"] == ["val_spearman", "val_pearson"]
    # 21 rows in batches of 16: the loss is a mean over examples, whatever fills the last batch up.
    assert finetuning._loss(get("glue/stsb")).reduction == "mean_with_sample_weight"
    assert finetuning._loss(get("glue/cola")).reduction == "mean_with_sample_weight"


def test_two_validation_splits_and_pairs(tmp_path):
    best = run(tmp_path, task="glue/mnli")["best"]
    assert {"val_accuracy", "validation_mismatched_accuracy"} <= set(best)


def test_the_official_metrics_come_before_the_routing_figures(whole, tmp_path, capsys):
    names = list(whole[0]["best"])
    assert names.index("val_loss") < names.index("val_matthews") < names.index("moe_1/dropped")
    run(tmp_path, verbose=2)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "val_matthews" in line)
    assert line.index("val_loss:") < line.index("val_matthews:") < line.index("moe/dropped:")
    assert "val_moe/dropped:" in line and "moe_1/" not in line


def test_the_line_of_an_epoch_has_means_over_the_layers():
    logs = {"loss": 2.0, "moe_2/dead": 0.0, "moe_4/dead": 1.0, "val_moe_2/dead": 3.0}
    logs |= {"val_moe_4/dead": 4.0, "validation_mismatched_accuracy": 0.5}
    assert runs.EpochLine._shortened(logs) == {
        "loss": 2.0,
        "validation_mismatched_accuracy": 0.5,
        "moe/dead": (0.0 + 1.0) / 2,
        "val_moe/dead": (3.0 + 4.0) / 2,
    }


class Killed(Exception):
    pass


def test_a_run_interrupted_again_and_again_comes_to_the_same_end(whole, tmp_path, monkeypatch):
    def save(self, model, logs, seconds, original=runs.Run.save):
        if self.epoch == 1:  # while the weights of epoch 2 are half written
            (self.folder / "new-epoch-2.weights.h5").write_bytes(b"half")
            raise Killed
        original(self, model, logs, seconds)

    def write(self, original=runs.Run._write):
        if self.epoch == 2:  # when they are written, and nothing says so yet
            raise Killed
        original(self)

    def predict(self, epoch, logs=None, original=scores.OfficialMetrics.on_epoch_end):
        if epoch == 2:  # within epoch 3
            raise Killed
        original(self, epoch, logs)

    for of, name, killed, epochs_kept in (
        (runs.Run, "save", save, 1),
        (runs.Run, "_write", write, 1),
        (scores.OfficialMetrics, "on_epoch_end", predict, 2),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(of, name, killed)
            run(tmp_path, epochs=10)
        assert len(json.loads((tmp_path / "results.json").read_text())["history"]) == epochs_kept
    resumed = run(tmp_path, epochs=10)
    for one, other in zip(whole[0]["history"], resumed["history"], strict=True):
        for name in one:
            if name != "seconds":
                assert one[name] == pytest.approx(other[name], abs=1e-4), (one["epoch"], name)


def test_a_finished_run_is_not_run_again(whole, monkeypatch):
    results, folder = whole
    monkeypatch.setattr(finetuning, "build", None)
    assert run(folder, epochs=10) == results


def test_another_run_in_the_folder_is_refused(whole):
    results, folder = whole
    with pytest.raises(ValueError, match="`output` holds another run, with epochs=10"):
        run(folder, epochs=11)
    assert json.loads((folder / "results.json").read_text()) == results


def test_settings_that_an_earlier_version_did_not_have(whole, tmp_path):
    """Were `None`, or off: such a run is this one."""
    results, _ = whole
    new = {"load_weights": None, "mix_layers": False}
    assert results["settings"].items() >= new.items()
    settings = {name: v for name, v in results["settings"].items() if name not in new}
    (tmp_path / "preset").mkdir()
    (tmp_path / "results.json").write_text(json.dumps({**results, "settings": settings}))
    assert run(tmp_path, epochs=10)["history"] == results["history"]
    with pytest.raises(ValueError, match="`output` holds another run, with mix_layers=None"):
        run(tmp_path, epochs=10, mix_layers=True)
    begun = {"settings": settings, "finished": False, "history": [], "best": None}
    (tmp_path / "results.json").write_text(json.dumps({**results, **begun}))
    gone_on = run(tmp_path, epochs=10)
    assert gone_on["finished"] and gone_on["settings"] == results["settings"]


@pytest.mark.parametrize(
    ("name", "value"), [("training_examples", 63), ("partial", ["validation"])]
)
def test_going_on_with_other_data_is_refused(whole, tmp_path, name, value):
    begun = {"finished": False, "history": whole[0]["history"][:1], name: value}
    (tmp_path / "results.json").write_text(json.dumps({**whole[0], **begun}))
    said = f"`output` holds a run on other data, with {name}="
    with pytest.raises(ValueError, match=said):
        run(tmp_path, epochs=10)
    assert json.loads((tmp_path / "results.json").read_text())[name] == value


def test_the_folder_says_what_is_trained(masked_lm):
    backend = keras.backend.backend()
    for options, name in (
        ({}, f"preset-frozen_experts-{backend}"),
        ({"train": "all"}, f"preset-{backend}"),
        ({"load_weights": False}, f"preset-new-{backend}"),
        ({"train": "non_experts"}, f"preset-non_experts-{backend}"),
    ):
        assert finetuning.label(
            finetuning.settle("glue/cola", preset=masked_lm, **options)
        ).endswith(name)
    assert finetuning.label(finetuning.settle("glue/cola", "dense")) == f"dense-{backend}"


def test_restart_throws_a_run_away_and_nothing_else(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    (tmp_path / "run" / "new-corpus").mkdir()
    first = run(tmp_path / "run", max_examples=16)
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="`size` must be one of"):
        run(tmp_path / "run", size="none", restart=True)
    assert run(tmp_path / "run", max_examples=16) == first  # bad input lost nothing
    again = run(tmp_path / "run", max_examples=16, seed=1, restart=True)
    assert again["best"]["loss"] != first["best"]["loss"]
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"
    assert (tmp_path / "run" / "new-corpus").is_dir()


def test_a_restart_that_was_killed_can_be_made_again(whole, tmp_path, monkeypatch):
    def remove(path, original=runs._remove):
        original(path)
        raise Killed

    shutil.copytree(whole[1], tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs, "_remove", remove)
        run(tmp_path / "run", max_examples=16, restart=True)
    assert run(tmp_path / "run", max_examples=16, restart=True)["finished"]


def test_a_preset_that_is_no_runs_is_not_replaced(tmp_path):
    (tmp_path / "preset").mkdir()
    for restart in (False, True):
        with pytest.raises(ValueError, match="`output` must be a folder without a `preset`"):
            run(tmp_path, restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


def test_a_finished_run_that_was_moved_or_lost_its_preset(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "moved")
    assert run(tmp_path / "moved", epochs=10)["preset"] == str(tmp_path / "moved" / "preset")
    shutil.rmtree(tmp_path / "moved" / "preset")
    with pytest.raises(ValueError, match="the `preset` of this finished one is gone; `restart`"):
        run(tmp_path / "moved", epochs=10)


def test_numbers_of_numpys(tmp_path):
    numbers = {"epochs": np.int64(1), "learning_rate": np.float32(1e-2), "seed": np.uint32(3)}
    settings = run(tmp_path, max_examples=np.int32(16), **numbers)["settings"]
    assert json.loads((tmp_path / "results.json").read_text())["settings"] == settings
    assert (settings["epochs"], settings["seed"], settings["max_examples"]) == (1, 3, 16)


def test_damaged_results(tmp_path):
    nothing = dict.fromkeys(("settings", "metrics", "finished", "history", "best"))
    for text in ("{", "[]", '{"a": 1}', json.dumps(nothing)):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            run(tmp_path)


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`output` must be a folder"):
        run(tmp_path / "file")


def test_weights_that_do_not_fit(whole, tmp_path):
    unfinished = whole[0] | {"finished": False, "history": whole[0]["history"][:1]}
    (tmp_path / "results.json").write_text(json.dumps(unfinished))
    (tmp_path / "epoch-1.weights.h5").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"epoch-1\.weights\.h5' does not fit or is damaged"):
        run(tmp_path, epochs=10)
    assert json.loads((tmp_path / "results.json").read_text()) == unfinished


def test_starts_from_a_preset(whole, tmp_path):
    """With a new head, but what the trained model tells apart it tells apart at once."""
    results, _ = whole
    second = run(tmp_path, preset=results["preset"], learning_rate=2e-2)
    assert second["best"]["val_loss"] < 0.8 * results["history"][0]["val_loss"]
    settings = second["settings"]
    assert (settings["model"], settings["preset"]) == (None, results["preset"])
    assert [settings[name] for name in ("size", "num_experts")] == [None, None]
    assert (settings["dropout"], settings["expert_dropout"]) == (0.1, 0.4)
    backbone = zoo.from_preset(second["preset"]).backbone
    assert (backbone.dropout, backbone.expert_dropout) == (0.1, 0.4)


def test_a_loss_that_is_not_finite_stops_and_loses_nothing(tmp_path, monkeypatch):
    """64 examples in batches of 16 make 4 steps; the third of the second epoch is the seventh."""

    def item(self, index, original=TokenBatches.__getitem__):
        x, labels, weight = original(self, index)
        third = self.shuffle_seed is not None and self.epoch == 1 and index == 2
        return x, labels, weight * (np.nan if third else 1)

    def shuffle(self, epoch, original=TokenBatches.shuffle):
        self.epoch = epoch
        original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(TokenBatches, "__getitem__", item)
        patch.setattr(TokenBatches, "shuffle", shuffle)
        said = f"must be finite. Received: nan at step 7; {tmp_path} has the weights of step 4"
        with pytest.raises(FloatingPointError, match=said):
            run(tmp_path, epochs=3)
    assert len(json.loads((tmp_path / "results.json").read_text())["history"]) == 1
    assert len(run(tmp_path, epochs=3)["history"]) == 3


def test_what_the_last_step_of_an_epoch_breaks_is_not_saved(tmp_path):
    said = "Received: (nan|inf) at step 1; .* has no weights yet"
    with pytest.raises(FloatingPointError, match=said):
        run(tmp_path, max_examples=16, learning_rate=1e38)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def save(self, path, original=finetuning.trainable.Network.save_weights):
        if path.name.startswith("new-epoch-2"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.trainable.Network, "save_weights", save)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-1.weights.h5", "results.json"]
    assert len(json.loads((tmp_path / "results.json").read_text())["history"]) == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"train": "experts"}, "with train='frozen_experts'"),
        ({"expert_dropout": 0.2}, "with expert_dropout=0.4"),
        ({"max_length": 12}, "with max_length=10"),
    ],
)
def test_another_setting_of_a_preset_is_refused(masked_lm, tmp_path, option, said):
    (tmp_path / "results.json").write_text(
        json.dumps(
            {
                "settings": finetuning.settle("glue/cola", preset=masked_lm, max_length=10),
                "metrics": ["val_matthews"],
                "finished": False,
                "history": [],
                "best": None,
            }
        )
    )
    given = {"epochs": None, "batch_size": None, "learning_rate": None}
    with pytest.raises(ValueError, match=f"`output` holds another run, {said}"):
        run(tmp_path, preset=masked_lm, **(given | option))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a positive integer"),
        ({"batch_size": -1}, "`batch_size` must be a positive integer"),
        ({"max_length": 3}, "`max_length` must be from 4 to 512. Received: max_length=3"),
        ({"max_length": 513}, "`max_length` must be from 4 to 512. Received: max_length=513"),
        ({"seed": -1}, "`seed` must be from 0 to 4294967295. Received: seed=-1"),
        ({"seed": 0.5}, "`seed` must be from 0 to 4294967295. Received: seed=0.5"),
        ({"max_length": 8.5}, "`max_length` must be a positive integer"),
        ({"max_examples": 32.5}, "`max_examples` must be a positive integer"),
        ({"seed": 2**32}, "`seed` must be from 0 to 4294967295. Received: seed=4294967296"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
        ({"batch_size": 65}, "`batch_size` must be at most the number of examples, 64"),
        ({"num_experts": 0}, "`num_experts` must be a positive integer"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number"),
        ({"max_examples": 3}, "`max_examples` must be at least the batch size"),
        ({"task": "glue/colla"}, "`task` must be one of .*glue/cola"),
        (
            {"train": "none"},
            "`train` must be one of all, frozen_experts, non_experts, experts, lora",
        ),
        ({"train": "lora", "lora_rank": 0}, "`lora_rank` must be a positive integer"),
        ({"model": "swich"}, "`model` must be one of switch, expert_choice, dense, and what"),
        ({"size": "smal"}, "Did you mean 'small'"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="no engine has devices share")
def test_neither_devices_nor_processes_change_a_run(tmp_path):
    """Two processes; on JAX each has two devices."""
    program = ("-m", "tests.zoo.finetuning.on_devices")
    mesh = {"data": 1, "experts": 4} if keras.backend.backend() == "jax" else {"experts": 2}
    (one,) = launched(*program, tmp_path / "one", "null")
    many = launched(*program, tmp_path / "many", json.dumps(mesh), processes=2, devices=2)
    assert "val_moe_1/dropped" in one
    for process in many:
        assert process.keys() == one.keys()
        for name in set(one) - {"seconds"}:
            np.testing.assert_allclose(process[name], one[name], rtol=0, atol=1e-4, err_msg=name)
    kept = {path.name for path in (tmp_path / "one").iterdir()}
    assert (
        {path.name for path in (tmp_path / "many").iterdir()} == kept == {"preset", "results.json"}
    )


def test_several_processes_need_a_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "num_processes", lambda: 2)
    with pytest.raises(
        ValueError, match="`mesh` must be the devices of all processes.*2 processes"
    ):
        run(tmp_path / "run")


def test_partial_data_has_the_validation_splits_that_are_there(tmp_path, monkeypatch):
    splits = (("validation_matched",), ("train", "validation_matched"))
    monkeypatch.setattr(batches, "validation_splits", lambda task, data_dir: splits)
    results = run(tmp_path, "glue/mnli")
    assert results["partial"] == list(splits[1])
    (entry,) = results["history"]
    assert "val_accuracy" in entry and "validation_mismatched_accuracy" not in entry
