import json
import shutil
import sys
import threading

import keras
import numpy as np
import pytest

import zoo
from tests.backend import numpy
from tests.keras_moe.distribution.several import launched
from tests.zoo.kills import copied_after_epoch
from tests.zoo.traces import counted_traces
from zoo.models import builders
from zoo.pretraining import run as pretraining
from zoo.pretraining.run import pretrain

TINY = {
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "key_dim": 8,
    "intermediate_dim": 32,
}
QUICK = {
    "num_experts": 4,
    "steps": 6,
    "steps_per_save": 2,
    "batch_size": 4,
    "length": 16,
    "learning_rate": 0.05,
    "warmup_steps": 1,
    "window": 8,
    "heldout_batches": 2,
    "dropout": 0.1,
    "verbose": 0,
}


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builders.SIZES, "mini", {**builders.SIZES["mini"], **TINY})
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The words of a few colours and animals, 40 sentences to train on and 12 held out."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name, number in (("train", 40), ("heldout", 12)):
        colours = rng.choice(["red", "green", "blue"], (number, 3))
        lines = [f"the {a} dog sees the {b} cat and the {c} bird" for a, b, c in colours]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(text, output, **options):
    given = {"heldout": [text / "heldout.txt"], **QUICK, **options}
    if given.get("model") == "dense" and "num_experts" not in options:
        del given["num_experts"]
    return pretrain(given.pop("model", "switch"), [text / "train.txt"], output=output, **given)


@pytest.fixture(scope="module")
def counted(text, tmp_path_factory):
    """A run that nothing interrupted.

    Returns:
        Tuple of its results, its folder, a copy of its folder after its first epoch, and how often
        its step was traced.
    """
    output, killed = (tmp_path_factory.mktemp(name) / "run" for name in ("whole", "killed"))
    with counted_traces() as traces, copied_after_epoch(1, killed):
        results = run(text, output)
    return results, output, killed, len(traces)


@pytest.fixture(scope="module")
def whole(counted):
    """The results and the folder of that run."""
    return counted[:2]


@pytest.mark.every_backend
def test_step_is_traced_once(counted):
    assert counted[3] == (QUICK["steps"] if keras.backend.backend() == "torch" else 1)


@pytest.mark.every_backend
def test_results(whole):
    results, output = whole
    assert results == json.loads((output / "results.json").read_text())
    assert results["metrics"] == ["val_perplexity"]
    assert results["finished"] and [entry["epoch"] for entry in results["history"]] == [1, 2, 3]
    first, *_, last = results["history"]
    assert last["loss"] < first["loss"]
    for entry in results["history"]:
        for prefix in ("", "val_"):
            entropy, loss = entry[f"{prefix}cross_entropy"], entry[f"{prefix}loss"]
            assert entry[f"{prefix}perplexity"] == pytest.approx(np.exp(entropy))
            assert loss > entropy  # by the routers' loss
    assert results["best"] == last
    assert {path.name for path in output.iterdir()} == {"results.json", "preset"}


