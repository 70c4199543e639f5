"""One scenario by hand, and the property that dispatch and combine are transposes."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import slots
from keras_moe.dispatch import combine, dispatch
from keras_moe.routing import Routing, seat_choices
from tests.backend import compiled, gradients, numpy

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor


def token_choice(expert_index, weight, num_experts, capacity):
    expert_index, weight = tensor(expert_index, "int32"), tensor(weight, "float32")
    seats = seat_choices(expert_index, weight, num_experts, capacity)
    return Routing(*seats, expert_index, None, None, None)


def expert_choice(token_index, weight):
    token_index, weight = tensor(token_index, "int32"), tensor(weight, "float32")
    return Routing(token_index, weight, None, None, None, None, None, None)


# Two groups of three tokens, worth 1 2 3 and 4 5 6, two experts, two choices each; 2 is padding.
#   group 0: token 0 -> experts 0, 1; token 1 -> 0, 1; token 2 -> 0, 1
#   group 1: token 0 -> experts 1, 0; token 1 -> nobody (padding); token 2 -> 1, 0
X = np.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]], "float32")
CHOICES = [[[0, 1], [0, 1], [0, 1]], [[1, 0], [2, 2], [1, 0]]]
WEIGHTS = [[[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]], [[0.5, 0.25], [0.0, 0.0], [1.0, 0.5]]]


class TestTokenChoice:
    def test_with_capacity(self):
        routing = token_choice(CHOICES, WEIGHTS, num_experts=2, capacity=2)
        # Row e: group 0's two slots, then group 1's. Token 2 of group 0 finds both experts full.
        filled = numpy(dispatch(tensor(X), routing))
        assert filled[..., 0].tolist() == [[1, 2, 4, 6], [1, 2, 4, 6]]
        # Expert 0 multiplies by 10, expert 1 by 100:
        #   1 * (.75 * 10 + .25 * 100) = 32.5    2 * (.5 * 10 + .5 * 100) = 110      dropped: 0
        #   4 * (.5 * 100 + .25 * 10) = 210      padding: 0                6 * (100 + 5) = 630
        outputs = tensor(filled * np.array([10.0, 100.0], "float32")[:, None, None])
        y = numpy(combine(outputs, routing, 2, 3))
        assert y[..., 0].tolist() == [[32.5, 110, 0], [210, 0, 630]]

    def test_dropless(self):
        routing = token_choice(CHOICES, WEIGHTS, num_experts=2, capacity=None)
        filled = numpy(dispatch(tensor(X), routing))
        scale = np.array([10.0, 100.0, 0.0], "float32")[numpy(routing.row_expert)]
        y = numpy(combine(tensor(filled * scale[:, None, None]), routing, 2, 3))
        # As above, and token 2 of group 0 is served: 3 * (.5 * 10 + .5 * 100) = 165
        assert y[..., 0].tolist() == [[32.5, 110, 165], [210, 0, 630]]

    def test_other_width_comes_back(self):
        routing = token_choice(CHOICES, WEIGHTS, num_experts=2, capacity=2)
        y = combine(ops.ones((2, 4, 5)), routing, 2, 3)
        assert tuple(y.shape) == (2, 3, 5)


def test_expert_choice():
    # Two experts with two slots each: token 1 sits twice, token 2 nowhere; 3 is an empty slot.
    routing = expert_choice([[[1, 0], [1, 3]]], [[[0.5, 0.25], [1.0, 0.0]]])
    filled = numpy(dispatch(tensor(X[:1]), routing))
    assert filled[..., 0].tolist() == [[2, 1], [2, 0]]
    # 1 * .25 * 10 = 2.5    2 * (.5 * 10 + 1 * 100) = 210
    outputs = tensor(filled * np.array([10.0, 100.0], "float32")[:, None, None])
    assert numpy(combine(outputs, routing, 1, 3))[..., 0].tolist() == [[2.5, 210, 0]]


def random_routing(kind, seed):
    """Of 2 groups of 5 tokens to 3 experts, with padding; always of the same shapes."""
    rng = np.random.default_rng(seed)
    if kind == "expert choice":
        score, mask = rng.random((2, 5, 3)).astype("float32"), rng.random((2, 5)) < 0.7
        return expert_choice(*slots.by_score(tensor(score), 3, tensor(mask)))
    choices = np.argsort(rng.random((2, 5, 3)), axis=-1)[..., :2]
    choices = np.where(rng.random((2, 5, 1)) < 0.2, 3, choices)
    capacity = 2 if kind == "capacity" else None
    return token_choice(choices, rng.random((2, 5, 2)), 3, capacity)


KINDS = pytest.mark.parametrize("kind", ["capacity", "dropless", "expert choice"])


@KINDS
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_combine_is_the_transpose_of_dispatch(kind, seed):
    """`<dispatch(x) * weight, s> = <x, combine(s)>` for every routing, x and s."""
    routing = random_routing(kind, seed)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    filled = numpy(dispatch(tensor(x), routing))
    s = rng.normal(size=filled.shape).astype("float32")
    weight = numpy(ops.reshape(ops.transpose(routing.weight, (1, 0, 2)), filled.shape[:2]))
    left = np.sum(filled * weight[..., None] * s)
    right = np.sum(x * numpy(combine(tensor(s), routing, 2, 5)))
    assert left == pytest.approx(right, rel=1e-5, abs=1e-5)


@KINDS
def test_gradients_are_those_of_the_sums(kind):
    """Each is linear: its gradient at cotangent c, against a direction v, is `<f(v), c>`."""
    routing = random_routing(kind, seed=0)
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 2, 5, 4)).astype("float32")
    filled = numpy(dispatch(tensor(v), routing))
    c = rng.normal(size=filled.shape).astype("float32")
    there = keras.layers.Lambda(lambda x: dispatch(x, routing))
    there.build(x.shape)
    by_x, _ = gradients(there, x, c)
    assert np.sum(by_x * v) == pytest.approx(np.sum(filled * c), rel=1e-5, abs=1e-5)

    s, v = rng.normal(size=(2, *filled.shape)).astype("float32")
    c = rng.normal(size=x.shape).astype("float32")
    back = keras.layers.Lambda(lambda s: combine(s, routing, 2, 5))
    back.build(s.shape)
    by_s, _ = gradients(back, s, c)
    expected = np.sum(numpy(combine(tensor(v), routing, 2, 5)) * c)
    assert np.sum(by_s * v) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@KINDS
def test_gradient_of_weights_is_that_of_the_sum(kind):
    routing = random_routing(kind, seed=0)
    rng = np.random.default_rng(0)
    weight, v = rng.normal(size=(2, *routing.weight.shape)).astype("float32")
    outputs = rng.normal(size=dispatch(ops.zeros((2, 5, 4)), routing).shape).astype("float32")
    c = rng.normal(size=(2, 5, 4)).astype("float32")

    def combined(weight):
        return combine(tensor(outputs), routing._replace(weight=weight), 2, 5)

    layer = keras.layers.Lambda(combined)
    layer.build(weight.shape)
    by_weight, _ = gradients(layer, weight, c)
    expected = np.sum(numpy(combined(tensor(v))) * c)
    assert np.sum(by_weight * v) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@KINDS
def test_bfloat16_tokens_stay_bfloat16(kind):
    routing = random_routing(kind, seed=0)
    filled = dispatch(ops.ones((2, 5, 4), "bfloat16"), routing)
    y = combine(filled, routing, 2, 5)
    assert [ops.dtype(t) for t in (filled, y)] == ["bfloat16"] * 2


def test_compiles():
    routing = random_routing("capacity", seed=0)
    x = ops.ones((2, 5, 4))
    there_and_back = compiled(lambda x: combine(dispatch(x, routing), routing, 2, 5))
    np.testing.assert_allclose(
        numpy(there_and_back(x)), numpy(combine(dispatch(x, routing), routing, 2, 5)), rtol=1e-6
    )
