import json
import re
import shutil

import keras
import numpy as np
import pytest

import zoo
from tests.keras_moe.distribution.several import launched
from tests.zoo.finetuning.small import run
from tests.zoo.traces import counted_traces
from zoo.finetuning import batches, scores
from zoo.finetuning import run as finetuning
from zoo.tasks.task import get


@pytest.mark.every_backend
def test_step_is_traced_once(counted):
    """PyTorch traces nothing, and ten epochs have 40 steps."""
    assert counted[3] == (40 if keras.backend.backend() == "torch" else 1)


@pytest.mark.every_backend
def test_results_and_preset(whole):
    results, folder = whole
    assert results["metrics"] == ["val_matthews"]
    assert results["training_examples"] == 64 and results["partial"] == []
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


@pytest.mark.parametrize("task", ["glue/stsb", "glue/cola"])
def test_loss_of_a_batch_is_a_mean_over_its_examples(tmp_path, task):
    """The validation set has batches of 16 and of 5 examples; 11 rows only fill the second up."""
    results = run(tmp_path, task, "dense", max_examples=16)
    (metric, *_) = results["metrics"]
    assert metric == {"glue/stsb": "val_spearman", "glue/cola": "val_matthews"}[task]
    classifier = zoo.from_preset(results["preset"])
    data = batches.TokenisedTask(get(task), None, 10)
    outputs = scores.predict(
        keras.Model(classifier.input, classifier.output),
        data.batches("validation", classifier.preprocessor, 16),
    )
    labels = data.examples("validation").labels
    if task == "glue/stsb":
        losses = (outputs[:, 0] - labels) ** 2
    else:
        losses = np.log(np.exp(outputs).sum(axis=1)) - outputs[np.arange(21), labels]
    of_batches = np.mean(losses[:16]), np.mean(losses[16:])
    assert results["best"]["val_loss"] == pytest.approx(np.mean(of_batches), rel=1e-4)


def test_two_validation_splits_and_pairs(tmp_path):
    best = run(tmp_path, task="glue/mnli")["best"]
    assert {"val_accuracy", "validation_mismatched_accuracy"} <= set(best)


def test_each_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    orders, original = [], batches.TokenBatches.shuffle

    def shuffle(self, epoch):
        original(self, epoch)
        if self.shuffle_seed is not None:  # the training data
            orders.append(self.order.tolist())

    monkeypatch.setattr(batches.TokenBatches, "shuffle", shuffle)
    run(tmp_path, model="dense", epochs=2, max_examples=32)
    one, other = orders[-2:]
    assert one != other and sorted(one) == sorted(other) == list(range(32))


def test_official_metrics_come_before_the_routing_metrics(whole, tmp_path, capsys):
    names = list(whole[0]["best"])
    assert names.index("val_loss") < names.index("val_matthews") < names.index("moe_1/dropped")
    run(tmp_path, verbose=2, max_examples=16)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "val_matthews" in line)
    assert line.index("val_loss:") < line.index("val_matthews:") < line.index("moe/dropped:")
    assert "val_moe/dropped:" in line and "moe_1/" not in line


@pytest.mark.every_backend
def test_run_interrupted_twice_comes_to_the_same_end(counted, tmp_path, monkeypatch):
    """Within its ninth epoch, and while its preset is saved. All else is in test_runs.py."""
    whole, _, killed, _ = counted
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    (folder / "new-epoch-9.weights.h5").write_bytes(b"half")
    assert len(json.loads((folder / "results.json").read_text())["history"]) == 8

    def save(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zoo.EncoderTextClassifier, "save_to_preset", save)
        run(folder, epochs=10)
    assert len(json.loads((folder / "results.json").read_text())["history"]) == 10
    resumed = run(folder, epochs=10)
    assert resumed["finished"]
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], abs=1e-4), (one["epoch"], name)


def test_a_finished_run_is_not_run_again(whole, monkeypatch, capsys):
    results, folder = whole
    monkeypatch.setattr(finetuning, "build", None)
    assert run(folder, epochs=10) == results
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("training_examples", 63), ("partial", ["train"])])
def test_going_on_with_other_data_is_refused(whole, tmp_path, name, value):
    begun = {"finished": False, "history": whole[0]["history"][:1], name: value}
    (tmp_path / "results.json").write_text(json.dumps({**whole[0], **begun}))
    with pytest.raises(ValueError, match=rf"`output`.*{name}={re.escape(repr(value))}"):
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


