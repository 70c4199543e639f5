"""Soft MoE: experts see weighted means of tokens. Nothing is chosen, nothing is dropped.

G groups (sequences), S tokens per group, D width, E experts, P slots per expert, N = E*P slots.
"""

import keras
from keras import ops

from keras_moe.distribution.active import active, sharding
from keras_moe.moe import check_shape


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftMoE(keras.layers.Layer):
    """Every slot of every expert is a weighted mean of all tokens, every output one of all slots.

    From Sparse to Soft Mixtures of Experts (https://arxiv.org/abs/2308.00951), section 2.1, for the
    tokens `X [S, D]` of one sequence:

        logits = normalize(X) @ (scale * normalize(phi))     both to length 1 along D, section 2.3
        slots  = softmax(logits, over tokens)^T @ X
        Y      = softmax(logits, over slots) @ experts(slots)

    The cost is that of `E * P` tokens through one expert each, however many experts there are, and
    a table of tokens x slots per sequence; the paper takes about as many slots as tokens. All is
    differentiable and all experts carry the same load, so there is neither a loss nor a statistic.

    Every output depends on every token of its sequence, later ones too: the layer is for encoders,
    not for causal models. Sequences do not see each other.

    Example:

    ```python
    layer = keras_moe.SoftMoE(
        keras_moe.FeedForwardExperts(num_experts=32, hidden_dim=1024, activation="gelu"),
        slots_per_expert=8,
    )
    outputs = inputs + layer(inputs)  # [batch, length, dim]
    ```

    Args:
        experts: a bank of experts, see `MixtureOfExperts`.
        slots_per_expert: integer.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        mask: `[batch, length]` booleans, `False` for padding, which is in no mean and comes out as
            zero. Keras passes an upstream mask by itself.
        training: boolean, for the experts.

    Returns:
        Tensor shaped like `inputs`, but for the width of the experts' output.

    Raises:
        ValueError: if an argument is out of range, or if the inputs or the mask have another shape.
    """

    def __init__(self, experts, slots_per_expert, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(experts, keras.Layer) or not hasattr(experts, "num_experts"):
            raise ValueError(
                "`experts` must be a layer with `num_experts`, such as `FeedForwardExperts` or "
                f"`LayerExperts`. Received: experts={experts!r}"
            )
        if slots_per_expert < 1:
            raise ValueError(
                "`slots_per_expert` must be a positive integer. "
                f"Received: slots_per_expert={slots_per_expert}"
            )
        self.experts = experts
        self.slots_per_expert = slots_per_expert
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                "`inputs` must be [batch, length, dim] with a known dim. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        dim = input_shape[-1]
        if not self.experts.built:
            with sharding(self.experts, self.path):
                self.experts.build((None, None, dim))
        self.phi = self.add_weight(
            name="phi",
            shape=(dim, self.experts.num_experts, self.slots_per_expert),
            initializer=keras.initializers.RandomNormal(stddev=dim**-0.5),
            dtype="float32",
            autocast=False,
        )
        self.scale = self.add_weight(
            name="scale", shape=(), initializer="ones", dtype="float32", autocast=False
        )

    def call(self, inputs, mask=None, training=False):
        if 0 in tuple(inputs.shape):  # no tokens
            return ops.zeros(self.compute_output_shape(inputs.shape), self.compute_dtype)
        if mask is not None:
            check_shape("mask", mask, inputs)
            mask = ops.cast(mask, "bool")[..., None]
            inputs = ops.where(mask, inputs, 0.0)  # whatever stands there
        logits_GSN = self._logits(inputs)
        combine_GSN = ops.softmax(logits_GSN, axis=-1)
        if mask is not None:
            logits_GSN = ops.where(mask, logits_GSN, -1e30)
        dispatch_GSN = ops.softmax(logits_GSN, axis=1)

        slots_GND = ops.matmul(self._cast(ops.transpose(dispatch_GSN, (0, 2, 1))), inputs)
        y_GND = self._apply_experts(slots_GND, training)
        y_GSD = ops.matmul(self._cast(combine_GSN), y_GND)
        return y_GSD if mask is None else ops.where(mask, y_GSD, 0.0)

    def _logits(self, x_GSD):
        """How well each token fits each slot, float32."""
        phi_DN = ops.reshape(self.phi, (x_GSD.shape[-1], -1))
        x_GSD = _normalize(ops.cast(x_GSD, "float32"), axis=-1)
        return ops.matmul(x_GSD, self.scale * _normalize(phi_DN, axis=0))

    def _apply_experts(self, slots_GND, training):
        groups, _, dim = ops.shape(slots_GND)
        num_experts, slots = self.experts.num_experts, self.slots_per_expert
        slots_GEPD = ops.reshape(slots_GND, (groups, num_experts, slots, dim))
        if active() is not None:
            y_GEPD = active().spread(self.experts, slots_GEPD, training)
        else:
            slots_EGPD = ops.transpose(slots_GEPD, (1, 0, 2, 3))
            slots_EMD = ops.reshape(slots_EGPD, (num_experts, -1, dim))
            y_EMD = self.experts(slots_EMD, training=training)
            y_EGPD = ops.reshape(y_EMD, (num_experts, -1, slots, y_EMD.shape[-1]))
            y_GEPD = ops.transpose(y_EGPD, (1, 0, 2, 3))
        return self._cast(ops.reshape(y_GEPD, (-1, num_experts * slots, y_GEPD.shape[-1])))

    def _cast(self, x):
        return ops.cast(x, self.compute_dtype)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Plain: the experts, made in the same `keras.RematScope`, are what is computed again."""
        return layer_call

    def compute_output_shape(self, input_shape):
        slots_shape = (None, None, input_shape[-1])
        return (*input_shape[:-1], self.experts.compute_output_shape(slots_shape)[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "slots_per_expert": self.slots_per_expert,
        }

    @classmethod
    def from_config(cls, config):
        # Not built on their own, or their weights' paths would lack this layer's name.
        experts = {**config["experts"], "build_config": None}
        return cls(**{**config, "experts": keras.saving.deserialize_keras_object(experts)})


def _normalize(x, axis):
    """Scaled to length 1; what is zero stays zero, and its gradient finite."""
    return x * ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=axis, keepdims=True), 1e-12))
