import re

import keras
import numpy as np
import pytest

import keras_moe
import zoo
from keras_moe import LayerExperts, MixtureOfExperts, SoftmaxRouter
from keras_moe.losses import MixtureOfExpertsLoss, blend, unpack
from tests import oracle
from tests.backend import numpy

X = np.random.default_rng(0).normal(size=(48, 3)).astype("float32")


def different_experts(width=2):
    return [
        keras.layers.Dense(width),
        keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(width)]),
    ]


def fitted(model, y, loss="mixture", epochs=3, **compile_options):
    optimizer = keras.optimizers.Adam(0.03)
    model.compile(optimizer, MixtureOfExpertsLoss(loss), **compile_options)
    return model.fit(X, y, batch_size=16, epochs=epochs, verbose=0).history


def test_is_linear_experts_and_a_gate_that_starts_equal():
    model = zoo.adaptive_mixture(experts=3, output_dim=2)
    outputs, gate_logits = (numpy(x) for x in unpack(model(X)))
    for e, expert in enumerate(model.experts):
        kernel, bias = (numpy(v) for v in expert.weights)
        np.testing.assert_allclose(outputs[:, e], X @ kernel + bias, rtol=1e-5, atol=1e-6)
    assert (gate_logits == 0).all()
    assert [v.path.partition("/")[2] for v in model.weights] == [
        *(f"expert_{e}/{name}" for e in range(3) for name in ("kernel", "bias")),
        *("gate/kernel", "gate/bias"),
    ]


def test_experts_part_the_inputs():
    """Two lines that no single one comes near, told apart by the sign of the input: |x|."""
    keras.utils.set_random_seed(0)
    model = zoo.adaptive_mixture(experts=2)
    y = 4 * np.abs(X[:, :1])
    model.compile(keras.optimizers.Adam(0.1), MixtureOfExpertsLoss(), metrics=["mse"])
    history = model.fit(X, y, epochs=100, verbose=0).history
    assert history["mse"][-1] < 0.1 * np.var(y)
    assert history["loss"][-1] < 0.1
    gate_logits = numpy(unpack(model(X))[1])
    side = np.sign(gate_logits[:, 0] - gate_logits[:, 1])
    assert abs(np.mean(side * np.sign(X[:, 0]))) > 0.9


def test_predict_and_metrics_see_the_blend_and_the_loss_what_is_packed():
    model = zoo.adaptive_mixture(different_experts())
    y = X[:, :2] ** 2
    fitted(model, y, metrics=["mse"], weighted_metrics=["mae"])
    packed = numpy(model(X))
    prediction = model.predict(X, batch_size=20, verbose=0)  # the last batch is smaller
    np.testing.assert_allclose(prediction, numpy(blend(packed)), rtol=1e-5, atol=1e-6)
    weight = np.arange(48.0)
    result = model.evaluate(X, y, sample_weight=weight, verbose=0, return_dict=True)
    cases = [
        oracle.mixture_loss("mixture", target, experts[:, :-1], experts[:, -1])
        for target, experts in zip(y, packed, strict=True)
    ]
    assert result["mse"] == pytest.approx(np.mean((y - prediction) ** 2), rel=1e-5)
    weighted = np.average(np.mean(abs(y - prediction), axis=-1), weights=weight)
    assert result["mae"] == pytest.approx(weighted, rel=1e-5)
    assert result["loss"] == pytest.approx(np.mean(cases * weight), rel=1e-5)


def test_classification_predicts_probabilities():
    model = zoo.adaptive_mixture(experts=3, output_dim=4, classification=True)
    labels = (X[:, 0] > 0) + 2 * (X[:, 1] > 0)
    history = fitted(model, labels, "classification", epochs=60, metrics=["accuracy"])
    prediction = model.predict(X, verbose=0)
    np.testing.assert_allclose(prediction.sum(axis=-1), np.ones(48), rtol=1e-5)
    np.testing.assert_allclose(
        prediction, numpy(blend(model(X), classification=True)), rtol=1e-5, atol=1e-6
    )
    accuracy = np.mean(prediction.argmax(axis=-1) == labels)
    assert accuracy > 0.9
    assert history["accuracy"][-1] == pytest.approx(accuracy, abs=0.05)


