import contextlib
import inspect
import math
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    LayerExperts,
    MixtureOfExperts,
    StrictlyBalancedRouter,
    SwitchRouter,
    TopKRouter,
)
from tests import oracle
from tests.backend import cost, marked, numpy, run, run_each

tensor = ops.convert_to_tensor
E, D, F = 4, 3, 4
JIT = keras.backend.backend() != "torch"


def built(router, group="sequence", dim=D, **options):
    """A layer with weights large enough for clear decisions."""
    layer = MixtureOfExperts(
        FeedForwardExperts(router.num_experts or E, F, **options), router, group
    )
    layer.build((None, None, dim))
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def expected(router, group, x, mask, weights, training):
    """Outputs and the sum of the losses, by the oracle."""
    x_GSD, mask_GS = oracle.in_groups(x, mask, group)
    num_experts = weights["kernel"].shape[1]
    logits = x_GSD @ weights["kernel"]
    p = oracle.softmax(logits)
    tokens = x_GSD.shape[1]
    losses = router.router_z_weight * oracle.router_z(logits, mask_GS)
    factor = router.capacity_factor if training else router.eval_capacity_factor
    if isinstance(router, ExpertChoiceRouter):
        capacity = min(
            tokens, oracle.capacity(tokens, num_experts, factor or router.capacity_factor)
        )
        if router.inference == "threshold" and not training:
            cap = router.max_experts_per_token or math.ceil(2 * router.capacity_factor)
            weight = oracle.threshold_choice(p, numpy(router.threshold), cap, mask_GS)
        else:
            weight = oracle.expert_choice(
                p, capacity, mask_GS, router.max_experts_per_token, router.linear_programme
            )
    else:
        capacity = factor and oracle.capacity(
            tokens, num_experts, factor, router.k, router.min_capacity
        )
        weight, chosen = oracle.token_choice(
            p, router.k, capacity, router.normalize, mask_GS, router.priority
        )
        losses += router.load_balancing_weight * oracle.load_balancing(p, chosen, mask_GS)
    y = oracle.mixture(x_GSD, weight, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
    y = y.reshape(-1, y.shape[-1])[: math.prod(x.shape[:-1])].reshape(x.shape)
    return y, losses, weight


TIGHT = {"capacity_factor": 0.75, "min_capacity": 1}
SUREST = {**TIGHT, "priority": "probability"}
LOSSES = {"load_balancing_weight": 0.5, "router_z_weight": 0.25}
RICH = {"gated": True, "use_bias": True}


def switch(**kwargs):
    return SwitchRouter(jitter=0.0, **LOSSES, **kwargs)


def top(k, normalize, **kwargs):
    return TopKRouter(k, normalize=normalize, **LOSSES, **kwargs)


def experts_choose(factor, **kwargs):
    return ExpertChoiceRouter(capacity_factor=factor, router_z_weight=0.25, **kwargs)


# Every router with and without drops, every group, both ranks, with and without padding; 7 does not
# divide the 12 tokens.
CASES = {
    "switch": (lambda: switch(**TIGHT), "sequence", 3, False, {}),
    "switch, batch, mask": (lambda: switch(**TIGHT), "batch", 3, True, {}),
    "switch, dropless, 7, mask": (lambda: switch(capacity_factor=None), 7, 3, True, RICH),
    "switch, 2-D": (lambda: switch(**TIGHT), "sequence", 2, False, {}),
    "k=1, mask": (lambda: top(1, True, **TIGHT), "sequence", 3, True, {}),
    "k=1, dropless": (lambda: top(1, False), "batch", 3, False, {}),
    "k=2": (lambda: top(2, True, **TIGHT), "sequence", 3, False, RICH),
    "k=2, raw, 7": (lambda: top(2, False, **TIGHT), 7, 3, False, {}),
    "k=2, dropless, mask": (lambda: top(2, True), "sequence", 3, True, {"gated": True}),
    "k=2, raw, dropless, 2-D, mask": (lambda: top(2, False), "batch", 2, True, {}),
    "k=3, 4, mask": (lambda: top(3, True, **TIGHT), 4, 3, True, {"use_bias": True}),
    "k=3, raw, dropless, 7": (lambda: top(3, False), 7, 3, False, {}),
    "switch, surest first, batch": (lambda: switch(**SUREST), "batch", 3, False, {}),
    "k=2, surest first, mask": (lambda: top(2, True, **SUREST), "sequence", 3, True, {}),
    "k=3, raw, surest first, 7, mask": (lambda: top(3, False, **SUREST), 7, 3, True, {}),
    "expert choice": (lambda: experts_choose(1.0), "sequence", 3, False, RICH),
    "expert choice, batch, mask": (lambda: experts_choose(2.0), "batch", 3, True, {}),
    "expert choice, 7": (lambda: experts_choose(1.0), 7, 3, False, {}),
    "expert choice, all, mask": (lambda: experts_choose(4.0), "sequence", 3, True, {}),
    "expert choice, capped, mask": (
        lambda: experts_choose(1.0, max_experts_per_token=2), "sequence", 3, True, {}),
    "expert choice, by programme": (
        lambda: experts_choose(2.0, max_experts_per_token=2, linear_programme=True), "batch", 3,
        False, {}),
    "expert choice, 2-D, mask": (lambda: experts_choose(1.0), "sequence", 2, True, {}),
}  # fmt: skip
# Compiling a case takes seconds. JAX always compiles: operation by operation it takes longer.
COMPILED = ("switch", "k=2, dropless, mask", "expert choice, capped, mask")
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])


