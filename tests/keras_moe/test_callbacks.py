"""Tokens that are one-hot, and routers that read them: token `e` goes to expert `e`."""

import keras
import numpy as np
import pytest

from keras_moe import (
    ExpertChoiceRouter,
    FeedForwardExperts,
    MixtureOfExperts,
    SwitchRouter,
    metrics,
)
from keras_moe.callbacks import RoutingMetrics

E = 4
# Probabilities (1/2, 1/6, 1/6, 1/6): .5 ln 2 + .5 ln 6, relative to ln 4.
ENTROPY = (0.5 * np.log(2) + 0.5 * np.log(6)) / np.log(4)
JIT = keras.backend.backend() != "torch"


def switch():
    """One slot for each expert and sequence of four tokens."""
    return SwitchRouter(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1, jitter=0.0)


def moe(router, name="moe"):
    layer = MixtureOfExperts(FeedForwardExperts(E, 2), router, name=name)
    layer.build((None, None, E))
    layer.router.kernel.assign(np.log(3) * np.eye(E))
    return layer


def compiled_model(*layers):
    """Padding is where the tokens are -1; it learns nothing, so that the routing stays."""
    inputs = keras.Input((4, E))
    outputs = keras.layers.Masking(-1.0)(inputs)
    for layer in layers:
        outputs = layer(outputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=JIT)
    return model


def one_hot(*sequences):
    return np.stack([np.where(np.array(s)[:, None] < 0, -1.0, np.eye(E)[s]) for s in sequences])


# Batches of one sequence each; -1 is padding.
#   0 0 1 2:   4 choices, 1 dropped, max_share 2 / 1 = 2
#   3 3 3 -1:  3 choices, 2 dropped, max_share 3 / .75 = 4
TRAINING = one_hot([0, 0, 1, 2], [3, 3, 3, -1])
#   0 1 0 1:   4 choices, 2 dropped, max_share 2, experts 2 and 3 are dead
VALIDATION = one_hot([0, 1, 0, 1])


