import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    FeedForwardExperts,
    HierarchicalMoE,
    HierarchicalRouter,
    MixtureOfExperts,
    losses,
)
from keras_moe.callbacks import RoutingMetrics
from keras_moe.optimizers import Adafactor
from tests import oracle
from tests.backend import cost, gradients, numpy
from tests.keras_moe.routing.examples import check_layer, random_weights

A, B, D, F = 3, 3, 3, 4
E = A * B
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])
JIT = keras.backend.backend() != "torch"


def softplus(x):
    return np.log1p(np.exp(x))


def built(k=2, secondary_k=2, **options):
    layer = HierarchicalMoE(FeedForwardExperts(E, F), A, k, secondary_k, **options)
    layer.build((None, None, D))
    random_weights(layer)
    return layer


CASES = {
    "2 of 3, 2 of 3": (2, 2, {}),
    "1 and 1, no mask": (1, 1, {}),
    "1 and 2, drops": (1, 2, {"capacity_factor": 0.75, "min_capacity": 1}),
    "2 and 1, drops, batch": (
        2,
        1,
        {"capacity_factor": 0.75, "min_capacity": 1, "group": "batch"},
    ),
    "all groups": (3, 2, {}),
    "all experts": (3, 3, {}),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("case", CASES)
def test_output_losses_and_gradients_are_the_equations(case, monkeypatch):
    """Eqs. 4-5 and 12-14 with the noise given, against central differences of a float64 loop."""
    k, secondary_k, options = CASES[case]
    mask = np.ones((2, 6), bool) if "no mask" in case else MASK
    rng = np.random.default_rng(3)
    noise_A, noise_KB = rng.normal(size=(2, 6, A)), rng.normal(size=(2, 6, k, B))

    def normal(shape, _):
        noise = noise_A if len(shape) == 3 else noise_KB
        return ops.convert_to_tensor(noise.reshape(shape), "float32")

    monkeypatch.setattr("keras_moe.routing.noisy.normal", normal)
    weighed = {"importance_weight": 0.5, "load_weight": 0.25, "router_z_weight": 0.0}
    layer = built(k, secondary_k, **weighed, **options)
    weights, x = random_weights(layer), X.copy()

    def loop():
        clean_A, scale_A = x @ weights["kernel"], softplus(x @ weights["noise_kernel"])
        clean_AB, scale_AB = (
            np.einsum("gsd,adb->gsab", x, weights[name])
            for name in ("secondary_kernel", "secondary_noise_kernel")
        )
        gates, importance, load = oracle.hierarchical(
            (clean_A, noise_A, scale_A),
            (clean_AB, noise_KB, softplus(scale_AB)),
            k,
            secondary_k,
            mask,
        )
        if "drops" in case:
            shape = (-1, 12 if "batch" in case else 6, E)
            capacity = oracle.capacity(
                shape[1],
                E,
                layer.router.capacity_factor,
                k * secondary_k,
                layer.router.min_capacity,
            )
            kept = oracle.drop(gates.reshape(shape), capacity).reshape(gates.shape)
            assert (kept != gates).any()
            gates = kept
        y = oracle.mixture(x, gates, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
        return y, 0.5 * importance + 0.25 * load

    given = None if "no mask" in case else mask
    check_layer(layer, loop, x, weights, given, compiles="drops" in case)


def test_routing_by_hand():
    """Two groups of two experts, one group each: token 0 prefers group 1, and expert 0 in it."""
    router = HierarchicalRouter(2, k=1, secondary_k=1, num_experts=4)
    router.build((None, None, 2))
    router.kernel.assign(np.log([[1.0, 3.0], [1.0, 1.0]]))  # token 0: (1/4, 3/4); token 1: tie
    secondary = np.ones((2, 2, 2))
    secondary[0, 1], secondary[1, 0] = [1.0, 9.0], [4.0, 1.0]  # [group, dim, member]
    router.secondary_kernel.assign(np.log(secondary))
    routing = numpy(router(np.eye(2, dtype="float32")[None]))
    # Token 1 is the second: of the tied groups it takes group 1, and of its tied experts, in the
    # first round, expert 0.
    assert routing.expert_index.tolist() == [[[2], [2]]]
    np.testing.assert_allclose(
        routing.secondary.weight, [[[3 / 4 * 4 / 5], [1 / 2 * 1 / 2]]], rtol=1e-6
    )
    np.testing.assert_allclose(routing.probabilities, [[[4 / 5, 1 / 5], [1 / 2, 1 / 2]]], rtol=1e-6)


@pytest.mark.parametrize(("k", "secondary_k"), [(1, 1), (2, 2)])
def test_untrained_gates_spread_the_tokens_over_all_experts_in_inference(k, secondary_k):
    router = HierarchicalRouter(4, k, secondary_k, num_experts=16)
    routing = numpy(router(np.ones((1, 32, D), "float32")))
    count = np.bincount(routing.expert_index.reshape(-1), minlength=16)
    assert count.tolist() == [2 * k * secondary_k] * 16


def test_experts_are_numbered_group_by_group():
    """Two groups of three: untrained gates go through the groups, then to their next experts."""
    routing = numpy(HierarchicalRouter(2, 1, 1, num_experts=6)(np.ones((1, 6, D), "float32")))
    assert routing.expert_index[..., 0].tolist() == [[0, 3, 1, 4, 2, 5]]


def test_capacity_counts_the_choices_of_both_levels():
    router = HierarchicalRouter(2, 2, 2, num_experts=8, eval_capacity_factor=1.0)
    slots = router(np.ones((1, 16, D), "float32")).token_index.shape[-1]
    assert router.capacity_of(16) == slots == 8  # 16 tokens, 2 * 2 choices, 8 experts


def test_noise_is_fresh_on_both_levels_and_only_in_training():
    router = HierarchicalRouter(3, num_experts=9, seed=1)
    x = np.ones((1, 500, D), "float32")
    first, second = (numpy(router(x, training=True)) for _ in range(2))
    for a, b in ((first, second), (first.secondary, second.secondary)):
        assert (a.clean_logits == 0).all()
        assert a.logits.std() == pytest.approx(np.log(2), rel=0.1)  # softplus(0)
        assert (a.logits != b.logits).all()
    assert (numpy(router(x).secondary.logits) == 0).all()


@pytest.mark.parametrize(
    ("load_weight", "training", "needed"),
    [(0.0, False, False), (0.0, True, True), (0.1, False, True)],
)
def test_the_noise_is_not_computed_where_nobody_needs_it(load_weight, training, needed):
    router = HierarchicalRouter(3, num_experts=9, load_weight=load_weight)
    routing = router(np.ones((1, 3, D), "float32"), training=training)
    for gates in (routing, routing.secondary):
        assert (gates.noise_scale is not None) == needed


def test_groups_are_apart_for_the_optimizer():
    """What one group's gate gets changes no other's update, though all lie in one kernel."""
    router = built().router
    per_group = {v.name for v in router.trainable_variables if getattr(v, "per_expert", False)}
    assert per_group == {"secondary_kernel", "secondary_noise_kernel"}
    rng, after = np.random.default_rng(0), []
    gradient, kernel = rng.normal(size=(A, D, B)), numpy(router.secondary_kernel)
    for factor in (1.0, 1e3):
        router.secondary_kernel.assign(kernel)
        optimizer = Adafactor(0.1)
        given = gradient * np.array([factor, 1, 1])[:, None, None]
        optimizer.apply([ops.convert_to_tensor(given, "float32")], [router.secondary_kernel])
        after.append(numpy(router.secondary_kernel))
    np.testing.assert_allclose(after[0][1:], after[1][1:], rtol=1e-6)


def test_seed():
    x = np.ones((1, 3, D), "float32")
    one, two = (HierarchicalRouter(3, num_experts=9, seed=7) for _ in range(2))
    for a, b in zip(*(numpy(r(x, training=True).secondary) for r in (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gates_are_computed_for_chosen_groups_alone():
    """Multiplications of the gates, forward and twice backward; no tensor of tokens x experts."""
    groups, size, tokens = 16, 32, 64

    class Gates(keras.layers.Layer):
        def build(self, shape):
            self.router = HierarchicalRouter(groups, num_experts=groups * size)
            self.router.build(shape)

        def call(self, x):
            routing = self.router(x, training=True)
            gates = ops.sum(routing.secondary.weight, axis=-1, keepdims=True)
            return gates + sum(self.router.auxiliary_losses(routing))

    layer = Gates()
    layer.build((None, None, D))
    random_weights(layer)
    x = np.random.default_rng(0).normal(size=(1, tokens, D))
    largest, products = cost(layer, x, np.ones((1, tokens, 1)))
    needed = 3 * 2 * tokens * D * (groups + 2 * size)
    flat = 3 * 2 * tokens * D * groups * size
    assert needed <= products < 1.5 * needed < flat / 4  # where XLA compiles a slot may be empty
    assert largest < tokens * groups * size


class TestLosses:
    def test_importance_sums_to_the_tokens(self):
        """Where nothing is raw, a token's weights sum to 1 over all experts."""
        layer = built()
        routing = layer.router(ops.convert_to_tensor(X, "float32"), training=True)
        assert numpy(routing.secondary.weight).sum() == pytest.approx(12, rel=1e-5)

    def test_importance_by_hand(self):
        # Two tokens, experts 0..3: sums .5 + .2, .5, .8, 0; mean .5, squares .04 + 0 + .09 + .25
        weights = np.array([[0.5, 0.5], [0.8, 0.2], [9.0, np.nan]], "float32")
        index = np.array([[0, 1], [2, 0], [3, 4]], "int32")
        mask = np.array([True, True, False])
        loss = losses.hierarchical_importance(weights, index, 4, mask)
        assert float(loss) == pytest.approx(0.38 / 4 / 0.25, rel=1e-6)
        marked = np.where(mask[:, None], index, 4)
        again = losses.hierarchical_importance(np.nan_to_num(weights), marked, 4)
        assert float(again) == pytest.approx(float(loss))

    def draws(self, *shape):
        rng = np.random.default_rng(len(shape))
        logits, scale = rng.normal(size=shape), rng.uniform(0.3, 2, size=shape)
        return logits, logits + rng.normal(size=shape) * scale, scale

    def test_a_group_without_tokens(self):
        """Its experts' load is 0, and nothing is divided by it."""
        primary, secondary = self.draws(4, 3), self.draws(4, 1, 2)
        index = np.array([[0], [1], [0], [1]], "int32")
        load_A = sum(oracle.chances(*(x[t] for x in primary), 1) for t in range(4))
        chance = [oracle.chances(*(x[t, 0] for x in secondary), 1) for t in range(4)]
        loads = [load_A[0] * (chance[0] + chance[2]) / 2, load_A[1] * (chance[1] + chance[3]) / 2]
        expected = oracle.squared_variation(np.array([*loads, np.zeros(2)]))
        loss = losses.hierarchical_load(primary, secondary, index, 1)
        assert float(loss) == pytest.approx(expected, rel=1e-5)

    def test_all_chosen_on_both_levels_is_zero(self):
        index = np.array([[0, 1]] * 4, "int32")
        loss = losses.hierarchical_load(self.draws(4, 2), self.draws(4, 2, 3), index, 3)
        assert float(loss) == 0

    def test_nothing_but_padding_is_zero(self):
        index, mask = np.array([[0, 1]] * 4, "int32"), np.zeros(4, bool)
        loss = losses.hierarchical_load(self.draws(4, 3), self.draws(4, 2, 3), index, 2, mask)
        assert float(loss) == 0
        weights = np.ones((4, 2), "float32")
        assert float(losses.hierarchical_importance(weights, index, 6, mask)) == 0

    def test_the_load_teaches_both_gates(self):
        layer = built(importance_weight=0.0, load_weight=1.0)
        names = [v.name for v in layer.trainable_variables]
        _, by_weight = gradients(layer, X, np.zeros(X.shape), training=True)
        by_name = dict(zip(names, by_weight, strict=True))
        for name in ("kernel", "noise_kernel", "secondary_kernel", "secondary_noise_kernel"):
            assert np.abs(by_name[name]).max() > 1e-4, name

    def test_with_their_weights(self):
        x = ops.convert_to_tensor(X, "float32")
        layer = built(importance_weight=0.5, load_weight=0.25, router_z_weight=0.125)
        routing = layer.router(x, mask=MASK, training=False)
        z, importance, load, z_within = map(float, layer.router.auxiliary_losses(routing))
        primary, secondary = numpy(routing.logits), numpy(routing.secondary.logits)
        of_choices = np.repeat(MASK[..., None], 2, axis=-1)
        assert z == pytest.approx(0.125 * oracle.router_z(primary, MASK), rel=1e-5)
        assert z_within == pytest.approx(0.125 * oracle.router_z(secondary, of_choices), rel=1e-5)
        assert importance == pytest.approx(0.5 * float(layer.router.importance(routing)))
        assert load == pytest.approx(0.25 * float(layer.router.load(routing)))

    @pytest.mark.parametrize(
        ("options", "count"),
        [({}, 2), ({"importance_weight": 0.0}, 1), ({"load_weight": 0.0}, 1)],
    )
    def test_of_weight_zero_are_not_added(self, options, count):
        router = HierarchicalRouter(2, num_experts=4, **options)
        assert len(router.auxiliary_losses(router(np.ones((1, 3, D), "float32")))) == count


@pytest.mark.parametrize("content", [50.0, np.nan])
def test_padding_changes_nothing(content):
    layer = built(capacity_factor=1.0, eval_capacity_factor=1.0, router_z_weight=0.5)
    found = []
    for x in (X, np.where(MASK[..., None], X, content)):
        for variable in layer.statistics:
            variable.assign(np.zeros(variable.shape))
        y = numpy(layer(ops.convert_to_tensor(x, "float32"), mask=MASK))
        assert (y[~MASK] == 0).all()
        found.append([y, *map(float, layer.losses), *map(numpy, layer.statistics)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    totals, expert_tokens = found[0][-2:]
    assert expert_tokens.shape == (E,)
    assert totals[1:3].tolist() == [10, 40]  # tokens, and choices


def test_entropy_is_that_of_the_experts_in_the_chosen_groups():
    layer = HierarchicalMoE(FeedForwardExperts(8, F), 4)
    layer(np.ones((2, 6, D), "float32"))
    totals = numpy(layer.statistics[0])
    assert totals[5] / totals[1] == pytest.approx(1, rel=1e-5)  # all alike: the maximum, ln 4


def test_no_later_token_and_no_other_sequence_matters():
    layer = built(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1)
    other = X.copy()
    other[0, 3:], other[1] = 5.0, -5.0
    one, two = (numpy(layer(ops.convert_to_tensor(x, "float32")))[0, :3] for x in (X, other))
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_float32_gates_under_a_mixed_policy():
    layer = HierarchicalMoE(FeedForwardExperts(E, F, dtype="mixed_bfloat16"), A, dtype="bfloat16")
    y = layer(ops.cast(X, "bfloat16"), training=True)
    routing = layer.router(ops.cast(X, "bfloat16"), training=True)
    assert ops.dtype(y) == "bfloat16"
    for part in (*routing.secondary, routing.logits, routing.probabilities, routing.weight):
        assert ops.dtype(part) == "float32"


def test_trains_in_fit_saves_and_loads(tmp_path):
    """Any batch, the figures, and losses that even out what the gates do at first."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, D))
    layer = HierarchicalMoE(FeedForwardExperts(E, F), A, name="moe", load_weight=1.0)
    model = keras.Model(inputs, inputs + layer(inputs))
    collapsed = np.zeros((D, A))
    collapsed[0, :2] = 3.0
    layer.router.kernel.assign(collapsed)
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=JIT)
    x = np.random.default_rng(0).normal(size=(32, 6, D)).astype("float32")
    x[..., 0] = 1.0
    history = model.fit(
        x, np.sin(x), batch_size=16, epochs=16, verbose=0, callbacks=[RoutingMetrics()]
    ).history
    assert history["loss"][-1] < history["loss"][0]
    # Two groups of three have everything at first, 1.5 times a fair share.
    assert history["moe/max_share"][-1] < 0.85 * history["moe/max_share"][0]
    assert history["moe/dropped"] == [0.0] * 16
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    paths = [v.path for v in loaded.get_layer("moe").router.trainable_variables]
    assert [path.split("moe/")[-1] for path in paths] == [
        "router/kernel",
        "router/noise_kernel",
        "router/secondary_kernel",
        "router/secondary_noise_kernel",
    ]


ARGUMENTS = {
    "num_groups": 4,
    "k": 3,
    "secondary_k": 1,
    "num_experts": 8,
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


def test_config_round_trip():
    parameters = inspect.signature(HierarchicalRouter.__init__).parameters
    assert set(ARGUMENTS) == set(parameters) - {"self", "kwargs"}
    made = HierarchicalRouter(**ARGUMENTS, name="mine")
    copy = HierarchicalRouter.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert copy.name == "mine"
    for name, value in ARGUMENTS.items():
        if "initializer" in name:
            assert isinstance(getattr(copy, name), keras.initializers.Ones)
        else:
            assert getattr(copy, name) == value


def test_hierarchical_moe_is_a_mixture_of_experts_with_such_a_router():
    experts = FeedForwardExperts(8, 4)
    options = {name: value for name, value in ARGUMENTS.items() if name != "num_experts"}
    layer = HierarchicalMoE(experts, **options, group="batch", name="mine", dtype="bfloat16")
    assert isinstance(layer, MixtureOfExperts)
    assert layer.experts is experts
    assert (layer.group, layer.name, layer.dtype_policy.name) == ("batch", "mine", "bfloat16")
    expected = HierarchicalRouter(**ARGUMENTS).get_config()
    assert layer.router.get_config() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HierarchicalRouter(0), "`num_groups`.*num_groups=0"),
        (
            lambda: HierarchicalRouter(4, secondary_k=0),
            "`secondary_k`.*secondary_k=0",
        ),
        (lambda: HierarchicalRouter(4, k=0), "`k`.*k=0"),
        (
            lambda: HierarchicalRouter(2, k=3),
            "`k`.*k=3.*num_groups=2",
        ),
        (
            lambda: HierarchicalRouter(4, num_experts=10),
            "`num_groups`.*num_groups=4.*num_experts=10",
        ),
        (
            lambda: HierarchicalMoE(FeedForwardExperts(8, 4), 4, secondary_k=3),
            "`secondary_k`.*secondary_k=3.*num_experts=8.*num_groups=4",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
