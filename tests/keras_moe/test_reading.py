"""Tokens that are one-hot, and routers that read them: token `e` goes to expert `e`."""

import keras
import numpy as np
import pytest

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    MixtureOfExperts,
    Routing,
    SwitchRouter,
    TopKRouter,
    metrics,
    mixtures,
    routings,
)
from tests.backend import numpy

E = 3


def moe(router, name="moe", **options):
    # Small experts: with the residual connection the largest entry of a token stays the largest.
    experts = FeedForwardExperts(E, 2, init_scale=1e-3, seed=1)
    layer = MixtureOfExperts(experts, router, name=name, **options)
    layer.build((None, None, E))
    layer.router.kernel.assign(np.log(3) * np.eye(E))
    return layer


def model_of(*layers):
    inputs = keras.Input((None, E))
    outputs = keras.layers.Masking(-1.0)(inputs)
    for layer in layers:
        outputs = keras.layers.Add()([outputs, layer(outputs)])  # keeps the mask
    return keras.Model(inputs, outputs)


def one_hot(*sequences):
    return np.stack([np.where(np.array(s)[:, None] < 0, -1.0, np.eye(E)[s]) for s in sequences])


def one_slot():
    return SwitchRouter(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1, jitter=0.0)


# Of the first sequence token 1 finds expert 0 full; the last token of the second is padding.
X = one_hot([0, 0, 1], [2, 1, -1])
P = 3 / 5  # e^(ln 3) / (e^(ln 3) + 1 + 1)


def test_layers_of_one_path_are_told_apart():
    class Twins(keras.Layer):
        def __init__(self):
            super().__init__()
            self.one, self.other = moe(one_slot()), moe(one_slot())

    twins = Twins()
    assert mixtures(twins) == {"moe": twins.one, "moe_1": twins.other}


class TestRoutings:
    def test_of_all_layers_for_these_inputs(self):
        model = model_of(moe(one_slot(), "first"), moe(TopKRouter(1), "second"))
        read = routings(model, X)
        assert list(read) == list(mixtures(model)) == ["first", "second"]
        first, second = read.values()
        assert isinstance(first, Routing) and isinstance(first.token_index, np.ndarray)
        assert first.expert_index[..., 0].tolist() == [[0, 0, 1], [2, 1, E]]
        # The first layer's residual connection leaves the largest entry where it was.
        assert second.expert_index[..., 0].tolist() == [[0, 0, 1], [2, 1, E]]

    def test_nothing_that_counts_is_changed(self):
        layer = moe(one_slot())
        model = model_of(layer)
        model(X)
        before = [numpy(v).tolist() for v in layer.statistics]
        losses = [float(loss) for loss in layer.losses]
        routings(model, X)
        assert [numpy(v).tolist() for v in layer.statistics] == before
        model(X)
        assert numpy(layer.statistics[0])[1] == 2 * before[0][1] > 0
        assert [float(loss) for loss in layer.losses] == losses != []

    def test_as_in_training(self):
        # Capacity ceil(3 * 3 / 3) in training, 1 in inference.
        router = SwitchRouter(
            capacity_factor=3.0, eval_capacity_factor=1.0, min_capacity=1, jitter=0.0
        )
        model = model_of(moe(router))
        for training, histogram in ((False, [1, 4, 0, 0]), (True, [0, 5, 0, 0])):
            read = routings(model, X, training=training)["moe"]
            assert numpy(metrics.experts_per_token_histogram(read)).tolist() == histogram

    def test_a_layer_that_is_not_called(self):
        class Half(keras.Layer):
            def __init__(self):
                super().__init__()
                self.used, self.unused = moe(one_slot(), "used"), moe(one_slot(), "unused")

            def call(self, inputs):
                return self.used(inputs)

        assert list(routings(Half(), X)) == ["used"]


class TestExpertTokens:
    def test_choices_before_any_is_dropped(self):
        read = routings(model_of(moe(one_slot())), X)["moe"]
        assert numpy(metrics.expert_tokens(read)).tolist() == [2, 2, 1]

    def test_of_expert_choice(self):
        # One slot for each expert and sequence, and in the second one too few tokens for three.
        read = routings(model_of(moe(ExpertChoiceRouter(capacity_factor=1.0))), X)["moe"]
        assert numpy(metrics.expert_tokens(read)).tolist() == [2, 2, 2]


class TestExpertWeights:
    @pytest.mark.parametrize("group", ["sequence", "batch"])
    def test_of_token_choice_that_drops(self, group):
        # In one group of six places there are two slots for each expert: none is dropped.
        read = routings(model_of(moe(one_slot(), group=group)), X)["moe"]
        weights = metrics.expert_weights(read).reshape(2, 3, E)
        second = 0 if group == "sequence" else P
        expected = [
            [[P, 0, 0], [second, 0, 0], [0, P, 0]],
            [[0, 0, P], [0, P, 0], [0, 0, 0]],
        ]
        np.testing.assert_allclose(weights, expected, atol=1e-6)

    def test_without_a_capacity_groups_are_pooled(self):
        read = routings(model_of(moe(TopKRouter(2))), X)["moe"]
        assert len(read.token_index) == 1 and read.row_expert is not None
        # Of the other two experts, both 1/5, the first: weights 3/4 and 1/4.
        a, b = 3 / 4, 1 / 4
        expected = [[[a, b, 0], [a, b, 0], [b, a, 0]], [[b, 0, a], [b, a, 0], [0, 0, 0]]]
        np.testing.assert_allclose(metrics.expert_weights(read), expected, atol=1e-6)

    def test_of_expert_choice(self):
        # One slot for each expert, ceil(4 * .75 / 3); of expert 0 the last token is the weaker.
        x = one_hot([0, 1, 2, 0])
        x[:, 3] /= 2
        read = routings(model_of(moe(ExpertChoiceRouter(capacity_factor=0.75))), x)["moe"]
        expected = [[[P, 0, 0], [0, P, 0], [0, 0, P], [0, 0, 0]]]
        np.testing.assert_allclose(metrics.expert_weights(read), expected, atol=1e-6)
