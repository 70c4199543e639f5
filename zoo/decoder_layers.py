"""The parts of a T5-style decoder, which sees no later token and may look at an encoder's outputs.

B batch, L length, D width, H heads, K width of a head, S keys. While a text is generated the keys
and values of the tokens before are kept: a cache is a `[batch, 2, heads, keys, key_dim]` tensor.
"""

import keras
import keras_hub
from keras import ops

from keras_moe.ops import put_rows
from zoo.layers import Attention, SelfAttention, TransformerBlock


@keras.saving.register_keras_serializable(package="zoo")
class CausalSelfAttention(SelfAttention):
    """`SelfAttention` in which no token attends to a later one.

    Args, call arguments and returns: as `SelfAttention`.
    """

    def call(
        self, inputs, position_bias, padding_mask, training=False, token_ids=None, counts=True
    ):
        heads = self.project_heads(inputs, padding_mask, training, token_ids, counts=counts)
        length = ops.shape(inputs)[1]
        mask = causal_mask(length, length) & ops.cast(padding_mask[:, None, None, :], "bool")
        return self.attend(*heads, mask, position_bias, training)

    def go_on(self, inputs, position_bias, mask, cache, first, token_ids=None):
        """Attends from tokens at `first` and after to all before them, in inference.

        Args:
            inputs: `[batch, length, dim]` tensor.
            position_bias: `[1, heads, length, keys]` tensor, or `None`.
            mask: `[length, keys]` booleans, see `causal_mask`.
            cache: keys and values of the tokens before `first`.
            first: position of the first of the inputs.
            token_ids: `[batch, length]` integers, for mixtures whose router hashes them.

        Returns:
            Tuple of the outputs `[batch, length, dim]` and the cache with the inputs' own.
        """
        query, key, value = self.project_heads(
            inputs, None, False, token_ids, first, counts=False, drops=False
        )
        new = ops.cast(ops.stack([key, value], axis=1), cache.dtype)
        cache = put_rows(cache, new, first, axis=3)
        y = self.attend(query, cache[:, 0], cache[:, 1], mask, position_bias)
        return y, cache


def causal_mask(length, num_keys, first=0):
    """Which keys are not later than the queries at `first` and after, `[length, num_keys]`."""
    query_L = ops.arange(length, dtype="int32") + first
    return ops.arange(num_keys, dtype="int32") <= query_L[:, None]


@keras.saving.register_keras_serializable(package="zoo")
class RotarySelfAttention(CausalSelfAttention):
    """Causal self-attention of the Llama family: rotary positions, scaled logits.

    Queries and keys are rotated by their positions (https://arxiv.org/abs/2104.09864); groups of
    heads may share keys and values (https://arxiv.org/abs/2305.13245).

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        dropout: rate on the attention weights.
        num_key_value_heads: heads of the keys and values; `None`: `num_heads`.
        max_wavelength: of the rotary positions, in tokens.
        normalize: whether queries and keys are normalized (RMS) before they are rotated, all heads
            together, as in OLMoE.
        epsilon: of these norms.

    Call arguments and returns: as `SelfAttention`; `position_bias` may be `None`.

    Raises:
        ValueError: if `num_heads` is no multiple of `num_key_value_heads`, or `key_dim` is odd.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        dropout=0.0,
        num_key_value_heads=None,
        max_wavelength=10000,
        normalize=False,
        epsilon=1e-5,
        **kwargs,
    ):
        super().__init__(num_heads, key_dim, dropout, **kwargs)
        if key_dim % 2:
            raise ValueError(
                "`key_dim` must be even, as rotary positions turn pairs of numbers. "
                f"Received: key_dim={key_dim}"
            )
        self.num_key_value_heads = num_key_value_heads or num_heads
        if num_heads % self.num_key_value_heads:
            raise ValueError(
                "`num_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}"
            )
        self.max_wavelength = max_wavelength
        self.normalize = normalize
        self.epsilon = epsilon

    def build_inputs(self, input_shape):
        dim = input_shape[-1]
        for name, heads in (
            ("query", self.num_heads),
            ("key", self.num_key_value_heads),
            ("value", self.num_key_value_heads),
        ):
            setattr(self, name, self._projection(name, heads * self.key_dim, dim, dim**-0.5))
        if self.normalize:
            self.query_norm = self._norm("query_norm", self.num_heads)
            self.key_norm = self._norm("key_norm", self.num_key_value_heads)
        self.rotary = keras_hub.layers.RotaryEmbedding(
            self.max_wavelength, dtype="float32", name="rotary"
        )

    def _norm(self, name, heads):
        norm = keras.layers.RMSNormalization(
            epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build((None, None, heads * self.key_dim))
        return norm

    def project_heads(self, inputs, padding_mask, training, token_ids, first=0, **of_mixture):
        query_BLD, key_BLD, value_BLD = self.project(
            inputs, padding_mask, training, token_ids, **of_mixture
        )
        if self.normalize:
            query_BLD, key_BLD = self.query_norm(query_BLD), self.key_norm(key_BLD)
        query_BHLK = self._rotated(query_BLD, first) * self.key_dim**-0.5
        return query_BHLK, self._rotated(key_BLD, first), self.heads(value_BLD)

    def _rotated(self, x_BLD, first):
        batch, length, dim = ops.shape(x_BLD)
        x_BLHK = ops.reshape(x_BLD, (batch, length, dim // self.key_dim, self.key_dim))
        x_BLHK = ops.cast(self.rotary(x_BLHK, start_index=first), self.compute_dtype)
        return ops.transpose(x_BLHK, (0, 2, 1, 3))

    def get_config(self):
        return {
            **super().get_config(),
            "num_key_value_heads": self.num_key_value_heads,
            "max_wavelength": self.max_wavelength,
            "normalize": self.normalize,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="zoo")
class CrossAttention(Attention):
    """Attention from a decoder's tokens to an encoder's outputs, without positions.

    Args:
        num_heads: integer.
        key_dim: integer, the width of a head.
        dropout: rate on the attention weights.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        memory: `[batch, keys, dim]` tensor, the encoder's outputs.
        memory_mask: `[batch, keys]`, 0 or `False` for padding.
        training: boolean.

    Returns:
        `[batch, length, dim]` tensor.
    """

    def call(self, inputs, memory, memory_mask, training=False):
        return self.look_up(inputs, self.remember(memory), memory_mask, training)

    def remember(self, memory):
        """The cache of an encoder's outputs, `[batch, 2, heads, keys, key_dim]`."""
        parts = [self.heads(self.key(memory)), self.heads(self.value(memory))]
        return ops.stack(parts, axis=1)

    def look_up(self, inputs, cache, memory_mask, training=False):
        """The outputs, from a cache that `remember` made."""
        query = self.heads(self.query(inputs))
        mask = memory_mask[:, None, None, :]
        return self.attend(query, cache[:, 0], cache[:, 1], mask, training=training)


