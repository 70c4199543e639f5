import contextlib
import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, LayerExperts, SoftMoE
from tests import oracle
from tests.backend import numpy, run, run_each
from tests.keras_moe.routing.examples import check_layer, random_weights

E, P, D, F = 3, 2, 4, 5
JIT = keras.backend.backend() != "torch"
X = np.random.default_rng(0).normal(size=(2, 6, D))
MASK = np.array([[True] * 6, [True, True, True, False, True, False]])


def built(slots=P, **options):
    layer = SoftMoE(FeedForwardExperts(E, F, **options), slots)
    layer.build((None, None, D))
    return layer, random_weights(layer)


def by_hand(x, weights, mask=None):
    y = np.zeros(x.shape)
    for g, x_SD in enumerate(x):
        valid = np.ones(len(x_SD), bool) if mask is None else mask[g]
        if valid.any():
            y[g, valid] = oracle.soft_moe(
                x_SD[valid],
                weights["phi"],
                weights["scale"],
                lambda x_D, e: oracle.feed_forward(x_D, weights, e),
            )
    return y


@pytest.mark.every_backend
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("slots", [1, 2])
def test_output_and_gradients_are_the_equations(slots, mask):
    layer, weights = built(slots, use_bias=True)
    x = X.copy()
    check_layer(layer, lambda: (by_hand(x, weights, mask), 0.0), x, weights, mask)


def test_one_token_one_expert():
    """All weights are 1: the layer is its expert."""
    layer = SoftMoE(FeedForwardExperts(1, F), 1)
    x = np.ones((1, 1, D), "float32")
    np.testing.assert_allclose(numpy(layer(x)), numpy(layer.experts(x)), rtol=1e-5, atol=1e-6)


def test_the_length_of_tokens_and_phi_does_not_matter_to_the_weights():
    # Logits are scale * cosine: 3 and 0 for the first token, 0 and 3 for the second. Slots:
    # softmax(3, 0) = (.9526, .0474) of tokens (2, 0) and (0, 5); experts double; and back.
    layer = SoftMoE(LayerExperts([keras.layers.Lambda(lambda x: 2 * x) for _ in range(2)]), 1)
    layer.build((None, None, 2))
    layer.phi.assign([[[10.0], [0.0]], [[0.0], [0.1]]])
    layer.scale.assign(3.0)
    a, b = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3))
    slots = np.array([[2 * a, 5 * b], [2 * b, 5 * a]])
    expected = np.array([[a, b], [b, a]]) @ (2 * slots)
    y = numpy(layer(np.array([[[2.0, 0.0], [0.0, 5.0]]], "float32")))
    np.testing.assert_allclose(y[0], expected, rtol=1e-5)


def test_starts_with_a_scale_of_one_and_phi_of_length_one():
    layer = SoftMoE(FeedForwardExperts(8, 2), 4)
    layer.build((None, None, 400))
    assert numpy(layer.scale) == 1.0
    np.testing.assert_allclose(np.linalg.norm(numpy(layer.phi), axis=0), 1.0, atol=0.15)


@pytest.mark.every_backend
class TestPadding:
    @pytest.mark.parametrize("content", [50.0, np.inf, np.nan])
    def test_its_content_changes_nothing(self, content):
        layer, _ = built()
        zeros = np.where(MASK[..., None], X, 0.0)
        other = np.where(MASK[..., None], X, content)
        one, two = run_each(layer, (zeros, other), np.ones(X.shape), mask=MASK)
        for a, b in zip((one[0], one[2], *one[3]), (two[0], two[2], *two[3]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert (one[0][~MASK] == 0).all() and (one[2][~MASK] == 0).all()

    def test_nothing_but_padding(self):
        layer, _ = built()
        y, _, by_x, by_weight = run(layer, X, np.ones(X.shape), mask=np.zeros((2, 6), bool))
        assert (y == 0).all() and all(np.isfinite(g).all() for g in (by_x, *by_weight))

    def test_mask_comes_with_the_inputs(self):
        tokens = keras.Input((None,), dtype="int32")
        embedded = keras.layers.Embedding(9, D, mask_zero=True)(tokens)
        layer, weights = built()
        outputs = layer(embedded)
        mean = keras.layers.GlobalAveragePooling1D()(outputs)  # without padding, if it gets a mask
        model = keras.Model(tokens, [outputs, embedded, mean])
        ids = np.array([[3, 4, 5, 6, 7, 0], [1, 2, 0, 0, 0, 0]])
        y, x, mean = (numpy(t) for t in model(ids))
        expected = by_hand(x.astype("float64"), weights, ids > 0)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        assert (y[ids == 0] == 0).all()
        np.testing.assert_allclose(mean, y.sum(axis=1) / [[5], [2]], rtol=1e-5, atol=1e-6)


def test_a_token_of_zeros_has_a_gradient():
    layer, _ = built()
    *_, by_x, by_weight = run(layer, np.where(MASK[..., None], X, 0.0), np.ones(X.shape))
    assert all(np.isfinite(g).all() for g in (by_x, *by_weight))


def test_sees_the_future_of_its_own_sequence_only():
    layer, _ = built()
    other = X.copy()
    other[0, 3:] += 1.0
    changed = np.abs(numpy(layer(other)) - numpy(layer(X))).max(axis=-1)
    assert changed[0, :3].min() > 0.1
    assert changed[1].max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 6, D), (2, 0, D)])