def test_computes_what_a_dense_layer_of_experts_does():
    layer = MixtureOfExperts(LayerExperts(different_experts()), SoftmaxRouter())
    experts = different_experts()
    gate = keras.layers.Dense(2, use_bias=False)
    model = zoo.adaptive_mixture(experts, gate=gate)
    layer.build(X.shape)
    model.build(X.shape)
    layer.router.kernel.assign(numpy(gate.kernel))
    for ours, theirs in zip(experts, layer.experts.layers, strict=True):
        theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(model.predict(X, verbose=0), numpy(layer(X)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classification", [False, True])
def test_saved_and_loaded(tmp_path, classification):
    gate = keras.Sequential([keras.layers.Dense(5, "relu"), keras.layers.Dense(2)])
    experts = different_experts(3)
    model = zoo.adaptive_mixture(experts, classification=classification, gate=gate, name="mine")
    form, y = ("classification", np.arange(48) % 3) if classification else ("competitive", X)
    fitted(model, y, form, metrics=["accuracy" if classification else "mse"])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, zoo.AdaptiveMixture)
    assert loaded.name == "mine" and loaded.loss.form == form
    assert loaded.get_config().keys() == model.get_config().keys()
    assert loaded.experts[0].kernel.path == model.experts[0].kernel.path
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    before, after = (m.evaluate(X, y, verbose=0) for m in (model, loaded))
    assert after == pytest.approx(before)
    loaded.fit(X, y, verbose=0)


def test_inputs_of_any_structure_and_axes():
    class Sum(keras.Layer):
        """Builds itself when it is first called, as many do."""

        def __init__(self, units):
            super().__init__()
            self.dense = keras.layers.Dense(units)

        def call(self, inputs):
            return self.dense(inputs["a"]) + self.dense(inputs["b"])

    model = zoo.adaptive_mixture([Sum(1), Sum(1)], gate=Sum(2))
    x = X.reshape(8, 6, 3)
    inputs = {"a": x, "b": x}
    model.compile("sgd", MixtureOfExpertsLoss())
    model.fit(inputs, x[..., 0], verbose=0)
    assert model.predict(inputs, verbose=0).shape == (8, 6, 1)


def test_padding_is_not_in_the_loss():
    x = X.reshape(8, 6, 3).copy()
    mask = np.arange(48).reshape(8, 6) % 4 > 0
    x[~mask] = 0
    inputs = keras.Input((6, 3))
    mixture = zoo.adaptive_mixture(experts=2, output_dim=3)
    model = keras.Model(inputs, mixture(keras.layers.Masking()(inputs)))
    model.compile("sgd", MixtureOfExpertsLoss("competitive"))
    y = np.where(mask[..., None], x, 1e3)
    packed = numpy(mixture(x))
    cases = [
        oracle.mixture_loss("competitive", y[c], packed[c][:, :-1], packed[c][:, -1])
        for c in zip(*np.nonzero(mask), strict=True)
    ]
    assert model.evaluate(x, y, verbose=0) == pytest.approx(np.mean(cases), rel=1e-5)


def test_experts_dropout_only_while_training():
    dropout = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model = zoo.adaptive_mixture([dropout, keras.layers.Dense(1)])
    model.build(X.shape)
    once, again = (model.predict(X, verbose=0) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (numpy(model(X, training=True)) != numpy(model(X, training=True))).any()


def test_the_gate_is_float32_under_mixed_precision():
    dense = keras.layers.Dense(1, dtype="mixed_bfloat16", kernel_initializer="ones")
    gate = keras.layers.Dense(1, dtype="float32", kernel_initializer="ones", use_bias=False)
    model = zoo.AdaptiveMixture([dense], gate, dtype="mixed_bfloat16")
    packed = model(np.array([[257.0]], "float32"))
    assert keras.backend.standardize_dtype(packed.dtype) == "float32"
    assert numpy(packed).tolist() == [[[256.0, 257.0]]]  # 257 is 256 in bfloat16
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        default = zoo.adaptive_mixture(experts=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert default.experts[0].compute_dtype == "bfloat16"
    assert default.gate.compute_dtype == "float32"


class TestErrors:
    def test_number_of_experts(self):
        with pytest.raises(ValueError, match="`experts`.*experts=0"):
            zoo.adaptive_mixture(experts=0)

    def test_output_dim(self):
        with pytest.raises(ValueError, match="`output_dim`.*output_dim=0"):
            zoo.adaptive_mixture(experts=2, output_dim=0)

    @pytest.mark.parametrize("experts", [[], [keras.layers.Dense(1), "dense"]])
    def test_no_layers(self, experts):
        with pytest.raises(ValueError, match=f"`experts`.*{re.escape(repr(experts))}"):
            zoo.adaptive_mixture(experts)

    def test_gate_is_a_layer(self):
        with pytest.raises(ValueError, match="`gate`.*gate='softmax'"):
            zoo.adaptive_mixture(experts=2, gate="softmax")

    def test_one_layer_twice(self):
        expert = keras.layers.Dense(1)
        with pytest.raises(ValueError, match="`experts`.*different"):
            zoo.adaptive_mixture([expert, expert])

    def test_widths(self):
        model = zoo.adaptive_mixture([keras.layers.Dense(1), keras.layers.Dense(2)])
        with pytest.raises(ValueError, match=r"`experts`.*\[1, 2\]"):
            model.build(X.shape)

    def test_gate_of_another_width(self):
        model = zoo.adaptive_mixture(experts=2, gate=keras.layers.Dense(3))
        with pytest.raises(ValueError, match="`gate`.*2.*3"):
            model.build(X.shape)


@pytest.mark.parametrize("classification", [False, True])
def test_loss_of_the_other_kind(classification):
    model = zoo.adaptive_mixture(2, 3, classification=classification)
    other = "mixture" if classification else "classification"
    model.compile("sgd", keras_moe.losses.MixtureOfExpertsLoss(other))
    message = f"`form`.*form='{other}'.*classification={classification}"
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((4, 2)), np.ones((4, 1 if not classification else 3)), verbose=0)
