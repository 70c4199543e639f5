import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.py"))
MANY = next(path for path in TUTORIALS if path.stem == "many_devices")


@pytest.mark.parametrize("path", [p for p in TUTORIALS if p != MANY], ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    if path.stem == "sparse_layers":
        for model in ("switch", "choice"):
            assert names[model].history.history["val_accuracy"][-1] > 0.9
        assert "difference after loading: 0.0" in capsys.readouterr().out


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras shares nothing there")
def test_many_devices(tmp_path):
    """In a process of its own, since backends count their devices when they start."""
    environment = {**os.environ, "PYTHONPATH": str(MANY.parents[1])}
    done = subprocess.run(
        [sys.executable, str(MANY)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alone, together, *table = done.stdout.splitlines()
    for one, many in zip(alone.split()[-3:], together.split()[-3:], strict=True):
        assert abs(float(one) - float(many)) < 2e-4
    kernel = next(line for line in table if line.startswith("mixture/experts/kernel_in"))
    assert kernel.split()[-1] == f"{8 * 32 * 128 * 4 // 4:,}"


def test_there_are_tutorials():
    assert TUTORIALS
