import keras
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from tests.backend import numpy

tensor = ops.convert_to_tensor


@pytest.fixture
def layers():
    layers = [keras.layers.Rescaling(scale) for scale in (10.0, 100.0)]
    for layer in layers:
        layer.build((None, 1))
    return layers


def test_row_e_is_layer_e(layers):
    y = moe_ops.call_by_row(layers, tensor([[[1.0]], [[2.0]]]))
    assert numpy(y)[..., 0].tolist() == [[10], [200]]


def test_as_many_rows_as_a_layer_needs(layers):
    x, row_expert = tensor([[[1.0]], [[2.0]], [[3.0]]]), tensor([0, 1, 1], "int32")
    y = moe_ops.call_by_row(layers, x, row_expert)
    assert numpy(y)[..., 0].tolist() == [[10], [200], [300]]


def test_nobodys_rows(layers):
    x, row_expert = tensor([[[1.0]], [[0.0]]]), tensor([1, 2], "int32")
    y = moe_ops.call_by_row(layers, x, row_expert)
    assert numpy(y)[..., 0].tolist() == [[100], [0]]
    y = moe_ops.call_by_row(layers, ops.zeros((2, 1, 1)), tensor([2, 2], "int32"))
    assert numpy(y)[..., 0].tolist() == [[0], [0]]
