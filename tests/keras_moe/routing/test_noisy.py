import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, NoisyTopKRouter, TopKRouter
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


def keep_top_k(x, k):
    """Eq. 5: minus infinity for all but the `k` largest."""
    return np.where(np.argsort(np.argsort(-x)) < k, x, -np.inf)


def gates_of(routing, E):
    """The weights as a matrix `[G, S, E]`, from the slots of a routing without drops."""
    weight = np.append(routing.weight, 0)[routing.slot_index]  # no slot: padding
    return np.sum(weight[..., None] * (routing.expert_index[..., None] == np.arange(E)), axis=2)


def trained(router):
    router.build((None, None, D))
    random_weights(router)
    return router


@pytest.mark.every_backend
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
        gates = oracle.softmax(keep_top_k(noisy, k)) * MASK[..., None]  # Eqs. 3 and 5
        if k == 1:
            gates = gates * oracle.softmax(noisy)
        y = oracle.mixture(x, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        losses = 0.5 * oracle.importance(gates, MASK) + 0.125 * oracle.router_z(noisy, MASK)
        return y, losses + 0.25 * oracle.load(clean, noisy, scale, k, MASK)

    check_layer(layer, loop, x, weights, MASK)


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("kind", [TopKRouter, NoisyTopKRouter])
def test_softmax_of_the_largest_is_the_largest_of_the_softmax_made_to_sum_to_one(kind, k):
    """Shazeer et al. and Mixtral take it over the `k` logits; here all share one softmax."""
    x = np.random.default_rng(0).normal(size=(2, 20, 6))
    routing = numpy(with_identity(kind(k, 6), scale=3.0)(x.astype("float32")))
    expected = oracle.softmax(keep_top_k(3 * x, k))
    np.testing.assert_allclose(gates_of(routing, 6), expected, rtol=1e-5, atol=1e-7)


def test_one_choice_alone_has_its_probability_not_one():
    x = np.random.default_rng(0).normal(size=(2, 20, 6))
    routing = numpy(with_identity(NoisyTopKRouter(1, 6))(x.astype("float32")))
    expected = oracle.softmax(keep_top_k(x, 1)) * oracle.softmax(x)
    np.testing.assert_allclose(gates_of(routing, 6), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_importance_of_ties_counts_the_chosen_alone(k, monkeypatch):
    """An untrained gate in inference: `k` of 4 equal gates, 1/k each, or 1/4 where `k` is 1."""
    given = []
    monkeypatch.setattr("keras_moe.losses.importance", lambda weights, mask: given.append(weights))
    mask = np.array([[True] * 5, [True, True, False, False, True]])
    router = NoisyTopKRouter(k, 4)
    routing = router(np.ones((2, 5, D), "float32"), mask=mask)
    router.importance(routing)
    gates, expected = numpy(given[0])[mask], gates_of(numpy(routing), 4)[mask]
    np.testing.assert_allclose(gates, expected, rtol=1e-6)
    assert (gates > 0).sum(axis=-1).tolist() == [k] * 8
    np.testing.assert_allclose(gates.sum(axis=-1), 1.0 if k > 1 else 0.25, rtol=1e-6)


def test_the_noise_is_not_computed_where_nobody_needs_it():
    x = np.ones((1, 3, D), "float32")
    for load_weight, training, needed in (
        (0.0, False, False),
        (0.0, True, True),
        (0.1, False, True),
    ):
        routing = trained(NoisyTopKRouter(2, 4, load_weight=load_weight))(x, training=training)
        assert (routing.noise_scale is not None) == needed


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
