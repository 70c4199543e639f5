import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, LinearExperts, MixtureOfExperts, SoftMoE, SwitchRouter
from tests import oracle
from tests.backend import numpy, run
from zoo.layers import (
    Embedding,
    FeedForward,
    RelativePositionBias,
    ReversibleEmbedding,
    SelfAttention,
    SwitchAttention,
    TransformerBlock,
)

HEADS, K, D, E, L = 2, 3, 4, 3, 5
MASK = np.array([[True] * 5, [True, True, True, False, False]])


def attention(**options):
    def mixture(name):
        experts = LinearExperts(E, HEADS * K, dtype="float32")
        tight = {"capacity_factor": 0.6, "eval_capacity_factor": 0.6, "min_capacity": 1}
        router = SwitchRouter(exploration="argmax", load_balancing_weight=0.5, **tight)
        return MixtureOfExperts(experts, router, dtype="float32", name=name)

    mixtures = mixture("query"), mixture("key_value")
    return SwitchAttention(HEADS, K, *mixtures, name="attention", **options)


class TestSwitchAttention:
    @pytest.mark.every_backend
    def test_output_losses_and_gradients_are_the_papers(self):
        """Against central differences of a float64 loop, with tokens that no expert takes."""
        layer = attention()
        layer.build((None, L, D))
        rng = np.random.default_rng(0)
        weights = {v.path: rng.normal(size=v.shape) for v in layer.trainable_variables}
        for variable in layer.trainable_variables:
            variable.assign(weights[variable.path])
        x, cotangent = rng.normal(size=(2, 2, L, D))
        bias = rng.normal(size=(1, HEADS, L, L))
        capacity = oracle.capacity(L, E, 0.6)

        def project(name):
            router, kernel = (
                next(w for path, w in weights.items() if path.endswith(f"{name}/{part}/kernel"))
                for part in ("router", "experts")
            )
            p = oracle.softmax(x @ router)
            weight, chosen = oracle.token_choice(p, 1, capacity, mask=MASK)
            loss = 0.5 * oracle.load_balancing(p, chosen, MASK)
            served.append(np.sum(weight > 0))
            return oracle.mixture(x, weight, lambda x_D, e: x_D @ kernel[e]), loss

        def loop():
            (query, query_loss), (key_value, loss) = project("query"), project("key_value")
            mixed = np.zeros((2, L, HEADS * K))
            for b, h in np.ndindex(2, HEADS):
                head, seen = np.s_[b, :, h * K : (h + 1) * K], MASK[b]
                logits = query[head] @ key_value[head].T + bias[0, h]
                mixed[head] = oracle.softmax(logits[:, seen]) @ key_value[head][seen]
            output = next(w for path, w in weights.items() if "output" in path)
            return mixed @ output, query_loss + loss

        def total():
            y, losses = loop()
            return np.sum(y * cotangent) + losses

        served = []
        y, losses, by_x, by_weight = run(
            layer, x, cotangent, position_bias=bias.astype("float32"), padding_mask=MASK
        )
        y_expected, losses_expected = loop()
        assert min(served) < MASK.sum()
        np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx(losses_expected, rel=1e-5)
        slopes = oracle.gradient(total, [x, *weights.values()])
        for ours, expected in zip([by_x, *by_weight], slopes, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)

    def test_mixtures_are_float32_under_a_lower_policy(self):
        layer = attention(dtype="bfloat16")
        x = ops.cast(np.random.default_rng(0).normal(size=(2, L, D)), "bfloat16")
        y = layer(x, np.zeros((1, HEADS, L, L), "float32"), MASK)
        assert ops.dtype(y) == "bfloat16"
        for mixed in (layer.query, layer.key_value):
            assert ops.dtype(mixed(x)) == mixed.experts.kernel.dtype == "float32"

    def test_comes_back(self, tmp_path):
        inputs, mask = keras.Input((L, D)), keras.Input((L,), dtype="bool")
        bias = keras.Input((HEADS, L, L))
        model = keras.Model([inputs, bias, mask], attention(dropout=0.2)(inputs, bias, mask))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.get_layer("attention").dropout == 0.2
        x = np.random.default_rng(0).normal(size=(2, L, D)).astype("float32")
        x = [x, np.zeros((2, HEADS, L, L), "float32"), MASK]
        np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
        paths = [v.path for v in loaded.get_layer("attention").trainable_variables]
        assert paths == [v.path for v in model.get_layer("attention").trainable_variables]


def test_texts_that_share_a_row_do_not_attend_to_each_other():
    """Each comes out as it does in a row of its own."""
    layer = SelfAttention(HEADS, K)
    x = np.random.default_rng(0).normal(size=(1, L, D)).astype("float32")
    bias = np.zeros((1, HEADS, L, L), "float32")
    y = numpy(layer(x, bias, np.array([[1, 1, 2, 2, 0]])))
    for text in (np.s_[:, :2], np.s_[:, 2:4]):
        alone = numpy(layer(x[text], bias[:, :, :2, :2], np.ones((1, 2))))
        np.testing.assert_allclose(y[text], alone, rtol=1e-5, atol=1e-6)


