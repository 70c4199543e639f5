import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    MixtureOfExperts,
    SwitchRouter,
    TopKRouter,
    metrics,
)
from tests.backend import compiled, gradients, numpy

tensor = ops.convert_to_tensor


def routing_of(router, probabilities, **call):
    if not router.built:
        router.build((None, None, router.num_experts))
    router.kernel.assign(np.eye(router.num_experts))
    return router(np.log(np.asarray(probabilities, "float32")), **call)


def totals_of(routing):
    totals, expert_tokens = numpy(metrics.statistics(routing))
    return dict(zip(metrics.TOTALS, totals.tolist(), strict=True)), expert_tokens.tolist()


# Two groups of three tokens and two experts. Of the six tokens four want expert 0, and the last one
# is padding where a mask is used. The entropy of (.75, .25) is .8113 bits, that of a coin 1.
P = [[[0.75, 0.25], [0.75, 0.25], [0.75, 0.25]], [[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]]
MASK = np.array([[True, True, True], [True, True, False]])
BITS = 0.75 * np.log2(4 / 3) + 0.25 * 2


@pytest.mark.every_backend
class TestStatistics:
    def test_of_token_choice(self):
        # Capacity ceil(3 * .5 / 2) = 1 per group: kept are the first token of group 0 and both of
        # group 1, two of five are dropped.
        router = SwitchRouter(2, eval_capacity_factor=0.5, min_capacity=1)
        total, expert_tokens = totals_of(routing_of(router, P, mask=MASK))
        assert expert_tokens == [4, 1]
        assert total == pytest.approx(
            {
                "calls": 1,
                "tokens": 5,
                "wanted": 5,
                "kept": 3,
                "untaken": 2,
                "entropy": 5 * BITS,
                "max_share": 4 / 2.5,
            },
            rel=1e-5,
        )

    def test_of_two_choices_none_dropped(self):
        total, expert_tokens = totals_of(routing_of(TopKRouter(2, 2), P))
        assert expert_tokens == [6, 6]
        assert (total["wanted"], total["kept"], total["untaken"]) == (12, 12, 0)
        assert total["max_share"] == 1
        assert total["entropy"] == pytest.approx(5 * BITS + 1, rel=1e-5)

    def test_of_expert_choice(self):
        # Two slots for each expert and group, the earlier token where scores tie:
        #   group 0: expert 0 takes 0, 1 and expert 1 takes 0, 1
        #   group 1: expert 0 takes 0, 1 and expert 1 takes 1, 0 (token 2 is padding)
        # Token 2 of group 0 is untaken; the other four valid tokens have two experts each.
        total, expert_tokens = totals_of(routing_of(ExpertChoiceRouter(2, 1.0), P, mask=MASK))
        assert expert_tokens == [4, 4]
        assert (total["tokens"], total["kept"], total["untaken"]) == (5, 8, 1)
        assert total["max_share"] == 1

    def test_of_the_threshold(self):
        router = ExpertChoiceRouter(2, 1.0, inference="threshold")
        router.build((None, None, 2))
        router.threshold.assign([0.6, 0.8])  # expert 1 refuses everybody
        total, expert_tokens = totals_of(routing_of(router, P, mask=MASK))
        assert expert_tokens == [4, 0]
        assert (total["wanted"], total["kept"], total["untaken"]) == (4, 4, 1)

    @pytest.mark.parametrize("router", [SwitchRouter, ExpertChoiceRouter])
    def test_of_a_single_expert(self, router):
        total, expert_tokens = totals_of(routing_of(router(1), np.ones((1, 3, 1))))
        assert (total["entropy"], total["max_share"], expert_tokens) == (0, 1, [3])

    def test_of_padding_alone(self):
        routing = routing_of(SwitchRouter(2), P, mask=np.zeros((2, 3), bool))
        total, expert_tokens = totals_of(routing)
        assert expert_tokens == [0, 0]
        assert set(total.values()) == {0}

    def test_have_no_gradient(self):
        router = TopKRouter(2, 2)
        routing_of(router, P)
        layer = keras.layers.Lambda(
            lambda x: ops.sum(x) + ops.sum(metrics.statistics(router(x))[0])
        )
        layer.build((2, 3, 2))
        by_x, _ = gradients(layer, P, 1.0)
        assert (by_x == 1).all()

    def test_compile(self):
        router = SwitchRouter(2, eval_capacity_factor=0.5, min_capacity=1)
        x = np.log(np.asarray(P, "float32"))
        eager = numpy(metrics.statistics(routing_of(router, P)))
        jitted = numpy(compiled(lambda x: metrics.statistics(router(x)))(tensor(x)))
        for a, b in zip(eager, jitted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


class TestExpertsPerToken:
    def test_of_expert_choice(self):
        # As above: three slots for each expert and group would be all, two leave token 2 out.
        routing = routing_of(ExpertChoiceRouter(2, 1.0), P, mask=MASK)
        assert numpy(metrics.experts_per_token_histogram(routing)).tolist() == [1, 0, 4]
        routing = routing_of(ExpertChoiceRouter(2, 1.0), P)
        # Group 1 without a mask: expert 0 takes 0, 2 (.5 before .25), expert 1 takes 1, 2.
        assert numpy(metrics.experts_per_token_histogram(routing)).tolist() == [1, 2, 3]

    def test_of_token_choice_that_drops(self):
        # Three of five kept, see above.
        router = SwitchRouter(2, eval_capacity_factor=0.5, min_capacity=1)
        histogram = metrics.experts_per_token_histogram(routing_of(router, P, mask=MASK))
        assert numpy(histogram).tolist() == [2, 3, 0]
        assert ops.dtype(histogram) == "int32"

    def test_a_cap_shows_and_the_balance_is_perfect(self):
        p = np.random.default_rng(0).dirichlet(np.ones(4), (2, 16))
        for cap, top in ((2, 2), (None, 3)):
            router = ExpertChoiceRouter(4, 2.0, max_experts_per_token=cap)
            routing = routing_of(router, p)
            histogram = numpy(metrics.experts_per_token_histogram(routing))
            assert histogram.sum() == 32 and histogram @ np.arange(5) == 64
            assert np.flatnonzero(histogram).max() == top
            total, expert_tokens = totals_of(routing)
            assert expert_tokens == [16] * 4 and total["max_share"] == 1


class TestFigures:
    def test_from_totals(self):
        # calls 2, tokens 10, wanted 20, kept 15, untaken 3, entropy 4, max_share 3
        totals = [2, 10, 20, 15, 3, 4, 3]
        expected = {"dropped": 0.25, "max_share": 1.5, "dead": 0.5, "entropy": 0.4}
        assert metrics.figures(totals, [20, 0]) == pytest.approx(expected)
        expected |= {"untaken": 0.3, "experts_per_token": 1.5}
        assert metrics.figures(totals, [20, 0], expert_choice=True) == pytest.approx(expected)

    def test_nothing_seen(self):
        figures = metrics.figures(np.zeros(7), np.zeros(4), expert_choice=True)
        assert set(figures.values()) == {0.0}


def test_the_layer_adds_up_its_calls():
    layer = MixtureOfExperts(FeedForwardExperts(2, 3), TopKRouter(1))
    layer.build((None, None, 2))
    layer.router.kernel.assign(np.eye(2))
    x = np.log(np.asarray(P, "float32"))
    for mask in (None, MASK):
        layer(x, mask=mask)
    totals, expert_tokens = (numpy(v) for v in layer.statistics)
    assert totals[:3].tolist() == [2, 11, 11]
    # Where the odds are even the first expert is taken: 5 + 4 and 1 + 1.
    assert expert_tokens.tolist() == [9, 2]
    assert metrics.read(layer)["max_share"] == pytest.approx((5 / 3 + 4 / 2.5) / 2)
    assert [v.trainable for v in layer.statistics] == [False, False]
