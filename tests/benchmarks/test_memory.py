import json
import sys

import keras
import pytest

from benchmarks import memory
from benchmarks.processes import measured

BACKEND = keras.backend.backend()
SIZES = ["--tokens", "64", "--width", "8", "--hidden", "16", "--experts", "2"]


def test_measures_one_layer():
    figures = measured("memory", BACKEND, [*SIZES, "--measure", "switch"])
    # Two experts of two 8 x 16 kernels, an 8 x 2 router, a norm of 8; four float32 of each.
    assert figures["weights"] == pytest.approx((2 * 2 * 8 * 16 + 8 * 2 + 8) * 4 * 4 / 2**20)
    assert figures["peak"] > 0


def test_compares_with_the_dense_layer(monkeypatch, tmp_path, capsys):
    # Beyond the weights: dense 100, Switch 130; dense of top-2 200, top-2 250.
    figures = {
        "dense": {"peak": 110, "weights": 10},
        "switch": {"peak": 210, "weights": 80},
        "expert choice": {"peak": 180, "weights": 80},
        "dense of top-2": {"peak": 220, "weights": 20},
        "top-2": {"peak": 330, "weights": 80},
        "weights alone": {"peak": 100, "weights": 80},
    }
    monkeypatch.setattr(memory, "measured", lambda module, backend, given: figures[given[-1]])
    monkeypatch.setattr(sys, "argv", ["", *SIZES, "--backend", "jax", "--into", str(tmp_path)])
    memory.main()
    printed = capsys.readouterr().out
    assert "| dense | 110 | 10 | 1.00 | 1.00 |" in printed
    assert "| switch | 210 | 80 | 1.30 | 1.10 |" in printed
    assert "| top-2 | 330 | 80 | 1.25 | 1.15 |" in printed
    results = json.loads((tmp_path / "memory.json").read_text())
    assert results["sizes"] == {"tokens": 64, "width": 8, "hidden": 16, "experts": 2}
    assert results["backends"]["jax"]["mebibytes"] == figures
