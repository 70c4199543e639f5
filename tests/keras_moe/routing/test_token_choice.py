import numpy as np
import pytest

from keras_moe import SwitchRouter, TopKRouter
from tests.backend import numpy
from tests.keras_moe.routing.examples import P, logits_of, with_identity


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

    def test_the_surest_sit_first(self):
        # Expert 0 has 2 slots for tokens 0 (.5), 1 (.6) and 2 (.5, which ties with 0).
        router = with_identity(
            SwitchRouter(3, eval_capacity_factor=1.5, min_capacity=1, priority="probability")
        )
        routing = numpy(router(logits_of(P)))
        assert routing.token_index.tolist() == [[[1, 0], [3, 4], [4, 4]]]
        np.testing.assert_allclose(routing.weight, [[[0.6, 0.5], [0.6, 0], [0, 0]]], rtol=1e-6)
        assert routing.slot_index.tolist() == [[[1], [0], [6], [2]]]

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

    def test_the_surest_first_and_all_first_choices_before_any_second(self):
        # In order of confidence: tokens 1 and 3 (.6), 0 and 2 (.5). First choices: 1 -> 0, 3 -> 1,
        # 0 -> 0, 2 -> 0; second choices: 1 -> 1, 3 -> 0 which is full, 0 -> 1, 2 -> 2.
        routing = self.routing(2, eval_capacity_factor=1.0, min_capacity=1, priority="probability")
        assert routing.token_index.tolist() == [[[1, 0, 2], [3, 1, 0], [2, 4, 4]]]
        assert routing.slot_index.tolist() == [[[1, 5], [0, 4], [2, 6], [3, 9]]]

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
