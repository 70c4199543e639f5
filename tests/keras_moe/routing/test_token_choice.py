import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, SwitchRouter, TopKRouter, metrics
from tests import oracle
from tests.backend import numpy
from tests.keras_moe.routing.examples import (
    P,
    check_layer,
    logits_of,
    random_weights,
    with_identity,
)


class TestSwitchRouter:
    def test_raw_probability_of_the_first_choice(self):
        routing = numpy(with_identity(SwitchRouter(3, eval_capacity_factor=None))(logits_of(P)))
        assert routing.expert_index.tolist() == [[[0], [0], [0], [1]]]
        np.testing.assert_allclose(
            np.sort(routing.weight[routing.weight > 0]), [0.5, 0.5, 0.6, 0.6], rtol=1e-6
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

    def test_one_expert_is_the_network_alone(self):
        layer = MixtureOfExperts(FeedForwardExperts(1, F), SwitchRouter(load_balancing_weight=0.25))
        layer.build((None, None, D))
        weights = random_weights(layer)
        y = numpy(layer(ops.convert_to_tensor(X, "float32")))
        expected = oracle.mixture(
            X, np.ones((2, 6, 1)), lambda x_D, e: oracle.feed_forward(x_D, weights, e)
        )
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert [float(loss) for loss in layer.losses] == [0.25]  # alpha * 1 * f * P, both 1

    def test_min_capacity(self):
        assert with_identity(SwitchRouter(3))(logits_of(P)).token_index.shape[2] == 4
        router = with_identity(SwitchRouter(3, min_capacity=5))
        assert router(logits_of(P)).token_index.shape[2] == 5

    @pytest.mark.parametrize("training", [True, False])
    def test_a_factor_of_0_leaves_the_minimum_whatever_the_length(self, training):
        """As in transformers, where a capacity is so many tokens of a sequence."""
        router = SwitchRouter(E, 0, 0, min_capacity=2, exploration="argmax")
        layer = MixtureOfExperts(FeedForwardExperts(E, F), router, group="sequence")
        layer.build((None, None, D))
        weights = random_weights(layer)
        rng = np.random.default_rng(3)
        for length in (6, 23):
            x = rng.normal(size=(2, length, D)).astype("float32")
            p = oracle.softmax(x @ weights["kernel"])
            weight, _ = oracle.token_choice(p, 1, 2)
            assert (weight > 0).sum() < 2 * length  # some find their expert full
            expected = oracle.mixture(
                x, weight, lambda x_D, e: oracle.feed_forward(x_D, weights, e)
            )
            y = numpy(layer(ops.convert_to_tensor(x), training=training))
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert router.capacity_of(1000) == 2


TIGHT = {"capacity_factor": 0.75, "eval_capacity_factor": 0.75, "min_capacity": 1}


class TestExploration:
    def explored(self, policy, x, **options):
        router = with_identity(SwitchRouter(x.shape[-1], exploration=policy, seed=1, **options))
        return numpy(router(x, training=True))

    @pytest.mark.parametrize("policy", ["argmax", "sample", "dropout", "jitter"])
    def test_none_in_inference(self, policy):
        router = with_identity(SwitchRouter(3, exploration=policy, jitter=0.5, input_dropout=0.5))
        for _ in range(2):
            routing = numpy(router(logits_of(P)))
            np.testing.assert_allclose(routing.probabilities, P, rtol=1e-6)
            assert routing.expert_index.tolist() == [[[0], [0], [0], [1]]]

    @pytest.mark.parametrize("policy", ["argmax", "sample"])
    def test_input_is_left_alone(self, policy):
        routing = self.explored(policy, logits_of(P), jitter=0.5, input_dropout=0.5)
        np.testing.assert_allclose(routing.probabilities, P, rtol=1e-6)

    def test_dropout_of_the_input(self):
        logits = self.explored(
            "dropout", np.ones((1, 2000, 3), "float32"), input_dropout=0.2
        ).logits
        assert np.unique(logits) == pytest.approx([0, 1.25])
        assert np.mean(logits == 0) == pytest.approx(0.2, abs=0.03)  # sd .005

    def test_jitter_is_no_dropout(self):
        logits = self.explored("jitter", np.ones((1, 100, 3), "float32"), jitter=0.1).logits
        assert logits.min() >= 0.9 and logits.max() <= 1.1 and len(np.unique(logits)) > 100

    @pytest.mark.every_backend
    def test_sample_draws_by_probability_and_weighs_by_it(self):
        p = np.array([0.5, 0.0, 0.3, 0.2], "float32")
        with np.errstate(divide="ignore"):
            x = np.maximum(np.log(p), -200) * np.ones((1, 20_000, 1), "float32")
        routing = self.explored("sample", x, capacity_factor=None)
        share = np.bincount(routing.expert_index.reshape(-1), minlength=4) / 20_000
        assert share[1] == 0 and share == pytest.approx(p, abs=0.015)  # sd .0035 at most
        drawn = p[routing.expert_index.reshape(-1)]
        weight = routing.weight.reshape(-1)[routing.slot_index.reshape(-1)]
        np.testing.assert_allclose(weight, drawn, rtol=1e-5)

    def test_sample_is_new_for_every_token_and_call(self):
        router = with_identity(SwitchRouter(8, exploration="sample", seed=1))
        x = np.zeros((2, 50, 8), "float32")
        first, second = (numpy(router(x, training=True)).expert_index for _ in range(2))
        assert (first != second).any() and (first[0] != first[1]).any()
        assert ops.dtype(router(x, training=True).expert_index) == "int32"


E, D, F = 4, 3, 5
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])


