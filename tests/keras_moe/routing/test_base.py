import inspect
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    HashRouter,
    HierarchicalRouter,
    LinearExperts,
    LossFreeRouter,
    NoisyTopKRouter,
    SoftmaxRouter,
    StrictlyBalancedRouter,
    SwitchRouter,
    TopKRouter,
)
from keras_moe.metrics import experts_per_token_histogram
from keras_moe.routing import seat_choices
from tests import oracle
from tests.backend import numpy
from tests.keras_moe.routing.examples import with_identity

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor

KINDS = {
    "switch": lambda **kwargs: SwitchRouter(4, **kwargs),
    "top-k": lambda **kwargs: TopKRouter(2, 4, **kwargs),
    "expert choice": lambda **kwargs: ExpertChoiceRouter(4, **kwargs),
}
ROUTERS = pytest.mark.parametrize("router", KINDS.values(), ids=KINDS)


class TestRouter:
    @ROUTERS
    def test_jitter_only_while_training(self, router):
        x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype("float32")
        router = with_identity(router(jitter=0.1, seed=1))
        for _ in range(2):
            np.testing.assert_allclose(numpy(router(x).logits), x, rtol=1e-6)
        first, second = (numpy(router(x, training=True).logits) for _ in range(2))
        assert (first != second).any()
        # Multiplicative and within bounds.
        assert 0.9 <= (first / x).min() < 0.95 and 1.05 < (first / x).max() <= 1.1

    @ROUTERS
    def test_no_jitter_no_noise(self, router):
        x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype("float32")
        logits = with_identity(router(jitter=0.0))(x, training=True).logits
        np.testing.assert_allclose(numpy(logits), x, rtol=1e-6)

    @ROUTERS
    @pytest.mark.parametrize("content", [50.0, np.nan])
    def test_padding_is_read_as_zeros(self, router, content):
        x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype("float32")
        mask = np.array([[True] * 4 + [False] * 2])
        expected = np.where(mask[..., None], x, 0)
        x[~mask] = content
        logits = with_identity(router())(x, mask=mask).logits
        np.testing.assert_allclose(numpy(logits), expected, rtol=1e-6)

    def test_seed(self):
        x = np.ones((1, 6, 4), "float32")
        one, two = (with_identity(SwitchRouter(4, jitter=0.1, seed=7)) for _ in range(2))
        a, b = (numpy(router(x, training=True).logits) for router in (one, two))
        np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
    @ROUTERS
    def test_float32_under_every_policy(self, router, policy):
        x = ops.cast(np.random.default_rng(0).normal(size=(1, 6, 8)), "bfloat16")
        plain = router(kernel_initializer=keras.initializers.RandomNormal(stddev=1, seed=0))
        keras.config.set_dtype_policy(policy)
        try:
            lower = router(kernel_initializer=keras.initializers.RandomNormal(stddev=1, seed=0))
            routing = lower(x)
        finally:
            keras.config.set_dtype_policy("float32")
        assert keras.backend.standardize_dtype(lower.kernel.dtype) == "float32"
        for name in ("logits", "probabilities", "weight"):
            assert ops.dtype(getattr(routing, name)) == "float32"
        for loss in lower.auxiliary_losses(routing):
            assert ops.dtype(loss) == "float32"
        # The same selection as float32 makes of the same inputs.
        expected = plain(ops.cast(x, "float32"))
        np.testing.assert_array_equal(numpy(routing.token_index), numpy(expected.token_index))
        np.testing.assert_allclose(numpy(routing.weight), numpy(expected.weight), rtol=1e-6)

    @ROUTERS
    def test_kernel(self, router):
        router = router()
        router.build((None, None, 400))
        assert [v.path.split("/")[-1] for v in router.trainable_variables] == ["kernel"]
        kernel = numpy(router.kernel)
        assert kernel.shape == (400, 4)
        # Truncated at two of the 1,600 entries' standard deviations of .02, which leaves .88 of it.
        assert kernel.std() == pytest.approx(0.88 * 0.02, rel=0.1)

    def test_kernel_initializer(self):
        router = SwitchRouter(4, kernel_initializer="ones")
        router.build((None, None, 3))
        assert numpy(router.kernel).tolist() == [[1.0] * 4] * 3

    def test_losses_with_their_weights(self):
        x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
        mask = np.array([[True] * 5, [True, True, False, False, False]])
        router = with_identity(TopKRouter(2, 4, load_balancing_weight=0.5, router_z_weight=0.25))
        z, balance = (float(loss) for loss in router.auxiliary_losses(router(x, mask=mask)))
        p = oracle.softmax(x.astype("float64"))
        _, chosen = oracle.token_choice(p, k=2, mask=mask)
        assert balance == pytest.approx(0.5 * oracle.load_balancing(p, chosen, mask), rel=1e-5)
        assert z == pytest.approx(0.25 * oracle.router_z(x.astype("float64"), mask), rel=1e-5)

    @pytest.mark.parametrize(
        ("router", "count"),
        [
            (SwitchRouter(2), 1),
            (SwitchRouter(2, load_balancing_weight=0.0), 0),
            (TopKRouter(2, 2, router_z_weight=1e-3), 2),
            (ExpertChoiceRouter(2), 0),
            (ExpertChoiceRouter(2, router_z_weight=1e-3), 1),
        ],
    )
    def test_a_loss_of_weight_zero_is_not_added(self, router, count):
        routing = router(np.ones((1, 3, 2), "float32"))
        assert len(router.auxiliary_losses(routing)) == count

    def test_losses_count_what_was_dropped(self):
        """Choices count before any is dropped: three tokens to one expert, one of them seated."""
        router = with_identity(SwitchRouter(2, capacity_factor=0.5, min_capacity=1), scale=50.0)
        routing = router(np.array([[[1, 0]] * 3], "float32"), training=True)
        assert routing.token_index.shape[2] == 1
        loss = float(router.auxiliary_losses(routing)[0])
        assert loss == pytest.approx(0.01 * 2, rel=1e-5)  # f = P = (1, 0): 2 * 1 * 1


