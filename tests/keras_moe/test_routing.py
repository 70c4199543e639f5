import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ExpertChoiceRouter, SwitchRouter, TopKRouter
from keras_moe.routing import seat_choices
from tests import oracle
from tests.backend import numpy

tensor = ops.convert_to_tensor

KINDS = {
    "switch": lambda **kwargs: SwitchRouter(4, **kwargs),
    "top-k": lambda **kwargs: TopKRouter(2, 4, **kwargs),
    "expert choice": lambda **kwargs: ExpertChoiceRouter(4, **kwargs),
}
ROUTERS = pytest.mark.parametrize("router", KINDS.values(), ids=KINDS)


def with_identity(router, scale=1.0):
    """The router's logits are now its input."""
    router.build((None, None, router.num_experts))
    router.kernel.assign(scale * np.eye(router.num_experts))
    return router


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, "float32"))


# One group of four tokens and three experts; the order of preference of each token:
#   token 0: 0 1 2    token 1: 0 1 2    token 2: 0 2 1    token 3: 1 0 2
P = [[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1]]]


class TestSwitchRouter:
    def test_raw_probability_of_the_first_choice(self):
        routing = numpy(with_identity(SwitchRouter(3, eval_capacity_factor=None))(logits_of(P)))
        assert routing.expert_index.tolist() == [[[0], [0], [0], [1]]]
        np.testing.assert_allclose(
            np.sort(routing.weight[routing.weight > 0]), [0.5, 0.5, 0.6, 0.6]
        )
        np.testing.assert_allclose(routing.probabilities, P, rtol=1e-6)

    def test_exactly_the_capacity_is_kept_the_earlier_tokens_first(self):
        # ceil(4 tokens * 1.5 / 3 experts) = 2 slots each; tokens 0, 1 and 2 all want expert 0.
        router = with_identity(SwitchRouter(3, eval_capacity_factor=1.5, min_capacity=1))
        routing = numpy(router(logits_of(P)))
        assert routing.token_index.tolist() == [[[0, 1], [3, 4], [4, 4]]]  # 4: the slot is empty
        np.testing.assert_allclose(routing.weight, [[[0.5, 0.6], [0.6, 0], [0, 0]]], rtol=1e-6)
        assert routing.slot_index.tolist() == [[[0], [1], [6], [2]]]  # 6: dropped
        assert routing.row_expert is None

    def test_padding_takes_no_slot(self):
        router = with_identity(SwitchRouter(3, eval_capacity_factor=1.5, min_capacity=1))
        mask = np.array([[False, True, True, True]])
        routing = numpy(router(logits_of(P), mask=mask))
        assert routing.token_index.tolist() == [[[1, 2], [3, 4], [4, 4]]]
        assert routing.expert_index.tolist() == [[[3], [0], [0], [1]]]  # 3 = E: padding

    def test_training_and_inference_have_their_own_capacity(self):
        router = with_identity(
            SwitchRouter(3, capacity_factor=0.75, eval_capacity_factor=1.5, min_capacity=1)
        )
        assert router(logits_of(P), training=True).token_index.shape[2] == 1
        assert router(logits_of(P)).token_index.shape[2] == 2

    def test_min_capacity(self):
        assert with_identity(SwitchRouter(3))(logits_of(P)).token_index.shape[2] == 4
        router = with_identity(SwitchRouter(3, min_capacity=5))
        assert router(logits_of(P)).token_index.shape[2] == 5


