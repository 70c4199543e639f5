"""The byte model and its comparisons, on a small text of two words."""

import argparse
import gzip
import json
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("the experiments run on JAX", allow_module_level=True)

from benchmarks.papers import (
    balancing_2017,
    byte_model,
    capacity_2017,
    comparison,
    expert_choice_2022,
    experts_switch,
    switch_ablations,
)
from benchmarks.papers.runs import RESULTS, Runs

FIGURES = {"step_flops": 2.0, "step_seconds": 0.5, "parameters": 1000, "routing": {}}


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Words in an order that is not known, and a model small enough for them."""
    for name, value in {"LENGTH": 16, "BATCH": 4, "EVERY": 12, "EVALUATED": 8}.items():
        monkeypatch.setattr(byte_model, name, value)
    rng = np.random.default_rng(0)
    for part, documents in (("train", 8), ("heldout", 2)):
        with gzip.open(tmp_path / f"novels-{part}-00.jsonl.gz", "wt") as file:
            for _ in range(documents):
                words = " ".join(rng.choice(["ab", "cde"], 1200))
                file.write(json.dumps({"title": "", "text": words}) + "\n")
    return byte_model.Text(Path(tmp_path))


def test_text(text):
    assert text.train.shape[1] == 17 and text.evaluated["heldout"].shape == (8, 17)
    # Documents of 8 for training: 3 of them are for tuning, so 5 are left, of 1,200 words of 3.5
    # bytes with the space after them.
    assert abs(text.train.size / (5 * 1200 * 3.5) - 1) < 0.05

    x, y, weight = text.examples(text.train[:3], "next", seed=0)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert weight.min() == 1

    x, y, weight = text.examples(text.train, "masked", seed=0)
    np.testing.assert_array_equal(y, text.train[:, :-1])
    np.testing.assert_array_equal(x == 256, weight == 1)
    np.testing.assert_array_equal(x[weight == 0], y[weight == 0])
    assert abs(weight.mean() - 1 / 7) < 0.01


@pytest.mark.parametrize(
    ("settings", "watch", "seen"),
    [
        ({"kind": "dense"}, None, set()),
        (
            {"kind": "noisy", "experts": 8, "k": 2, "hidden": 8},
            balancing_2017.balance,
            {"cv_importance", "cv_load", "max_mean_load"},
        ),
        (
            {"kind": "expert_choice", "experts": 4, "capacity": 2.0, "objective": "masked"},
            expert_choice_2022.watch,
            {"experts_per_token", "nats_by_32", "nats_by_1"},
        ),
        ({"kind": "switch", "experts": 4, "precision": "bfloat16", "sequences": 50}, None, set()),
    ],
    ids=["dense", "noisy", "expert choice", "switch"],
)
def test_a_run(text, settings, watch, seen):
    run = {**settings, "learning_rate": 1e-2, "steps": 24, "seed": 0}
    result = byte_model.train(text, watch, **run)
    assert json.loads(json.dumps(result)) == result
    assert [step for step, _ in result["curve"]] == [12, 24]
    # From log(256) = 5.5 down to the bytes that occur: 6 of them are log(6) = 1.8 at most.
    assert result["loss"] == result["curve"][-1][1] < 3.5
    assert set(result) >= seen
    if settings["kind"] == "noisy":
        assert result["routing"]["dropped"] == 0 and result["cv_importance"] < 0.5
    if settings["kind"] == "expert_choice":
        shares = result["experts_per_token"]
        assert sum(shares) == pytest.approx(1)
        assert np.dot(shares, range(6)) == pytest.approx(2)  # 2 experts on average, 4 at most
        assert 0 < abs(result["nats_by_1"] - result["nats_by_32"]) < 0.5  # other tokens to choose


def test_text_is_not_repeated(text):
    with pytest.raises(ValueError, match="`steps`.*`sequences`.*steps=1000000"):
        byte_model.train(text, kind="dense", learning_rate=1e-2, steps=10**6, seed=0)


def test_little_text_is_seen_again_in_another_order(text):
    order, unseen = text.order(120, sequences=50, seed=0)
    assert len(order) == 120 and len(unseen) == 20 * byte_model.BATCH
    assert sorted(order[:50]) == sorted(order[50:100]) and set(order[100:]) <= set(order[:50])
    assert list(order[:50]) != list(order[50:100]) and not set(order) & set(unseen)
    once, _ = text.order(120, sequences=None, seed=0)
    assert len(set(once)) == 120


@pytest.mark.parametrize("precision", ["float32", "selective", "bfloat16"])
def test_precision(precision):
    model = byte_model.make_model({"kind": "switch", "experts": 4, "precision": precision})
    low = "float32" if precision == "float32" else "bfloat16"
    moe = model.get_layer("moe_0")
    assert moe.compute_dtype == low and model.output.dtype == "float32"
    routing = moe.router(np.random.default_rng(0).normal(size=(1, 64, 64)).astype("float32"))
    rounded = keras.ops.cast(keras.ops.cast(routing.logits, "bfloat16"), "float32")
    assert bool(keras.ops.all(routing.logits == rounded)) == (precision == "bfloat16")
    assert keras.config.dtype_policy().name == "float32"


def test_dropout():
    settings = {"kind": "switch", "experts": 4, "dropout": 0.1, "expert_dropout": 0.4}
    model = byte_model.make_model(settings)
    rates = [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    assert rates == [0.1] * 4 and model.get_layer("moe_1").experts.dropout == 0.4


def test_step_flops():
    # Per token and layer: attention 4*64*64 for the projections and 2*128*64 for the logits and the
    # sums, 32,768 in all; the logits of bytes 64*256 = 16,384; 6 operations each, 4,096 tokens.
    rest = 2 * 32768 + 16384
    for settings, feed_forward in (
        ({"kind": "dense", "hidden": 64}, 2 * 64 * 64),
        ({"kind": "switch", "hidden": 64, "experts": 4, "capacity": 1.25}, 1.25 * 8192 + 64 * 4),
        ({"kind": "noisy", "hidden": 16, "experts": 8, "k": 4}, 4 * 2048 + 2 * 64 * 8),
        ({"kind": "top_k", "hidden": 64, "experts": 4, "k": 2, "capacity": 2}, 2 * 8192 + 64 * 4),
        ({"kind": "top_k", "hidden": 64, "experts": 4, "k": 2, "capacity": 1}, 2 * 8192 + 64 * 4),
        ({"kind": "top_k", "hidden": 64, "experts": 4, "k": 2, "capacity": 0.5}, 8192 + 64 * 4),
        ({"kind": "expert_choice", "hidden": 64, "experts": 4, "capacity": 2}, 2 * 8192 + 64 * 4),
    ):
        assert byte_model.step_flops(settings) == 6 * 4096 * (rest + 2 * feed_forward)
    masked = {**settings, "objective": "masked"}  # with a convolution of width 3
    assert byte_model.step_flops(masked) - byte_model.step_flops(settings) == 6 * 4096 * 3 * 64**2


def made_up(text, watch, **settings):
    """A result with all that the experiments ask for."""
    return {
        **FIGURES,
        "loss": 1.0,
        "curve": [[settings["steps"], 1.0]],
        "routing_of_all": {},
        **dict.fromkeys(("cv_importance", "cv_load", "max_mean_load"), 1.0),
        **dict.fromkeys(("nats_by_32", "nats_by_1"), 1.0),
        "experts_per_token": [0.5, 0.5, 0, 0, 0, 0],
    }


@pytest.mark.parametrize(
    ("experiment", "train"),
    [
        (balancing_2017, made_up),
        (capacity_2017, None),
        (experts_switch, made_up),
        (expert_choice_2022, made_up),
        (switch_ablations, made_up),
    ],
    ids=["balancing", "capacity, its dense runs", "experts", "expert choice", "ablations"],
)
def test_quick(experiment, train, text, tmp_path, monkeypatch, capsys):
    """The whole of an experiment; the second time it only reads."""
    name = experiment.__name__.rpartition(".")[2]
    if train is None:
        monkeypatch.setitem(comparison.QUICK, "steps", 2)
        names = ("dense", "dense, parameters of 64 experts")
        contestants = {each: experiment.CONTESTANTS[each] for each in names}
        monkeypatch.setattr(experiment, "CONTESTANTS", contestants)
    else:
        monkeypatch.setattr(byte_model, "train", train)
    arguments = ["--quick", "--data", str(tmp_path), "--into", str(tmp_path / "results")]
    experiment.main(arguments)
    first = capsys.readouterr().out
    studies = getattr(experiment, "STUDIES", None) or {"": experiment.CONTESTANTS}
    for contestants in studies.values():
        names = list(contestants)[: 2 if experiment is switch_ablations else None]
        assert all(f"| {each} |" in first for each in names)
    figure = tmp_path / "results" / f"{name}.png"
    figure.unlink()

    def fail(*arguments, **settings):
        raise AssertionError("it ran again")

    monkeypatch.setattr(byte_model, "train", fail)
    experiment.main(arguments)
    assert capsys.readouterr().out == first and figure.stat().st_size > 0


PAGE = Path(comparison.__file__).with_name("README.md").read_text()


@pytest.mark.parametrize(
    ("experiment", "base", "shares", "own"),
    [
        (balancing_2017, "importance 0.1, load 0.1", (), [balancing_2017.table]),
        (capacity_2017, "dense", ("experts_switch",), []),
        (experts_switch, "dense", (), []),
        (
            expert_choice_2022,
            "top-2",
            (),
            [expert_choice_2022.table, expert_choice_2022.table_of_sizes],
        ),
        (switch_ablations, None, (), []),
    ],
    ids=["balancing", "capacity", "experts", "expert choice", "ablations"],
)
def test_the_page_has_the_tables_of_the_kept_runs(experiment, base, shares, own):
    name = experiment.__name__.rpartition(".")[2]
    runs = Runs(RESULTS / f"{name}.jsonl", [RESULTS / f"{other}.jsonl" for other in shares])
    if name == "switch_ablations":
        full = argparse.Namespace(quick=False)
        studies = [
            (each, experiment.protocol_of(study, full), next(iter(each)))
            for study, each in experiment.STUDIES.items()
        ]
    else:
        studies = [(experiment.CONTESTANTS, getattr(experiment, "FULL", comparison.FULL), base)]
    for contestants, protocol, base in studies:
        results = comparison.compare(runs, None, contestants, protocol)
        assert comparison.table(results, base) in PAGE
        assert comparison.tuning_table(runs, None, contestants, protocol) in PAGE
        assert all(table(results) in PAGE for table in own)


def test_seconds_of_steps(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        experts_switch, "CONTESTANTS", {"A": {"kind": "dense"}, "B": {"kind": "dense"}}
    )
    arguments = ["--time", "--data", str(tmp_path), "--into", str(tmp_path)]
    with pytest.raises(SystemExit):
        experts_switch.main(arguments)
    seconds = json.loads((tmp_path / "experts_switch.seconds.json").read_text())
    assert list(seconds) == ["A", "B"] and all(len(each) == 5 for each in seconds.values())
    assert min(seconds["A"] + seconds["B"]) > 0


def test_steps_to_a_loss():
    curve = [[10, 3.0], [20, 2.0], [30, 1.0]]
    assert comparison.steps_to(curve, 1.5) == 25  # halfway from 2 to 1
    assert comparison.steps_to(curve, 3.5) == 10
    assert comparison.steps_to(curve, 0.5) == np.inf


def test_speed_ups():
    base = {**FIGURES, "curve": [[10, 2.0], [20, 1.0]], "loss": 1.0}
    fast = {**FIGURES, "curve": [[10, 1.0], [20, 0.5]], "loss": 0.5, "step_flops": 4.0}
    fast["step_seconds"] = 0.25
    # 20 steps to 10; each twice the FLOPs, half the seconds.
    assert comparison.speed_ups(fast, base) == {"steps": 2.0, "FLOPs": 1.0, "seconds": 4.0}
    assert comparison.speed_ups(base, fast)["steps"] == 0


def test_speed_ups_of_runs_that_got_there():
    assert comparison.times([2.0, 1.0]) == "1.50 ± 0.71"
    assert comparison.times([2.0, 0.0, 1.0]) == "1.50 ± 0.71 (2 of 3)"
    assert comparison.times([0.0, 2.0]) == "2.00 (1 of 2)"
    assert comparison.times([0.0, 0.0]) == "never"


def test_every_contestant_is_tuned_and_run_with_every_seed(tmp_path):
    """Made-up runs: the loss is lowest at the rate 0.2, and 0.3 for the other contestant."""

    def train(kind, learning_rate, seed, steps, split="heldout"):
        best = {"a": 0.2, "b": 0.3}[kind]
        loss = 1 + abs(learning_rate - best) + 0.01 * seed * (split == "heldout")
        return {**FIGURES, "loss": loss, "curve": [[steps // 2, 2 * loss], [steps, loss]]}

    runs = Runs(tmp_path / "runs.jsonl")
    protocol = {"steps": 8, "tuning_steps": 4, "learning_rates": (0.1, 0.2, 0.3), "seeds": 2}
    contestants = {"A": {"kind": "a"}, "B": {"kind": "b"}}
    results = comparison.compare(runs, train, contestants, protocol)
    assert [r["learning_rate"] for r in results["A"] + results["B"]] == [0.2, 0.2, 0.3, 0.3]
    np.testing.assert_allclose([r["loss"] for r in results["A"]], [1, 1.01])
    assert len(runs.results) == 2 * 3 + 2 * 2

    lines = comparison.table(results, "A").splitlines()
    expected = "| A | 1k | 1.00 | 0.2 | 1.005 ± 0.007 | 2.73 ± 0.02 | 1.00 ± 0.00 | 1.00 ± 0.00 |"
    assert lines[2].startswith(expected)
    lines = comparison.tuning_table(runs, train, contestants, protocol).splitlines()
    assert lines[3] == "| A | 1.100 | **1.000** | 1.100 |"
    comparison.draw(results, tmp_path / "curves.png", experts={"A": None, "B": 4})
    assert (tmp_path / "curves.png").stat().st_size > 0

    (tmp_path / "runs.seconds.json").write_text(json.dumps({"A": [0.1, 0.3, 0.2]}))
    timed = comparison.compare(runs, train, contestants, protocol)
    assert [timed[name][0]["step_seconds"] for name in "AB"] == [0.2, FIGURES["step_seconds"]]


def test_ablations_are_drawn(tmp_path):
    result = {**FIGURES, "loss": 1.0, "curve": [[4, 2.0], [8, 1.0]]}
    results = {
        study: {name: [result, result] for name in contestants}
        for study, contestants in switch_ablations.STUDIES.items()
    }
    switch_ablations.draw(results, tmp_path / "studies.png")
    assert (tmp_path / "studies.png").stat().st_size > 0
    names = [name for contestants in switch_ablations.STUDIES.values() for name in contestants]
    assert len(set(names)) == len(names)
    for contestants in switch_ablations.STUDIES.values():
        for settings in contestants.values():
            assert set(settings) <= {*byte_model.DEFAULTS, "kind"}
