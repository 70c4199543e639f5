import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, StrictlyBalancedRouter, metrics
from tests import oracle
from tests.backend import numpy, run
from tests.keras_moe.routing.examples import (
    P,
    check_layer,
    logits_of,
    random_weights,
    with_identity,
)

E, D, F = 4, 3, 5
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])
T = [0.1, 0.3, 0.5, 0.2]


def layer_and_weights(**kwargs):
    layer = MixtureOfExperts(FeedForwardExperts(E, F), StrictlyBalancedRouter(**kwargs))
    layer.build((None, None, D))
    weights = random_weights(layer)
    layer.router.threshold.assign(T)
    weights["threshold"][:] = T
    return layer, weights


@pytest.mark.every_backend
class TestEquations:
    @pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_training(self, factor, mask):
        """Eqs. 15-20 against central differences of a float64 loop; the loss sees fixed scores."""
        layer, weights = layer_and_weights(capacity_factor=factor, router_z_weight=0.125)
        x = X.copy()
        fixed = oracle.softmax(X @ weights["kernel"])

        def loop():
            logits = x @ weights["kernel"]
            scores = oracle.softmax(logits)
            taken = oracle.expert_choice(scores, oracle.capacity(6, E, factor), mask)
            y = oracle.mixture(
                x,
                oracle.strictly_balanced(taken),
                lambda x_D, e: oracle.feed_forward(x_D, weights, e),
            )
            loss = oracle.batchwise_threshold(fixed, taken, weights["threshold"], mask)
            return y, 0.125 * oracle.router_z(logits, mask) + loss

        y, _ = loop()
        served = (y != 0).any(axis=-1)
        assert served.all() == (factor == 2.0 and mask is None)  # some tokens are nobody's
        check_layer(layer, loop, x, weights, mask)

    @pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
    @pytest.mark.parametrize("cap", [None, 1, E])
    def test_inference(self, cap, mask):
        layer, weights = layer_and_weights(capacity_factor=1.0, max_experts_per_token=cap)
        scores = oracle.softmax(X @ weights["kernel"])
        taken = oracle.threshold_choice(scores, T, cap or 2, mask)
        y = oracle.mixture(
            X,
            oracle.strictly_balanced(taken),
            lambda x_D, e: oracle.feed_forward(x_D, weights, e),
        )
        np.testing.assert_allclose(numpy(layer(X, mask=mask)), y, rtol=1e-5, atol=1e-5)
        assert layer.losses == []
        assert metrics.read(layer)["experts_per_token"] == pytest.approx(
            np.mean(np.sum(taken > 0, axis=-1)[MASK if mask is not None else ...])
        )


class TestByHand:
    # m = 4 tokens * 1.5 / 3 experts = 2. Expert 0 takes tokens 1 (.6) and 0 (.5, before token 2
    # which ties), expert 1 takes 3 (.6) and 0 (.3, before 1), expert 2 takes 2 (.4) and 0 (.2).
    #   token 0 has all three, .5 + .3 + .2 = 1; the others one each, of weight 1.
    def test_training(self):
        router = with_identity(StrictlyBalancedRouter(3, 1.5))
        routing = numpy(router(logits_of(P), training=True))
        assert routing.token_index.tolist() == [[[1, 0], [3, 0], [2, 0]]]
        np.testing.assert_allclose(routing.weight, [[[1, 0.5], [1, 0.3], [1, 0.2]]], rtol=1e-5)

    # Above T = (.5, .3, .15), strictly: token 0 expert 2 alone; 1: expert 0; 2: expert 2; 3: 1.
    def test_inference(self):
        router = with_identity(StrictlyBalancedRouter(3, 1.5))
        scores = np.log(np.array(P, "float32")) + [[[-1e-4, -1e-4, 0]] * 4]
        router.threshold.assign([0.5, 0.3, 0.15])
        routing = numpy(router(scores.astype("float32")))
        assert np.sort(routing.expert_index).tolist() == [
            [[2, 3, 3], [0, 3, 3], [2, 3, 3], [1, 3, 3]]
        ]
        assert sorted(routing.weight[routing.weight > 0]) == pytest.approx([1.0] * 4)

    def test_a_score_equal_to_the_threshold_is_not_above_it(self):
        router = with_identity(StrictlyBalancedRouter(2))
        router.threshold.assign([0.5, 0.4])
        routing = numpy(router(np.zeros((1, 1, 2), "float32")))  # scores of exactly a half
        assert routing.expert_index.tolist() == [[[2, 1]]]

    def test_a_token_that_nobody_takes(self):
        layer, _ = layer_and_weights()
        layer.router.threshold.assign([1.0] * E)
        y, _, by_x, by_weight = run(layer, X, np.ones(X.shape))
        assert (y == 0).all() and (by_x == 0).all()
        assert all((gradient == 0).all() for gradient in by_weight)

    # m = 1. Expert 0 takes token 1, expert 1 takes token 2, and expert 2, whose scores are all 0 in
    # float32, must take one too: token 0, whose weight is 0 / 0.
    @pytest.mark.every_backend
    def test_scores_that_underflow(self):
        layer = MixtureOfExperts(FeedForwardExperts(3, F), StrictlyBalancedRouter(3, 1.0))
        layer.build((None, None, 3))
        layer.router.kernel.assign(np.eye(3))
        x = np.array([[[0.4, 0.0, -200.0], [0.0, -200.0, -200.0], [-200.0, 0.0, -200.0]]])
        y, _, by_x, by_weight = run(layer, x, np.ones(x.shape), training=True)
        assert (y[0, 0] == 0).all() and (y[0, 1:] != 0).any()
        for gradient in (by_x, *by_weight):
            assert np.isfinite(gradient).all()

    @pytest.mark.parametrize("stddev", [0.0, 0.02, 3.0])
    def test_untrained_it_refuses_nobody(self, stddev):
        """Every token gets as many experts as the cap allows it."""
        kernel = keras.initializers.RandomNormal(stddev=stddev, seed=0)
        router = StrictlyBalancedRouter(4, 1.0, kernel_initializer=kernel)
        x = np.random.default_rng(0).normal(size=(1, 50, D)).astype("float32")
        routing = numpy(router(x))
        assert routing.expert_index.shape == (1, 50, 2)
        assert (routing.expert_index < 4).all()

    def test_weight_decay_spares_the_thresholds_as_documented(self):
        router = StrictlyBalancedRouter(4)
        router.build((None, None, D))
        router.threshold.assign(T)
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["threshold"])
        zeros = [np.zeros(v.shape, "float32") for v in router.trainable_variables]
        kernel = numpy(router.kernel)
        optimizer.apply(list(map(ops.convert_to_tensor, zeros)), router.trainable_variables)
        np.testing.assert_array_equal(numpy(router.threshold), np.float32(T))
        np.testing.assert_allclose(numpy(router.kernel), 0.95 * kernel, rtol=1e-5)