def test_no_tokens(shape):
    layer, _ = built()
    assert tuple(layer(ops.zeros(shape)).shape) == shape


def test_shapes_not_known_to_the_graph():
    """As a data set of ragged batches has it: TensorFlow's graph then knows no shape."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow's graphs have unknown shapes")
    import tensorflow as tf

    layer, weights = built()
    graph = tf.function(layer, input_signature=[tf.TensorSpec((None, None, D))])
    y = numpy(graph(tf.constant(X, "float32")))
    np.testing.assert_allclose(y, by_hand(X, weights), rtol=1e-4, atol=1e-5)


def test_layers_as_experts_of_another_width():
    layer = SoftMoE(LayerExperts([keras.layers.Dense(7), keras.layers.Dense(7)]), 2)
    assert layer(keras.Input((None, D))).shape == (None, None, 7)
    weights = [[numpy(w) for w in dense.weights] for dense in layer.experts.layers]
    expected = oracle.soft_moe(
        X[0], numpy(layer.phi), 1.0, lambda x_D, e: x_D @ weights[e][0] + weights[e][1]
    )
    np.testing.assert_allclose(numpy(layer(X))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_weights_of_tokens_and_slots_in_float32(policy, monkeypatch):
    layer = SoftMoE(FeedForwardExperts(E, F, dtype=policy), P, dtype=policy)
    x = ops.cast(X, "bfloat16")
    made = []
    softmax = ops.softmax
    monkeypatch.setattr(
        "keras_moe.soft.ops.softmax", lambda x, axis: made.append(x.dtype) or softmax(x, axis=axis)
    )
    assert ops.dtype(layer(x, mask=MASK)) == "bfloat16"
    assert {keras.backend.standardize_dtype(dtype) for dtype in made} == {"float32"}
    assert {v.dtype for v in (layer.phi, layer.scale)} == {"float32"}


def test_trains_saves_and_loads(tmp_path):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6, D)).astype("float32")
    y = np.sin(x) + x.mean(axis=1, keepdims=True)
    inputs = keras.Input((None, D))
    layer = SoftMoE(FeedForwardExperts(E, 16), P, name="soft")
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=JIT)
    loss = model.fit(x, y, batch_size=16, epochs=30, verbose=0).history["loss"]
    assert loss[-1] < 0.7 * loss[0]
    paths = [v.path for v in layer.trainable_variables]
    assert sorted(paths) == [
        "soft/experts/kernel_in",
        "soft/experts/kernel_out",
        "soft/phi",
        "soft/scale",
    ]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.trainable_variables] == paths
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_rematerialisation_trains_the_same():
    def losses(scope):
        with scope:
            layer = SoftMoE(FeedForwardExperts(E, 16, dropout=0.5, seed=1), P)
        inputs = keras.Input((6, D))
        model = keras.Model(inputs, inputs + layer(inputs))
        layer.phi.assign(np.random.default_rng(1).normal(size=(D, E, P)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = np.random.default_rng(0).normal(size=(8, 6, D)).astype("float32")
        return model.fit(x, np.sin(x), 4, 2, verbose=0, shuffle=False).history["loss"]

    plain = losses(contextlib.nullcontext())
    assert plain[0] != plain[1]
    assert losses(keras.RematScope("full")) == pytest.approx(plain, rel=1e-6)


def test_every_config_key_makes_the_round_trip():
    arguments = {"experts": FeedForwardExperts(E, F, gated=True), "slots_per_expert": 5}
    assert set(arguments) == set(inspect.signature(SoftMoE).parameters) - {"kwargs"}
    made = SoftMoE(**arguments, name="mine", dtype="mixed_bfloat16")
    copy = SoftMoE.from_config(made.get_config())
    assert copy.get_config() == made.get_config()
    assert (copy.name, copy.slots_per_expert, copy.experts.gated) == ("mine", 5, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: SoftMoE(keras.layers.Dense(3), 1), "`experts`.*experts=<Dense"),
        (lambda e: SoftMoE(e, 0), "`slots_per_expert`.*slots_per_expert=0"),
        (lambda e: SoftMoE(e, 1).build((None, 3)), r"`inputs`.*\(None, 3\)"),
        (lambda e: SoftMoE(e, 1).build((2, 3, None)), r"`inputs`.*\(2, 3, None\)"),
        (
            lambda e: SoftMoE(e, 1)(np.ones((2, 3, 4)), mask=np.ones((3, 2), bool)),
            r"`mask`.*\(2, 3\).*\(3, 2\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(FeedForwardExperts(2, 4))