@keras.saving.register_keras_serializable(package="zoo")
class DecoderBlock(TransformerBlock):
    """`x + attention(norm(x))`, `x + cross_attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        attention: a `CausalSelfAttention`.
        feed_forward: as in `TransformerBlock`.
        cross_attention: a `CrossAttention`; `None` in a model without an encoder.
        dropout: rate on the output of each sub-layer.
        epsilon: of the RMS norm.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        position_bias, padding_mask, training, token_ids: as `SelfAttention`.
        memory, memory_mask: as `CrossAttention`.

    Returns:
        `[batch, length, dim]` tensor.
    """

    def __init__(
        self, attention, feed_forward, cross_attention=None, dropout=0.0, epsilon=1e-6, **kwargs
    ):
        super().__init__(attention, feed_forward, dropout, epsilon, **kwargs)
        self.cross_attention = cross_attention

    def build(self, input_shape, *args):
        super().build(input_shape)
        if self.cross_attention is not None:
            self.cross_attention_norm = self._norm("cross_attention_norm", input_shape)
            if not self.cross_attention.built:
                self.cross_attention.build(input_shape)

    def call(
        self,
        inputs,
        position_bias,
        padding_mask,
        memory=None,
        memory_mask=None,
        training=False,
        token_ids=None,
    ):
        x = self.attention_norm(inputs)
        x = self.attention(x, position_bias, padding_mask, training=training, token_ids=token_ids)
        inputs = inputs + self.residual_dropout(x, training=training)
        if self.cross_attention is not None:
            x = self.cross_attention_norm(inputs)
            x = self.cross_attention(x, memory, memory_mask, training=training)
            inputs = inputs + self.residual_dropout(x, training=training)
        return self.feed(inputs, padding_mask, training, token_ids)

    def go_on(
        self,
        inputs,
        position_bias,
        mask,
        cache,
        first,
        memory=None,
        memory_mask=None,
        token_ids=None,
        padding_mask=None,
    ):
        """The block's outputs for tokens at `first` and after, in inference.

        A mixture drops none of them, whatever its router's capacity, and does not count them in its
        losses and statistics: a text must not depend on how many of its tokens are read at once.

        Args:
            inputs: `[batch, length, dim]` tensor.
            position_bias: `[1, heads, length, keys]` tensor, or `None`.
            mask: `[length, keys]` booleans, see `causal_mask`.
            cache: of the self-attention, up to `first`.
            first: position of the first of the inputs.
            memory: what `cross_attention.remember` made of the encoder's outputs.
            memory_mask: `[batch, keys]`, 0 or `False` for padding.
            token_ids: `[batch, length]` integers, for mixtures whose router hashes them.
            padding_mask: `[batch, length]`, 0 or `False` for inputs whose outputs nobody reads;
                `None`: there are none.

        Returns:
            Tuple of the outputs `[batch, length, dim]` and the new cache.
        """
        x = self.attention_norm(inputs)
        x, cache = self.attention.go_on(x, position_bias, mask, cache, first, token_ids)
        inputs = inputs + x
        if self.cross_attention is not None:
            x = self.cross_attention_norm(inputs)
            inputs = inputs + self.cross_attention.look_up(x, memory, memory_mask)
        return self.feed(inputs, padding_mask, False, token_ids, counts=False, drops=False), cache

    def get_config(self):
        cross_attention = self.cross_attention
        return {
            **super().get_config(),
            "cross_attention": cross_attention
            and keras.saving.serialize_keras_object(cross_attention),
        }

    @classmethod
    def from_config(cls, config):
        cross_attention = config["cross_attention"]
        if cross_attention is not None:
            cross_attention = keras.saving.deserialize_keras_object(cross_attention)
        return super().from_config({**config, "cross_attention": cross_attention})