def test_the_default_cap_in_inference_is_twice_the_capacity_factor():
    router = StrictlyBalancedRouter(8, 1.25)
    assert router(np.zeros((1, 4, 3), "float32")).expert_index.shape[2] == 3  # ceil(2.5)


def test_max_experts_per_token_while_training():
    router = with_identity(StrictlyBalancedRouter(3, 1.5, max_experts_per_token=2))
    routing = numpy(router(logits_of(P), training=True))
    assert routing.token_index.tolist() == [[[1, 0], [3, 0], [2, 1]]]


def test_the_thresholds_learn_to_choose_as_the_experts_do():
    """Of scores that do not change, the loss alone: what passes is what the experts take."""
    keras.utils.set_random_seed(0)
    layer = MixtureOfExperts(FeedForwardExperts(E, F), StrictlyBalancedRouter(capacity_factor=1.0))
    model = keras.Sequential([keras.Input((64, D)), layer])
    kernel = np.random.default_rng(1).normal(size=(D, E)).astype("float32")
    layer.router.kernel.assign(kernel)
    model.compile(keras.optimizers.SGD(0.2), lambda y_true, y_pred: 0.0 * y_pred)
    x = np.random.default_rng(2).normal(size=(1, 64, D)).astype("float32")
    model.fit(np.repeat(x, 60, axis=0), np.zeros((60, 64, D)), batch_size=1, verbose=0)
    np.testing.assert_array_equal(numpy(layer.router.kernel), kernel)  # it left the scores alone
    scores = oracle.softmax(x.astype("float64") @ kernel)
    taken = oracle.expert_choice(scores, 16) > 0
    over = scores > numpy(layer.router.threshold)
    assert (over != taken).sum(axis=(0, 1)).max() <= 1


def test_fits_saves_and_comes_back(tmp_path):
    inputs = keras.Input((None, D))
    layer = MixtureOfExperts(FeedForwardExperts(E, F), StrictlyBalancedRouter())
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = X.astype("float32")
    loss = model.fit(x, np.sin(3 * x), epochs=5, verbose=0, validation_data=(x, x)).history["loss"]
    assert loss[-1] < loss[0]
    assert (numpy(layer.router.threshold) > 0).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_config_round_trip():
    arguments = {
        "num_experts": 4,
        "capacity_factor": 1.5,
        "max_experts_per_token": 3,
        "jitter": 0.125,
        "router_z_weight": 0.25,
        "kernel_initializer": "ones",
        "seed": 7,
    }
    made = StrictlyBalancedRouter(**arguments, name="mine")
    copy = StrictlyBalancedRouter.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    for name, value in arguments.items():
        if name == "kernel_initializer":
            assert isinstance(copy.kernel_initializer, keras.initializers.Ones)
        else:
            assert getattr(copy, name) == value
