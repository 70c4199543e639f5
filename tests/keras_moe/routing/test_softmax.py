import keras
import numpy as np
import pytest

from keras_moe import FeedForwardExperts, MixtureOfExperts, SoftmaxRouter
from tests import oracle
from tests.backend import numpy
from tests.keras_moe.routing.examples import (
    P,
    check_layer,
    logits_of,
    random_weights,
    with_identity,
)

pytestmark = pytest.mark.every_backend

E, D, F = 4, 3, 5
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("group", ["sequence", "batch", 5])
def test_is_the_weighted_sum_of_all_experts(group, mask):
    layer = MixtureOfExperts(FeedForwardExperts(E, F), SoftmaxRouter(router_z_weight=0.5), group)
    layer.build((None, None, D))
    weights, x = random_weights(layer), X.copy()
    valid = np.ones((2, 6), bool) if mask is None else mask

    def loop():
        logits = x @ weights["kernel"]
        gates = oracle.softmax(logits) * valid[..., None]
        y = oracle.mixture(x, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        return y, 0.5 * oracle.router_z(logits, valid)

    check_layer(layer, loop, x, weights, mask, compiles=group == 5)


def test_every_expert_sees_every_token_in_order():
    routing = numpy(with_identity(SoftmaxRouter(3))(logits_of(P)))
    assert routing.token_index.tolist() == [[[0, 1, 2, 3]] * 3]
    np.testing.assert_allclose(routing.weight, np.swapaxes(P, 1, 2), rtol=1e-6)
    assert routing.row_expert is None


def test_padding_takes_no_slot():
    mask = np.array([[True, False, True, True]])
    routing = numpy(with_identity(SoftmaxRouter(3))(logits_of(P), mask=mask))
    assert routing.token_index.tolist() == [[[0, 4, 2, 3]] * 3]  # 4: empty
    assert routing.expert_index[0, 1].tolist() == [3, 3, 3]  # 3 = E: padding
    assert (routing.weight[0, :, 1] == 0).all()


def test_starts_with_equal_proportions():
    routing = numpy(SoftmaxRouter(4)(np.ones((1, 2, D), "float32")))
    np.testing.assert_allclose(routing.probabilities, np.full((1, 2, 4), 0.25))


def test_config_round_trip():
    arguments = {"num_experts": 4, "jitter": 0.125, "router_z_weight": 0.25, "seed": 7}
    made = SoftmaxRouter(**arguments, kernel_initializer="ones", name="mine")
    copy = SoftmaxRouter.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert isinstance(copy.kernel_initializer, keras.initializers.Ones)
    for name, value in arguments.items():
        assert getattr(copy, name) == value
