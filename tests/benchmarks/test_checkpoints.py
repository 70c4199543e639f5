import argparse
import json
import sys
import time

import numpy as np

from benchmarks import checkpoints

NANO = {"d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 1, "num_experts": 2}


def test_loads_and_generates_what_transformers_made(tmp_path):
    options = argparse.Namespace(**NANO, tokens=5, rounds=2, folder=tmp_path)
    checkpoints.make(options)
    written = (tmp_path / "config.json").stat().st_mtime_ns
    figures = checkpoints.measure(options)
    assert figures["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    for name in ("read", "load", "transformers", "ours"):
        assert len(figures[name]) == 2 and min(figures[name]) > 0
    checkpoints.make(options)
    assert (tmp_path / "config.json").stat().st_mtime_ns == written
    checkpoints.make(argparse.Namespace(**{**vars(options), "num_experts": 3}))
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 3


def test_peak_of_memory():
    with checkpoints.Peak() as peak:
        array = np.ones(2**24)  # 128 MiB
        time.sleep(0.1)
        del array
        time.sleep(0.1)
    assert 0.9 * 2**27 < peak.bytes < 1.5 * 2**27


def test_table(monkeypatch, tmp_path, capsys):
    seconds = {"read": [1.0], "load": [1.5], "transformers": [4.0], "ours": [2.0]}
    figures = {"bytes": 100, "memory": 110, **seconds}
    monkeypatch.setattr(checkpoints, "make", lambda options: None)
    monkeypatch.setattr(checkpoints, "measured", lambda module, backend, given: figures)
    monkeypatch.setattr(sys, "argv", ["", "--backend", "jax", "--into", str(tmp_path)])
    checkpoints.main()
    line = "| jax | 1.50 (1.50-1.50) | 1.10 | 0.50 (0.50-0.50) |"
    assert line in capsys.readouterr().out
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    assert results["backends"]["jax"]["load"] == [1.5]
