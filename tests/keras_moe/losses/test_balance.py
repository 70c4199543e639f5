import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import losses
from tests import oracle
from tests.backend import run

pytestmark = pytest.mark.every_backend


def value(loss):
    return float(ops.convert_to_numpy(loss))


def one_hot(index, n):
    return np.eye(n, dtype="float32")[index]


class TestLoadBalancing:
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_one_at_perfect_balance_for_every_k(self, k):
        index = (np.arange(8)[:, None] + np.arange(k)) % 4
        loss = losses.load_balancing(np.full((8, 4), 0.25, "float32"), index.astype("int32"))
        assert value(loss) == pytest.approx(1.0, abs=1e-6)

    def test_number_of_experts_at_full_collapse(self):
        index = np.zeros((6, 1), "int32")
        assert value(losses.load_balancing(one_hot(index[:, 0], 5), index)) == pytest.approx(5.0)

    @pytest.mark.parametrize("k", [2, 4])
    def test_experts_by_choices_where_the_same_few_take_everything(self, k):
        index = np.tile(np.arange(k, dtype="int32"), (6, 1))
        probabilities = np.where(np.arange(8) < k, 1 / k, 0) * np.ones((6, 1))
        assert value(losses.load_balancing(probabilities, index)) == pytest.approx(8 / k)

    def test_may_be_under_one(self):
        # f = (2/3, 1/3), P = ((.51 + .51 + 0) / 3, (.49 + .49 + 1) / 3) = (.34, .66):
        # 2 * (2/3 * .34 + 1/3 * .66) = 0.8933
        probabilities = np.array([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]], "float32")
        loss = losses.load_balancing(probabilities, np.array([[0], [0], [1]], "int32"))
        assert value(loss) == pytest.approx(0.89333, abs=1e-5)

    def test_an_index_outside_is_not_counted(self):
        index = np.array([[0, -1], [1, 3], [2, 7]], "int32")
        # f = (1/6, 1/6, 1/6), P = thirds
        loss = losses.load_balancing(np.full((3, 3), 1 / 3, "float32"), index)
        assert value(loss) == pytest.approx(0.5)

    def test_padding_is_not_counted(self):
        rng = np.random.default_rng(0)
        probabilities = oracle.softmax(rng.normal(size=(2, 6, 4)))
        index = rng.integers(0, 4, (2, 6, 2)).astype("int32")
        mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
        loss = losses.load_balancing(probabilities.astype("float32"), index, mask)
        chosen = np.eye(4)[index].sum(axis=2)
        assert value(loss) == pytest.approx(
            oracle.load_balancing(probabilities, chosen, mask), rel=1e-5
        )

    def test_nan_in_padding(self):
        probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]], "float32")
        index, mask = np.array([[0], [1]], "int32"), np.array([True, False])
        # f = (1, 0), P = (1/2, 1/2): 2 * 1 * 1/2
        assert value(losses.load_balancing(probabilities, index, mask)) == 1.0

    def test_nothing_but_padding_is_zero(self):
        mask = np.zeros((3,), bool)
        loss = losses.load_balancing(
            np.full((3, 2), 0.5, "float32"), np.zeros((3, 1), "int32"), mask
        )
        assert value(loss) == 0.0


class TestSequenceBalancing:
    def test_sequences_that_are_unbalanced_each_in_another_way(self):
        # All tokens of the first sequence go to expert 0, of the second to expert 1: 2 each, and
        # yet 1 over the batch, f = P = (1/2, 1/2).
        index = np.array([[[0]] * 3, [[1]] * 3], "int32")
        probabilities = one_hot(index[..., 0], 2)
        assert value(losses.load_balancing(probabilities, index)) == pytest.approx(1.0)
        assert value(losses.sequence_balancing(probabilities, index)) == pytest.approx(2.0)

    def test_padding_is_not_counted(self):
        rng = np.random.default_rng(0)
        probabilities = oracle.softmax(rng.normal(size=(3, 6, 4)))
        index = np.argsort(rng.random((3, 6, 4)), axis=-1)[..., :2].astype("int32")
        mask = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0], [0] * 6], bool)
        chosen = np.eye(4)[index].sum(axis=2)
        expected = oracle.sequence_balancing(probabilities, chosen, mask)
        for content in (0.5, np.nan):
            given = np.where(mask[..., None], probabilities, content).astype("float32")
            loss = losses.sequence_balancing(given, index, mask)
            assert value(loss) == pytest.approx(expected, rel=1e-5)

    def test_nothing_but_padding_is_zero(self):
        probabilities, index = np.full((2, 3, 2), 0.5, "float32"), np.zeros((2, 3, 1), "int32")
        assert value(losses.sequence_balancing(probabilities, index, np.zeros((2, 3), bool))) == 0