def test_restart_deletes_an_earlier_run_unless_an_argument_is_refused(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(ValueError, match="`size`.*'none'"):
        run(tmp_path / "run", size="none", restart=True)
    with pytest.raises(ValueError, match="`output`.*epochs=10.*epochs=1"):
        run(tmp_path / "run", max_examples=16)
    again = run(tmp_path / "run", max_examples=16, restart=True)
    assert len(again["history"]) == 1 and again["finished"]


def test_arguments_may_be_numbers_of_numpy(tmp_path):
    """And runs of one seed are the same."""
    numbers = {"epochs": 1, "learning_rate": 0.5**7, "seed": 3, "max_examples": 16}
    kinds = (np.int64, np.float32, np.uint32, np.int32)
    of_numpy = {name: kind(numbers[name]) for name, kind in zip(numbers, kinds, strict=True)}
    one, other = run(tmp_path / "one", **numbers), run(tmp_path / "other", **of_numpy)
    assert json.loads((tmp_path / "other" / "results.json").read_text()) == other
    assert one["settings"] == other["settings"]
    for result in (one, other):
        del result["history"][0]["seconds"]
    assert one["history"][0] == pytest.approx(other["history"][0], abs=1e-5)


def test_optimizer(tmp_path, monkeypatch):
    """Five epochs of 4 steps: 2 steps of warm-up, then a cosine, from and to a hundredth."""

    def fit(self, *arguments, **options):
        raise KeyboardInterrupt

    settings = finetuning.settle("glue/cola", "dense", size="tiny", epochs=5, batch_size=16)
    settings |= {"learning_rate": 0.01, "max_length": 10}
    bench = finetuning.Bench(settings, None)
    monkeypatch.setattr(keras.Model, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        bench.train(finetuning.open_run(tmp_path, settings))
    assert isinstance(bench.network.optimizer, keras.optimizers.AdamW)
    config = bench.network.optimizer.get_config()
    assert (config["weight_decay"], config["clipnorm"]) == (0.01, 1.0)
    rate = keras.optimizers.schedules.deserialize(config["learning_rate"])
    rates = [float(rate(step)) for step in (0, 1, 2, 11, 20)]
    assert rates == pytest.approx([0.0001, 0.00505, 0.01, 0.00505, 0.0001], rel=1e-4)


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


def test_weights_that_the_last_step_of_an_epoch_breaks_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="(nan|inf) at step 1"):
        run(tmp_path, max_examples=16, learning_rate=1e38)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"train": "experts"}, "train='frozen_experts'.*train='experts'"),
        ({"expert_dropout": 0.2}, "expert_dropout=0.4.*expert_dropout=0.2"),
        ({"max_length": 12}, "max_length=10.*max_length=12"),
    ],
)
def test_another_setting_of_a_preset_is_refused(masked_lm, tmp_path, option, said):
    settings = finetuning.settle("glue/cola", preset=masked_lm, max_length=10)
    new = finetuning.open_run(tmp_path, settings).results
    (tmp_path / "results.json").write_text(json.dumps(new))
    given = {"epochs": None, "batch_size": None, "learning_rate": None}
    with pytest.raises(ValueError, match=f"`output`.*{said}"):
        run(tmp_path, preset=masked_lm, **(given | option))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"batch_size": 65},  # there are 64 examples
        {"max_length": 3},
        {"max_length": 513},
        {"max_length": 8.5},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": 2**32},
        {"max_examples": 32.5},
        {"max_examples": 3},  # less than a batch
        {"dropout": 1.0},
        {"num_experts": 0},
        {"learning_rate": 0.0},
        {"task": "glue/colla"},
        {"train": "none"},
        {"train": "lora", "lora_rank": 0},
        {"model": "swich"},
        {"size": "smal"},
    ],
    ids=str,
)
def test_argument_out_of_range_is_refused(tmp_path, options):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"`{name}`.*{name}={value!r}"):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def assert_same_run(many, one):
    assert "val_moe_1/dropped" in one
    assert many.keys() == one.keys()
    for name in set(one) - {"seconds"}:
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.every_backend
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no engine for devices")
def test_devices_do_not_change_a_run(tmp_path):
    # `mix_layers` adds a weight to the head that is neither an expert's nor a kernel.
    options = {"max_examples": 16, "batch_size": 8, "dropout": 0.0, "mix_layers": True}
    one, many = (
        run(tmp_path / f"{mesh}", mesh=mesh, **options)["history"][0]
        for mesh in (None, {"data": 1, "experts": 4})
    )
    assert_same_run(many, one)


@pytest.mark.full
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no engine for devices")
def test_processes_do_not_change_a_run(tmp_path):
    """Two processes; on JAX each has two devices."""
    program = ("-m", "tests.zoo.finetuning.on_devices")
    mesh = {"data": 1, "experts": 4} if keras.backend.backend() == "jax" else {"experts": 2}
    (one,) = launched(*program, tmp_path / "one", "null")
    for process in launched(*program, tmp_path / "many", json.dumps(mesh), processes=2, devices=2):
        assert_same_run(process, one)
    for name in ("one", "many"):
        kept = {path.name for path in (tmp_path / name).iterdir()}
        assert kept == {"preset", "results.json"}


def test_partial_data_has_the_validation_splits_that_are_there(tmp_path, monkeypatch):
    splits = (("validation_matched",), ("train", "validation_matched"))
    monkeypatch.setattr(batches, "validation_splits", lambda task, data_dir: splits)
    results = run(tmp_path, "glue/mnli")
    assert results["partial"] == list(splits[1])
    (entry,) = results["history"]
    assert "val_accuracy" in entry and "validation_mismatched_accuracy" not in entry