def test_gated_feed_forward():
    """Without dropout in inference."""
    layer = FeedForward(3, "gelu", dropout=0.5, gated=True)
    x = np.random.default_rng(0).normal(size=(2, L, D)).astype("float32")
    y = numpy(layer(x))
    gate, hidden, out = (
        numpy(part.kernel) for part in (layer.gate, layer.hidden, layer.output_projection)
    )
    expected = numpy(keras.activations.gelu(x @ gate)) * (x @ hidden) @ out
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_a_block_comes_back_with_its_options():
    options = {"dropout": 0.3, "epsilon": 0.1}
    block = TransformerBlock(SelfAttention(HEADS, K), FeedForward(3), **options)
    back = TransformerBlock.from_config(block.get_config())
    assert {name: getattr(back, name) for name in options} == options


def test_a_block_without_counts_leaves_no_trace():
    """Neither of a mixture in its attention nor of one behind it."""
    feed_forward = MixtureOfExperts(FeedForwardExperts(E, 4), SwitchRouter(E))
    block = TransformerBlock(attention(), feed_forward)
    x = np.random.default_rng(0).normal(size=(2, L, D)).astype("float32")
    bias = np.zeros((1, HEADS, L, L), "float32")
    mixtures = (block.attention.query, block.attention.key_value, feed_forward)
    y = numpy(block(x, bias, MASK, counts=False))
    assert not block.losses and not any(numpy(m.statistics[1]).any() for m in mixtures)
    np.testing.assert_array_equal(numpy(block(x, bias, MASK)), y)
    assert len(block.losses) == 3 and all(numpy(m.statistics[1]).any() for m in mixtures)


def test_a_block_keeps_padding_out_of_soft_moe():
    block = TransformerBlock(SelfAttention(HEADS, K), SoftMoE(FeedForwardExperts(E, 4, seed=0), 2))
    x = np.random.default_rng(0).normal(size=(2, L, D)).astype("float32")
    bias = np.zeros((1, HEADS, L, L), "float32")
    before = numpy(block(x, bias, MASK))
    changed = np.where(MASK[..., None], x, 9.0).astype("float32")
    after = numpy(block(changed, bias, MASK))
    np.testing.assert_allclose(after[MASK], before[MASK], rtol=1e-5, atol=1e-5)


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", ["embedding", "reversible", "positions", "bias"])
def test_rows_of_a_weight_that_are_used_often_move_like_others(kind):
    """Adam's first step is as long as its rate, whatever the gradient; rows not used stay."""
    ids = np.array([[1, 4, 1, 1], [4, 2, 1, 1]], "int32")
    zeros, experts = np.zeros((5, 1, 3), "float32"), np.array([1, 1, 1, 4, 4], "int32")
    layer, name, inputs, used = {
        "embedding": (Embedding(6, 3), "embeddings", ids, [1, 2, 4]),
        "reversible": (ReversibleEmbedding(6, 3), "embeddings", ids, [1, 2, 4]),
        # Distances 0 to 2 either way; those to the right have the second half of the buckets.
        "positions": (
            RelativePositionBias(3, 8, 20),
            "embedding",
            zeros[None, :3, 0],
            [0, 1, 2, 5, 6],
        ),
        "bias": (FeedForwardExperts(6, 4, use_bias=True), "bias_out", zeros, [1, 4]),
    }[kind]
    options = {"row_expert": ops.convert_to_tensor(experts)} if kind == "bias" else {}
    layer.build(inputs.shape)
    table = getattr(layer, name)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def call(self, x):
            return self.layer(x, **options)

        def compute_loss(self, x, y, y_pred, *others, **more):
            return ops.sum(y_pred * ops.cumsum(ops.ones_like(y_pred), axis=0))

    before, model = numpy(table), Model()
    model.compile(keras.optimizers.Adam(0.1, epsilon=1e-12))
    model.fit(inputs, batch_size=len(inputs), verbose=0)
    moved = before - numpy(table)
    np.testing.assert_allclose(moved[used], 0.1, rtol=1e-4)
    np.testing.assert_array_equal(np.delete(moved, used, axis=0), 0)


def test_gradients_of_an_embedding_are_summed_in_float32():
    """One by one in bfloat16 the sum would stop at 256, where the next number is 258."""
    layer = Embedding(2, 1, dtype="mixed_bfloat16")
    layer.build((1, 512))
    *_, (by_table,) = run(layer, np.zeros((1, 512)), np.ones((1, 512, 1)))
    assert by_table.tolist() == [[512], [0]]