def fit(model, callbacks, **kwargs):
    y = np.zeros(TRAINING.shape)
    arguments = {"batch_size": 1, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(TRAINING, y, callbacks=callbacks, **arguments).history


class TestFit:
    @pytest.mark.every_backend
    def test_exact_figures_of_every_epoch(self):
        history = fit(
            compiled_model(moe(switch())),
            [RoutingMetrics()],
            epochs=3,
            validation_data=(VALIDATION, np.zeros(VALIDATION.shape)),
        )
        expected = {
            "moe/dropped": 3 / 7,
            "moe/max_share": 3,
            "moe/dead": 0,
            "moe/entropy": ENTROPY,
            "val_moe/dropped": 2 / 4,
            "val_moe/max_share": 2,
            "val_moe/dead": 2 / 4,
            "val_moe/entropy": ENTROPY,
        }
        assert set(history) == {"loss", "val_loss", *expected}
        for name, value in expected.items():
            assert history[name] == pytest.approx([value] * 3, rel=1e-5), name

    def test_without_validation(self):
        history = fit(compiled_model(moe(switch())), [RoutingMetrics()], epochs=2)
        assert history["moe/dropped"] == pytest.approx([3 / 7] * 2)
        assert not any(name.startswith("val_") for name in history)

    def test_validation_of_some_epochs(self):
        layer = moe(switch())

        def forget(epoch, logs):
            # From epoch 2 on all choose expert 0: 5 of 7 are dropped, 3 of 4 in validation.
            if epoch == 1:
                layer.router.kernel.assign(np.zeros((E, E)))

        history = fit(
            compiled_model(layer),
            [RoutingMetrics(), keras.callbacks.LambdaCallback(on_epoch_begin=forget)],
            epochs=4,
            validation_data=(VALIDATION, np.zeros(VALIDATION.shape)),
            validation_freq=[1, 3],
        )
        assert history["moe/dropped"] == pytest.approx([3 / 7, 5 / 7, 5 / 7, 5 / 7])
        assert history["val_moe/dropped"] == pytest.approx([2 / 4, 3 / 4])

    def test_other_callbacks_see_them(self):
        seen = []
        other = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
        fit(compiled_model(moe(switch())), [RoutingMetrics(), other])
        assert seen[0]["moe/dropped"] == pytest.approx(3 / 7)

    def test_training_stops_by_them(self):
        stop = keras.callbacks.EarlyStopping("moe/dropped", patience=1, mode="min")
        history = fit(compiled_model(moe(switch())), [RoutingMetrics(), stop], epochs=9)
        assert len(history["loss"]) == 2

    def test_two_fits_with_one_callback(self):
        model, callback = compiled_model(moe(switch())), RoutingMetrics()
        for _ in range(2):
            assert fit(model, [callback])["moe/dropped"] == pytest.approx([3 / 7])

    def test_expert_choice(self):
        # Each expert takes one of the four tokens, ceil(4 * 1 / 4).
        #   0 0 1 2:   experts 0, 1 and 2 take the first of theirs, expert 3 the first of equals,
        #              token 0: of four tokens one is untaken, four places
        #   3 3 3 -1:  all four the first of equals: of three tokens two are untaken
        history = fit(
            compiled_model(moe(ExpertChoiceRouter(capacity_factor=1.0))), [RoutingMetrics()]
        )
        expected = {
            "moe/dropped": 0,
            "moe/max_share": 1,
            "moe/dead": 0,
            "moe/entropy": ENTROPY,
            "moe/untaken": 3 / 7,
            "moe/experts_per_token": 8 / 7,
        }
        assert set(history) == {"loss", *expected}
        for name, value in expected.items():
            assert history[name] == pytest.approx([value], rel=1e-5), name

    def test_two_layers(self):
        first, second = moe(switch(), "first"), moe(switch(), "second")
        second.router.kernel.assign(np.zeros((E, E)))
        # The second layer's router cannot tell experts apart: the first expert has all 7 choices,
        # of which one per sequence is kept.
        history = fit(compiled_model(first, second), [RoutingMetrics()])
        assert history["first/dropped"] == pytest.approx([3 / 7])
        assert history["second/dropped"] == pytest.approx([5 / 7])

    def test_two_layers_of_one_name(self):
        inner = [keras.Sequential([moe(switch())], name=name) for name in ("first", "second")]
        inner[1].layers[0].router.kernel.assign(np.zeros((E, E)))
        history = fit(compiled_model(*inner), [RoutingMetrics()])
        # Built by themselves, both have the path `moe` too.
        assert history["moe/dropped"] == pytest.approx([3 / 7])
        assert history["moe_1/dropped"] == pytest.approx([5 / 7])

    def test_two_layers_of_one_name_with_paths(self):
        class Block(keras.Layer):
            def __init__(self, name):
                super().__init__(name=name)
                self.moe = MixtureOfExperts(FeedForwardExperts(E, 2), switch(), name="moe")

            def call(self, inputs):
                return self.moe(inputs)

        history = fit(compiled_model(Block("first"), Block("second")), [RoutingMetrics()])
        assert {"first/moe/dropped", "second/moe/dropped"} <= set(history)

    def test_a_model_that_is_not_built_yet(self):
        model = keras.Sequential([keras.layers.Masking(-1.0), moe(switch())])
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=JIT)
        assert fit(model, [RoutingMetrics()])["moe/dropped"] == pytest.approx([3 / 7])

    def test_a_model_without_moe_layers(self):
        assert set(fit(compiled_model(keras.layers.Dense(E)), [RoutingMetrics()])) == {"loss"}


def test_evaluate():
    """Keras returns a copy of its logs that no callback can reach; other callbacks see them."""
    seen = []
    other = keras.callbacks.LambdaCallback()
    other.on_test_end = lambda logs=None: seen.append(logs)
    layer = moe(switch())
    model, y = compiled_model(layer), np.zeros(VALIDATION.shape)
    fit(model, [])  # what was counted before is not counted
    callbacks = [RoutingMetrics(), other]
    logs = model.evaluate(VALIDATION, y, callbacks=callbacks, verbose=0, return_dict=True)
    assert set(logs) == {"loss"}
    assert set(seen[0]) == {"loss", *(f"moe/{figure}" for figure in metrics.read(layer))}
    assert seen[0]["moe/dropped"] == metrics.read(layer)["dropped"] == pytest.approx(2 / 4)
