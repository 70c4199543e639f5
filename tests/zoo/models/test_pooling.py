import keras
import numpy as np
import pytest

from tests.backend import numpy
from tests.zoo.models.pairs import compared
from zoo.models.pooling import ComparedTexts, MaskedMean, MixedLayers, TextNumbers

LENGTHS = ((2, 3), (4, 1))


def pairs(scale=1.0):
    """Two rows of six tokens of width 4, and which of them are of the first text and the second."""
    x = scale * np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    text_numbers = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 0]], "int32")
    return x, text_numbers


def right(layer, x):
    kernel, bias = (numpy(weight) for weight in layer.weights)
    return np.array(
        [
            compared(row[:a], row[a : a + b], kernel, bias)
            for row, (a, b) in zip(x, LENGTHS, strict=True)
        ]
    )


def test_the_mean_leaves_out_padding():
    x, mask = np.array([[[1.0], [3.0], [50.0]]], "float32"), np.array([[2, 1, 0]], "int32")
    np.testing.assert_allclose(numpy(MaskedMean()(x, mask)), [[2.0]])


def test_numbers_of_texts():
    """The first text ends with its separator, unless that is the row's first token."""
    token_ids = np.array([[5, 1, 6, 7, 1, 0], [1, 5, 1, 6, 1, 0]], "int32")
    numbers = TextNumbers(separator=1)(token_ids, np.array([[1, 1, 1, 1, 1, 0]] * 2))
    assert numpy(numbers).tolist() == [[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 0]]


def test_features_of_pairs():
    x, text_numbers = pairs()
    layer = ComparedTexts(dropout=0.5)
    features = layer(x, text_numbers)
    assert features.shape == layer.compute_output_shape(x.shape) == (2, 6 * 4 + 2)
    np.testing.assert_allclose(numpy(features), right(layer, x), rtol=1e-5, atol=1e-6)


def test_dropout():
    x, text_numbers = pairs()
    layer = ComparedTexts.from_config(ComparedTexts(dropout=0.5).get_config())
    still, one, other = (
        numpy(layer(x, text_numbers, training=training)) for training in (False, True, True)
    )
    whole, by_token = slice(0, 16), slice(16, 24)
    np.testing.assert_array_equal(one[:, whole], still[:, whole])
    assert np.abs(one - other)[:, by_token].max() > 0.01


def test_a_text_alone():
    """As if the other one's features were 0, and whatever the padding."""
    x, _ = pairs()
    layer = ComparedTexts()
    alone = numpy(layer(x[:, :3], np.ones((2, 3), "int32")))
    padded = numpy(layer(x, np.array([[1, 1, 1, 0, 0, 0]] * 2, "int32")))
    np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-6)
    u, v, apart, product = np.split(alone[:, :16], 4, axis=1)
    np.testing.assert_allclose(u, x[:, :3].mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(apart, np.abs(u))
    assert not v.any() and not product.any() and not alone[:, 20:].any()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy):
    """Of outputs whose squares float16 does not have."""
    x, text_numbers = pairs(scale=200.0)
    x = numpy(keras.ops.cast(keras.ops.cast(x, policy.removeprefix("mixed_")), "float32"))
    layer = ComparedTexts(dtype=policy)
    features = numpy(keras.ops.cast(layer(x, text_numbers), "float32"))
    closest = features[:, -2:]
    np.testing.assert_allclose(closest, right(layer, x)[:, -2:], rtol=0, atol=0.01)


def test_mixed_layers():
    """As ELMo's equation 1, of vectors whose mean square is 1."""
    layers = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype("float32") * [[[[9.0]]]]
    mix = MixedLayers()
    unit = layers / np.sqrt(np.mean(layers**2, axis=-1, keepdims=True))
    mixed = mix(list(layers))
    assert mixed.shape == mix.compute_output_shape([x.shape for x in layers]) == (2, 5, 4)
    np.testing.assert_allclose(numpy(mixed), unit.mean(axis=0), rtol=1e-5, atol=1e-6)
    scores = np.array([1.0, 0.0, -2.0], "float32")
    mix.scores.assign(scores)
    weights = np.exp(scores) / np.exp(scores).sum()
    right = np.tensordot(weights, unit, axes=1)
    np.testing.assert_allclose(numpy(mix(list(layers))), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_layers_in_half_precision(policy):
    """Of outputs whose squares float16 does not have."""
    layers = 300 * np.random.default_rng(0).normal(size=(2, 2, 5, 4)).astype("float32")
    unit = layers / np.sqrt(np.mean(layers**2, axis=-1, keepdims=True))
    dtype = policy.removeprefix("mixed_")
    mixed = MixedLayers(dtype=policy)([keras.ops.cast(x, dtype) for x in layers])
    assert keras.backend.standardize_dtype(mixed.dtype) == dtype
    mixed = numpy(keras.ops.cast(mixed, "float32"))
    np.testing.assert_allclose(mixed, unit.mean(axis=0), rtol=0, atol=0.02)
