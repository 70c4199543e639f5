"""The parts of a T5-style Transformer; a block takes any feed-forward layer, dense or sparse.

B batch, L length, D width, H heads, K width of a head. Differences from a textbook Transformer, all
T5's (https://arxiv.org/abs/1910.10683): RMS norm before each sub-layer, no biases, attention logits
unscaled (the initializer of the query carries the factor), positions only by a learned bias on the
attention logits, shared by all blocks.
"""

import math

import keras
import keras_hub
from keras import ops

from keras_moe import MixtureOfExperts, SoftMoE
from keras_moe.distribution.active import gathered
from keras_moe.ops import dropout as fast_dropout
from keras_moe.ops import embedding_lookup


@keras.saving.register_keras_serializable(package="zoo")
def gelu_tanh(x):
    """The approximate GELU of T5 1.1."""
    return keras.activations.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="zoo")
class Dropout(keras.layers.Dropout):
    """Keras' dropout with `keras_moe`'s noise, which XLA compiles well on TensorFlow too."""

    def call(self, inputs, training=False):
        if training and self.rate > 0:
            return fast_dropout(inputs, self.rate, self.seed_generator)
        return inputs


@keras.saving.register_keras_serializable(package="zoo")
class Embedding(keras.layers.Embedding):
    """Keras' embedding with one gradient on every backend, see `keras_moe.ops.embedding_lookup`."""

    def call(self, inputs):
        return _embedded(self, inputs)


@keras.saving.register_keras_serializable(package="zoo")
class ReversibleEmbedding(keras_hub.layers.ReversibleEmbedding):
    """KerasHub's, which also makes logits, with the same gradient on every backend."""

    def call(self, inputs, reverse=False):
        return super().call(inputs, reverse=True) if reverse else _embedded(self, inputs)


def _embedded(layer, token_ids):
    rows = embedding_lookup(layer.embeddings, ops.cast(token_ids, "int32"))
    return ops.cast(rows, layer.compute_dtype)


@keras.saving.register_keras_serializable(package="zoo")
class RelativePositionBias(keras.layers.Layer):
    """A learned bias per head and bucketed distance between query and key.

    Half of the buckets are for keys to the right, in a decoder none; half of each side's are for
    exact distances, the other half grow logarithmically up to `max_distance`.

    Args:
        num_heads: integer.
        num_buckets: integer.
        max_distance: tokens; everything farther shares the last bucket.
        bidirectional: whether keys to the right have buckets, as in an encoder.

    Call arguments:
        inputs: `[batch, length, ...]` tensor of the queries; only its length matters.
        num_keys: how many keys there are; `None`: `length`.
        first: position of the first query among the keys.

    Returns:
        `[1, heads, length, num_keys]` tensor.
    """

    def __init__(self, num_heads, num_buckets=32, max_distance=128, bidirectional=True, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def build(self, input_shape):
        self.embedding = self.add_weight(
            name="embedding",
            shape=(self.num_buckets, self.num_heads),
            initializer=keras.initializers.RandomNormal(stddev=0.1),
        )

    def call(self, inputs, num_keys=None, first=0):
        length = ops.shape(inputs)[1]
        query_Q = ops.arange(length, dtype="int32") + first
        key_S = ops.arange(length if num_keys is None else num_keys, dtype="int32")
        bucket_QS = self._bucket(key_S - ops.expand_dims(query_Q, 1))
        bias_QSH = embedding_lookup(self.embedding, bucket_QS)
        return gathered(ops.expand_dims(ops.transpose(bias_QSH, (2, 0, 1)), 0))

    def _bucket(self, distance):
        if self.bidirectional:
            side = self.num_buckets // 2
            bucket = ops.where(distance > 0, side, 0)
            distance = ops.abs(distance)
        else:
            side, bucket = self.num_buckets, 0
            distance = ops.maximum(-distance, 0)
        exact = side // 2
        far = ops.log(ops.cast(ops.maximum(distance, 1), "float32") / exact)
        far = far / math.log(self.max_distance / exact) * (side - exact)
        far = ops.minimum(exact + ops.cast(far, "int32"), side - 1)
        return bucket + ops.where(distance < exact, distance, far)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
        }