def test_seat_choices_reads_in_both_directions():
    rng = np.random.default_rng(0)
    choices = np.argsort(rng.random((2, 5, 3)), axis=-1)[..., :2].astype("int32")
    weight = rng.random((2, 5, 2)).astype("float32")
    seats = numpy(tuple(seat_choices(tensor(choices), tensor(weight), 3, 2)))
    token_index, slot_weight, slot_index, _ = seats
    for (g, s, k), slot in np.ndenumerate(slot_index):
        if slot < 6:
            assert slot // 2 == choices[g, s, k]
            assert token_index[g].reshape(-1)[slot] == s
            assert slot_weight[g].reshape(-1)[slot] == weight[g, s, k]
    assert np.sum(slot_index < 6) == np.sum(token_index < 5)


CONFIGS = {
    SwitchRouter: {
        "num_experts": 4,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 3.0,
        "min_capacity": 2,
        "priority": "probability",
        "load_balancing_weight": 0.5,
        "exploration": "sample",
        "jitter": 0.25,
        "input_dropout": 0.5,
        "reroutes": 1,
        "router_z_weight": 0.125,
        "kernel_initializer": keras.initializers.Constant(2.0),
        "seed": 7,
    },
    TopKRouter: {
        "k": 3,
        "num_experts": 4,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 3.0,
        "min_capacity": 2,
        "priority": "probability",
        "normalize": False,
        "load_balancing_weight": 0.5,
        "jitter": 0.25,
        "router_z_weight": 0.125,
        "kernel_initializer": keras.initializers.Constant(2.0),
        "seed": 7,
    },
    ExpertChoiceRouter: {
        "num_experts": 4,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 3.0,
        "max_experts_per_token": 2,
        "linear_programme": True,
        "inference": "threshold",
        "threshold_momentum": 0.5,
        "jitter": 0.25,
        "router_z_weight": 0.125,
        "kernel_initializer": keras.initializers.Constant(2.0),
        "seed": 7,
    },
}


