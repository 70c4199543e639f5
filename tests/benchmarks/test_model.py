import argparse
import json
import sys

from benchmarks import model
from zoo.models import builders

NANO = {"num_layers": 2, "num_heads": 1, "hidden_dim": 8, "key_dim": 8, "intermediate_dim": 8}
SIZES = {"size": "nano", "experts": 2, "batch": 1, "length": 8}


def test_measures_every_model(monkeypatch):
    monkeypatch.setitem(builders.SIZES, "nano", NANO)
    seconds = model.measure(argparse.Namespace(**SIZES, rounds=1))
    models, figures = ("dense", "switch", "expert_choice"), ("step", "inference")
    assert list(seconds) == [f"{name} {what}" for name in models for what in figures]
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())


def test_compares_with_the_dense_twin(monkeypatch, tmp_path, capsys):
    seconds = {
        **{"dense step": [2.0], "switch step": [3.0], "expert_choice step": [2.5]},
        **{"dense inference": [1.0], "switch inference": [1.1], "expert_choice inference": [0.9]},
    }
    monkeypatch.setattr(model, "measured", lambda module, backend, given: seconds)
    given = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["", *given, "--backend", "jax", "--into", str(tmp_path)])
    model.main()
    printed = capsys.readouterr().out
    assert "| switch | 1.50 (1.50-1.50) | 1.10 (1.10-1.10) |" in printed
    assert "| expert_choice | 1.25 (1.25-1.25) | 0.90 (0.90-0.90) |" in printed
    results = json.loads((tmp_path / "model.json").read_text())
    assert results["sizes"] == SIZES and results["backends"]["jax"]["seconds"] == seconds
