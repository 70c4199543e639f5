import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from tests.backend import compiled, gradients, numpy

tensor = ops.convert_to_tensor


class TestExpertProduct:
    def test_every_row_by_its_own_expert(self):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 4, 5))
        y = moe_ops.expert_product(tensor(x, "float32"), tensor(kernel, "float32"))
        np.testing.assert_allclose(numpy(y), x @ kernel, rtol=1e-5, atol=1e-5)

    def test_rows_in_any_order(self):
        # Expert e multiplies by e + 1: rows of experts 2, 0, 2 give 3, 1, 3.
        kernel = tensor([[[1.0]], [[2.0]], [[3.0]]])
        y = moe_ops.expert_product(ops.ones((3, 2, 1)), kernel, tensor([2, 0, 2], "int32"))
        assert numpy(y)[..., 0].tolist() == [[3, 3], [1, 1], [3, 3]]


class TestCallByRow:
    @pytest.fixture
    def layers(self):
        layers = [keras.layers.Rescaling(scale) for scale in (10.0, 100.0)]
        for layer in layers:
            layer.build((None, 1))
        return layers

    def test_row_e_is_layer_e(self, layers):
        y = moe_ops.call_by_row(layers, tensor([[[1.0]], [[2.0]]]))
        assert numpy(y)[..., 0].tolist() == [[10], [200]]

    def test_rows_in_any_order(self, layers):
        x, row_expert = tensor([[[1.0]], [[2.0]], [[3.0]]]), tensor([1, 0, 1], "int32")
        y = moe_ops.call_by_row(layers, x, row_expert)
        assert numpy(y)[..., 0].tolist() == [[100], [20], [300]]


class TestTopK:
    # 7 stands first and third, 5 second and last; equal entries in order of position.
    X = [[7.0, 5.0, 7.0, 1.0, 5.0]]

    @pytest.mark.parametrize("k", [1, 2, 3, 5])
    def test_in_descending_order_ties_by_position(self, k):
        values, index = moe_ops.top_k(tensor(self.X), k)
        assert numpy(values).tolist() == [[7, 7, 5, 5, 1][:k]]
        assert numpy(index).tolist() == [[0, 2, 1, 4, 3][:k]]
        assert keras.backend.standardize_dtype(index.dtype) == "int32"

    def test_many_ties(self):
        _, index = moe_ops.top_k(ops.zeros((2, 100)), 40)
        assert numpy(index).tolist() == [list(range(40))] * 2

    @pytest.mark.parametrize("k", [1, 2])
    def test_gradient_goes_to_the_chosen(self, k):
        layer = keras.layers.Lambda(lambda x: moe_ops.top_k(x, k)[0])
        layer.build((1, 3))
        by_x, _ = gradients(layer, [[1.0, 5.0, 3.0]], np.arange(1.0, k + 1)[None])
        assert by_x.tolist() == [[0, 1, 2 if k == 2 else 0]]


class TestNoise:
    def test_uniform_fills_its_range(self):
        noise = numpy(moe_ops.uniform((10_000,), 2.0, 4.0, keras.random.SeedGenerator(1)))
        assert noise.dtype == "float32"
        assert noise.min() >= 2 and noise.max() < 4
        # Mean 3 and standard deviation 2 / sqrt(12) = .577; the error of the mean is .0058.
        assert noise.mean() == pytest.approx(3, abs=0.03)
        assert noise.std() == pytest.approx(2 / np.sqrt(12), abs=0.02)

    def test_uniform_is_seeded_and_new_at_every_call(self):
        one, two = keras.random.SeedGenerator(1), keras.random.SeedGenerator(1)
        first = numpy(moe_ops.uniform((8,), 0.0, 1.0, one))
        np.testing.assert_array_equal(first, numpy(moe_ops.uniform((8,), 0.0, 1.0, two)))
        assert (first != numpy(moe_ops.uniform((8,), 0.0, 1.0, one))).any()

    def test_dropout_keeps_the_mean(self):
        x = ops.ones((10_000,))
        y = numpy(moe_ops.dropout(x, 0.25, keras.random.SeedGenerator(1)))
        assert set(np.round(y, 5)) == {0, np.round(np.float32(1 / 0.75), 5)}
        assert np.mean(y == 0) == pytest.approx(0.25, abs=0.03)

    def test_dropout_keeps_the_dtype(self):
        y = moe_ops.dropout(ops.ones((8,), "bfloat16"), 0.5, keras.random.SeedGenerator(1))
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


class TestRows:
    X = [[1.0, 2.0], [3.0, 4.0]]

    def test_take_rows_past_the_last_is_zeros(self):
        rows = moe_ops.take_rows(tensor(self.X), tensor([[1, 2], [0, 1]], "int32"))
        assert numpy(rows).tolist() == [[[3, 4], [0, 0]], [[1, 2], [3, 4]]]

    def test_add_rows_past_the_last_is_thrown_away(self):
        rows = tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
        summed = moe_ops.add_rows(rows, tensor([2, 3, 2], "int32"), 3)
        assert numpy(summed).tolist() == [[0, 0], [0, 0], [101, 202]]

    def test_compile(self):
        x, index = tensor(self.X), tensor([1, 2, 0], "int32")
        taken = compiled(moe_ops.take_rows)(x, index)
        assert numpy(taken).tolist() == [[3, 4], [0, 0], [1, 2]]
        summed = compiled(lambda x: moe_ops.add_rows(x, index[:2], 2))(x)
        assert numpy(summed).tolist() == [[0, 0], [1, 2]]


def test_with_gradient_uses_the_gradient_it_is_given():
    double_and_claim_seven = moe_ops.with_gradient(lambda x: 2 * x, lambda upstream: 7 * upstream)
    layer = keras.layers.Lambda(double_and_claim_seven)
    layer.build((2,))
    assert numpy(layer(tensor([1.0, 2.0]))).tolist() == [2, 4]
    by_x, _ = gradients(layer, [1.0, 2.0], [1.0, 10.0])
    assert by_x.tolist() == [7, 70]
