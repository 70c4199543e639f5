"""What the tests of the routers share."""

import keras
import numpy as np
import pytest

from tests import oracle
from tests.backend import numpy, run


def with_identity(router, scale=1.0):
    """The router's logits are now its input."""
    router.build((None, None, router.num_experts))
    router.kernel.assign(scale * np.eye(router.num_experts))
    return router


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, "float32"))


# One group of four tokens and three experts; the order of preference of each token:
#   token 0: 0 1 2    token 1: 0 1 2    token 2: 0 2 1    token 3: 1 0 2
P = [[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1]]]


def random_weights(layer):
    """Draws every weight from a normal; returns them as float64 arrays by name."""
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return {v.name: numpy(v).astype("float64") for v in layer.trainable_variables}


def check_layer(layer, loop, x, weights, mask, compiles=True):
    """Compares a layer's outputs, losses and gradients with a float64 loop's.

    Args:
        layer: a built `MixtureOfExperts`.
        loop: function without arguments that computes outputs and the sum of the losses from `x`
            and `weights`.
        x: float64 array, the inputs.
        weights: dictionary of the float64 arrays of all weights.
        mask: booleans, or `None`.
        compiles: whether XLA compiles it on TensorFlow, which takes seconds; one case of each
            router should. JAX always compiles it, and is slower if it does not.
    """
    cotangent = np.random.default_rng(2).normal(size=x.shape)

    def loss():
        y, losses = loop()
        return np.sum(y * cotangent) + losses

    jit = compiles or keras.backend.backend() != "tensorflow"
    y, losses, by_x, by_weight = run(layer, x, cotangent, jit, mask=mask, training=True)
    expected, losses_expected = loop()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert losses == pytest.approx(losses_expected, rel=1e-5)
    slopes = oracle.gradient(loss, [x, *weights.values()])
    for ours, theirs in zip([by_x, *by_weight], slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
