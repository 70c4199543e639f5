import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, NoisyTopKRouter
from tests import oracle
from tests.backend import numpy
from tests.keras_moe.routing.examples import (
    check_layer,
    logits_of,
    random_weights,
    with_identity,
)

E, D, F, K = 4, 3, 5, 2
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])


def softplus(x):
    return np.log1p(np.exp(x))


def trained(router):
    router.build((None, None, D))
    random_weights(router)
    return router


@pytest.mark.parametrize("k", [1, 2, 4])
def test_output_losses_and_gradients_are_the_equations(k, monkeypatch):
    """Eqs. 1 and 3-11 with the noise given, against central differences of a float64 loop."""
    noise = np.random.default_rng(3).normal(size=(2, 6, E))
    monkeypatch.setattr(
        "keras_moe.routing.noisy.normal", lambda *_: ops.convert_to_tensor(noise, "float32")
    )
    router = NoisyTopKRouter(k, importance_weight=0.5, load_weight=0.25, router_z_weight=0.125)
    layer = MixtureOfExperts(FeedForwardExperts(E, F), router)
    layer.build((None, None, D))
    weights, x = random_weights(layer), X.copy()

    def loop():
        clean = x @ weights["kernel"]
        scale = softplus(x @ weights["noise_kernel"])
        noisy = clean + noise * scale
        gates, _ = oracle.token_choice(oracle.softmax(noisy), k, mask=MASK)
        y = oracle.mixture(x, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        losses = 0.5 * oracle.importance(gates, MASK) + 0.125 * oracle.router_z(noisy, MASK)
        return y, losses + 0.25 * oracle.load(clean, noisy, scale, k, MASK)

    check_layer(layer, loop, x, weights, MASK)


def test_at_first_the_noise_alone_spreads_the_tokens():
    """Kernels of zeros: logits of mean 0 and standard deviation softplus(0) = ln 2."""
    router = NoisyTopKRouter(2, 8, seed=1)
    routing = numpy(router(np.ones((1, 2000, D), "float32"), training=True))
    assert np.abs(routing.clean_logits).max() == 0
    assert routing.logits.std() == pytest.approx(np.log(2), rel=0.03)
    count = np.bincount(routing.expert_index.reshape(-1), minlength=8)
    assert count == pytest.approx(np.full(8, 500), rel=0.2)  # sd of a count: 19


def test_noise_is_new_for_every_call_token_and_expert():
    router = trained(NoisyTopKRouter(2, 4, seed=1))
    x = np.ones((1, 3, D), "float32")
    first, second = (numpy(router(x, training=True).logits) for _ in range(2))
    assert len(np.unique(np.stack([first, second]) - first[0, 0, 0])) == 24


def test_seed():
    x = np.ones((1, 3, D), "float32")
    one, two = (trained(NoisyTopKRouter(2, 4, seed=7)) for _ in range(2))
    np.testing.assert_array_equal(*(numpy(r(x, training=True).logits) for r in (one, two)))


def test_no_noise_in_inference():
    x = logits_of([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]])
    routing = numpy(with_identity(NoisyTopKRouter(2, 4))(x))
    np.testing.assert_allclose(routing.logits, x, rtol=1e-6)
    assert routing.expert_index.tolist() == [[[0, 1], [3, 2]]]


@pytest.mark.parametrize("k", [1, 3])
def test_an_untrained_gate_spreads_the_tokens_in_inference_too(k):
    routing = numpy(NoisyTopKRouter(k, 4)(np.ones((1, 8, D), "float32")))
    assert np.bincount(routing.expert_index.reshape(-1)).tolist() == [2 * k] * 4
    assert routing.expert_index[0, 5].tolist() == [1, 2, 3][:k]


def test_ties_do_not_touch_those_who_have_a_favourite():
    x = logits_of([[[0.1, 0.1, 0.1, 0.7]] * 5])
    routing = numpy(with_identity(NoisyTopKRouter(2, 4))(x))
    assert routing.expert_index[0].tolist() == [[3, 0], [3, 1], [3, 2], [3, 0], [3, 0]]
    slot = routing.slot_index[..., 0]
    assert routing.weight.reshape(-1)[slot] == pytest.approx(np.full((1, 5), 7 / 8), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 2), ({"importance_weight": 0.0}, 1), ({"load_weight": 0.0}, 1)],
)
def test_a_loss_of_weight_zero_is_not_added(options, count):
    router = trained(NoisyTopKRouter(2, 4, **options))
    assert len(router.auxiliary_losses(router(np.ones((1, 3, D), "float32")))) == count


def test_losses_pull_a_collapsed_gate_apart():
    """Trained by its losses alone, a gate that sends all to two experts comes to use all."""
    keras.utils.set_random_seed(0)
    experts = FeedForwardExperts(4, 2, init_scale=1e-6)
    layer = MixtureOfExperts(experts, NoisyTopKRouter(2, importance_weight=1.0, load_weight=1.0))
    model = keras.Sequential([keras.Input((16, D)), layer])
    collapsed = np.zeros((D, 4))
    collapsed[0, :2] = 2.0
    layer.router.kernel.assign(collapsed)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x = np.random.default_rng(0).normal(size=(64, 16, D)).astype("float32")
    x[..., 0] = 1.0
    before = numpy(losses_of(layer, x))
    model.fit(x, np.zeros_like(x), batch_size=16, epochs=8, verbose=0)
    assert before > 1 and numpy(losses_of(layer, x)) < 0.1 * before


def losses_of(layer, x):
    return sum(layer.router.auxiliary_losses(layer.router(x)))


def test_config_round_trip():
    arguments = {
        "k": 3,
        "num_experts": 4,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 3.0,
        "min_capacity": 2,
        "importance_weight": 0.5,
        "load_weight": 0.25,
        "jitter": 0.125,
        "router_z_weight": 0.0625,
        "kernel_initializer": "ones",
        "noise_initializer": "ones",
        "seed": 7,
    }
    made = NoisyTopKRouter(**arguments, name="mine")
    copy = NoisyTopKRouter.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    for name, value in arguments.items():
        if "initializer" in name:
            assert isinstance(getattr(copy, name), keras.initializers.Ones)
        else:
            assert getattr(copy, name) == value