class Attention(keras.layers.Layer):
    """What all attention here has in common: heads, unscaled logits, a projection of the outputs.

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        dropout: rate on the attention weights.
    """

    def __init__(self, num_heads, key_dim, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.dropout = dropout

    def build(self, input_shape, *args):
        dim, inner = input_shape[-1], self.num_heads * self.key_dim
        self.build_inputs(input_shape)
        self.output_projection = self._projection("output", dim, inner, inner**-0.5)
        self.attention_dropout = Dropout(self.dropout, dtype=self.dtype_policy)

    def build_inputs(self, input_shape):
        """Makes what makes queries, keys and values."""
        dim, inner = input_shape[-1], self.num_heads * self.key_dim
        self.query = self._projection("query", inner, dim, (dim * self.key_dim) ** -0.5)
        self.key = self._projection("key", inner, dim, dim**-0.5)
        self.value = self._projection("value", inner, dim, dim**-0.5)

    def _projection(self, name, units, dim, stddev):
        layer = keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=stddev),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, dim))
        return layer

    def attend(self, query_BHQK, key_BGSK, value_BGSK, mask, position_bias=None, training=False):
        """What the queries find, projected, `[batch, queries, dim]`.

        Args:
            query_BHQK: `[batch, heads, queries, key_dim]` tensor.
            key_BGSK: `[batch, groups, keys, key_dim]` tensor; as many heads as there are to a group
                share its keys and values.
            value_BGSK: the same of the values.
            mask: booleans or integers that broadcast to `[batch, heads, queries, keys]`, 0 or
                `False` for keys that are not attended to.
            position_bias: tensor that broadcasts likewise; `None`: none.
            training: boolean.
        """
        logits_BHQS = by_group(query_BHQK, ops.swapaxes(key_BGSK, 2, 3))
        if position_bias is not None:
            logits_BHQS = logits_BHQS + position_bias
        logits_BHQS = ops.cast(logits_BHQS, "float32")
        logits_BHQS = ops.where(ops.cast(mask, "bool"), logits_BHQS, -1e9)
        weight_BHQS = ops.cast(ops.softmax(logits_BHQS, axis=-1), self.compute_dtype)
        weight_BHQS = self.attention_dropout(weight_BHQS, training=training)
        mixed_BHQK = by_group(weight_BHQS, value_BGSK)
        batch, _, length, _ = ops.shape(mixed_BHQK)
        mixed_BQD = ops.reshape(
            ops.transpose(mixed_BHQK, (0, 2, 1, 3)), (batch, length, self.num_heads * self.key_dim)
        )
        return self.output_projection(mixed_BQD)

    def heads(self, x_BLD):
        """`[batch, heads, length, key_dim]` of `[batch, length, heads * key_dim]`."""
        batch, length, dim = ops.shape(x_BLD)
        x_BLHK = ops.reshape(x_BLD, (batch, length, dim // self.key_dim, self.key_dim))
        return ops.transpose(x_BLHK, (0, 2, 1, 3))

    def compute_output_shape(self, input_shape, *args):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "dropout": self.dropout,
        }


def by_group(of_heads, of_groups):
    """The matrix of each head times that of its group, `[batch, heads or groups, ...]` each."""
    batch, heads, length, width = ops.shape(of_heads)
    groups = ops.shape(of_groups)[1]
    if groups == heads:
        return ops.matmul(of_heads, of_groups)
    of_heads = ops.reshape(of_heads, (batch, groups, heads // groups * length, width))
    result = ops.matmul(of_heads, of_groups)
    return ops.reshape(result, (batch, heads, length, ops.shape(result)[-1]))


@keras.saving.register_keras_serializable(package="zoo")
class SelfAttention(Attention):
    """Multi-head self-attention with unscaled logits and an additive position bias.

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        dropout: rate on the attention weights.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        position_bias: `[1, heads, length, length]` tensor.
        padding_mask: `[batch, length]`, 0 or `False` for padding, which no token attends to. Tokens
            of different numbers, texts that share a row, do not attend to each other.
        training: boolean.
        token_ids: `[batch, length]` integers, for mixtures whose router hashes them.
        counts: whether mixtures keep losses and statistics of the call.

    Returns:
        `[batch, length, dim]` tensor.
    """

    def call(
        self, inputs, position_bias, padding_mask, training=False, token_ids=None, counts=True
    ):
        heads = self.project_heads(inputs, padding_mask, training, token_ids, counts=counts)
        numbers_BL = ops.cast(padding_mask, "int32")
        query_B1Q1 = ops.expand_dims(numbers_BL, (1, 3))
        key_B11S = ops.expand_dims(numbers_BL, (1, 2))
        # A query that is padding attends to all: what comes of it, nobody reads.
        mask_B1QS = (key_B11S != 0) & ((query_B1Q1 == key_B11S) | (query_B1Q1 == 0))
        return self.attend(*heads, mask_B1QS, position_bias, training)

    def project_heads(self, inputs, padding_mask, training, token_ids, first=0, **of_mixture):
        """Queries, keys and values, `[batch, heads, length, key_dim]` each; see `project`.

        `first` is the position of the first of the inputs.
        """
        projected = self.project(inputs, padding_mask, training, token_ids, **of_mixture)
        return [self.heads(x_BLD) for x_BLD in projected]

    def project(self, inputs, padding_mask, training, token_ids, counts=True, drops=True):
        """Queries, keys and values, `[batch, length, heads * key_dim]` each; see `call_mixture`."""
        return self.query(inputs), self.key(inputs), self.value(inputs)


@keras.saving.register_keras_serializable(package="zoo")
class SwitchAttention(SelfAttention):
    """Self-attention in which every token has its queries, keys and values made by experts.

    Switch Transformers (https://arxiv.org/abs/2101.03961), appendix A and Figure 10: one mixture
    makes the queries; what the other makes is both the keys and the values. With mixtures that
    compute in bfloat16 the paper saw training diverge: give them the dtype "float32", whatever the
    attention's own is. A token that neither's experts take has zeros for a query, a key and a
    value; the residual connection around the attention carries it.

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        query: a `keras_moe.MixtureOfExperts` from `[batch, length, dim]` to
            `[batch, length, num_heads * key_dim]`.
        key_value: another.
        dropout: rate on the attention weights.

    Call arguments and returns: as `SelfAttention`.
    """

    def __init__(self, num_heads, key_dim, query, key_value, dropout=0.0, **kwargs):
        super().__init__(num_heads, key_dim, dropout, **kwargs)
        self.query = query
        self.key_value = key_value

    def build_inputs(self, input_shape):
        for mixture in (self.query, self.key_value):
            if not mixture.built:
                mixture.build(input_shape)

    def project(self, inputs, padding_mask, training, token_ids, counts=True, drops=True):
        query, key_value = (
            ops.cast(
                call_mixture(layer, inputs, padding_mask, training, token_ids, counts, drops),
                self.compute_dtype,
            )
            for layer in (self.query, self.key_value)
        )
        return query, key_value, key_value

    def get_config(self):
        return {
            **super().get_config(),
            "query": keras.saving.serialize_keras_object(self.query),
            "key_value": keras.saving.serialize_keras_object(self.key_value),
        }

    @classmethod
    def from_config(cls, config):
        # Not built on their own, or their weights' paths would lack this layer's name.
        parts = {
            name: keras.saving.deserialize_keras_object({**config[name], "build_config": None})
            for name in ("query", "key_value")
        }
        return cls(**{**config, **parts})


@keras.saving.register_keras_serializable(package="zoo")
class FeedForward(keras.layers.Layer):
    """The dense feed-forward layer: `activation(x W_in) W_out`, without biases.

    Args:
        hidden_dim: integer.
        activation: name or function.
        gated: whether the hidden units are `activation(x W_gate) * (x W_in)`, as in T5 1.1.
        dropout: rate on the hidden units.

    Call arguments:
        inputs: `[..., dim]` tensor.
        training: boolean.

    Returns:
        `[..., dim]` tensor.
    """

    def __init__(self, hidden_dim, activation="relu", dropout=0.0, gated=False, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.dropout = dropout
        self.gated = gated

    def build(self, input_shape):
        dim = input_shape[-1]
        self.hidden = self._dense("hidden", self.hidden_dim, dim)
        if self.gated:
            self.gate = self._dense("gate", self.hidden_dim, dim)
        self.output_projection = self._dense("output", dim, self.hidden_dim)
        self.hidden_dropout = Dropout(self.dropout, dtype=self.dtype_policy)

    def _dense(self, name, units, dim):
        layer = keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=dim**-0.5),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, dim))
        return layer

    def call(self, inputs, training=False):
        hidden = self.hidden(inputs)
        if self.gated:
            hidden = self.activation(self.gate(inputs)) * hidden
        else:
            hidden = self.activation(hidden)
        return self.output_projection(self.hidden_dropout(hidden, training=training))

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "gated": self.gated,
        }


