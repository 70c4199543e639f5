"""It measures whom it says and writes it down; figures at these sizes mean nothing."""

import json
import pathlib
import re
import subprocess
import sys

import keras
import pytest

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[2]
SIZES = ["--tokens", "64", "--width", "8", "--hidden", "8", "--experts", "2", "4", "--rounds", "1"]

PARTS = ("frame", "bare", "frame of bare", "routing", "routing and metrics", "no experts")
CONTESTANTS = {
    "step": [
        *("dense", "dense of top-1", "switch, bare", "top-1, bare"),
        *("switch", "expert choice", "top-1"),
    ],
    "parts": [
        *("switch", *(f"switch, {part}" for part in PARTS)),
        *("top-1", *(f"top-1, {part}" for part in PARTS)),
    ],
    "peers": [
        *("dense of top-2, gated", "dense", "top-2, gated", "switch"),
        *("KerasHub Mixtral", "one-hot Switch"),
    ],
    "generation": [
        *("dense, batch of 1", "switch, batch of 1", "dense, batch of 64", "switch, batch of 64"),
    ],
}
TORCH_PEERS = [
    "transformers Mixtral, grouped_mm",
    "transformers Mixtral, eager",
    "transformers Switch",
]


def layer(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "suite",
    [
        "peers",  # the layers, and whom they are measured against
        *(pytest.param(suite) for suite in CONTESTANTS if suite != "peers"),
    ],
)
def test_measures_every_contestant(suite, tmp_path):
    run = layer(suite, *SIZES, "--k", "1", "--backend", BACKEND, "--into", tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / f"{suite}.json").read_text())
    assert results["sizes"]["tokens"] == 64 and results["sizes"]["experts"] == [2, 4]
    figures = results["backends"][BACKEND]
    assert figures["rounds"] == 1 and set(figures["versions"]) == {"keras", BACKEND}
    peers = TORCH_PEERS if (suite, BACKEND) == ("peers", "torch") else []
    names = CONTESTANTS[suite] + peers
    assert list(figures["seconds"]) == [f"{name}/{n}" for n in (2, 4) for name in names]
    assert all(len(times) == 1 and times[0] > 0 for times in figures["seconds"].values())
    assert f"{suite}, {BACKEND}: " in run.stdout
    assert (tmp_path / "step.png").exists() == (suite == "step")


def test_unknown_suite():
    run = layer("speed")
    assert run.returncode == 2
    assert re.search("`suites`.*step, parts, peers, generation, gpu.*speed", run.stderr)
