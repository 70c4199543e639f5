import keras
import numpy as np
from keras import ops

import keras_moe
from benchmarks import contestants as c
from benchmarks.timing import (
    compiled,
    framed,
    inference_step,
    interleaved,
    token_numbers,
    token_table,
)


def test_a_slow_contestant_runs_in_two_rounds():
    times = {"first": 0.1, "fair": 5.0, "slow": 5.1}
    seconds = interleaved({name: lambda t=t: t for name, t in times.items()}, 4, slow=50)
    assert seconds == {"first": [0.1] * 4, "fair": [5.0] * 4, "slow": [5.1] * 2}


def test_tokens_differ_and_are_not_trained():
    numbers = token_numbers(128)
    assert numbers.shape == (2, 64) and len(np.unique(numbers)) == 128
    table = token_table(8)
    assert not table.trainable_variables
    tokens = ops.convert_to_numpy(table(numbers)).reshape(128, 8)
    assert len(np.unique(tokens, axis=0)) == 128


def test_the_gradient_of_the_layers_inputs_is_needed():
    model = framed(keras.layers.Identity(), token_table(8), 64)
    (scale,) = model.trainable_variables
    before = ops.convert_to_numpy(scale)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(token_numbers(64), 2 * np.ones((1, 64)), verbose=0)
    assert np.all(ops.convert_to_numpy(scale) > before)


def test_inference_is_the_layers_own():
    layer = c.moe(keras_moe.SwitchRouter(), 4, 8, False)
    x = np.random.default_rng(0).normal(size=(2, 1, 8)).astype("float32")
    assert inference_step(layer, x, times=2)() > 0
    expected = ops.convert_to_numpy(layer(x))
    actual = ops.convert_to_numpy(compiled(layer)(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
