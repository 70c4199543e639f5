"""The parts of a T5-style Transformer; a block takes any feed-forward layer, dense or sparse.

B batch, L length, D width, H heads, K width of a head. Differences from a textbook Transformer, all
T5's (https://arxiv.org/abs/1910.10683): RMS norm before each sub-layer, no biases, attention logits
unscaled (the initializer of the query carries the factor), positions only by a learned bias on the
attention logits, shared by all blocks.
"""

import math

import keras
from keras import ops

from keras_moe import MixtureOfExperts, SoftMoE
from keras_moe.ops import dropout as fast_dropout


@keras.saving.register_keras_serializable(package="zoo")
class Dropout(keras.layers.Dropout):
    """Keras' dropout with `keras_moe`'s noise, which XLA compiles well on TensorFlow too."""

    def call(self, inputs, training=False):
        if training and self.rate > 0:
            return fast_dropout(inputs, self.rate, self.seed_generator)
        return inputs


@keras.saving.register_keras_serializable(package="zoo")
class RelativePositionBias(keras.layers.Layer):
    """A learned bias per head and bucketed distance between query and key.

    Half of the buckets are for keys to the right; half of each side's are for exact distances, the
    other half grow logarithmically up to `max_distance`.

    Args:
        num_heads: integer.
        num_buckets: integer.
        max_distance: tokens; everything farther shares the last bucket.

    Call arguments:
        inputs: `[batch, length, ...]` tensor; only its length matters.

    Returns:
        `[1, heads, length, length]` tensor.
    """

    def __init__(self, num_heads, num_buckets=32, max_distance=128, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance

    def build(self, input_shape):
        self.embedding = self.add_weight(
            name="embedding",
            shape=(self.num_buckets, self.num_heads),
            initializer=keras.initializers.RandomNormal(stddev=0.1),
        )

    def call(self, inputs):
        position_L = ops.arange(ops.shape(inputs)[1], dtype="int32")
        bucket_LL = self._bucket(position_L[None, :] - position_L[:, None])
        bias_LLH = ops.take(self.embedding, bucket_LL, axis=0)
        return ops.transpose(bias_LLH, (2, 0, 1))[None]

    def _bucket(self, distance):
        side = self.num_buckets // 2
        exact = side // 2
        bucket = ops.where(distance > 0, side, 0)
        distance = ops.abs(distance)
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
        }


@keras.saving.register_keras_serializable(package="zoo")
class SelfAttention(keras.layers.Layer):
    """Multi-head self-attention with unscaled logits and an additive position bias.

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        dropout: rate on the attention weights.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        position_bias: `[1, heads, length, length]` tensor.
        padding_mask: `[batch, length]`, 0 or `False` for padding, which no token attends to.
        training: boolean.
        token_ids: `[batch, length]` integers, for mixtures whose router hashes them.

    Returns:
        `[batch, length, dim]` tensor.
    """

    def __init__(self, num_heads, key_dim, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.dropout = dropout

    def build(self, input_shape):
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

    def call(self, inputs, position_bias, padding_mask, training=False, token_ids=None):
        projected = self.project(inputs, padding_mask, training, token_ids)
        query_BHLK, key_BHLK, value_BHLK = (self._heads(x_BLD) for x_BLD in projected)
        logits_BHLL = ops.einsum("bhqk,bhsk->bhqs", query_BHLK, key_BHLK) + position_bias
        attended = ops.cast(padding_mask, "bool")[:, None, None, :]
        logits_BHLL = ops.where(attended, ops.cast(logits_BHLL, "float32"), -1e9)
        weight_BHLL = ops.cast(ops.softmax(logits_BHLL, axis=-1), self.compute_dtype)
        weight_BHLL = self.attention_dropout(weight_BHLL, training=training)
        mixed_BHLK = ops.einsum("bhqs,bhsk->bhqk", weight_BHLL, value_BHLK)
        batch, _, length, _ = ops.shape(mixed_BHLK)
        mixed_BLD = ops.reshape(
            ops.transpose(mixed_BHLK, (0, 2, 1, 3)), (batch, length, self.num_heads * self.key_dim)
        )
        return self.output_projection(mixed_BLD)

    def project(self, inputs, padding_mask, training, token_ids):
        """Queries, keys and values, `[batch, length, heads * key_dim]` each."""
        return self.query(inputs), self.key(inputs), self.value(inputs)

    def _heads(self, x_BLD):
        batch, length, _ = ops.shape(x_BLD)
        x_BLHK = ops.reshape(x_BLD, (batch, length, self.num_heads, self.key_dim))
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

    def project(self, inputs, padding_mask, training, token_ids):
        query, key_value = (
            ops.cast(
                call_mixture(layer, inputs, padding_mask, training, token_ids), self.compute_dtype
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
        dropout: rate on the hidden units.

    Call arguments:
        inputs: `[..., dim]` tensor.
        training: boolean.

    Returns:
        `[..., dim]` tensor.
    """

    def __init__(self, hidden_dim, activation="relu", dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.dropout = dropout

    def build(self, input_shape):
        dim = input_shape[-1]
        self.hidden = self._dense("hidden", self.hidden_dim, dim)
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
        hidden = self.activation(self.hidden(inputs))
        return self.output_projection(self.hidden_dropout(hidden, training=training))

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
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
        inputs, position_bias, padding_mask, training, token_ids: as `SelfAttention`.
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

    def call(self, inputs, position_bias, padding_mask, training=False, token_ids=None):
        x = self.attention_norm(inputs)
        x = self.attention(x, position_bias, padding_mask, training=training, token_ids=token_ids)
        inputs = inputs + self.residual_dropout(x, training=training)

        x = self.feed_forward_norm(inputs)
        if isinstance(self.feed_forward, MixtureOfExperts):
            x = call_mixture(self.feed_forward, x, padding_mask, training, token_ids)
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


def call_mixture(mixture, inputs, padding_mask, training, token_ids):
    """Calls a `MixtureOfExperts`, with `token_ids` if its router hashes them."""
    ids = {"token_ids": token_ids} if mixture.router.needs_token_ids else {}
    return mixture(inputs, mask=padding_mask, training=training, **ids)
