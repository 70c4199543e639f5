import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import FeedForwardExperts, MixtureOfExperts, SwitchRouter
from tests import oracle
from tests.backend import numpy
from zoo.decoder_layers import (
    CausalSelfAttention,
    CrossAttention,
    DecoderBlock,
    RotarySelfAttention,
    causal_mask,
)
from zoo.layers import FeedForward

H, K, D, L, S = 2, 4, 6, 5, 3
MASK = np.array([[1] * 5, [1, 1, 1, 0, 0]])
MEMORY_MASK = np.array([[1, 1, 1], [1, 0, 1]])
rng = np.random.default_rng(0)
X = rng.normal(size=(2, L, D)).astype("float32")
MEMORY = rng.normal(size=(2, S, D)).astype("float32")
BIAS = rng.normal(size=(1, H, L, L)).astype("float32")


def ready(layer, *shapes):
    """Built, with weights of normal size, so that all of them matter."""
    layer.build(*shapes or ((None, L, D),))
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def by_hand(layer, x, keys, bias, sees):
    """A query at a time; `sees[b, q]` are the places of the keys that it attends to."""
    heads = {}
    for name, rows in (("query", x), ("key", keys), ("value", keys)):
        heads[name] = rows @ numpy(getattr(layer, name).kernel)
    mixed = np.zeros((*x.shape[:2], H * K))
    for b, q, h in np.ndindex(len(x), x.shape[1], H):
        head, seen = np.s_[h * K : (h + 1) * K], sees[b, q]
        logits = heads["key"][b, seen, head] @ heads["query"][b, q, head] + bias[h, q, seen]
        mixed[b, q, head] = oracle.softmax(logits) @ heads["value"][b, seen, head]
    return mixed @ numpy(layer.output_projection.kernel)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (0, [[1, 0, 0, 0], [1, 1, 0, 0]]),
        (1, [[1, 1, 0, 0], [1, 1, 1, 0]]),
        (3, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_causal_mask(first, expected):
    np.testing.assert_array_equal(numpy(causal_mask(2, 4, first)), np.array(expected) == 1)


@pytest.mark.every_backend
def test_causal_self_attention():
    """By hand: of the tokens up to the query's own those that are no padding."""
    layer = ready(CausalSelfAttention(H, K))
    sees = np.tril(np.ones((L, L))) * MASK[:, None] == 1
    ours = numpy(layer(X, BIAS, MASK))
    np.testing.assert_allclose(ours, by_hand(layer, X, X, BIAS[0], sees), rtol=1e-4, atol=1e-4)


def test_cross_attention():
    """By hand: of all of the encoder's tokens that are no padding; a cache gives the same."""
    layer = ready(CrossAttention(H, K))
    sees = np.broadcast_to(MEMORY_MASK[:, None] == 1, (2, L, S))
    ours = numpy(layer(X, MEMORY, MEMORY_MASK))
    expected = by_hand(layer, X, MEMORY, np.zeros((H, L, S)), sees)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    cache = layer.remember(MEMORY)
    assert tuple(cache.shape) == (2, 2, H, S, K)
    for place in range(L):
        one = layer.look_up(X[:, place : place + 1], cache, MEMORY_MASK)
        np.testing.assert_allclose(numpy(one)[:, 0], ours[:, place], rtol=1e-5, atol=1e-5)


def test_rotary_attention():
    """By hand, a query and a key at a time, rotated as complex numbers."""
    layer = RotarySelfAttention(
        4, 6, num_key_value_heads=2, max_wavelength=50, normalize=True, epsilon=1e-3
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 8)).astype("float32")
    layer.build(x.shape)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    ours = numpy(layer(x, position_bias=None, padding_mask=np.ones((1, 5), "int32")))[0]

    def projected(name, heads):
        y = x[0] @ numpy(getattr(layer, name).kernel)
        if name != "value":
            y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-3)
            y = y * numpy(getattr(layer, f"{name}_norm").scale)
        y = y.reshape(5, heads, 6)
        if name == "value":
            return y
        angle = np.arange(5)[:, None, None] * 50 ** (-np.arange(3) / 3)
        rotated = (y[..., :3] + 1j * y[..., 3:]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    query, key, value = projected("query", 4), projected("key", 2), projected("value", 2)
    mixed = np.zeros((5, 4, 6))
    for place in range(5):
        for head in range(4):
            group = head // 2
            scores = key[: place + 1, group] @ query[place, head] / np.sqrt(6)
            weight = np.exp(scores - scores.max())
            mixed[place, head] = weight / weight.sum() @ value[: place + 1, group]
    expected = mixed.reshape(5, 24) @ numpy(layer.output_projection.kernel)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_keys_in_groups_that_do_not_come_out_even():
    message = "`num_heads`.*`num_key_value_heads`.*num_heads=4, num_key_value_heads=3$"
    with pytest.raises(ValueError, match=message):
        RotarySelfAttention(4, 6, num_key_value_heads=3)
    for odd in (1, 7):
        with pytest.raises(ValueError, match=f"`key_dim`.*even.*key_dim={odd}$"):
            RotarySelfAttention(4, odd)
    assert RotarySelfAttention(4, 6).num_key_value_heads == 4


KINDS = {
    "relative": lambda: CausalSelfAttention(H, K, name="attention"),
    "rotary": lambda: RotarySelfAttention(H, K, num_key_value_heads=1, name="attention"),
    "rotary, normalized": lambda: RotarySelfAttention(H, K, normalize=True, name="attention"),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_attention_goes_on_where_it_stopped(kind):
    """Three tokens, and then one at a time, with a cache; it may be longer than the text."""
    layer = ready(KINDS[kind]())
    bias = BIAS if kind == "relative" else None
    expected = numpy(layer(X, bias, np.ones((2, L))))
    heads = getattr(layer, "num_key_value_heads", H)
    cache = ops.full((2, 2, heads, L + 1, K), 9.0)
    for first, length in ((0, 3), (3, 1), (4, 1)):
        part = np.s_[:, first : first + length]
        of_part = None
        if bias is not None:
            longer = np.pad(bias, [(0, 0)] * 3 + [(0, 1)])
            of_part = ops.convert_to_tensor(longer[:, :, first : first + length])
        mask = causal_mask(length, L + 1, first)
        y, cache = layer.go_on(ops.convert_to_tensor(X[part]), of_part, mask, cache, first)
        np.testing.assert_allclose(numpy(y), expected[part], rtol=1e-4, atol=1e-4)
    assert (numpy(cache)[:, :, :, L] == 9).all()  # and writes what it has read only


def block(kind="relative", experts=True, cross=True, **options):
    """Of its mixture's 5 tokens in training as in inference 2 experts take 1 each."""
    feed_forward = FeedForward(7, name="feed_forward")
    if experts:
        tight = {"capacity_factor": 0.3, "eval_capacity_factor": 0.3, "min_capacity": 1}
        router = SwitchRouter(**tight, load_balancing_weight=0.5)
        feed_forward = MixtureOfExperts(FeedForwardExperts(2, 7), router, name="moe")
    attention = CrossAttention(H, K, name="cross_attention") if cross else None
    return DecoderBlock(KINDS[kind](), feed_forward, attention, name="block", **options)


@pytest.mark.parametrize("cross", [True, False])
def test_a_block_is_its_parts(cross):
    layer = ready(block(experts=False, cross=cross, epsilon=0.1))

    def normalized(x, name):
        scale = numpy(getattr(layer, name).scale)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) * scale

    of_encoder = (MEMORY, MEMORY_MASK) if cross else ()
    ours = numpy(layer(X, BIAS, MASK, *of_encoder))
    x = X + numpy(layer.attention(normalized(X, "attention_norm"), BIAS, MASK))
    if cross:
        queries = normalized(x, "cross_attention_norm")
        x = x + numpy(layer.cross_attention(queries, MEMORY, MEMORY_MASK))
    expected = x + numpy(layer.feed_forward(normalized(x, "feed_forward_norm")))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_residual_dropout_is_for_training_only():
    layer = ready(block(experts=False, dropout=0.5))
    call = (X, BIAS, MASK, MEMORY, MEMORY_MASK)
    calm = numpy(layer(*call))
    np.testing.assert_array_equal(numpy(layer(*call, training=False)), calm)
    assert (numpy(layer(*call, training=True)) != calm).any()


def test_a_block_goes_on_without_capacity_losses_and_statistics():
    """Token by token as all at once: an expert takes all who come. The whole block drops some."""
    layer = ready(block("rotary"))
    memory = layer.cross_attention.remember(MEMORY)
    empty = ops.zeros((2, 2, 1, L, K))

    def read(*lengths):
        first, cache, parts = 0, empty, []
        for length in lengths:
            mask = causal_mask(length, L, first)
            inputs = ops.convert_to_tensor(X[:, first : first + length])
            y, cache = layer.go_on(inputs, None, mask, cache, first, memory, MEMORY_MASK)
            parts.append(numpy(y))
            first += length
        return np.concatenate(parts, axis=1)

    at_once = read(5)
    np.testing.assert_allclose(read(3, 1, 1), at_once, rtol=1e-4, atol=1e-4)
    assert not layer.losses and not numpy(layer.feed_forward.statistics[1]).any()
    whole = numpy(layer(X, None, np.ones((2, L)), MEMORY, MEMORY_MASK))
    differ = np.abs(whole - at_once).max(axis=-1) > 1e-3
    assert differ.sum(axis=1).min() >= L - 2
    assert len(layer.losses) == 1 and numpy(layer.feed_forward.statistics[1]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cross", [True, False])
def test_blocks_come_back(kind, cross, tmp_path):
    x, mask = keras.Input((L, D)), keras.Input((L,))
    memory, memory_mask = keras.Input((S, D)), keras.Input((S,))
    layer = block(kind, cross=cross, dropout=0.2, epsilon=0.1)
    bias = keras.Input(batch_shape=(1, H, L, L))
    options = {"memory": memory, "memory_mask": memory_mask} if cross else {}
    inputs = [x, bias, mask, memory, memory_mask]
    rotary = kind != "relative"
    model = keras.Model(inputs, layer(x, None if rotary else bias, mask, **options))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = loaded.get_layer("block")
    for part in ("attention", "cross_attention")[: 1 + cross]:
        assert getattr(again, part).get_config() == getattr(layer, part).get_config()
    assert (again.dropout, again.epsilon) == (0.2, 0.1)
    assert type(again.attention) is type(layer.attention)
    assert (again.cross_attention is not None) == cross
    x = [X, BIAS, MASK, MEMORY, MEMORY_MASK]
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


def test_the_config_of_rotary_attention():
    options = {"num_key_value_heads": 2, "max_wavelength": 50, "normalize": True, "epsilon": 0.1}
    layer = RotarySelfAttention(4, 6, dropout=0.2, **options)
    config = layer.get_config()
    assert {name: config[name] for name in options} == options
    assert (config["num_heads"], config["key_dim"], config["dropout"]) == (4, 6, 0.2)
    assert RotarySelfAttention.from_config(config).get_config() == config