class TestRouterZ:
    def test_value(self):
        # logsumexp(0, 0) = log 2; logsumexp(log 3, 0) = log 4
        logits = np.array([[0.0, 0.0], [np.log(3.0), 0.0]], "float32")
        expected = (np.log(2) ** 2 + np.log(4) ** 2) / 2
        assert value(losses.router_z(logits)) == pytest.approx(expected, rel=1e-6)
        mask = np.array([True, False])
        assert value(losses.router_z(logits, mask)) == pytest.approx(np.log(2) ** 2, rel=1e-6)

    def test_nan_in_padding(self):
        layer = keras.layers.Lambda(lambda x: losses.router_z(x, np.array([True, False])))
        layer.build((2, 2))
        z, _, by_logits, _ = run(layer, [[0.0, 0.0], [np.nan, np.inf]], 1.0)
        assert z == pytest.approx(np.log(2) ** 2)
        # 2 * logsumexp * softmax
        np.testing.assert_allclose(by_logits, [[np.log(2)] * 2, [0, 0]], rtol=1e-6)

    def test_float32_and_finite_at_large_bfloat16_logits(self):
        loss = losses.router_z(ops.cast(np.full((4, 8), 300.0, "float32"), "bfloat16"))
        assert ops.dtype(loss) == "float32"
        assert value(loss) == pytest.approx((300 + np.log(8)) ** 2, rel=1e-4)


class TestImportance:
    def test_zero_when_all_experts_weigh_the_same(self):
        assert value(losses.importance(np.full((3, 5, 4), 0.25))) == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("tokens", [1, 7])
    def test_one_less_than_the_experts_at_full_collapse(self, tokens):
        weights = one_hot([2] * tokens, 4)
        assert value(losses.importance(weights)) == pytest.approx(3, rel=1e-6)

    def test_by_hand_and_without_padding(self):
        # Sums 1, 2, 3: mean 2, variance 2/3, so 1/6. The padding would make it 7, 2, 3.
        weights = np.array([[1.0, 0, 1], [0, 2, 2], [6, 0, np.nan]])
        loss = losses.importance(weights, np.array([True, True, False]))
        assert value(loss) == pytest.approx(1 / 6, rel=1e-6)

    def test_nothing_but_padding_is_zero(self):
        assert value(losses.importance(np.ones((2, 3)), np.zeros(2, bool))) == 0


class TestLoad:
    def draws(self, tokens=3, experts=5, seed=0):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(tokens, experts))
        scale = rng.uniform(0.3, 2, size=(tokens, experts))
        return logits, logits + rng.normal(size=(tokens, experts)) * scale, scale

    @pytest.mark.parametrize("k", [1, 2, 4, 5])
    def test_is_the_equations(self, k):
        mask = np.array([True, True, False])
        arrays = self.draws()
        expected = oracle.load(*arrays, k, mask)
        assert value(losses.load(*arrays, k, mask)) == pytest.approx(expected, rel=1e-5, abs=1e-6)

    @pytest.mark.parametrize("k", [1, 3])
    def test_probability_is_how_often_a_new_draw_is_among_the_largest(self, k):
        """One token: the loss follows from the probabilities that sampling finds."""
        logits, noisy, scale = self.draws(tokens=1)
        rng = np.random.default_rng(1)
        share = np.zeros(5)
        for e in range(5):
            again = np.repeat(noisy, 200_000, axis=0)
            again[:, e] = logits[0, e] + rng.normal(size=200_000) * scale[0, e]
            share[e] = np.mean(np.argsort(again, axis=-1)[:, -k:] == e) * k
        expected = oracle.squared_variation(share)
        assert value(losses.load(logits, noisy, scale, k)) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_probability_is_that_of_equation_8(self, k):
        """By a million draws of each expert's own noise: a standard deviation of 5e-4 at most.

        The loss does not depend on the scale of the probabilities. A second token fixes the scale:
        it has no noise, so that its probabilities are 0 and 1.
        """
        logits, noisy, scale = self.draws(tokens=2)
        rng = np.random.default_rng(1)
        share = np.zeros((2, 5))
        for t, e in np.ndindex(2, 5):
            kth_excluding = np.sort(np.delete(noisy[t], e))[-k]
            drawn = logits[t, e] + rng.normal(size=1_000_000) * scale[t, e]
            share[t, e] = np.mean(drawn > kth_excluding)
        for t, e in np.ndindex(2, 5):
            sure = np.roll(np.arange(5) < k, e).astype("float64")
            pairs = (logits[t], sure), (noisy[t], sure), (scale[t], np.zeros(5))
            loss = value(losses.load(*map(np.stack, pairs), k))
            expected = oracle.squared_variation(share[t] + sure)
            assert loss == pytest.approx(expected, rel=2e-3)

    def test_probability_at_zero_kernels_is_the_share_of_the_experts(self):
        """Logits of 0, and noise of the standard deviation softplus(0): k / n on average."""
        logits, scale = np.zeros((20_000, 8)), np.full((20_000, 8), np.log(2))
        noisy = np.random.default_rng(0).normal(size=logits.shape) * scale
        assert value(losses.load(logits, noisy, scale, 3)) == pytest.approx(
            0, abs=(5e-3 * 8 / 3) ** 2
        )
        # With as many tokens without noise, which choose experts 0 to 2, the means are 11/16 for
        # three experts and 3/16 for five: mean 3/8, variance 15/256, so 5/12.
        sure = np.tile(np.arange(8.0) < 3, (20_000, 1)).astype("float64")
        pairs = (logits, sure), (noisy, sure), (scale, 0 * sure)
        loss = losses.load(*map(np.concatenate, pairs), 3)
        assert value(loss) == pytest.approx(5 / 12, rel=5e-3)

    def test_all_experts_chosen_is_zero(self):
        assert value(losses.load(*self.draws(), 5)) == 0

    def test_no_noise_is_finite(self):
        logits, _, scale = self.draws()
        assert np.isfinite(value(losses.load(logits, logits, 0 * scale, 2)))


