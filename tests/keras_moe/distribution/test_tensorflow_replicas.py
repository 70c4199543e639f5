"""Strategies of `tf.distribute`: two replicas of a model of the zoo against one, by `fit`."""

import contextlib

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's strategies", allow_module_level=True)

from tests.keras_moe.distribution.several import launched
from tests.keras_moe.distribution.tensorflow_replicas import trained

pytestmark = pytest.mark.every_backend


@pytest.fixture(scope="module")
def one():
    return trained(contextlib.nullcontext(), run_eagerly=True)


PROGRAM = ("-m", "tests.keras_moe.distribution.tensorflow_replicas")


def test_two_devices(one):
    """In another process: strategies and DTensor use the same keys for groups of devices."""
    (mirrored,) = launched(*PROGRAM, "mirrored")
    compare(mirrored, one)


@pytest.mark.full
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