class TestTopKRouter:
    def routing(self, k, **kwargs):
        router = with_identity(TopKRouter(k, 3, **kwargs))
        return numpy(router(logits_of(P)))

    def test_first_k_in_order(self):
        routing = self.routing(2)
        assert routing.expert_index.tolist() == [[[0, 1], [0, 1], [0, 2], [1, 0]]]

    def test_normalize(self):
        def weights(**kwargs):
            routing = self.routing(2, eval_capacity_factor=3, min_capacity=1, **kwargs)
            slot_of_choice = routing.weight.reshape(-1)[routing.slot_index.reshape(-1)]
            return slot_of_choice.reshape(4, 2)

        raw = [[0.5, 0.3], [0.6, 0.3], [0.5, 0.4], [0.6, 0.3]]
        np.testing.assert_allclose(weights(normalize=False), raw, rtol=1e-6)
        expected = [[5 / 8, 3 / 8], [2 / 3, 1 / 3], [5 / 9, 4 / 9], [2 / 3, 1 / 3]]
        np.testing.assert_allclose(weights(), expected, rtol=1e-6)

    def test_one_choice_is_never_normalised(self):
        np.testing.assert_allclose(self.routing(1, normalize=True).weight.max(), 0.6, rtol=1e-6)

    def test_all_choices_of_a_token_before_the_next_tokens(self):
        # 3 slots each. In token order: 0 -> 0 1, 1 -> 0 1, 2 -> 0 2, 3 -> 1 and 0, which is full.
        # First choices first (GShard) would seat token 3 with expert 1 before token 1.
        routing = self.routing(2, eval_capacity_factor=1.0, min_capacity=1)
        assert routing.token_index.tolist() == [[[0, 1, 2], [0, 1, 3], [2, 4, 4]]]
        assert routing.slot_index.tolist() == [[[0, 3], [1, 4], [2, 6], [5, 9]]]

    def test_dropless_seats_every_choice(self):
        routing = self.routing(3)
        assert np.sum(routing.token_index < 4) == 12
        for row, expert in enumerate(routing.row_expert):
            for token, weight in zip(
                *(t[0, row] for t in (routing.token_index, routing.weight)), strict=True
            ):
                assert weight == (pytest.approx(P[0][token][expert]) if token < 4 else 0)

    @pytest.mark.parametrize(
        ("tokens", "k", "factor", "slots"),
        [(6, 1, 1.0, 2), (7, 1, 1.0, 3), (6, 2, 1.0, 4), (6, 2, 1.25, 5), (2, 1, 0.5, 1)],
    )
    def test_capacity_formula(self, tokens, k, factor, slots):
        router = TopKRouter(k, 3, capacity_factor=factor, min_capacity=1)
        routing = router(np.ones((2, tokens, 3), "float32"), training=True)
        assert tuple(routing.token_index.shape) == (2, 3, slots)


class TestExpertChoiceRouter:
    # Column by column the scores of P: expert 0 takes .6 (token 1), then .5 (token 0, before token
    # 2 which ties); expert 1 takes .6 (3), then .3 (0, before 1); expert 2 takes .4 (2), .2 (0).
    def test_every_expert_takes_its_best_tokens(self):
        # ceil(4 tokens * 1.5 / 3 experts) = 2
        routing = numpy(with_identity(ExpertChoiceRouter(3, 1.5))(logits_of(P)))
        assert routing.token_index.tolist() == [[[1, 0], [3, 0], [2, 0]]]
        expected = [[[0.6, 0.5], [0.6, 0.3], [0.4, 0.2]]]
        np.testing.assert_allclose(routing.weight, expected, rtol=1e-6)
        assert routing.slot_index is routing.expert_index is routing.row_expert is None

    def test_padding_is_never_taken(self):
        mask = np.array([[False, True, False, True]])
        routing = numpy(with_identity(ExpertChoiceRouter(3, 2.0))(logits_of(P), mask=mask))
        assert np.sort(routing.token_index).tolist() == [[[1, 3, 4]] * 3]  # 4: empty
        assert routing.weight[..., 2].tolist() == [[0, 0, 0]]

    @pytest.mark.parametrize(
        ("tokens", "factor", "slots"), [(6, 1.0, 2), (7, 1.0, 3), (6, 2.0, 4), (6, 3.5, 6)]
    )
    def test_capacity_formula(self, tokens, factor, slots):
        routing = ExpertChoiceRouter(3, factor)(np.ones((2, tokens, 3), "float32"), training=True)
        assert tuple(routing.token_index.shape) == (2, 3, slots)

    def test_eval_capacity_factor(self):
        router = with_identity(ExpertChoiceRouter(3, 0.75, eval_capacity_factor=1.5))
        assert router(logits_of(P), training=True).token_index.shape[2] == 1
        assert router(logits_of(P)).token_index.shape[2] == 2

    def test_max_experts_per_token(self):
        # Without a cap all three take token 0. With a cap of two it keeps experts 0 (.5) and 1
        # (.3), and expert 2 takes its next best, token 1 (.1, before token 3 which ties).
        router = with_identity(ExpertChoiceRouter(3, 1.5, max_experts_per_token=2))
        assert numpy(router(logits_of(P)).token_index).tolist() == [[[1, 0], [3, 0], [2, 1]]]