@pytest.mark.every_backend
@pytest.mark.parametrize("case", CASES)
def test_output_losses_and_gradients_are_the_oracles(case):
    router, group, rank, masked, options = CASES[case]
    layer = built(router(), group, **options)
    names = [variable.name for variable in layer.trainable_variables]
    weights = {v.name: numpy(v).astype("float64") for v in layer.trainable_variables}
    shape = (2, 6, D) if rank == 3 else (12, D)
    x, mask = X.reshape(shape).copy(), MASK.reshape(shape[:-1]) if masked else None
    cotangent = np.random.default_rng(2).normal(size=shape)

    def loop():
        return expected(layer.router, group, x, mask, weights, training=True)

    def loss():
        y, losses, _ = loop()
        return np.sum(y * cotangent) + losses

    jit = case in COMPILED or keras.backend.backend() == "jax"
    y, losses, by_x, by_weight = run(layer, x, cotangent, jit, mask=mask, training=True)
    y_expected, losses_expected, weight = loop()
    np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-5)
    assert losses == pytest.approx(losses_expected, rel=1e-5)
    slopes = oracle.gradient(loss, [x, *(weights[name] for name in names)])
    np.testing.assert_allclose(by_x, slopes[0], rtol=1e-5, atol=1e-5)
    for name, ours, slope in zip(names, by_weight, slopes[1:], strict=True):
        np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=1e-5, err_msg=name)

    served = (weight > 0).any(axis=-1).reshape(-1)[:12].reshape(shape[:-1])
    assert (y[~served] == 0).all()  # exactly
    if isinstance(layer.router, TopKRouter):  # the case is what its name says
        wanted = layer.router.k * (MASK if masked else np.ones(12)).sum()
        assert (np.sum(weight > 0) < wanted) == ("dropless" not in case)