def test_the_preset_guesses_and_classifies(whole):
    """The backbone of both is the pretrained one."""
    guesser = zoo.from_preset(whole[1] / "preset")
    assert type(guesser) is zoo.EncoderMaskedLM
    classifier = zoo.from_preset(whole[1] / "preset", num_classes=2)
    assert type(classifier) is zoo.EncoderTextClassifier
    table = numpy(guesser.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(numpy(classifier.backbone.token_embedding.embeddings), table)
    assert classifier.predict(["a red dog", "a cat"], verbose=0).shape == (2, 2)
    tokenizer = guesser.preprocessor.tokenizer
    assert tokenizer.id_to_token(tokenizer.vocabulary_size() - 1) == "▁<extra_id_0>"


@pytest.mark.every_backend
def test_run_interrupted_twice_comes_to_the_same_end(counted, text, tmp_path, monkeypatch):
    """Within its second epoch, and while its preset is saved. All else is in test_runs.py."""
    whole, _, killed, _ = counted
    output = tmp_path / "run"
    shutil.copytree(killed, output)
    (output / "new-epoch-2.weights.h5").write_bytes(b"half")
    assert len(json.loads((output / "results.json").read_text())["history"]) == 1

    def save(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zoo.EncoderMaskedLM, "save_to_preset", save)
        run(text, output)
    assert len(json.loads((output / "results.json").read_text())["history"]) == 3
    resumed = run(text, output)
    assert resumed["finished"]
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        assert one["place"] == other["place"] and one.keys() == other.keys()
        for name in one.keys() - {"seconds", "place"}:
            assert other[name] == pytest.approx(one[name], abs=1e-4), (one["epoch"], name)


def test_a_finished_run_is_not_run_again_and_others_are_refused(
    whole, text, tmp_path, monkeypatch, capsys
):
    results, output = whole
    monkeypatch.setattr(pretraining, "_train", None)
    assert run(text, output) == results
    assert str(output) in capsys.readouterr().out
    with pytest.raises(ValueError, match="`output`.*seed=0.*seed=1"):
        run(text, output, seed=1)
    text_changed = tmp_path / "text"
    shutil.copytree(text, text_changed)
    assert run(text_changed, output) == results
    for name in ("heldout", "train"):
        with open(text_changed / f"{name}.txt", "a") as file:
            file.write("the end\n")
        with pytest.raises(ValueError, match=f"`output`.* {name}.txt="):
            run(text_changed, output)
    with pytest.raises(ValueError, match="`heldout`.*train.txt"):
        run(text, output, heldout=text / "*.txt")


@pytest.mark.parametrize(
    ("objective", "options", "task"),
    [
        ("span", {"model": "switch", "optimizer": "adafactor"}, "Seq2SeqLM"),
        pytest.param(
            "prefix",
            {"model": "expert_choice", "schedule": "inverse_sqrt"},
            "Seq2SeqLM",
        ),
        ("causal", {"model": "dense", "dtype": "mixed_bfloat16"}, "CausalLM"),
    ],
)
def test_other_objectives(text, tmp_path, objective, options, task):
    results = run(text, tmp_path, objective=objective, steps=2, **options)
    (entry,) = results["history"]
    assert np.isfinite(entry["val_perplexity"])
    # Both are means over the tokens that count, about a half of them of "prefix". The loss weighs
    # batches alike, and has the routers' losses.
    assert entry["val_loss"] > 0.9 * entry["val_cross_entropy"]
    only_of = {"density": ("span", 0.15), "mean_span": ("span", 3.0)}
    for name, (of, value) in only_of.items():
        assert results["settings"][name] == (value if objective == of else None)
    assert type(zoo.from_preset(tmp_path / "preset")).__name__ == task


def assert_same_history(many, one):
    for mine, its in zip(one, many, strict=True):
        assert its["place"] == mine["place"] and its.keys() == mine.keys()
        for name in ("loss", "val_loss", "accuracy", "moe_2/dropped"):
            assert its[name] == pytest.approx(mine[name], abs=1e-4), name


@pytest.mark.every_backend
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no engine for devices")
def test_devices_do_not_change_a_run(text, tmp_path):
    one, many = (
        run(text, tmp_path / f"{mesh}", dropout=0.0, mesh=mesh)["history"]
        for mesh in (None, {"data": 1, "experts": 2, "model": 2})
    )
    assert_same_history(many, one)


@pytest.mark.full
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch has no engine for devices")
def test_processes_do_not_change_a_run(text, tmp_path):
    """Two processes; on JAX each has two devices."""
    program = ("-m", "tests.zoo.pretraining.on_devices", text)
    mesh = {"data": 2, "experts": 2} if keras.backend.backend() == "jax" else {"experts": 2}
    (one,) = launched(*program, tmp_path / "one", "null")
    for process in launched(*program, tmp_path / "many", json.dumps(mesh), processes=2, devices=2):
        assert_same_history(process, one)


def test_gradients_are_accumulated_and_losses_weighted(text, tmp_path, capsys):
    options = {"accumulate": 2, "router_z_weight": 0.5, "heldout": (), "steps": 2}
    results = run(text, tmp_path, **options, verbose=2)
    assert " perplexity: " in capsys.readouterr().out
    assert results["metrics"] == ["loss"]
    (entry,) = results["history"]
    # An untrained router's logits make about log(4)^2 = 1.9 of z-loss, half of it.
    assert 0.5 < entry["loss"] - entry["cross_entropy"] < 1.5
    assert not any(name.startswith("val_") for name in entry)


def test_loss_that_is_not_finite_stops_the_run(whole, text, tmp_path, monkeypatch):
    """Also its thread that makes batches. Until then it is the same as the run of one seed."""
    feeds = [thread for thread in threading.enumerate() if thread.name == "feed"]

    def batches(self, place=None, original=pretraining.Blocks.batches):
        is_heldout = self.batch_size == 1
        for number, (batch, after) in enumerate(original(self, place)):
            x, labels, weight = batch
            yield (x, labels, weight * (np.nan if number == 3 and not is_heldout else 1)), after

    monkeypatch.setattr(pretraining.Blocks, "batches", batches)
    with pytest.raises(FloatingPointError, match="nan at step 4; .* step 2"):
        run(text, tmp_path)
    assert [thread for thread in threading.enumerate() if thread.name == "feed"] == feeds
    (entry,) = json.loads((tmp_path / "results.json").read_text())["history"]
    for name in entry.keys() - {"seconds", "place"}:
        assert entry[name] == pytest.approx(whole[0]["history"][0][name], abs=1e-5), name


def test_logs_for_tensorboard(text, tmp_path, monkeypatch):
    (tmp_path / "tensorboard" / "thrown away").mkdir(parents=True)
    (tmp_path / "tensorboard" / "thrown away" / "events").write_text("of an earlier run")
    whole = run(text, tmp_path, tensorboard=True, steps=2, restart=True)
    logs = [path for path in (tmp_path / "tensorboard").rglob("*") if path.is_file()]
    assert {path.parent.name for path in logs} == {"train", "validation"} and whole["finished"]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"keras-moe\[tensorboard\]"):
        run(text, tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "swich"}, "`model`.*'swich'"),
        ({"objective": "mask"}, "`objective`.*'mask'"),
        ({"optimizer": "sgd"}, "`optimizer`.*'sgd'"),
        ({"schedule": "x"}, "`schedule`.*'x'"),
        ({"dtype": "float16"}, "`dtype`.*'float16'"),
        ({"steps": 5}, "`steps_per_save`.*5.*steps_per_save=2"),
        ({"length": 4}, "`length`.*length=4"),
        ({"learning_rate": 0}, "`learning_rate`.*learning_rate=0"),
        ({"clip": -1}, "`clip`.*clip=-1"),
        ({"router_z_weight": -1}, "`router_z_weight`.*router_z_weight=-1"),
        ({"dropout": 1}, "`dropout`.*dropout=1"),
        ({"residual_scale": 0}, "`residual_scale`.*residual_scale=0"),
        ({"window": 10}, "`window`.*window=10"),
        ({"heldout": ["nothing.txt"]}, "`heldout`.*nothing.txt"),
        ({"heldout_batches": 1, "batch_size": 80, "window": 80}, "`heldout`.*80.*heldout.txt"),
        ({"density": 0}, "`density`.*density=0"),
        ({"objective": "span", "mean_span": 0}, "`mean_span`.*mean_span=0"),
        ({"accumulate": 0}, "`accumulate`.*accumulate=0"),
        ({"accumulate": 4}, "`accumulate`.*accumulate=4"),  # of 6 steps
        ({"warmup_steps": 6}, "`warmup_steps`.*warmup_steps=6"),
        ({"seed": -1}, "`seed`.*seed=-1"),
        ({"num_experts": 0}, "`num_experts`.*num_experts=0"),
        ({"capacity_factor": 0}, "`capacity_factor`.*capacity_factor=0"),
        (
            {"model": "expert_choice", "capacity_factor": None},
            "`capacity_factor`.*capacity_factor=None",
        ),
        ({"model": "dense", "num_experts": 4}, "`num_experts`.*num_experts=4"),
    ],
    ids=str,
)
def test_argument_out_of_range_is_refused(text, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
