"""What backends do with functions, done with MoE layers: derivatives of all kinds, maps, exports.

Every transformation is held against a plain call or a plain gradient of the same layer.
"""

import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from tests.backend import numpy

pytestmark = pytest.mark.every_backend

BACKEND = keras.backend.backend()
GROUPS, TOKENS, DIM, EXPERTS = 3, 4, 8, 4
SHAPE = (GROUPS, TOKENS, DIM)
RNG = np.random.default_rng(0)
X, V, U = (RNG.normal(size=SHAPE).astype("float32") for _ in range(3))

DROPPING = {"capacity_factor": 0.75, "eval_capacity_factor": 0.75, "min_capacity": 1}
ROUTERS = {
    "SwitchRouter": keras_moe.SwitchRouter,
    "TopKRouter": lambda: keras_moe.TopKRouter(2),
    "TopKRouter with a capacity": lambda: keras_moe.TopKRouter(2, **DROPPING),
    "ExpertChoiceRouter": keras_moe.ExpertChoiceRouter,
    "ExpertChoiceRouter with a cap": lambda: keras_moe.ExpertChoiceRouter(max_experts_per_token=2),
    "SoftmaxRouter": keras_moe.SoftmaxRouter,
    "NoisyTopKRouter": lambda: keras_moe.NoisyTopKRouter(2),
    "LossFreeRouter": lambda: keras_moe.LossFreeRouter(2),
    "StrictlyBalancedRouter": keras_moe.StrictlyBalancedRouter,
    "HierarchicalRouter": lambda: keras_moe.HierarchicalRouter(2, 1, 2),
}


def feed_forward(**options):
    return keras_moe.FeedForwardExperts(EXPERTS, 8, "tanh", seed=1, **options)


BANKS = {
    "FeedForwardExperts": feed_forward,
    "gated, in a loop": functools.partial(feed_forward, gated=True, implementation="loop"),
    "grouped": functools.partial(feed_forward, implementation="grouped"),
    "LinearExperts": lambda: keras_moe.LinearExperts(EXPERTS, DIM, seed=1),
    "LayerExperts": lambda: keras_moe.LayerExperts(
        [keras.layers.Dense(DIM, "tanh") for _ in range(EXPERTS)]
    ),
}
ALWAYS = {
    ("TopKRouter", "FeedForwardExperts"),
    ("TopKRouter", "LayerExperts"),
    ("ExpertChoiceRouter", "FeedForwardExperts"),
}
PAIRS = [
    pytest.param(router, bank, marks=() if (router, bank) in ALWAYS else pytest.mark.full)
    for router in ROUTERS
    for bank in BANKS
]


each_pair = pytest.mark.parametrize(("router", "bank"), PAIRS)


def made(router, bank):
    """The MoE layer of a pair, built."""
    if bank == "grouped" and BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no grouped product")
    keras.utils.set_random_seed(0)
    layer = keras_moe.MixtureOfExperts(BANKS[bank](), ROUTERS[router]())
    layer.build(SHAPE)
    rng = np.random.default_rng(5)
    for variable in layer.router.trainable_variables:
        if len(variable.shape) > 1:  # logits are large, so that a small step changes no choice
            variable.assign(rng.normal(size=variable.shape))
    return layer


def close(seen, expected, tolerance=2e-5):
    np.testing.assert_allclose(numpy(seen), numpy(expected), rtol=tolerance, atol=tolerance)