FORWARD = {
    "threshold": lambda: ExpertChoiceRouter(capacity_factor=1.0, inference="threshold"),
    "threshold, capped": lambda: ExpertChoiceRouter(
        capacity_factor=1.0, inference="threshold", max_experts_per_token=1
    ),
    "capped at 1": lambda: ExpertChoiceRouter(capacity_factor=1.0, max_experts_per_token=1),
    "capped at 2": lambda: ExpertChoiceRouter(capacity_factor=2.0, max_experts_per_token=2),
    "capped by the programme": lambda: ExpertChoiceRouter(
        capacity_factor=1.0, max_experts_per_token=2, linear_programme=True
    ),
    "eval factor": lambda: ExpertChoiceRouter(capacity_factor=1.0, eval_capacity_factor=2.0),
    "eval capacity": lambda: TopKRouter(2, eval_capacity_factor=0.75, min_capacity=1),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("router", FORWARD.values(), ids=FORWARD)
def test_inference_is_the_oracles(router, masked):
    layer = built(router())
    if getattr(layer.router, "inference", None) == "threshold":
        layer.router.threshold.assign([0.1, 0.3, 0.5, 0.2])
    weights = {v.name: numpy(v).astype("float64") for v in layer.trainable_variables}
    mask = MASK if masked else None
    y, losses, weight = expected(layer.router, "sequence", X, mask, weights, training=False)
    assert 0 < np.sum(weight > 0) < 0.6 * weight.size
    np.testing.assert_allclose(numpy(layer(X, mask=mask)), y, rtol=1e-5, atol=1e-5)
    assert float(sum(layer.losses)) == pytest.approx(losses, rel=1e-5)


EVERY = {
    "switch": lambda **kwargs: SwitchRouter(E, eval_capacity_factor=0.75, min_capacity=1, **kwargs),
    "k=2": lambda **kwargs: TopKRouter(2, E, eval_capacity_factor=0.75, min_capacity=1, **kwargs),
    "dropless": lambda **kwargs: TopKRouter(2, E, **kwargs),
    "surest first": lambda **kwargs: TopKRouter(
        2, E, eval_capacity_factor=0.75, min_capacity=1, priority="probability", **kwargs
    ),
    "expert choice": lambda **kwargs: ExpertChoiceRouter(E, **kwargs),
    "threshold": lambda **kwargs: ExpertChoiceRouter(E, inference="threshold", **kwargs),
    "strict": lambda **kwargs: StrictlyBalancedRouter(E, **kwargs),
}
ROUTERS = pytest.mark.parametrize("router", EVERY.values(), ids=EVERY)


CAPPED = {
    "capped": lambda: ExpertChoiceRouter(E, max_experts_per_token=2),
    "by programme": lambda: ExpertChoiceRouter(E, max_experts_per_token=2, linear_programme=True),
}


def call(layer, x, **kwargs):
    """Outputs, losses and what the call added to the statistics."""
    for variable in layer.statistics:
        variable.assign(np.zeros(variable.shape))
    y = numpy(layer(tensor(x, "float32"), **kwargs))
    return y, [float(loss) for loss in layer.losses], [numpy(v) for v in layer.statistics]


def set_threshold(layer):
    if hasattr(layer.router, "threshold"):
        layer.router.threshold.assign([0.1, 0.3, 0.5, 0.2])
    return layer


class TestPadding:
    @pytest.mark.parametrize("content", [50.0, np.inf, np.nan])
    @pytest.mark.parametrize("group", marked(["sequence", "batch", 7], "sequence"))
    @ROUTERS
    def test_its_content_changes_nothing(self, router, group, content):
        layer = set_threshold(built(router(router_z_weight=0.5), group))
        content = content * np.random.default_rng(3).normal(size=X.shape)
        other = np.where(MASK[..., None], X, content)
        one, two = (call(layer, x, mask=MASK) for x in (X, other))
        np.testing.assert_allclose(one[0], two[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one[1], two[1], rtol=1e-6)
        for a, b in zip(one[2], two[2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        assert (one[0][~MASK] == 0).all() and (one[0][MASK] != 0).any()

    @pytest.mark.every_backend
    @ROUTERS
    def test_its_content_changes_no_gradient(self, router):
        layer = set_threshold(built(router(router_z_weight=0.5)))
        zeros = np.where(MASK[..., None], X, 0.0)
        other = zeros.copy()
        other[1, 3], other[1, 5] = np.nan, np.inf
        (*_, by_x, by_weight), (*_, by_other, by_its_weight) = run_each(
            layer, (zeros, other), np.ones(X.shape), mask=MASK
        )
        np.testing.assert_allclose(by_other, by_x, rtol=1e-6, atol=1e-6)
        assert (by_other[~MASK] == 0).all()
        for a, b in zip(by_weight, by_its_weight, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    def test_mask_comes_with_the_inputs(self):
        """As `Embedding(mask_zero=True)` sends it, and goes on to the next layer."""
        tokens = keras.Input((None,), dtype="int32")
        embedded = keras.layers.Embedding(9, D, mask_zero=True)(tokens)
        layer = built(EVERY["k=2"]())
        outputs = layer(embedded)
        mean = keras.layers.GlobalAveragePooling1D()(outputs)  # without padding, if it gets a mask
        model = keras.Model(tokens, [outputs, embedded, mean])
        ids = np.array([[3, 4, 5, 6, 7, 0], [1, 2, 0, 0, 0, 0]])
        y, x, mean = (numpy(t) for t in model(ids))
        np.testing.assert_allclose(y, numpy(layer(tensor(x), mask=ids > 0)), rtol=1e-6, atol=1e-6)
        assert (y[ids == 0] == 0).all()
        np.testing.assert_allclose(mean, y.sum(axis=1) / [[5], [2]], rtol=1e-5, atol=1e-6)

    def test_nothing_but_padding(self):
        y, losses, _ = call(built(EVERY["k=2"]()), X, mask=np.zeros((2, 6), bool))
        assert (y == 0).all() and losses == [0.0]


class TestRematerialisation:
    @pytest.mark.parametrize(
        "router",
        [
            lambda: SwitchRouter(capacity_factor=1.0, seed=2),
            lambda: TopKRouter(2),
            lambda: ExpertChoiceRouter(inference="threshold"),
        ],
        ids=["switch", "dropless", "expert choice"],
    )
    def test_trains_the_same(self, router):
        def losses(scope):
            with scope:
                experts = FeedForwardExperts(E, 16, dropout=0.5, seed=1)
                layer = MixtureOfExperts(experts, router())
            inputs = keras.Input((6, D))
            model = keras.Model(inputs, inputs + layer(inputs))
            rng = np.random.default_rng(0)
            layer.router.kernel.assign(rng.normal(size=(D, E)))
            model.compile(keras.optimizers.SGD(0.1), "mse")
            x = rng.normal(size=(8, 6, D)).astype("float32")
            return model.fit(x, np.sin(x), 4, 2, verbose=0, shuffle=False).history["loss"]

        plain, remat = losses(contextlib.nullcontext()), losses(keras.RematScope("full"))
        assert plain[0] != plain[1]
        assert remat == pytest.approx(plain, rel=1e-6)

    def test_computes_the_hidden_units_again(self):
        def multiplications(scope):
            with scope:
                layer = MixtureOfExperts(FeedForwardExperts(E, 16), TopKRouter(2))
            layer.build((None, None, D))
            return cost(layer, X, np.ones_like(X), training=True)[1]

        plain = multiplications(contextlib.nullcontext())
        assert multiplications(keras.RematScope("full")) > plain


class TestCompact:
    """Few tokens, many experts: a capacity must not make experts run that nobody chose."""

    @pytest.mark.parametrize("tokens", [1, 6])
    @pytest.mark.parametrize("training", [False, True])
    def test_drops_what_the_capacity_drops(self, tokens, training):
        # min_capacity makes 32 slots for 6 choices. Every token is the same and wants expert 5, of
        # which each of the two groups has 2 slots.
        router = TopKRouter(1, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=2)
        layer = MixtureOfExperts(FeedForwardExperts(16, 4, "linear"), router)
        layer.build((None, None, D))
        router.kernel.assign(np.eye(16)[5] * np.ones((D, 1)))
        x = np.ones((2, tokens, D), "float32")
        routing = router(tensor(x), training=training, compact=True)
        assert set(numpy(routing.row_expert)) <= {5, 16}
        y = numpy(layer(tensor(x), training=training))
        served = min(tokens, 2)
        assert (y[:, :served] != 0).any(axis=-1).all() and (y[:, served:] == 0).all()
        table = router(tensor(x), training=training)
        assert table.row_expert is None
        kept = numpy(routing.slot_index) < np.prod(routing.token_index.shape[1:])
        np.testing.assert_array_equal(kept, numpy(table.slot_index) < 16 * 2)

    def test_keeps_the_surest(self):
        # Token s wants expert 5 with logit 1, 3, 2, 3, 0, 4 and there are 2 slots for it.
        router = TopKRouter(1, 16, eval_capacity_factor=1.0, min_capacity=2, priority="probability")
        router.build((None, None, 1))
        router.kernel.assign(np.eye(16)[5:6])
        x = tensor([[[1.0], [3.0], [2.0], [3.0], [0.5], [4.0]]])
        for compact in (False, True):
            routing = numpy(router(x, compact=compact))
            assert (routing.row_expert is None) == (not compact)
            slots = np.prod(routing.token_index.shape[1:])
            assert np.flatnonzero(routing.slot_index < slots).tolist() == [1, 5]

    def test_few_tokens_cost_the_same_with_many_experts(self):
        def products(experts):
            layer = MixtureOfExperts(FeedForwardExperts(experts, 4), SwitchRouter())
            layer.build((None, None, D))
            x = np.ones((2, 1, D))
            return cost(layer, x, x)[1] - 3 * 2 * D * experts  # but for the router's own

        assert products(4) == products(64)


@pytest.mark.every_backend
@pytest.mark.parametrize("shape", [(0, 6, D), (2, 0, D), (0, D)])
@pytest.mark.parametrize("group", ["sequence", "batch", 4])
@ROUTERS
def test_no_tokens(router, group, shape):
    layer = MixtureOfExperts(FeedForwardExperts(E, 4), router(), group)
    layer.build((None, None, D))
    y = numpy(layer(ops.zeros(shape), training=True))
    assert y.shape == shape and np.isfinite([float(loss) for loss in layer.losses]).all()


class TestSelectivePrecision:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
    @ROUTERS
    def test_router_in_float32(self, router, policy):
        """The selection is the one float32 makes of the same bfloat16 inputs."""
        experts = FeedForwardExperts(E, F, dtype=policy)
        keras.config.set_dtype_policy(policy)
        try:
            layer = MixtureOfExperts(experts, router(router_z_weight=0.5), dtype=policy)
        finally:
            keras.config.set_dtype_policy("float32")
        layer.build((None, None, D))
        layer.router.kernel.assign(np.random.default_rng(1).normal(size=(D, E)))
        x = ops.cast(X, "bfloat16")
        y = layer(x)
        assert ops.dtype(y) == "bfloat16"
        assert {ops.dtype(loss) for loss in layer.losses} == {"float32"}
        assert {v.dtype for v in layer.statistics} == {"float32"}
        routing = numpy(layer.router(x))
        p = oracle.softmax(
            numpy(ops.cast(x, "float32")) @ numpy(layer.router.kernel).astype("float64")
        )
        np.testing.assert_allclose(routing.probabilities, p, rtol=1e-5)
        # Outputs: of the float32 layer with the same weights, to the precision of bfloat16 (2^-8).
        exact = MixtureOfExperts(FeedForwardExperts(E, F), router())
        exact.build((None, None, D))
        for ours, theirs in zip(exact.trainable_variables, layer.trainable_variables, strict=True):
            ours.assign(ops.cast(theirs, "float32"))
        reference = numpy(exact(ops.cast(x, "float32")))
        np.testing.assert_allclose(
            numpy(ops.cast(y, "float32")), reference, atol=0.02 * np.abs(reference).max()
        )

    @pytest.mark.every_backend
    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
    @pytest.mark.parametrize("router", [SwitchRouter, lambda: TopKRouter(1)])
    def test_a_near_tie_of_large_logits(self, router, policy):
        """100.0 and 100.2 are equal in bfloat16, which would take the first, with weight 1/2."""
        layer = MixtureOfExperts(FeedForwardExperts(2, F, dtype=policy), router(), dtype=policy)
        layer.build((None, None, 1))
        layer.router.kernel.assign([[100.0, 100.2]])
        _, routing = layer.outputs_and_routing(ops.ones((1, 3, 1), "bfloat16"))
        assert numpy(routing.expert_index).tolist() == [[[1]] * 3]
        assert numpy(routing.weight).max() == pytest.approx(1 / (1 + np.exp(-0.2)), rel=1e-5)

    def test_fit(self):
        inputs = keras.Input((6, D))
        experts = FeedForwardExperts(E, F, dropout=0.1, dtype="mixed_bfloat16")
        layer = MixtureOfExperts(experts, SwitchRouter(), dtype="mixed_bfloat16")
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="mixed_bfloat16")(layer(inputs)))
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=JIT)
        history = model.fit(np.tile(X, (4, 1, 1)), np.ones((8, 6, 1)), 4, epochs=2, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        assert {v.dtype for v in layer.trainable_variables} == {"float32"}


class TestRandomness:
    @ROUTERS
    def test_inference_is_deterministic(self, router):
        layer = set_threshold(built(router(jitter=0.3), dropout=0.5))
        np.testing.assert_array_equal(call(layer, X)[0], call(layer, X)[0])
        first, second = (call(layer, X, training=True)[0] for _ in range(2))
        assert (first != second).any()

    def test_jitter_leaves_the_experts_inputs_alone(self):
        """One expert has probability 1 whatever the router's input."""
        layer = built(SwitchRouter(1, capacity_factor=None, eval_capacity_factor=None, jitter=0.5))
        np.testing.assert_array_equal(call(layer, X)[0], call(layer, X, training=True)[0])


def dense(**kwargs):
    return keras.layers.Dense(D, activation="tanh", name="shared", **kwargs)


def bank(experts=2, **kwargs):
    return FeedForwardExperts(experts, F, name="shared", **kwargs)


def layers():
    return LayerExperts([dense(), keras.layers.Dense(D, name="other")], name="shared")


def model():
    return keras.Sequential([keras.layers.Dense(5, "relu"), keras.layers.Dense(D)], name="shared")


SHARED = {"layer": dense, "model": model, "bank": bank, "layers": layers}


def with_shared(shared, router=None, group="sequence"):
    router = TopKRouter(2, E) if router is None else router
    layer = MixtureOfExperts(FeedForwardExperts(E, F), router, group, shared)
    layer.build((None, None, D))
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


class TestShared:
    def by_hand(self, layer, x):
        """What the shared layer alone makes of the tokens."""
        if not hasattr(layer.shared, "num_experts"):
            return numpy(layer.shared(x))
        tokens = x.reshape(1, -1, D)
        each = numpy(layer.shared(np.repeat(tokens, layer.shared.num_experts, axis=0)))
        return each.sum(axis=0).reshape(x.shape)

    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
    @pytest.mark.parametrize("group", ["sequence", 7])
    @pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
    def test_is_added_to_every_token_but_padding(self, shared, group, masked):
        router = SwitchRouter(E, eval_capacity_factor=0.5, min_capacity=1)
        layer = with_shared(shared(), router, group)
        x, mask = X.astype("float32"), MASK if masked else None
        y, losses, _ = call(layer, x, mask=mask)
        alone = self.by_hand(layer, x)
        layer.shared = None
        routed, routed_losses, _ = call(layer, x, mask=mask)
        assert (routed == 0).all(axis=-1).any() and losses == routed_losses
        expected = np.where(MASK[..., None], alone, 0.0) if masked else alone
        np.testing.assert_allclose(y, routed + expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shared", [dense, bank])
    def test_gradients(self, shared):
        """Of the tanh layer by hand: W, 1 - y^2; of the bank by differences of the oracle."""
        layer, x = with_shared(shared()), X.copy()
        weights = {v.path.split("/", 1)[1]: numpy(v) for v in layer.trainable_variables}
        weights = {path: w.astype("float64") for path, w in weights.items()}
        routed = {path.split("/")[1]: w for path, w in weights.items() if "shared" not in path}
        own = {path.split("/")[1]: w for path, w in weights.items() if "shared" in path}

        def loss():
            y, losses, _ = expected(layer.router, "sequence", x, MASK, routed, training=True)
            for at in zip(*np.nonzero(MASK), strict=True):
                if shared is dense:
                    y[at] += np.tanh(x[at] @ own["kernel"] + own["bias"])
                else:
                    y[at] += sum(oracle.feed_forward(x[at], own, e) for e in range(2))
            return y.sum() + losses

        *_, by_x, by_weight = run(layer, X, np.ones(X.shape), mask=MASK, training=True)
        slopes = oracle.gradient(loss, [x, *weights.values()])
        for ours, slope in zip([by_x, *by_weight], slopes, strict=True):
            np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("shared", [dense, bank])
    def test_padding_of_nan_and_infinity(self, shared):
        layer = with_shared(shared())
        zeros = np.where(MASK[..., None], X, 0.0)
        other = zeros.copy()
        other[1, 3], other[1, 5] = np.nan, np.inf
        one, two = run_each(layer, (zeros, other), np.ones(X.shape), mask=MASK)
        for a, b in zip((one[0], one[2], *one[3]), (two[0], two[2], *two[3]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)

    def test_trains_with_dropout_only_in_training(self):
        shared = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(D)], name="shared")
        layer = with_shared(shared)
        np.testing.assert_array_equal(call(layer, X)[0], call(layer, X)[0])
        assert (call(layer, X, training=True)[0] != call(layer, X)[0]).any()

    @pytest.mark.parametrize("shape", [(0, 6, D), (2, 0, D), (0, D), (6, D)])
    @pytest.mark.parametrize("shared", [dense, bank])
    def test_few_tokens_or_none(self, shared, shape):
        y = numpy(with_shared(shared())(ops.ones(shape), training=True))
        assert y.shape == shape and np.isfinite(y).all()

    @pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
    def test_comes_back_from_a_file(self, shared, tmp_path):
        inputs = keras.Input((None, D))
        layer = with_shared(shared())
        keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.layers[1].shared) is type(layer.shared)
        np.testing.assert_array_equal(numpy(loaded(X)), numpy(layer(tensor(X, "float32"))))

    def test_fit(self):
        keras.utils.set_random_seed(0)
        x, y = tiny_problem()
        inputs = keras.Input((None, D))
        layer = MixtureOfExperts(FeedForwardExperts(E, 16), TopKRouter(2), shared=bank(1))
        model = keras.Model(inputs, inputs + layer(inputs))
        model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=JIT)
        loss = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history["loss"]
        assert loss[-1] < 0.7 * loss[0]
        paths = {v.path.split("/", 1)[1] for v in layer.trainable_variables}
        assert {"shared/kernel_in", "experts/kernel_in", "router/kernel"} <= paths

    def test_in_a_lower_precision(self):
        experts = FeedForwardExperts(E, F, dtype="mixed_bfloat16")
        layer = MixtureOfExperts(
            experts, TopKRouter(2), shared=bank(dtype="mixed_bfloat16"), dtype="mixed_bfloat16"
        )
        y = layer(X, mask=MASK)
        assert ops.dtype(y) == "bfloat16" and (numpy(ops.cast(y, "float32"))[~MASK] == 0).all()


class TestFineGrained:
    """4 experts of width 16, 2 for each token, against 16 of width 4, 8 for each token."""

    def layer(self, m, shared=0):
        width = 16 // m
        extra = FeedForwardExperts(1, shared * width, name="shared") if shared else None
        experts = FeedForwardExperts(4 * m - shared, width, implementation="batched")
        router = TopKRouter(2 * m - shared, capacity_factor=1.0, eval_capacity_factor=1.0)
        layer = MixtureOfExperts(experts, router, shared=extra)
        layer.build((None, None, D))
        return layer

    @pytest.mark.parametrize(("m", "shared"), [(4, 0), (4, 2)])
    def test_as_many_weights_and_multiplications(self, m, shared):
        layer = self.layer(m, shared)
        paths = [v.path for v in layer.trainable_variables if "router" not in v.path]
        assert len(paths) == (4 if shared else 2)
        weights = sum(math.prod(v.shape) for v in layer.trainable_variables if v.path in paths)
        assert weights == 4 * 2 * 16 * D
        # 28 tokens make 28 * 2 / 4 = 28 * 8 / 16 = 14 or 28 * 6 / 14 = 12 slots for each expert.
        x = np.random.default_rng(0).normal(size=(2, 28, D))
        products = cost(layer, x, np.ones(x.shape), training=True)[1]
        router = 3 * 56 * D * layer.experts.num_experts
        # Forward and the two gradients; k, tokens; in and out.
        assert products - router == 3 * 2 * 56 * 2 * D * 16


class TestGradientOfTheRouter:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_one_choice_teaches_it_the_task(self, normalize):
        """Its weight is the raw probability: normalised to 1 it would have no gradient."""
        layer = built(TopKRouter(1, normalize=normalize, load_balancing_weight=0.0))
        _, _, _, by_weight = run(layer, X, np.ones(X.shape))
        by_router = by_weight[[v.name for v in layer.trainable_variables].index("kernel")]
        assert np.abs(by_router).max() > 0.1


def test_a_dropped_token_is_exactly_zero_and_its_neighbour_is_not():
    layer = built(SwitchRouter(E, eval_capacity_factor=1.0, min_capacity=1))
    layer.router.kernel.assign(np.zeros((D, E)))
    # Where all are equal every token takes expert 0, whose capacity is ceil(6 * 1 / 4) = 2.
    y = call(layer, X)[0]
    assert (y[:, :2] != 0).any(axis=-1).all() and (y[:, 2:] == 0).all()


class TestCost:
    """Shapes for which what must not be made could not be missed: 1,024 tokens, 8 experts."""

    T, E, D, F = 1024, 8, 16, 16
    ROUTERS = {
        "switch": (lambda: SwitchRouter(capacity_factor=1.0), 1.0),
        "k=2": (lambda: TopKRouter(2, capacity_factor=1.0), 2.0),
        "k=1, dropless": (lambda: TopKRouter(1), 1.0),
        "k=2, dropless": (lambda: TopKRouter(2), 2.0),
        "expert choice": (lambda: ExpertChoiceRouter(capacity_factor=2.0), 2.0),
        "expert choice, capped": (
            lambda: ExpertChoiceRouter(max_experts_per_token=2, linear_programme=True),
            2.0,
        ),
    }

    @pytest.fixture(scope="module", params=marked(ROUTERS, "k=2", "k=2, dropless"))
    def case(self, request):
        router, experts_per_token = self.ROUTERS[request.param]
        layer = MixtureOfExperts(FeedForwardExperts(self.E, self.F), router())
        layer.build((None, None, self.D))
        x = np.random.default_rng(0).normal(size=(2, self.T // 2, self.D))
        return *cost(layer, x, np.ones(x.shape), training=True), experts_per_token

    def test_nothing_of_size_tokens_by_experts_by_dim_or_capacity(self, case):
        largest, _, _ = case
        # tokens x experts x dim is 131,072 numbers, and tokens x experts x capacity (64 slots for
        # each sequence and choice) four times that; the slots are 1,024 to 2,496 rows of 16.
        assert largest < self.T * self.E * self.D / 2

    @pytest.mark.parametrize("router", [TopKRouter(4), TopKRouter(4, capacity_factor=1.0)])
    def test_nothing_of_size_tokens_by_choices_by_experts(self, router):
        layer = MixtureOfExperts(FeedForwardExperts(64, 2), router)
        layer.build((None, None, 2))
        x = np.random.default_rng(0).normal(size=(2, self.T // 2, 2))
        largest, *_ = cost(layer, x, np.ones(x.shape), training=True)
        # 262,144 numbers; tokens x experts, the router's probabilities, is 65,536.
        assert largest < self.T * 4 * 64 / 2

    def test_not_all_experts_see_all_tokens(self, case):
        _, multiplications, experts_per_token = case
        # Forward, gradient of the inputs and of the kernels: 3 products, in and out. The router's
        # three are small change.
        ideal = 3 * experts_per_token * self.T * 2 * self.D * self.F
        router = 3 * self.T * self.D * self.E
        assert ideal <= multiplications - router <= 1.6 * ideal  # all to all would be 8 or 4 times


def tiny_problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6, D)).astype("float32")
    return x, np.sin(2 * x)


def moe(router=None):
    router = router or TopKRouter(2, capacity_factor=2.0)
    return MixtureOfExperts(FeedForwardExperts(E, 16, seed=1), router)


class Residual(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = moe()

    def call(self, inputs, training=False):
        return inputs + self.layer(inputs, training=training)


def functional(router=None):
    inputs = keras.Input((None, D))
    return keras.Model(inputs, inputs + moe(router)(inputs))


class TestModels:
    @pytest.mark.parametrize(
        "model",
        [
            functional,
            Residual,
            lambda: keras.Sequential([keras.Input((6, D)), moe()]),
            *(lambda router=router: functional(router()) for router in CAPPED.values()),
        ],
        ids=["functional", "subclassed", "sequential", *CAPPED],
    )
    def test_fit_learns(self, model):
        keras.utils.set_random_seed(0)
        x, y = tiny_problem()
        model = model()
        model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=JIT)
        loss = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history["loss"]
        assert loss[-1] < 0.7 * loss[0]

    @pytest.mark.parametrize(
        ("name", "group"),
        [
            pytest.param("k=2", 4, marks=pytest.mark.every_backend),
            pytest.param("dropless", "sequence", marks=pytest.mark.every_backend),
            ("expert choice", "sequence"),
            ("by programme", "sequence"),
        ],
    )
    def test_length_not_known(self, name, group):
        """One functional model for all lengths and batch sizes, traced once without either."""
        inputs = keras.Input((None, D))
        layer = built((EVERY | CAPPED)[name](), group)
        model = keras.Model(inputs, layer(inputs))
        assert model.output_shape == (None, None, D)
        model.compile(jit_compile=False)
        for x in (X, X[:1, :5]):
            y = model.predict(x, verbose=0)
            np.testing.assert_allclose(y, call(layer, x)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.every_backend
    @pytest.mark.parametrize("name", ["k=2", "dropless", "expert choice", *CAPPED])
    def test_length_not_known_to_the_graph(self, name):
        """As a data set of ragged batches has it: TensorFlow's graph then knows no shape."""
        if keras.backend.backend() != "tensorflow":
            pytest.skip("only TensorFlow's graphs have unknown shapes")
        import tensorflow as tf

        for group in ("sequence", "batch", 4):
            layer = built((EVERY | CAPPED)[name](), group)
            graph = tf.function(layer, input_signature=[tf.TensorSpec((None, None, D))])
            y = graph(tf.constant(X, "float32"))
            np.testing.assert_allclose(numpy(y), call(layer, X)[0], rtol=1e-5, atol=1e-5)

    def test_2d_is_one_group(self):
        layer = built(EVERY["k=2"]())
        flat = call(layer, X[0])[0]
        np.testing.assert_allclose(flat, call(layer, X[:1])[0][0], rtol=1e-5, atol=1e-5)

    def test_weight_paths(self):
        layer = MixtureOfExperts(FeedForwardExperts(2, 3), SwitchRouter(), name="moe")
        layer(keras.Input((4, D)))
        paths = [v.path for v in layer.trainable_variables]
        assert paths == [
            "moe/experts/kernel_in",
            "moe/experts/kernel_out",
            "moe/router/kernel",
        ]

    def test_losses_are_this_calls(self):
        layer = built(TopKRouter(2, E, router_z_weight=0.5))
        for _ in range(2):
            layer(tensor(X, "float32"))
            assert len(layer.losses) == 2


def test_every_config_key_makes_the_round_trip():
    arguments = {
        "experts": LayerExperts([keras.layers.Dense(5), keras.layers.Dense(5)]),
        "router": TopKRouter(2, normalize=False),
        "group": 7,
        "shared": keras.layers.Dense(5, use_bias=False, name="shared"),
    }
    assert set(arguments) == set(inspect.signature(MixtureOfExperts).parameters) - {"kwargs"}
    made = MixtureOfExperts(**arguments, name="mine", dtype="mixed_bfloat16")
    copy = MixtureOfExperts.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert (copy.name, copy.group, copy.dtype_policy.name) == ("mine", 7, "mixed_bfloat16")
    assert type(copy.router) is TopKRouter and copy.router.normalize is False
    assert type(copy.experts) is LayerExperts and copy.experts.num_experts == 2
    assert type(copy.shared) is keras.layers.Dense and copy.shared.use_bias is False


@pytest.mark.every_backend
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone compiles plain calls")
@pytest.mark.parametrize("router", [SwitchRouter(E), TopKRouter(2, E)], ids=["capacity", "all"])
def test_a_plain_call_compiles_nothing_that_was_compiled(router):
    import jax

    compiled = []

    def listen(event, seconds, **_):
        compiled.append(event)

    layer, x = built(router), np.ones((2, 5, D), "float32")
    layer(x)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        layer(x)
        assert not compiled
        jax.jit(lambda x: x + 1)(0.0)  # is heard
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda e, r: MixtureOfExperts(r, e),
                "`router`.*router=<FeedForwardExperts",
            ),
            (
                lambda e, r: MixtureOfExperts(keras.layers.Dense(3), r),
                "`experts`.*experts=<Dense",
            ),
            (lambda e, r: MixtureOfExperts([e], r), r"`experts`.*experts=\[<FeedForwardExperts"),
            (
                lambda e, r: MixtureOfExperts(e, r, group="row"),
                "`group`.*group='row'",
            ),
            (
                lambda e, r: MixtureOfExperts(e, r, shared="dense"),
                "`shared`.*shared='dense'",
            ),
            (
                lambda e, r: MixtureOfExperts(e, r, shared=FeedForwardExperts(1, 4)),
                "`shared`.*'experts'",
            ),
            (
                lambda e, r: MixtureOfExperts(e, r, shared=keras.layers.Dense(3, name="router")),
                "`shared`.*'router'",
            ),
            (lambda e, r: MixtureOfExperts(e, r, group=0), "`group`.*group=0"),
            (lambda e, r: MixtureOfExperts(e, r, group=True), "`group`.*group=True"),
            (lambda e, r: MixtureOfExperts(e, r, group=None), "`group`.*group=None"),
            (
                lambda e, r: MixtureOfExperts(e, TopKRouter(3)),
                "`k`.*k=3.*num_experts=2",
            ),
            (
                lambda e, r: MixtureOfExperts(e, SwitchRouter(4)),
                "num_experts=4.*num_experts=2",
            ),
        ],
    )
    def test_when_it_is_made(self, make, message):
        with pytest.raises(ValueError, match=message):
            make(FeedForwardExperts(2, 4), SwitchRouter())

    @pytest.mark.parametrize(
        "router",
        [
            TopKRouter(2),
            SwitchRouter(eval_capacity_factor=None),
            SwitchRouter(capacity_factor=None),
            ExpertChoiceRouter(inference="threshold"),
            StrictlyBalancedRouter(),
        ],
    )
    def test_batched_experts_without_a_capacity(self, router):
        """They would fail when they are called, some not before the first validation."""
        experts = FeedForwardExperts(2, 4, implementation="batched")
        received = f"router=<{type(router).__name__}"
        with pytest.raises(ValueError, match=f"`experts`.*'batched'.*{received}"):
            MixtureOfExperts(experts, router)

    @pytest.mark.parametrize("router", [SwitchRouter, ExpertChoiceRouter])
    @pytest.mark.parametrize("training", [True, False])
    def test_batched_experts_with_a_capacity(self, router, training):
        layer = MixtureOfExperts(FeedForwardExperts(2, 4, implementation="batched"), router())
        layer(np.ones((1, 3, D), "float32"), training=training)

    @pytest.mark.parametrize("shape", [(3,), (1, 2, 4, 3)])
    def test_rank_of_the_inputs(self, shape):
        layer = MixtureOfExperts(FeedForwardExperts(2, 4), SwitchRouter())
        with pytest.raises(ValueError, match=f"`inputs`.*{re.escape(str(shape))}"):
            layer(np.ones(shape, "float32"))

    def test_unknown_dim(self):
        layer = MixtureOfExperts(FeedForwardExperts(2, 4), SwitchRouter())
        with pytest.raises(ValueError, match=r"`inputs`.*\(None, 4, None\)"):
            layer.build((None, 4, None))

    @pytest.mark.parametrize("width", [1, 2])
    def test_width_of_the_shared_layer(self, width):
        shared = keras.layers.Dense(width)
        layer = MixtureOfExperts(FeedForwardExperts(2, 4), SwitchRouter(), shared=shared)
        with pytest.raises(ValueError, match=f"`shared`.* {width} .* 3"):
            layer.build((None, None, 3))

    @pytest.mark.parametrize("shape", [(2, 5), (2,), (2, 6, 3), (12,)])
    def test_shape_of_the_mask(self, shape):
        layer = built(SwitchRouter(E))
        with pytest.raises(ValueError, match=f"`mask`.*{re.escape(str(shape))}"):
            layer(np.ones((2, 6, D), "float32"), mask=np.ones(shape, bool))
