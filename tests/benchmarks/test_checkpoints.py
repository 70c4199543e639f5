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
        seen_by = time.monotonic() + 20  # the thread that looks may have to wait for a core
        while peak.bytes < array.nbytes // 2 and time.monotonic() < seen_by:
            time.sleep(0.01)
        del array
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
