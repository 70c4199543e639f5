import numpy as np
import pytest

from keras_moe import ExpertChoiceRouter, StrictlyBalancedRouter
from keras_moe.metrics import experts_per_token_histogram
from tests.backend import numpy
from tests.keras_moe.routing.examples import P, logits_of, with_identity

pytestmark = pytest.mark.every_backend


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

    @pytest.mark.parametrize("kind", [ExpertChoiceRouter, StrictlyBalancedRouter])
    def test_padding_counts_as_tokens(self, kind):
        """6 tokens * 1 / 3 experts = 2 slots, 3 * 2 seats for 3 tokens that are no padding."""
        mask = np.array([[True, False] * 3])
        x = np.random.default_rng(0).normal(size=(1, 6, 3)).astype("float32")
        routing = with_identity(kind(3, 1.0))(x, mask=mask, training=True)
        tokens_of = numpy(experts_per_token_histogram(routing))
        assert tokens_of @ np.arange(4) / tokens_of.sum() == 2.0

    def test_eval_capacity_factor(self):
        router = with_identity(ExpertChoiceRouter(3, 0.75, eval_capacity_factor=1.5))
        assert router(logits_of(P), training=True).token_index.shape[2] == 1
        assert router(logits_of(P)).token_index.shape[2] == 2

    def test_max_experts_per_token(self):
        # Without a cap all three take token 0. With a cap of two it keeps experts 0 (.5) and 1
        # (.3), and expert 2 takes its next best, token 1 (.1, before token 3 which ties).
        router = with_identity(ExpertChoiceRouter(3, 1.5, max_experts_per_token=2))
        assert numpy(router(logits_of(P)).token_index).tolist() == [[[1, 0], [3, 0], [2, 1]]]

    @pytest.mark.parametrize(
        ("linear_programme", "taken"), [(False, [[[0], [1]]]), (True, [[[1], [0]]])]
    )
    def test_linear_programme(self, linear_programme, taken):
        # See `test_capped.py`: .50 + .40 = .90 by one choice after the other, .48 + .47 by looking
        # ahead. With tokens that nobody wants to make up the softmax: it needs three experts.
        p = [[[0.50, 0.47, 0.03], [0.48, 0.40, 0.12], [0.01, 0.01, 0.98]]]
        router = ExpertChoiceRouter(
            3, 1.0, max_experts_per_token=1, linear_programme=linear_programme
        )
        assert numpy(with_identity(router)(logits_of(p)).token_index)[:, :2].tolist() == taken

    @pytest.mark.parametrize("linear_programme", [False, True])
    def test_a_cap_of_all_experts_is_none(self, linear_programme):
        capped = ExpertChoiceRouter(
            3, 1.5, max_experts_per_token=3, linear_programme=linear_programme
        )
        one, two = (
            numpy(with_identity(router)(logits_of(P)))
            for router in (capped, ExpertChoiceRouter(3, 1.5))
        )
        np.testing.assert_array_equal(one.token_index, two.token_index)
        np.testing.assert_array_equal(one.weight, two.weight)

    def test_weights_are_the_raw_scores_under_a_cap(self):
        router = with_identity(ExpertChoiceRouter(3, 1.5, max_experts_per_token=2))
        expected = [[[0.6, 0.5], [0.6, 0.3], [0.4, 0.1]]]
        np.testing.assert_allclose(numpy(router(logits_of(P)).weight), expected, rtol=1e-6)


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

    def test_a_frozen_router_learns_nothing(self):
        router = self.router()
        router.trainable = False
        router(logits_of(P), training=True)
        assert numpy(router.threshold).tolist() == [-1, -1, -1]

    def test_replicas_take_the_mean(self):
        assert self.router().threshold.aggregation == "mean"

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