def outputs(layer, x):
    return layer.outputs_and_routing(x)[0]


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
@each_pair
class TestOnJax:
    def test_first_derivatives(self, router, bank):
        import jax

        layer = made(router, bank)
        weights = [v.value for v in layer.trainable_variables]
        rest = [v.value for v in layer.non_trainable_variables]

        def call(weights, x):
            return layer.stateless_call(weights, rest, x)[0]

        def gradient(function):
            return jax.grad(lambda w, x: ops.sum(function(w, x) * U[: len(x)]), argnums=(0, 1))

        ways = (
            call,
            jax.jit(call),
            jax.checkpoint(call),
            jax.checkpoint(call, policy=jax.checkpoint_policies.dots_saveable),
            jax.checkpoint(call, policy=jax.checkpoint_policies.everything_saveable),
            lambda w, x: jax.lax.scan(lambda x, _: (call(w, x), None), x, length=1)[0],
            lambda w, x: jax.lax.cond(x[0, 0, 0] < 1e9, call, lambda w, x: x, w, x),
        )

        @jax.jit
        def compute(weights, x):
            one_by_one = [gradient(call)(weights, one[None]) for one in x]
            mapped = jax.vmap(gradient(call), (None, 0))(weights, x[:, None])
            forward = jax.jvp(functools.partial(call, weights), (x,), (V,))[1]
            return [gradient(way)(weights, x) for way in ways], one_by_one, mapped, forward

        (expected, *found), one_by_one, mapped, forward = compute(weights, X)
        for of_way in found:
            jax.tree.map(close, of_way, expected)
        jax.tree.map(close, mapped, jax.tree.map(lambda *one: np.stack(one), *one_by_one))
        close(np.sum(forward * U), np.sum(expected[1] * V), 1e-4)

        eagerly = jax.vmap(gradient(call), (None, 0))(weights, X[:, None])
        jax.tree.map(close, eagerly, mapped)

    def test_second_derivatives(self, router, bank):
        import jax

        layer = made(router, bank)

        @jax.jit
        def gradient(x):
            return jax.grad(lambda x: ops.sum(outputs(layer, x) * U))(x)

        by_differences = (gradient(X + 1e-2 * V) - gradient(X - 1e-2 * V)) / 2e-2
        reverse = jax.jit(jax.grad(lambda x: ops.sum(gradient(x) * V)))(X)
        close(reverse, by_differences, 1e-2)
        close(jax.jvp(gradient, (X,), (V,))[1], reverse, 1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@each_pair
class TestOnTensorFlow:
    def test_first_derivatives(self, router, bank):
        import tensorflow as tf

        layer, x = made(router, bank), tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = outputs(layer, x)
        expected = tape.gradient(y, x, U)

        @tf.function
        def in_a_graph(x):
            with tf.GradientTape(persistent=True) as first, tf.GradientTape() as second:
                first.watch(x)
                second.watch(x)
                y = outputs(layer, x)
            return first.gradient(y, x, U), first.gradient(y, x, U), second.gradient(y, x, U)

        for found in in_a_graph(x):
            close(found, expected)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = outputs(layer, x)
        close(tf.einsum("abc,abcdef->def", U, tape.jacobian(y, x)), expected)
        with tf.autodiff.ForwardAccumulator(x, tf.constant(V)) as accumulator:
            y = outputs(layer, x)
        close(np.sum(accumulator.jvp(y) * U), np.sum(expected * V), 1e-4)

    def test_second_derivatives(self, router, bank):
        import tensorflow as tf

        layer = made(router, bank)

        def gradient(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = outputs(layer, x)
            return tape.gradient(y, x, U)

        x = tf.constant(X)
        with tf.GradientTape() as tape:
            tape.watch(x)
            by_x = gradient(x)
        by_differences = (gradient(x + 1e-2 * V) - gradient(x - 1e-2 * V)) / 2e-2
        close(tape.gradient(by_x, x, V), by_differences, 1e-2)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
@each_pair
class TestOnTorch:
    def test_first_derivatives(self, router, bank):
        import torch

        layer = made(router, bank)
        x, u, v = (torch.tensor(of) for of in (X, U, V))

        def gradient(x, u):
            return torch.func.grad(lambda x: (outputs(layer, x[None]) * u).sum())(x)

        each = []
        for one, cotangent in zip(x, u, strict=True):
            one = one.clone().requires_grad_()
            (by_x,) = torch.autograd.grad((outputs(layer, one[None]) * cotangent).sum(), one)
            each.append(by_x)
        expected = torch.stack(each)
        close(torch.stack([gradient(*pair) for pair in zip(x, u, strict=True)]), expected)
        if router == "ExpertChoiceRouter with a cap":
            with pytest.raises(ValueError, match="max_experts_per_token"):
                torch.func.vmap(gradient)(x, u)
        else:
            close(torch.func.vmap(gradient)(x, u), expected)
        forward = torch.func.jvp(lambda x: outputs(layer, x), (x,), (v,))[1]
        close((forward * u).sum(), (expected * v).sum(), 1e-4)

    def test_second_derivatives(self, router, bank):
        import torch

        layer = made(router, bank)
        u, v = torch.tensor(U), torch.tensor(V)

        def gradient(x, **options):
            x = torch.tensor(x, requires_grad=True)
            y = outputs(layer, x)
            return x, torch.autograd.grad((y * u).sum(), x, **options)[0]

        by_differences = (gradient(X + 1e-2 * V)[1] - gradient(X - 1e-2 * V)[1]) / 2e-2
        x, by_x = gradient(X, create_graph=True)
        close(torch.autograd.grad((by_x * v).sum(), x)[0], by_differences, 1e-2)
