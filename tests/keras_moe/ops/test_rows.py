import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from tests.backend import compiled, gradients, numpy

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor


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

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_the_stable_sort_of_numbers_of_any_sign_and_size(self, dtype):
        numbers = [-np.inf, -1e30, -1.0, -1e-20, 0.0, 1e-20, 0.5, 1.0, 1e30, np.inf]
        x = np.random.default_rng(0).choice(numbers, (4, 50)).astype("float32")
        values, index = moe_ops.top_k(ops.cast(x, dtype), 49)
        expected = np.argsort(-x, axis=-1, kind="stable")[:, :49]
        np.testing.assert_array_equal(numpy(index), expected)
        assert ops.dtype(values) == dtype

    @pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's rewriting of a sort")
    def test_that_not_all_of_the_k_are_used_does_not_make_it_a_sort(self):
        import jax

        last = jax.jit(lambda x: [part[..., -1:] for part in moe_ops.top_k(x, 4)])
        program = last.lower(np.zeros((64, 32), "float32")).compile().as_text().lower()
        assert "topk" in program and " sort(" not in program

    @pytest.mark.parametrize("k", [1, 2])
    def test_gradient_goes_to_the_chosen(self, k):
        layer = keras.layers.Lambda(lambda x: moe_ops.top_k(x, k)[0])
        layer.build((1, 3))
        by_x, _ = gradients(layer, [[1.0, 5.0, 3.0]], np.arange(1.0, k + 1)[None])
        assert by_x.tolist() == [[0, 1, 2 if k == 2 else 0]]


class TestRows:
    X = [[1.0, 2.0], [3.0, 4.0]]

    def test_take_rows_past_the_last_is_zeros(self):
        rows = moe_ops.take_rows(tensor(self.X), tensor([[1, 2], [0, 1]], "int32"))
        assert numpy(rows).tolist() == [[[3, 4], [0, 0]], [[1, 2], [3, 4]]]

    def test_sum_rows_times_their_weights(self):
        index = tensor([[1, 0], [2, 1], [2, 2]], "int32")
        summed = moe_ops.sum_rows(tensor(self.X), index, tensor([10.0, 100.0]))
        assert numpy(summed).tolist() == [[310, 420], [300, 400], [0, 0]]
        assert numpy(moe_ops.sum_rows(tensor(self.X), index)).tolist() == [[4, 6], [3, 4], [0, 0]]

    def test_sum_rows_sums_bfloat16_in_float32(self):
        x = tensor([[256.0], [1.0]], "bfloat16")
        summed = moe_ops.sum_rows(x, tensor([[0, 1, 1]], "int32"))
        assert ops.dtype(summed) == "bfloat16"
        assert numpy(ops.cast(summed, "float32")).tolist() == [[258]]  # one by one: 256

    def test_add_rows_past_the_last_is_thrown_away(self):
        rows = tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
        summed = moe_ops.add_rows(rows, tensor([2, 3, 2], "int32"), 3)
        assert numpy(summed).tolist() == [[0, 0], [0, 0], [101, 202]]

    def test_add_rows_sums_bfloat16_in_float32(self):
        # One by one in bfloat16 the sum would stop at 256, where the next number is 258.
        ones = ops.ones((512, 1), "bfloat16")
        summed = moe_ops.add_rows(ones, ops.zeros((512,), "int32"), 1)
        assert ops.dtype(summed) == "bfloat16"
        assert numpy(ops.cast(summed, "float32")).tolist() == [[512]]

    def test_compile(self):
        x, index = tensor(self.X), tensor([1, 2, 0], "int32")
        taken = compiled(moe_ops.take_rows)(x, index)
        assert numpy(taken).tolist() == [[3, 4], [0, 0], [1, 2]]
        summed = compiled(lambda x: moe_ops.add_rows(x, index[:2], 2))(x)
        assert numpy(summed).tolist() == [[0, 0], [1, 2]]

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_put_rows(self, axis):
        x = np.arange(24.0).reshape(4, 6)
        rows = -np.ones((2, 6) if axis == 0 else (4, 2))
        expected = x.copy()
        expected[(slice(1, 3), slice(None))[:: 1 if axis == 0 else -1]] = -1
        for first in (1, tensor(1, "int32")):
            put = compiled(
                lambda first=first: moe_ops.put_rows(tensor(x), tensor(rows), first, axis)
            )
            np.testing.assert_array_equal(numpy(put()), expected)
        np.testing.assert_array_equal(numpy(tensor(x)), x)

    @pytest.mark.skipif(
        keras.backend.backend() == "tensorflow",
        reason="TensorFlow has no gradient of XlaDynamicUpdateSlice, which Keras uses",
    )
    def test_gradient_of_put_rows_is_zero_where_rows_are_replaced(self):
        # The exponential's gradient is its output, which must not be written into.
        layer = keras.layers.Lambda(
            lambda x: moe_ops.put_rows(ops.exp(x), ops.ones((1, 2)), 1, axis=0)
        )
        layer.build((2, 2))
        by_x, _ = gradients(layer, np.zeros((2, 2)), [[2.0, 3.0], [4.0, 5.0]])
        assert by_x.tolist() == [[2, 3], [0, 0]]
