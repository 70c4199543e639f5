"""Strategies of `tf.distribute`: two replicas against one, of one process or two, by `fit`."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.keras_moe.distribution.several import launched

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's strategies", allow_module_level=True)

PROGRAM = ("-m", "tests.keras_moe.distribution.tensorflow_replicas")


def ran(kind):
    """What `tensorflow_replicas.py` prints under a strategy."""
    command = [sys.executable, *PROGRAM, kind]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one():
    return ran("one")


def test_two_devices(one):
    compare(ran("mirrored"), one)


def test_two_processes(one):
    for process in launched(*PROGRAM, "workers", processes=2):
        compare(process, one)


def compare(two, one):
    for name in ("losses", "evaluated", "threshold"):
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    # Logits of single texts, up to 3, after six long steps; neighbours differ by ones.
    np.testing.assert_allclose(two["predicted"], one["predicted"], rtol=0, atol=1e-3)
    assert two["tokens"] == one["tokens"]
    calls, tokens = one["totals"][:2]
    assert (calls, tokens) == (6, 6 * 16 * 8)
    assert two["totals"][:2] == [2 * calls, tokens]  # a step is a call of each replica
