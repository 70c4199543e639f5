import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, LossFreeRouter, MixtureOfExperts
from tests import oracle
from tests.backend import numpy, run
from tests.keras_moe.routing.examples import check_layer, random_weights, with_identity

E, D, F = 6, 3, 4
JIT = keras.backend.backend() != "torch"
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])
BIAS = np.array([0.3, -0.1, 0.0, 0.2, -0.4, 0.1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logits_of(scores):
    scores = np.asarray(scores)
    return np.log(scores / (1 - scores)).astype("float32")


CASES = {
    "sigmoid": {"k": 2},
    "softmax, scaled": {"k": 3, "score_function": "softmax", "scale": 2.5},
    "one": {"k": 1, "scale": 2.0},
    "raw": {"k": 2, "normalize": False},
    "groups": {"k": 3, "num_groups": 3, "top_groups": 2},
    "best of each group": {"k": 2, "num_groups": 3, "top_groups": 2, "group_score": "max"},
    "groups of one": {"k": 2, "num_groups": 6, "top_groups": 4},
}


@pytest.mark.every_backend
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("case", CASES)
def test_output_losses_and_gradients_are_the_equations(case, mask):
    options = {"score_function": "sigmoid", "normalize": True, "scale": 1.0, **CASES[case]}
    weights_of_losses = {"load_balancing_weight": 0.5, "sequence_balancing_weight": 0.25}
    router = LossFreeRouter(**options, **weights_of_losses, router_z_weight=0.125)
    layer = MixtureOfExperts(FeedForwardExperts(E, F), router)
    layer.build((None, None, D))
    router.bias.assign(BIAS)
    weights, x = random_weights(layer), X.copy()
    valid = np.ones((2, 6), bool) if mask is None else mask
    groups = options.get("num_groups"), options.get("top_groups")
    best_of_group = 1 if options.get("group_score") == "max" else 2

    def loop():
        logits = x @ weights["kernel"]
        scores = oracle.softmax(logits) if "softmax" in case else sigmoid(logits)
        gates, chosen, unbiased = (np.zeros((2, 6, E)) for _ in range(3))
        for at in zip(*np.nonzero(valid), strict=True):
            experts = oracle.biased_choice(scores[at], BIAS, router.k, *groups, best_of_group)
            total = scores[at][experts].sum() if options["normalize"] and router.k > 1 else 1.0
            gates[at][experts] = options["scale"] * scores[at][experts] / total
            chosen[at][experts] = 1
            unbiased[at][oracle.biased_choice(scores[at], 0, router.k)] = 1
        y = oracle.mixture(x, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        p = scores / scores.sum(axis=-1, keepdims=True)
        losses = 0.5 * oracle.load_balancing(p, chosen, valid)
        losses += 0.25 * oracle.sequence_balancing(p, unbiased, valid)
        assert (chosen != unbiased).any()  # the bias is felt
        return y, losses + 0.125 * oracle.router_z(logits, valid)

    check_layer(layer, loop, x, weights, mask, compiles=case == "groups")


# One group of four tokens and three experts; the scores:
S = [[[0.8, 0.6, 0.2], [0.7, 0.5, 0.1], [0.9, 0.3, 0.4], [0.6, 0.2, 0.1]]]


@pytest.mark.every_backend
class TestBias:
    def router(self, k=1, **options):
        options = {"bias_update_rate": 0.25, **options}
        return with_identity(LossFreeRouter(k, 3, **options))

    def test_chooses_and_does_not_weigh(self):
        # Biased: token 0: .8 .9 .2, 1: .7 .8 .1, 2: .9 .6 .4, 3: .6 .5 .1.
        router = self.router()
        router.bias.assign([0, 0.3, 0])
        routing = numpy(router(logits_of(S)))
        assert routing.expert_index.tolist() == [[[1], [1], [0], [0]]]
        weight = routing.weight.reshape(-1)[routing.slot_index.reshape(-1)]
        np.testing.assert_allclose(weight, [0.6, 0.5, 0.9, 0.6], rtol=1e-5)

    def test_what_got_too_little_is_raised(self):
        # All four choose expert 0; the mean is 4/3, and the signs are -, +, +.
        router = self.router()
        routing = numpy(router(logits_of(S), training=True))
        assert routing.expert_index.reshape(-1).tolist() == [0, 0, 0, 0]  # not yet
        np.testing.assert_allclose(numpy(router.bias), [-0.25, 0.25, 0.25])
        # Biased: .55 .85 .45, .45 .75 .35, .65 .55 .65, .35 .45 .35; counts 1, 3, 0.
        routing = numpy(router(logits_of(S), training=True))
        assert routing.expert_index.reshape(-1).tolist() == [1, 1, 0, 1]
        np.testing.assert_allclose(numpy(router.bias), [0.0, 0.0, 0.5])

    def test_a_fair_share_is_left_alone(self):
        # With k = 3 every expert gets all tokens.
        router = self.router(3)
        router(logits_of(S), training=True)
        assert numpy(router.bias).tolist() == [0, 0, 0]

    def test_counts_what_is_dropped(self):
        # Expert 0 has one slot and keeps 1 of 4, but 4 chose it.
        router = self.router(capacity_factor=0.75, min_capacity=1)
        assert router(logits_of(S), training=True).token_index.shape[2] == 1
        np.testing.assert_allclose(numpy(router.bias), [-0.25, 0.25, 0.25])

    def test_padding_does_not_count(self):
        # Token 1 chooses expert 1 when expert 0 is handicapped; all others are padding.
        router = self.router()
        router.bias.assign([-0.5, 0, 0])
        router(logits_of(S), mask=np.array([[False, True, False, False]]), training=True)
        np.testing.assert_allclose(numpy(router.bias), [-0.25, -0.25, 0.25])
        before = numpy(router.bias)
        router(logits_of(S), mask=np.zeros((1, 4), bool), training=True)
        np.testing.assert_array_equal(numpy(router.bias), before)

    def test_stays_in_inference_and_where_it_is_frozen(self):
        router = self.router()
        router(logits_of(S))
        router.trainable = False
        router(logits_of(S), training=True)
        assert numpy(router.bias).tolist() == [0, 0, 0]

    def test_surest_first(self):
        # One slot each; all want expert 0, and token 2 scores highest.
        router = self.router(capacity_factor=0.75, min_capacity=1, priority="probability")
        routing = numpy(router(logits_of(S), training=True))
        assert routing.token_index.tolist() == [[[2], [4], [4]]]

    def test_gradients_where_scores_underflow(self):
        """The sum of the sigmoids of -60 is 2e-26, and its square is 0 in float32."""
        layer = MixtureOfExperts(
            FeedForwardExperts(3, F), LossFreeRouter(2, load_balancing_weight=1.0)
        )
        layer.build((None, None, 3))
        layer.router.kernel.assign(np.eye(3))
        x = np.full((1, 4, 3), -60.0)
        _, _, by_x, by_weight = run(layer, x, np.ones(x.shape), training=True)
        for gradient in (by_x, *by_weight):
            assert np.isfinite(gradient).all()

    def test_scores_of_zero(self):
        routing = numpy(self.router(2)(np.full((1, 4, 3), -200.0, "float32")))
        assert np.isfinite(routing.weight).all() and np.isfinite(routing.probabilities).all()
        assert routing.weight.max() == pytest.approx(0.5)


class TestGroups:
    # Six experts in three groups. Best of each: .9 .8 .7; the sums of two: 1.0 1.1 1.3.
    S = [[[0.9, 0.1, 0.8, 0.3, 0.7, 0.6]]]

    def chosen(self, k, **options):
        router = with_identity(LossFreeRouter(k, 6, num_groups=3, **options))
        return numpy(router(logits_of(self.S))).expert_index.tolist()

    def test_sum_of_the_two_best(self):
        assert self.chosen(2, top_groups=1) == [[[4, 5]]]
        assert self.chosen(2, top_groups=2) == [[[2, 4]]]
        assert self.chosen(2, top_groups=3) == [[[0, 2]]]

    def test_the_best(self):
        assert self.chosen(2, top_groups=1, group_score="max") == [[[0, 1]]]
        assert self.chosen(3, top_groups=2, group_score="max") == [[[0, 2, 3]]]

    def test_the_bias_counts(self):
        # 1.0 + .4 = 1.4 is now the best sum, and within that group .5 comes before -.1 + .9.
        router = with_identity(LossFreeRouter(2, 6, num_groups=3, top_groups=1))
        router.bias.assign([-0.6, 1.0, 0, 0, 0, 0])
        routing = numpy(router(logits_of(self.S)))
        assert routing.expert_index.tolist() == [[[1, 0]]]

    def test_a_negative_bias_lets_no_other_group_in(self):
        router = with_identity(LossFreeRouter(2, 6, num_groups=3, top_groups=1))
        router.bias.assign(np.full(6, -5.0))
        assert numpy(router(logits_of(self.S))).expert_index.tolist() == [[[4, 5]]]


@pytest.mark.parametrize("version", [2, 3])
def test_routes_as_transformers_does(version):
    """The routers of its DeepSeek-V2 and -V3, with the same weights."""
    import torch
    import transformers

    name = f"deepseek_v{version}"
    options = {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    if version == 2:
        options["topk_method"] = "group_limited_greedy"
    sizes = {"hidden_size": 16, "n_routed_experts": 32, "num_experts_per_tok": 6}
    config = transformers.AutoConfig.for_model(
        name, **sizes, num_attention_heads=4, num_key_value_heads=4, **options
    )
    module = getattr(transformers.models, name)
    module = getattr(module, f"modeling_{name}")
    theirs = getattr(module, f"DeepseekV{version}TopkRouter")(config)

    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 40, 16)), rng.normal(size=(16, 32))
    bias = 0.3 * rng.normal(size=32)
    ours = {
        2: LossFreeRouter(
            6, 32, "softmax", 0.0, 8, 3, group_score="max", normalize=False, scale=2.5
        ),
        3: LossFreeRouter(6, 32, "sigmoid", 1e-3, 8, 3, scale=2.5),
    }[version]
    ours.build((None, None, 16))
    ours.kernel.assign(kernel)
    theirs.weight.data = torch.tensor(kernel.T, dtype=torch.float32)
    if version == 3:
        ours.bias.assign(bias)
        theirs.e_score_correction_bias = torch.tensor(bias, dtype=torch.float32)

    _, weight, index = theirs(torch.tensor(x, dtype=torch.float32))
    routing = numpy(ours(x.astype("float32")))
    expected, got = np.zeros((40, 32)), np.zeros((40, 32))
    np.put_along_axis(expected, index.numpy(), weight.detach().numpy(), axis=1)
    by_choice = routing.weight.reshape(-1)[routing.slot_index[0]]
    np.put_along_axis(got, routing.expert_index[0], by_choice, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def skewed(rate):
    """A router that sends nearly all tokens to its first two of six experts."""
    router = LossFreeRouter(2, E, bias_update_rate=rate)
    router.build((None, None, D))
    kernel = 0.3 * np.random.default_rng(1).normal(size=(D, E))
    kernel[-1] += [2, 1, 0, 0, -1, -1]
    router.kernel.assign(kernel)
    x = np.random.default_rng(2).normal(size=(16, 16, D)).astype("float32")
    x[..., -1] = 1.0
    return router, x


def shares(router, x):
    """Each expert's tokens relative to a fair share."""
    count = np.bincount(numpy(router(x).expert_index).reshape(-1), minlength=E)
    return count / count.mean()


@pytest.mark.parametrize("rate", [0.0, 0.005])
def test_balances_a_skewed_router(rate):
    router, x = skewed(rate)
    skew = [3, 2.65, 0, 0.35, 0, 0]
    np.testing.assert_allclose(shares(router, x), skew, atol=0.02)
    for step in range(150):
        router(x[step % 2 :: 2], training=True)
    if rate == 0:
        np.testing.assert_allclose(shares(router, x), skew, atol=0.02)
    else:
        assert shares(router, x).max() < 1.4 and shares(router, x).min() > 0.5


def test_is_updated_in_fit_and_not_in_evaluate():
    router, x = skewed(0.005)
    inputs = keras.Input((16, D))
    model = keras.Model(inputs, MixtureOfExperts(FeedForwardExperts(E, F), router)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=JIT)
    model.fit(x, x, batch_size=8, epochs=2, verbose=0, shuffle=False)
    model.evaluate(x, x, verbose=0)
    alone, x = skewed(0.005)
    for batch in (x[:8], x[8:]) * 2:
        alone(batch, training=True)
    np.testing.assert_allclose(numpy(router.bias), numpy(alone.bias), rtol=1e-6)
    assert np.abs(numpy(router.bias)).min() > 0


def test_the_bias_is_saved_and_not_trained(tmp_path):
    router, x = skewed(0.005)
    inputs = keras.Input((16, D))
    model = keras.Model(inputs, MixtureOfExperts(FeedForwardExperts(E, F), router)(inputs))
    model(x, training=True)
    assert (numpy(router.bias) != 0).any()
    assert [v.name for v in router.trainable_variables] == ["kernel"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded.layers[1].router.bias), numpy(router.bias))
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


@pytest.mark.parametrize("shape", [(0, 6, D), (2, 0, D)])
def test_no_tokens(shape):
    router = LossFreeRouter(2, bias_update_rate=0.5, sequence_balancing_weight=1.0)
    layer = MixtureOfExperts(FeedForwardExperts(E, F), router)
    layer.build((None, None, D))
    assert tuple(layer(ops.zeros(shape), training=True).shape) == shape
    assert [float(loss) for loss in layer.losses] == [0.0]
    assert (numpy(router.bias) == 0).all()


def test_shapes_not_known_to_the_graph():
    """As a data set of ragged batches has it: TensorFlow's graph then knows no shape."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow's graphs have unknown shapes")
    import tensorflow as tf

    router = LossFreeRouter(
        2, num_groups=3, top_groups=2, bias_update_rate=0.0, sequence_balancing_weight=1.0,
        load_balancing_weight=1.0, capacity_factor=0.75, priority="probability",
    )  # fmt: skip
    layer = MixtureOfExperts(
        FeedForwardExperts(E, F), router, shared=FeedForwardExperts(2, F, name="shared")
    )
    layer.build((None, None, D))

    def call(x):
        return layer(x, training=True), sum(layer.losses)

    graph = tf.function(call, input_signature=[tf.TensorSpec((None, None, D))])
    x = tf.constant(X, "float32")
    for ours, theirs in zip(graph(x), call(x), strict=True):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), rtol=1e-5, atol=1e-5)


def test_float32_under_a_lower_policy():
    keras.config.set_dtype_policy("bfloat16")
    try:
        router = LossFreeRouter(2, 4)
    finally:
        keras.config.set_dtype_policy("float32")
    router.build((None, None, D))
    assert {v.dtype for v in (router.kernel, router.bias)} == {"float32"}


ARGUMENTS = {
    "k": 2,
    "num_experts": 6,
    "score_function": "softmax",
    "bias_update_rate": 0.5,
    "num_groups": 3,
    "top_groups": 2,
    "group_score": "max",
    "normalize": False,
    "scale": 2.5,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 3.0,
    "min_capacity": 2,
    "priority": "probability",
    "load_balancing_weight": 0.5,
    "sequence_balancing_weight": 0.25,
    "jitter": 0.25,
    "router_z_weight": 0.125,
    "kernel_initializer": keras.initializers.Constant(2.0),
    "seed": 7,
}


def test_every_config_key_makes_the_round_trip():
    parameters = inspect.signature(LossFreeRouter.__init__).parameters
    assert set(ARGUMENTS) == set(parameters) - {"self", "kwargs"}
    made = LossFreeRouter(**ARGUMENTS, name="mine")
    copy = LossFreeRouter.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert copy.name == "mine"
    for name, value in ARGUMENTS.items():
        assert value != parameters[name].default
        got = getattr(copy, name)
        assert got.value == 2.0 if name == "kernel_initializer" else got == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_function": "tanh"}, "`score_function`.*score_function='tanh'"),
        ({"bias_update_rate": -1e-3}, "`bias_update_rate`.*bias_update_rate=-0.001"),
        ({"num_groups": 2}, "num_groups=2, top_groups=None"),
        ({"top_groups": 2}, "num_groups=None, top_groups=2"),
        ({"num_groups": 2, "top_groups": 3}, "`top_groups`.*num_groups=2, top_groups=3"),
        ({"num_groups": 2, "top_groups": 0}, "`top_groups`.*num_groups=2, top_groups=0"),
        ({"group_score": "sum"}, "`group_score`.*group_score='sum'"),
        ({"scale": 0.0}, "`scale`.*scale=0.0"),
        ({"num_groups": 4, "top_groups": 1}, "`num_groups`.*num_groups=4.*num_experts=6"),
        (
            {"k": 3, "num_groups": 3, "top_groups": 1},
            "`k`.*`top_groups`.*k=3.*top_groups=1",
        ),
        ({"k": 7}, "`k`.*k=7.*num_experts=6"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossFreeRouter(**{"k": 2, "num_experts": 6, **arguments})