@pytest.mark.parametrize("router", CONFIGS)
def test_every_config_key_makes_the_round_trip(router):
    arguments = CONFIGS[router]
    parameters = inspect.signature(router.__init__).parameters
    assert set(arguments) == set(parameters) - {"self", "kwargs"}
    for name, value in arguments.items():
        assert value != parameters[name].default
    made = router(**arguments, name="mine")
    copy = router.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert copy.name == "mine"
    for name, value in arguments.items():
        got = getattr(copy, name)
        assert got.value == 2.0 if name == "kernel_initializer" else got == value


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_experts": 0}, "`num_experts`.*num_experts=0"),
            ({"capacity_factor": -1.0}, "`capacity_factor`.*capacity_factor=-1.0"),
            ({"eval_capacity_factor": -0.1}, "`eval_capacity_factor`.*eval_capacity_factor=-0.1"),
            ({"jitter": 1.0}, "`jitter`.*jitter=1.0"),
            ({"jitter": -0.1}, "`jitter`.*jitter=-0.1"),
        ],
    )
    @pytest.mark.parametrize("router", [SwitchRouter, ExpertChoiceRouter])
    def test_of_every_router(self, router, arguments, message):
        with pytest.raises(ValueError, match=message):
            router(**arguments)

    @pytest.mark.parametrize(
        ("router", "argument"),
        [
            (SwitchRouter, "normalize"),
            (NoisyTopKRouter, "priority"),
            (HierarchicalRouter, "normalize"),
            (HashRouter, "jitter"),
            (SoftmaxRouter, "capacity_factor"),
            (StrictlyBalancedRouter, "inference"),
        ],
    )
    def test_what_a_parent_takes_is_not_swallowed(self, router, argument):
        with pytest.raises(ValueError, match=f"{router.__name__}: {argument}"):
            router(2, **{argument: None})

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TopKRouter(0), "`k`.*k=0"),
            (lambda: TopKRouter(5, 4), "`k`.*k=5.*num_experts=4"),
            (lambda: SwitchRouter(min_capacity=0), "`min_capacity`.*min_capacity=0"),
            (
                lambda: SwitchRouter(exploration="random"),
                "`exploration`.*exploration='random'",
            ),
            (
                lambda: SwitchRouter(input_dropout=1.0),
                "`input_dropout`.*input_dropout=1.0",
            ),
            (lambda: SwitchRouter(reroutes=-1), "`reroutes`.*reroutes=-1"),
            (
                lambda: SwitchRouter(4, reroutes=4),
                "`reroutes`.*reroutes=4.*num_experts=4",
            ),
            (
                lambda: SwitchRouter(priority="batch"),
                "`priority`.*priority='batch'",
            ),
            (
                lambda: ExpertChoiceRouter(linear_programme=True),
                "`linear_programme`.*`max_experts_per_token`.*linear_programme=True",
            ),
            (
                lambda: ExpertChoiceRouter(capacity_factor=None),
                "`capacity_factor`.*capacity_factor=None",
            ),
            (
                lambda: ExpertChoiceRouter(max_experts_per_token=0),
                "`max_experts_per_token`.*max_experts_per_token=0",
            ),
            (
                lambda: ExpertChoiceRouter(inference="beam"),
                "`inference`.*inference='beam'",
            ),
            (
                lambda: ExpertChoiceRouter(threshold_momentum=1.0),
                "`threshold_momentum`.*threshold_momentum=1.0",
            ),
        ],
    )
    def test_of_one_router(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("value", [2.0, "2", 0, -1, np.float32(2), None])
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda n: TopKRouter(n, 4), "k"),
            (lambda n: TopKRouter(2, 4, min_capacity=n), "min_capacity"),
            (lambda n: HierarchicalRouter(n), "num_groups"),
            (lambda n: HierarchicalRouter(4, k=n), "k"),
            (lambda n: HierarchicalRouter(4, secondary_k=n), "secondary_k"),
            (lambda n: FeedForwardExperts(n, 8), "num_experts"),
            (lambda n: FeedForwardExperts(4, n), "hidden_dim"),
            (lambda n: LinearExperts(n, 8), "num_experts"),
            (lambda n: LinearExperts(4, n), "output_dim"),
        ],
    )
    def test_what_must_be_a_positive_integer(self, make, name, value):
        given = re.escape(f"{name}={value!r}")
        with pytest.raises(ValueError, match=f"`{name}`.*{given}"):
            make(value)
        make(np.int64(4) if name == "num_groups" else np.int64(2))

    @pytest.mark.parametrize("value", [2.0, "2", 0])
    def test_what_may_be_left_out_is_checked_where_it_is_not(self, value):
        with pytest.raises(ValueError, match=f"`num_experts`.*num_experts={value!r}"):
            SoftmaxRouter(value)
        with pytest.raises(
            ValueError, match=f"`max_experts_per_token`.*max_experts_per_token={value!r}"
        ):
            ExpertChoiceRouter(4, max_experts_per_token=value)
        with pytest.raises(ValueError, match=f"`top_groups`.*top_groups={value!r}"):
            LossFreeRouter(2, num_groups=4, top_groups=value)

    @pytest.mark.parametrize("value", ["1.25", -0.5, float("nan")])
    @pytest.mark.parametrize("name", ["capacity_factor", "eval_capacity_factor"])
    def test_capacity_factors_are_not_negative(self, name, value):
        given = re.escape(f"{name}={value!r}")
        with pytest.raises(ValueError, match=f"`{name}`.*{given}"):
            SwitchRouter(4, **{name: value})
        for allowed in (0, np.float32(1.25)):
            SwitchRouter(4, **{name: allowed})

    @pytest.mark.parametrize("value", ["1.25", 0, -0.5, float("nan")])
    @pytest.mark.parametrize("name", ["capacity_factor", "eval_capacity_factor"])
    def test_capacity_factors_are_positive_where_experts_choose(self, name, value):
        given = re.escape(f"{name}={value!r}")
        with pytest.raises(ValueError, match=f"`{name}`.*{given}"):
            ExpertChoiceRouter(4, **{name: value})
        ExpertChoiceRouter(4, **{name: np.float32(1.25)})

    @pytest.mark.parametrize("value", ["1.25", -0.5, None])
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda **weight: TopKRouter(2, 4, **weight), "load_balancing_weight"),
            (lambda **weight: ExpertChoiceRouter(4, **weight), "router_z_weight"),
            (lambda **weight: NoisyTopKRouter(2, 4, **weight), "importance_weight"),
            (lambda **weight: HierarchicalRouter(2, **weight), "load_weight"),
            (lambda **weight: LossFreeRouter(2, 4, **weight), "sequence_balancing_weight"),
            (lambda **rate: LossFreeRouter(2, 4, **rate), "bias_update_rate"),
        ],
    )
    def test_weights_of_losses_are_not_negative(self, make, name, value):
        given = re.escape(f"{name}={value!r}")
        with pytest.raises(ValueError, match=f"`{name}`.*{given}"):
            make(**{name: value})
        for allowed in (0, np.float32(0.5)):
            make(**{name: allowed})

    @pytest.mark.parametrize("value", [1.0, "1", -1])
    def test_reroutes_are_an_integer(self, value):
        given = re.escape(f"reroutes={value!r}")
        with pytest.raises(ValueError, match=f"`reroutes`.*{given}"):
            SwitchRouter(4, reroutes=value)

    def test_used_alone_without_a_number_of_experts(self):
        with pytest.raises(ValueError, match="`num_experts`.*num_experts=None"):
            SwitchRouter()(np.ones((1, 2, 3), "float32"))

    def test_two_numbers_of_experts(self):
        with pytest.raises(ValueError, match="num_experts=4.*num_experts=8"):
            SwitchRouter(4).set_num_experts(8)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SwitchRouter(4, capacity_factor=None, eval_capacity_factor=None), 1),
        (lambda: TopKRouter(3, 4), 3),
        (lambda: HashRouter(4), 1),
        (lambda: HierarchicalRouter(2, k=1, secondary_k=2, num_experts=4), 2),
        (lambda: SoftmaxRouter(4), 4),
        (lambda: ExpertChoiceRouter(4, capacity_factor=1.5), 1.5),
        (lambda: ExpertChoiceRouter(4, capacity_factor=9.0), 4),
    ],
)
def test_experts_per_token(make, expected):
    """As many as there are, on average, where nothing is dropped."""
    router = make()
    ids = {"token_ids": np.arange(16).reshape(2, 8)} if router.needs_token_ids else {}
    routing = router(np.random.default_rng(0).normal(size=(2, 8, 3)).astype("float32"), **ids)
    tokens_of = numpy(experts_per_token_histogram(routing))
    assert router.experts_per_token == expected
    assert tokens_of @ np.arange(len(tokens_of)) / 16 == expected
