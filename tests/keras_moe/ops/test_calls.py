import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import LayerExperts, MixtureOfExperts, TopKRouter
from keras_moe import ops as moe_ops
from tests.backend import compiled, cost, numpy, run

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor
BACKEND = keras.backend.backend()
# Elsewhere one and the same code runs compiled and not.
JIT = pytest.mark.parametrize("jit", [True, False] if BACKEND == "tensorflow" else [False])


def call(layers, x, row_expert, jit):
    """Rows of one slot of width 1, there and back."""

    def function(x, row_expert):
        return moe_ops.call_by_row(layers, x, 1, row_expert)

    function = compiled(function) if jit else function
    x = tensor(np.reshape(x, (-1, 1, 1)), "float32")
    return numpy(function(x, tensor(row_expert, "int32")))[:, 0, 0].tolist()


@pytest.fixture
def layers():
    layers = [keras.layers.Rescaling(scale) for scale in (10.0, 100.0)]
    for layer in layers:
        layer.build((None, 1))
    return layers


def test_row_e_is_layer_e(layers):
    y = moe_ops.call_by_row(layers, tensor([[[1.0]], [[2.0]]]), 1)
    assert numpy(y)[..., 0].tolist() == [[10], [200]]


@JIT
def test_as_many_rows_as_a_layer_needs(layers, jit):
    assert call(layers, [1, 2, 3], [0, 1, 1], jit) == [10, 200, 300]


@JIT
def test_nobodys_rows_are_zero_whatever_they_hold(layers, jit):
    assert call(layers, [1, np.nan], [1, 2], jit) == [100, 0]
    assert call(layers, [1, 2], [2, 2], jit) == [0, 0]


class Counter(keras.layers.Layer):
    """Counts its calls."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


@JIT
@pytest.mark.parametrize(
    ("row_expert", "by_row", "by_span"),
    [([0, 0, 1], [2, 1], [1, 1]), ([0, 0, 2], [2, 0], [1, 0]), ([2, 2, 2], [0, 0], [0, 0])],
    ids=["all", "one layer idle", "nothing but nobody's"],
)
def test_only_its_own_rows_call_a_layer(row_expert, by_row, by_span, jit):
    layers = [Counter(), Counter()]
    for layer in layers:
        layer.build((None, 1))
    call(layers, [1, 2, 3], row_expert, jit)
    calls = [float(numpy(layer.calls)) for layer in layers]
    assert calls == (by_row if jit or BACKEND == "jax" else by_span)


def batch_normalizations():
    """A model of two experts; expert 0 takes positive tokens. The figures are the last batch's."""
    layers = [keras.layers.BatchNormalization(momentum=0.0) for _ in range(2)]
    layer = MixtureOfExperts(LayerExperts(layers), TopKRouter(1))
    inputs, mask = keras.Input((16, 1)), keras.Input((16,), dtype="bool")
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    layer.router.kernel.assign([[1.0, -1.0]])
    model.compile("sgd", "mse", jit_compile=BACKEND != "torch")
    return model, layers


def statistics(layer):
    return float(numpy(layer.moving_mean)[0]), float(numpy(layer.moving_variance)[0])


def test_a_layer_that_nobody_chose_keeps_its_statistics():
    model, layers = batch_normalizations()
    x = np.full((1, 16, 1), 3.0)
    model.train_on_batch([x, np.ones((1, 16), "bool")], x)
    assert [statistics(layer) for layer in layers] == [(3, 0), (0, 1)]


def test_padding_alone_changes_no_statistics():
    model, layers = batch_normalizations()
    x = np.full((1, 16, 1), 3.0)
    model.train_on_batch([x, np.zeros((1, 16), "bool")], x)
    assert [statistics(layer) for layer in layers] == [(0, 1), (0, 1)]


@JIT
def test_gradient_drops_what_the_output_drops(jit):
    bank = LayerExperts([keras.layers.Dropout(0.5, seed=seed) for seed in range(2)])
    layer = MixtureOfExperts(bank, TopKRouter(1, load_balancing_weight=0.0))
    layer.build((None, None, 64))
    layer.router.kernel.assign(np.zeros((64, 2)))  # expert 0 for all, with weight 1/2
    ones = np.ones((1, 16, 64))
    y, _, by_x, _ = run(layer, ones, ones, jit, training=True)
    np.testing.assert_array_equal(by_x, y)
    assert len(np.unique(y[0], axis=0)) == 16  # no two tokens alike


@pytest.mark.skipif(BACKEND != "jax", reason="the others keep their context")
def test_rematerialises_within_a_larger_function():
    """JAX traces it again where Keras no longer knows that this is training."""
    import jax

    bank = LayerExperts([keras.layers.Dropout(0.5, seed=seed) for seed in range(2)])
    bank.build((None, None, 64))
    state = [v.value for v in bank.non_trainable_variables]

    @jax.checkpoint
    def function(x):
        row_expert = ops.cast(x[:, 0, 0], "int32")
        return bank.stateless_call([], state, x, row_expert=row_expert, training=True)[0]

    x = ops.ones((3, 1, 64))
    by_x = jax.grad(lambda x: ops.sum(function(x)))(x)
    np.testing.assert_array_equal(numpy(by_x), numpy(function(x)))
    assert set(np.unique(by_x)) == {0, 2}


@pytest.mark.skipif(BACKEND == "tensorflow", reason="XLA's loop is TensorFlow's own")
def test_no_row_makes_weights_of_its_own():
    bank = LayerExperts([keras.layers.Dense(8, activation="relu") for _ in range(4)])
    bank.build((None, None, 8))
    ones, row_expert = np.ones((16, 1, 8)), np.repeat(np.arange(4, dtype="int32"), 4)
    largest, _ = cost(bank, ones, ones, row_expert=tensor(row_expert))
    assert largest == 16 * 8  # the slots; a kernel has 8 * 8


@JIT
def test_layers_of_another_dtype(jit):
    layers = [keras.layers.Dense(1, dtype=dtype) for dtype in ("float32", "bfloat16")]
    bank = LayerExperts(layers, dtype="bfloat16")
    bank.build((None, None, 1))

    def function(x):
        return bank(x, row_expert=tensor([0, 1, 2], "int32"))

    y = (compiled(function) if jit else function)(ops.ones((3, 1, 1)))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


@JIT
def test_weights_are_not_rounded(jit):
    """1 + 2**-12 would be 1 in bfloat16."""
    expert = keras.layers.Dense(1, dtype="mixed_bfloat16", trainable=False)
    bank = LayerExperts([expert], dtype="mixed_bfloat16")
    layer = MixtureOfExperts(bank, TopKRouter(1), dtype="mixed_bfloat16")
    layer.build((None, None, 1))
    expert.kernel.assign([[1 + 2**-12]])
    (compiled(layer) if jit else layer)(ops.ones((1, 1, 1)))
    assert numpy(expert.kernel).tolist() == [[1 + 2**-12]]