class TestThreshold:
    def router(self, **kwargs):
        kwargs = {"threshold_momentum": 0.5, **kwargs}
        return with_identity(ExpertChoiceRouter(3, 1.5, inference="threshold", **kwargs))

    def test_learns_the_lowest_score_taken(self):
        router = self.router()
        assert numpy(router.threshold).tolist() == [-1, -1, -1]  # nothing learnt yet
        router(logits_of(P), training=True)
        np.testing.assert_allclose(numpy(router.threshold), [0.5, 0.3, 0.2], rtol=1e-6)
        # The next batch, all thirds: .5 * old + .5 / 3
        router(np.zeros((1, 4, 3), "float32"), training=True)
        expected = np.array([0.5, 0.3, 0.2]) / 2 + 1 / 6
        np.testing.assert_allclose(numpy(router.threshold), expected, rtol=1e-6)

    def test_mean_over_groups_and_zero_where_slots_stay_empty(self):
        # In the second group three of four tokens are padding: no expert fills its 2 slots, and
        # each would have taken any token; the mean over the groups is half of the first's.
        router = self.router()
        mask = np.array([[True] * 4, [True, False, False, False]])
        router(np.concatenate([logits_of(P)] * 2), mask=mask, training=True)
        np.testing.assert_allclose(numpy(router.threshold), [0.25, 0.15, 0.1], rtol=1e-6)

    def test_a_group_of_padding_alone_teaches_nothing(self):
        router = self.router()
        x = np.concatenate([logits_of(P)] * 2)
        for valid in (True, False):  # the second batch is padding altogether
            router(x, mask=np.array([[valid] * 4, [False] * 4]), training=True)
            np.testing.assert_allclose(numpy(router.threshold), [0.5, 0.3, 0.2], rtol=1e-6)

    def test_inference_learns_nothing(self):
        router = self.router()
        router(logits_of(P))
        assert numpy(router.threshold).tolist() == [-1, -1, -1]

    def test_routes_each_token_alone(self):
        router = self.router()
        router.threshold.assign([0.45, 0.25, 0.15])
        routing = numpy(router(logits_of(P)))
        # Above the cut-off: token 0 all three, 1: experts 0 and 1, 2: experts 0 and 2, 3: expert 1.
        E = 3
        assert routing.expert_index.tolist() == [[[0, 1, 2], [0, 1, E], [0, 2, E], [1, E, E]]]

    def test_a_tokens_experts_are_capped(self):
        router = self.router(max_experts_per_token=1)
        routing = numpy(router(logits_of(P)))
        assert routing.expert_index.tolist() == [[[0], [0], [0], [1]]]

    def test_default_cap_is_twice_the_capacity_factor(self):
        router = ExpertChoiceRouter(8, 1.25, inference="threshold")
        assert router(np.zeros((1, 4, 3), "float32")).expert_index.shape[2] == 3  # ceil(2.5)

    def test_padding(self):
        mask = np.array([[True, False, True, True]])
        routing = numpy(self.router()(logits_of(P), mask=mask))
        assert routing.expert_index[0, 1].tolist() == [3, 3, 3]
        assert 1 not in routing.token_index


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
        "load_balancing_weight": 0.5,
        "jitter": 0.25,
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
            ({"num_experts": 0}, "`num_experts` must be a positive integer. Received: .*=0"),
            ({"capacity_factor": 0}, "`capacity_factor` must be a positive number or None.*=0"),
            ({"capacity_factor": -1.0}, "`capacity_factor` must be .* Received: .*=-1.0"),
            ({"eval_capacity_factor": 0.0}, "`eval_capacity_factor` must be .*=0.0"),
            ({"jitter": 1.0}, r"`jitter` must be in \[0, 1\). Received: jitter=1.0"),
            ({"jitter": -0.1}, r"`jitter` must be in \[0, 1\). Received: jitter=-0.1"),
        ],
    )
    @pytest.mark.parametrize("router", [SwitchRouter, ExpertChoiceRouter])
    def test_of_every_router(self, router, arguments, message):
        with pytest.raises(ValueError, match=message):
            router(**arguments)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: TopKRouter(0), "`k` must be a positive integer. Received: k=0"),
            (lambda: TopKRouter(5, 4), "`k` must be at most the number of experts.*k=5.*=4"),
            (lambda: SwitchRouter(min_capacity=0), "`min_capacity` must be a positive.*=0"),
            (lambda: ExpertChoiceRouter(capacity_factor=None), "mean number of experts per token"),
            (
                lambda: ExpertChoiceRouter(max_experts_per_token=0),
                "`max_experts_per_token` must be a positive integer or None. Received: .*=0",
            ),
            (
                lambda: ExpertChoiceRouter(inference="beam"),
                "`inference` must be 'top_k' or 'threshold'. Received: inference='beam'",
            ),
            (
                lambda: ExpertChoiceRouter(threshold_momentum=1.0),
                r"`threshold_momentum` must be in \[0, 1\). Received: threshold_momentum=1.0",
            ),
        ],
    )
    def test_of_one_router(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_used_alone_without_a_number_of_experts(self):
        with pytest.raises(ValueError, match="`num_experts` must be given to a router"):
            SwitchRouter()(np.ones((1, 2, 3), "float32"))

    def test_two_numbers_of_experts(self):
        with pytest.raises(ValueError, match="agree in number. Received: .*=4 for num_experts=8"):
            SwitchRouter(4).set_num_experts(8)