class TestReroutes:
    def rerouted(self, reroutes, **options):
        options = {**TIGHT, "reroutes": reroutes} | options
        return with_identity(SwitchRouter(3, **options))

    def test_by_hand(self):
        # One slot each. Stage 1 seats token 0 with expert 0 and token 3 with expert 1. Stage 2:
        # token 1 finds 1 full, token 2 gets 2, at its probability of .4; and nobody has a slot
        # left for token 1 in stage 3.
        for reroutes in (1, 2):
            routing = numpy(self.rerouted(reroutes)(logits_of(P)))
            assert routing.token_index.tolist() == [[[0], [3], [2]]]
            np.testing.assert_allclose(routing.weight, [[[0.5], [0.6], [0.4]]], rtol=1e-6)
            assert routing.slot_index.tolist() == [[[0], [3], [2], [1]]]  # 3: dropped
            assert routing.expert_index.tolist() == [[[0], [0], [0], [1]]]  # first choices

    def test_padding_is_not_rerouted(self):
        mask = np.array([[True, True, False, True]])
        routing = numpy(self.rerouted(2)(logits_of(P), mask=mask))
        assert routing.token_index.tolist() == [[[0], [3], [1]]]
        np.testing.assert_allclose(routing.weight, [[[0.5], [0.6], [0.1]]], rtol=1e-6)

    def test_loss_counts_first_choices_and_statistics_who_is_dropped(self):
        plain, router = self.rerouted(0), self.rerouted(1)
        routing = router(logits_of(P))
        assert float(router.auxiliary_losses(routing)[0]) == float(
            plain.auxiliary_losses(plain(logits_of(P)))[0]
        )
        totals, expert_tokens = numpy(metrics.statistics(routing))
        totals = dict(zip(metrics.TOTALS, totals.tolist(), strict=True))
        assert (totals["wanted"], totals["kept"], totals["untaken"]) == (4, 3, 1)
        assert expert_tokens.tolist() == [3, 1, 0]

    def test_nothing_to_do_without_a_capacity(self):
        router = self.rerouted(2, eval_capacity_factor=None)
        assert numpy(router(logits_of(P))).weight.max() == pytest.approx(0.6)

    # With 4 experts a table of slots, with 16 as many rows as are needed.
    @pytest.mark.every_backend
    @pytest.mark.parametrize(
        ("policy", "num_experts", "masked"),
        [("argmax", 4, True), ("argmax", 16, False), ("sample", 4, False), ("sample", 16, True)],
    )
    def test_output_losses_and_gradients_are_the_papers(
        self, policy, num_experts, masked, monkeypatch
    ):
        """Against central differences of a float64 loop; a draw's random numbers are given."""
        drawn = np.random.default_rng(3).uniform(0.0, 0.3, size=(2, 6, 1))
        monkeypatch.setattr(
            "keras_moe.routing.token_choice.uniform",
            lambda *_: ops.convert_to_tensor(drawn, "float32"),
        )
        mask = MASK if masked else None
        router = SwitchRouter(exploration=policy, reroutes=1, load_balancing_weight=0.5, **TIGHT)
        layer = MixtureOfExperts(FeedForwardExperts(num_experts, F), router)
        layer.build((None, None, D))
        weights, x = random_weights(layer), X.copy()
        capacity = oracle.capacity(6, num_experts, 0.75)

        def loop(reroutes=1):
            p = oracle.softmax(x @ weights["kernel"])
            first = np.argmax(p, axis=-1)
            if policy == "sample":
                first = np.argmax(np.cumsum(p, axis=-1) > drawn, axis=-1)
            weight, chosen = oracle.switch_choice(p, first, reroutes, capacity, mask)
            y = oracle.mixture(x, weight, lambda x_D, e: oracle.feed_forward(x_D, weights, e))
            return y, 0.5 * oracle.load_balancing(p, chosen, mask)

        assert not np.allclose(loop()[0], loop(reroutes=0)[0])  # this test can see
        check_layer(layer, loop, x, weights, mask)

    def test_a_later_token_takes_an_earlier_ones_place(self):
        """As the docstring says. Without reroutes it cannot; another sequence never can."""

        def before(reroutes, last):
            layer = MixtureOfExperts(FeedForwardExperts(3, F, seed=1), self.rerouted(reroutes))
            x = np.repeat(logits_of(P), 2, axis=0)
            x[0, 3] = np.log(last)
            y = numpy(layer(x))
            return y[0, :3], y[1]

        for reroutes, leaks in ((0, False), (1, True)):
            # Token 2's second wish, expert 2, is taken where token 3 has it for its first.
            one, two = before(reroutes, [0.3, 0.6, 0.1]), before(reroutes, [0.3, 0.1, 0.6])
            assert np.allclose(one[0], two[0]) != leaks
            np.testing.assert_array_equal(one[1], two[1])

    @pytest.mark.parametrize("policy", ["sample", "dropout"])
    def test_trains_and_comes_back(self, policy, tmp_path):
        """In `fit`, the number of tokens in a group unknown, and from a `.keras` file."""
        router = SwitchRouter(exploration=policy, reroutes=1, **TIGHT)
        inputs = keras.Input((None, D))
        outputs = MixtureOfExperts(FeedForwardExperts(E, F), router, "batch")(inputs)
        model = keras.Model(inputs, outputs)
        model.compile("adam", "mse")
        x = X.astype("float32")
        loss = model.fit(x, x, batch_size=2, epochs=2, verbose=0).history["loss"]
        assert np.isfinite(loss).all()
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


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
