"""Every implementation against one product per row, outputs and gradients."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import ops as moe_ops
from keras_moe.ops import products
from tests.backend import cost, gradients, run

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor
BACKEND = keras.backend.backend()


class Product(keras.layers.Layer):
    """`expert_product` with a kernel to differentiate by."""

    def __init__(self, kernel, row_expert, implementation, **kwargs):
        super().__init__(**kwargs)
        self.kernel = self.add_weight(shape=kernel.shape, initializer="zeros")
        self.kernel.assign(kernel)
        self.row_expert = row_expert
        self.implementation = implementation
        self.built = True

    def call(self, inputs):
        row_expert = None if self.row_expert is None else tensor(self.row_expert, "int32")
        return moe_ops.expert_product(inputs, self.kernel, row_expert, self.implementation)


# The expert of each row, of 4; 4 is nobody's.
ROWS = {
    "one each": None,
    "several each": [0, 1, 1, 1, 2, 3, 3],
    "idle experts": [1, 1, 3, 3, 3],
    "nobody's rows": [0, 2, 2, 4, 4],
    "one row": [2],
    "nothing but nobody's": [4, 4],
}


def implementations(row_expert):
    return [
        name
        for name in moe_ops.IMPLEMENTATIONS
        if not (name == "batched" and row_expert is not None)
        and not (name == "grouped" and BACKEND == "tensorflow")
    ]


CASES = [(rows, name) for rows in ROWS for name in implementations(ROWS[rows])]


def by_hand(x, kernel, cotangent, row_expert):
    """Output and gradients, one row after another, in float64."""
    row_expert = range(len(kernel)) if row_expert is None else row_expert
    y = np.zeros((*x.shape[:2], kernel.shape[2]))
    by_x, by_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for row, expert in enumerate(row_expert):
        if expert < len(kernel):
            y[row] = x[row] @ kernel[expert]
            by_x[row] = cotangent[row] @ kernel[expert].T
            by_kernel[expert] += x[row].T @ cotangent[row]
    return y, by_x, by_kernel


# TensorFlow's loops differ, and what "auto" stands for on JAX.
JIT = [True] if BACKEND == "torch" else [True, False]


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize(("rows", "implementation"), CASES)
def test_is_one_product_per_row(rows, implementation, jit):
    row_expert = ROWS[rows]
    mine = np.array([expert < 4 for expert in row_expert or range(4)])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(mine), 3, 8))
    kernel = rng.normal(size=(4, 8, 12))
    cotangent = rng.normal(size=(len(mine), 3, 12))
    x[~mine] = cotangent[~mine] = 0.0  # as in a layer
    expected = by_hand(x, kernel, cotangent, row_expert)

    layer = Product(kernel, row_expert, implementation)
    y, _, by_x, (by_kernel,) = run(layer, x, cotangent, jit)
    assert np.isfinite(y).all()
    for given, wanted in zip((y, by_x, by_kernel), expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-5)


class GatedProduct(Product):
    """`expert_product` of hidden units and their gates, `[2, rows, slots, in]`."""

    def call(self, inputs):
        row_expert = None if self.row_expert is None else tensor(self.row_expert, "int32")
        return moe_ops.expert_product(
            (inputs[0], inputs[1]),
            self.kernel,
            row_expert,
            self.implementation,
            before=lambda hidden, gate: ops.silu(gate) * hidden,
        )


@pytest.mark.parametrize(
    ("rows", "implementation"), [case for case in CASES if case[0] in ("one each", "nobody's rows")]
)
def test_before(rows, implementation):
    row_expert = ROWS[rows]
    mine = np.array([expert < 4 for expert in row_expert or range(4)])
    rng = np.random.default_rng(0)
    hidden, gate = x = rng.normal(size=(2, len(mine), 3, 8))
    kernel = rng.normal(size=(4, 8, 12))
    cotangent = rng.normal(size=(len(mine), 3, 12))
    x[:, ~mine] = cotangent[~mine] = 0.0
    sigmoid = 1 / (1 + np.exp(-gate))
    y, by_product, by_kernel = by_hand(gate * sigmoid * hidden, kernel, cotangent, row_expert)
    # d silu(g) = s(g) + g s(g) (1 - s(g))
    by_gate = by_product * hidden * sigmoid * (1 + gate * (1 - sigmoid))
    by_x = np.stack([by_product * gate * sigmoid, by_gate])

    got = run(GatedProduct(kernel, row_expert, implementation), x, cotangent)
    assert np.isfinite(got[0]).all()
    np.testing.assert_allclose(got[0][mine], y[mine], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2], by_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[3][0], by_kernel, rtol=1e-5, atol=1e-5)


def test_loop_of_any_width():
    """PyTorch's grouped product, which the loop is where it can, wants multiples of 16 bytes."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(7, 3, 7)), rng.normal(size=(4, 7, 5))
    cotangent, row_expert = rng.normal(size=(7, 3, 5)), ROWS["several each"]
    y, _, by_x, (by_kernel,) = run(Product(kernel, row_expert, "loop"), x, cotangent)
    expected = by_hand(x, kernel, cotangent, row_expert)
    for given, wanted in zip((y, by_x, by_kernel), expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", implementations([0]))
def test_bfloat16_sums_rows_in_float32(implementation):
    # 600 rows of 1 and a gradient of 1: bfloat16 has no number between 256 and 258, and would
    # stay at 256 if it added up row after row.
    layer = Product(np.ones((1, 8, 8)), [0] * 600, implementation, dtype="bfloat16")
    inputs = keras.Input(batch_shape=(600, 1, 8))
    in_float32 = keras.Sequential([inputs, layer, keras.layers.Identity(dtype="float32")])
    _, (by_kernel,) = gradients(in_float32, np.ones((600, 1, 8)), np.ones((600, 1, 8)))
    assert by_kernel.astype("float32") == pytest.approx(600, rel=2**-8)


@pytest.mark.parametrize("implementation", implementations([0])[1:2])
def test_loop_computes_busy_experts_only(implementation):
    x = np.ones((2, 1, 8))
    few, many = (
        cost(Product(np.ones((experts, 8, 8)), [0, 1], implementation), x, x)[1]
        for experts in (2, 64)
    )
    assert few == many


@pytest.mark.skipif(BACKEND != "tensorflow", reason="is about TensorFlow's way to XLA")
def test_compiles_once_whatever_the_rows():
    """What XLA takes for a constant is no parameter of the program, and compiles anew for each."""
    import tensorflow as tf

    x, kernel = ops.ones((5, 2, 8)), ops.ones((4, 8, 8))

    @tf.function(jit_compile=True)
    def step(row_expert):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            y = moe_ops.expert_product(x, kernel, row_expert, "loop")
            return tape.gradient(y, kernel)

    program = step.experimental_get_compiler_ir(tensor([0, 1, 1, 2, 3], "int32"))(stage="hlo")
    assert "s32[5]{0} parameter(" in program


@pytest.mark.skipif(BACKEND != "jax", reason="is about JAX's plain calls")
def test_much_is_not_grouped_in_a_plain_call(monkeypatch):
    """Three rows of two slots times five kernels of 4 x 6."""
    import jax

    sizes, grouped = [], jax.lax.ragged_dot
    monkeypatch.setattr(
        jax.lax, "ragged_dot", lambda x, *more: sizes.append(few) or grouped(x, *more)
    )
    for few in (3 * 2 * 5 * 4 * 6 + 1, 3 * 2 * 5 * 4 * 6):
        monkeypatch.setattr(products, "FEW", few)
        moe_ops.expert_product(ops.ones((3, 2, 4)), ops.ones((5, 4, 6)), tensor([0, 1, 1], "int32"))
    assert sizes == [721]


def test_batched_is_for_one_row_per_expert():
    with pytest.raises(ValueError, match="`implementation='batched'`.*'auto'"):
        moe_ops.expert_product(ops.ones((3, 2, 1)), ops.ones((3, 1, 1)), ops.arange(3), "batched")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others have a grouped product")
def test_tensorflow_has_no_grouped_product():
    with pytest.raises(ValueError, match="`implementation='grouped'`.*'auto'"):
        moe_ops.expert_product(ops.ones((3, 2, 1)), ops.ones((3, 1, 1)), None, "grouped")
