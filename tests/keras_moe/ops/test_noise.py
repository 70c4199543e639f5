import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from tests.backend import numpy

pytestmark = pytest.mark.every_backend


class TestNoise:
    def test_uniform_fills_its_range(self):
        noise = numpy(moe_ops.uniform((10_000,), 2.0, 4.0, keras.random.SeedGenerator(1)))
        assert noise.dtype == "float32"
        assert noise.min() >= 2 and noise.max() < 4
        # Mean 3 and standard deviation 2 / sqrt(12) = .577; the error of the mean is .0058.
        assert noise.mean() == pytest.approx(3, abs=0.03)
        assert noise.std() == pytest.approx(2 / np.sqrt(12), abs=0.02)

    def test_normal(self):
        one, two = keras.random.SeedGenerator(1), keras.random.SeedGenerator(1)
        noise = numpy(moe_ops.normal((10_000,), one))
        assert noise.dtype == "float32"
        assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(
            1, abs=0.03
        )
        np.testing.assert_array_equal(noise, numpy(moe_ops.normal((10_000,), two)))
        assert (noise != numpy(moe_ops.normal((10_000,), one))).all()

    def test_uniform_is_seeded_and_new_at_every_call(self):
        one, two = keras.random.SeedGenerator(1), keras.random.SeedGenerator(1)
        first = numpy(moe_ops.uniform((8,), 0.0, 1.0, one))
        np.testing.assert_array_equal(first, numpy(moe_ops.uniform((8,), 0.0, 1.0, two)))
        assert (first != numpy(moe_ops.uniform((8,), 0.0, 1.0, one))).any()

    def test_neighbouring_seeds_share_no_numbers(self):
        def three_draws(seed):
            generator = keras.random.SeedGenerator(seed)
            return {float(moe_ops.uniform((1,), 0.0, 1.0, generator)[0]) for _ in range(3)}

        assert len(three_draws(1) | three_draws(2)) == 6

    def test_dropout_keeps_the_mean(self):
        x = ops.ones((10_000,))
        y = numpy(moe_ops.dropout(x, 0.25, keras.random.SeedGenerator(1)))
        assert set(np.round(y, 5)) == {0, np.round(np.float32(1 / 0.75), 5)}
        assert np.mean(y == 0) == pytest.approx(0.25, abs=0.03)

    def test_dropout_keeps_the_dtype(self):
        y = moe_ops.dropout(ops.ones((8,), "bfloat16"), 0.5, keras.random.SeedGenerator(1))
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
