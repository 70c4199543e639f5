"""The benchmark runs and writes what it says; its figures at these sizes mean nothing."""

import json
import pathlib
import subprocess
import sys

import keras
import pytest

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[2]
SIZES = ["--tokens", "64", "--width", "8", "--hidden", "8", "--experts", "2", "4", "--rounds", "1"]


@pytest.mark.parametrize("suite", ["step", "peers", "generation"])
def test_measures_every_contestant(suite, tmp_path):
    command = [sys.executable, "-m", "benchmarks.layer", suite, *SIZES]
    run = subprocess.run(
        [*command, "--backend", BACKEND, "--into", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / f"{suite}.json").read_text())
    seconds = results["seconds"][BACKEND]
    assert len(seconds) >= 8 and all(time > 0 for times in seconds.values() for time in times)
    assert f"{suite}, {BACKEND}: relative to the dense layer" in run.stdout
    assert (tmp_path / "step.png").exists() == (suite == "step")


def test_unknown_suite(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", "speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "`suites` must be of step, peers, generation, gpu. Received: speed" in run.stderr
