import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from tests.backend import gradients, numpy

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor


def test_uses_the_gradient_it_is_given():
    double_and_claim_seven = moe_ops.with_gradient(
        lambda x: 2 * x, lambda upstream, x: [lambda: 7 * upstream]
    )
    layer = keras.layers.Lambda(double_and_claim_seven)
    layer.build((2,))
    assert numpy(layer(tensor([1.0, 2.0]))).tolist() == [2, 4]
    by_x, _ = gradients(layer, [1.0, 2.0], [1.0, 10.0])
    assert by_x.tolist() == [7, 70]


def product(x, y):
    """x * y, with the gradients upstream * y and upstream * x."""
    return moe_ops.with_gradient(
        lambda x, y: x * y, lambda upstream, x, y: (lambda: upstream * y, lambda: upstream * x)
    )(x, y)


def test_of_two_inputs_may_use_both():
    layer = keras.layers.Lambda(lambda x: product(x, 3 * x))
    layer.build((2,))
    by_x, _ = gradients(layer, [1.0, 2.0], [1.0, 10.0])
    assert by_x.tolist() == [6, 120]  # of 3 x^2: 6 x


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch frees and skips by hand")
class TestOnTorch:
    def test_a_gradient_nobody_wants_is_not_computed(self):
        import torch

        def refuse():
            raise AssertionError("computed all the same")

        x, y = torch.ones(2, requires_grad=True), torch.ones(2)
        function = moe_ops.with_gradient(
            lambda x, y: x * y, lambda upstream, x, y: (lambda: upstream * y, refuse)
        )
        function(x, y).sum().backward()
        assert x.grad.tolist() == [1, 1]

    def test_inputs_are_let_go_after_the_backward_pass(self):
        import torch

        x = torch.ones(2, requires_grad=True)
        hidden = x * 2
        outputs = product(hidden, hidden)
        alive = weakref.ref(hidden)
        del hidden
        outputs.sum().backward()
        gc.collect()
        assert alive() is None
        np.testing.assert_array_equal(outputs.detach().numpy(), [4, 4])