class TestBatchwiseThreshold:
    # Two experts, three tokens, T = (.4, .3); expert 0 took token 0 and expert 1 took token 1:
    #   token 0 (.7, .3): expert 0 agrees (over and taken), expert 1 agrees (neither)
    #   token 1 (.5, .5): expert 0 lets it through and did not take it: .5 - .4 = .1; 1 agrees
    #   token 2 (.2, .8): expert 0 agrees; expert 1 lets it through and did not: .8 - .3 = .5
    P = np.array([[[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]]], "float32")
    TAKEN = np.array([[[0], [1]]], "int32")

    def test_value(self):
        loss = losses.batchwise_threshold(self.P, self.TAKEN, np.array([0.4, 0.3], "float32"))
        assert value(loss) == pytest.approx(0.6 / 3, rel=1e-5)

    def test_of_a_token_refused_that_was_taken(self):
        # Expert 0 refuses token 0: (0 - 1) * (.7 - .9) = .2; expert 1, T = .9, refuses token 1: .4.
        loss = losses.batchwise_threshold(self.P, self.TAKEN, np.array([0.9, 0.9], "float32"))
        assert value(loss) == pytest.approx(0.6 / 3, rel=1e-5)

    def test_zero_where_the_two_agree(self):
        taken = np.array([[[0, 3], [2, 1]]], "int32")  # 3: an empty slot
        loss = losses.batchwise_threshold(self.P, taken, np.array([0.6, 0.4], "float32"))
        assert value(loss) == pytest.approx(0.0, abs=1e-7)

    # A threshold that lets two tokens through for one taken is pushed up by descent, and down where
    # it refuses what was taken.
    @pytest.mark.parametrize(("threshold", "slope"), [(0.4, -1), (0.9, 1), (0.6, 0), (0.1, -2)])
    def test_gradient_with_respect_to_the_threshold(self, threshold, slope):
        def loss(t):
            return losses.batchwise_threshold(self.P[..., :1], self.TAKEN[:, :1], t)

        layer = keras.layers.Lambda(loss)
        layer.build((1,))
        by_threshold = run(layer, [threshold], 1.0)[2]
        assert by_threshold.tolist() == pytest.approx([slope / 3])

    def test_random_with_padding(self):
        rng = np.random.default_rng(0)
        p = oracle.softmax(rng.normal(size=(2, 6, 4)))
        mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
        taken = oracle.expert_choice(p, 2, mask)
        index = [[[*np.flatnonzero(by), 6, 6][:2] for by in of.T] for of in taken]
        threshold = rng.uniform(size=4)
        dirty = np.where(mask[..., None], p, np.nan).astype("float32")
        loss = losses.batchwise_threshold(
            dirty, np.array(index, "int32"), threshold.astype("float32"), mask
        )
        expected = oracle.batchwise_threshold(p, taken, threshold, mask)
        assert value(loss) == pytest.approx(expected, rel=1e-5)

    def test_nothing_but_padding_is_zero(self):
        taken, mask = np.full((1, 2, 1), 3, "int32"), np.zeros((1, 3), bool)
        assert value(losses.batchwise_threshold(self.P, taken, np.zeros(2, "float32"), mask)) == 0
