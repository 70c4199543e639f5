"""A floor and a part are only that if they do what they are named for."""

import numpy as np
import pytest
from keras import ops

import keras_moe
from benchmarks import contestants as c

X = np.random.default_rng(0).normal(size=(4, 16, 8)).astype("float32")


@pytest.mark.parametrize("dropless", [False, True])
def test_bare_products_are_the_experts_of_their_slots(dropless):
    layer = c.Bare(4, 16, False, dropless)
    y = ops.convert_to_numpy(layer(X)).reshape(4, 16, 8)
    expected = ops.convert_to_numpy(layer.experts(X.reshape(4, 16, 8)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_without_experts_a_dropless_layer_returns_its_inputs():
    layer = c.mixture(c.NoExperts(4), keras_moe.TopKRouter(2))  # weights that sum to one
    np.testing.assert_allclose(ops.convert_to_numpy(layer(X)), X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_metrics", [False, True])
def test_routing_has_the_layers_loss_and_leaves_the_tokens(with_metrics):
    layer = c.Routing(keras_moe.TopKRouter(2, seed=0), 4, with_metrics)
    y = ops.convert_to_numpy(layer(X))
    np.testing.assert_array_equal(y, X)
    routing = layer.router(X.reshape(1, -1, 8), compact=True)
    (loss,) = layer.router.auxiliary_losses(routing)
    # Each thing that the routing made adds a billionth of its mean: below 1e-9 * 64.
    assert len(layer.losses) == (6 if with_metrics else 4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(sum(layer.losses)), ops.convert_to_numpy(loss), atol=1e-6
    )


def test_dense_is_as_wide_as_it_is_told():
    layer = c.Dense(16, True)
    layer.build(X.shape)
    assert [tuple(v.shape) for v in layer.trainable_variables] == [(8, 16), (8, 16), (16, 8)]
    assert layer(X).shape == X.shape
