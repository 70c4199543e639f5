"""Strategies of `tf.distribute`: two replicas of a model of the zoo against one, by `fit`."""

import contextlib

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's strategies", allow_module_level=True)

import tensorflow as tf

from tests.keras_moe.distribution.several import launched
from tests.keras_moe.distribution.tensorflow_replicas import trained

pytestmark = pytest.mark.every_backend


@pytest.fixture(scope="module")
def one():
    return trained(contextlib.nullcontext(), run_eagerly=True)


def test_two_devices(one):
    compare(trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()), one)


@pytest.mark.full
def test_two_processes(one):
    program = ("-m", "tests.keras_moe.distribution.tensorflow_replicas")
    for process in launched(*program, processes=2):
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