@keras.saving.register_keras_serializable(package="zoo")
class TransformerBlock(keras.layers.Layer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        attention: a `SelfAttention`.
        feed_forward: a `FeedForward`, a `keras_moe.MixtureOfExperts`, or any layer from
            `[batch, length, dim]` to the same.
        dropout: rate on the output of each sub-layer.
        epsilon: of the RMS norm.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        position_bias, padding_mask, training, token_ids, counts: as `SelfAttention`; the last also
            of a feed-forward mixture.

    Returns:
        `[batch, length, dim]` tensor.
    """

    def __init__(self, attention, feed_forward, dropout=0.0, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention
        self.feed_forward = feed_forward
        self.dropout = dropout
        self.epsilon = epsilon

    def build(self, input_shape):
        self.attention_norm = self._norm("attention_norm", input_shape)
        self.feed_forward_norm = self._norm("feed_forward_norm", input_shape)
        self.residual_dropout = Dropout(self.dropout, dtype=self.dtype_policy)
        for layer in (self.attention, self.feed_forward):
            if not layer.built:
                layer.build(input_shape)

    def _norm(self, name, input_shape):
        norm = keras.layers.RMSNormalization(
            epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(input_shape)
        return norm

    def call(
        self, inputs, position_bias, padding_mask, training=False, token_ids=None, counts=True
    ):
        x = self.attention_norm(inputs)
        x = self.attention(
            x,
            position_bias,
            padding_mask,
            training=training,
            token_ids=token_ids,
            counts=counts,
        )
        inputs = inputs + self.residual_dropout(x, training=training)
        return self.feed(inputs, padding_mask, training, token_ids, counts=counts)

    def feed(self, inputs, padding_mask, training=False, token_ids=None, **of_mixture):
        """The second half of the block: `x + feed_forward(norm(x))`; see `call_mixture`."""
        x = self.feed_forward_norm(inputs)
        if isinstance(self.feed_forward, MixtureOfExperts):
            x = call_mixture(self.feed_forward, x, padding_mask, training, token_ids, **of_mixture)
        elif isinstance(self.feed_forward, SoftMoE):
            x = self.feed_forward(x, mask=padding_mask, training=training)
        else:
            x = self.feed_forward(x, training=training)
        return inputs + self.residual_dropout(x, training=training)

    def compute_output_shape(self, input_shape, *args):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "attention": keras.saving.serialize_keras_object(self.attention),
            "feed_forward": keras.saving.serialize_keras_object(self.feed_forward),
            "dropout": self.dropout,
            "epsilon": self.epsilon,
        }

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("attention", "feed_forward")
        }
        return cls(**{**config, **parts})


def call_mixture(
    mixture, inputs, padding_mask, training=False, token_ids=None, counts=True, drops=True
):
    """The outputs of a `MixtureOfExperts`, which gets `token_ids` if its router hashes them.

    Without `counts` it keeps neither losses nor statistics of the call; only then may its router
    be without its capacity, without `drops`.
    """
    options = {"mask": padding_mask, "training": training}
    if mixture.router.needs_token_ids:
        options["token_ids"] = token_ids
    if counts:
        return mixture(inputs, **options)
    return mixture.outputs_and_routing(inputs, drops=drops, **options)[0]
