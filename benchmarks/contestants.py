"""The layers that are timed against each other, all from `[batch, length, width]` to the same.

E experts, k experts per token; "active" is how many times the hidden width of one expert a token
sees, and so the width of the dense layer of the same active FLOPs.
"""

import keras
from keras import ops

import keras_moe


class TokenLayer(keras.layers.Layer):
    """A layer whose outputs have the shape of its inputs."""

    def compute_output_shape(self, input_shape):
        return input_shape


class Dense(TokenLayer):
    """What all others are measured by: no biases; relu, or silu-gated as in Mixtral."""

    def __init__(self, hidden, gated, **kwargs):
        super().__init__(**kwargs)
        self.hidden = hidden
        self.gated = gated

    def build(self, input_shape):
        width = input_shape[-1]
        self.kernel_in = self.add_weight(shape=(width, self.hidden))
        if self.gated:
            self.kernel_gate = self.add_weight(shape=(width, self.hidden))
        self.kernel_out = self.add_weight(shape=(self.hidden, width))

    def call(self, inputs):
        x = ops.reshape(inputs, (-1, inputs.shape[-1]))
        hidden = ops.matmul(x, self.kernel_in)
        if self.gated:
            hidden = ops.silu(ops.matmul(x, self.kernel_gate)) * hidden
        else:
            hidden = ops.relu(hidden)
        return ops.reshape(ops.matmul(hidden, self.kernel_out), ops.shape(inputs))


def experts(num_experts, hidden, gated):
    activation = "silu" if gated else "relu"
    return keras_moe.FeedForwardExperts(num_experts, hidden, activation=activation, gated=gated)


def moe(router, num_experts, hidden, gated):
    return keras_moe.MixtureOfExperts(
        experts(num_experts, hidden, gated), router, group="batch", name="moe"
    )


class Bare(TokenLayer):
    """The floor: the experts' products alone, on tokens that lie in their slots already."""

    def __init__(self, num_experts, hidden, gated, k, dropless, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts(num_experts, hidden, gated)
        self.k = k
        self.dropless = dropless

    def build(self, input_shape):
        self.experts.build((None, None, input_shape[-1]))

    def call(self, inputs):
        num_experts, width = self.experts.num_experts, inputs.shape[-1]
        x = ops.reshape(inputs, (-1, width))
        if self.k > 1:
            x = ops.concatenate([x] * self.k)
        if not self.dropless:
            y = self.experts(ops.reshape(x, (num_experts, -1, width)))
        else:
            assignments = ops.shape(x)[0]
            size = keras_moe.ops.row_size(assignments, num_experts)
            x = ops.reshape(x, (-1, size, width))
            rows = ops.arange(ops.shape(x)[0], dtype="int32")
            y = self.experts(x, row_expert=rows * num_experts // ops.shape(x)[0])
        y = ops.reshape(y, (self.k, -1, width))
        return ops.reshape(ops.sum(y, axis=0), ops.shape(inputs))


class OneHot(TokenLayer):
    """GShard's dispatch: products with a one-hot `[tokens, experts, capacity]`, top-1."""

    def __init__(self, num_experts, hidden, gated, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts(num_experts, hidden, gated)

    def build(self, input_shape):
        self.router = self.add_weight(shape=(input_shape[-1], self.experts.num_experts))
        self.experts.build((None, None, input_shape[-1]))

    def call(self, inputs):
        num_experts = self.experts.num_experts
        x = ops.reshape(inputs, (-1, inputs.shape[-1]))
        capacity = -(-ops.shape(x)[0] // num_experts)
        probabilities = ops.softmax(ops.matmul(x, self.router))
        chosen = ops.one_hot(ops.argmax(probabilities, axis=-1), num_experts)
        place = (ops.cumsum(chosen, axis=0) - 1.0) * chosen
        place = ops.cast(ops.sum(place, axis=-1), "int32")
        slot = ops.cast(place[:, None] == ops.arange(capacity, dtype="int32"), "float32")
        dispatch = chosen[:, :, None] * slot[:, None, :]
        y = self.experts(ops.einsum("tec,td->ecd", dispatch, x))
        y = ops.einsum("tec,ecd->td", dispatch * probabilities[:, :, None], y)
        return ops.reshape(y, ops.shape(inputs))


def keras_hub_mixtral(num_experts, width, hidden, k):
    """KerasHub's block: every expert on every token."""
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

    class Block(TokenLayer, MixtralSparseMoeBlock):
        def call(self, inputs, training=False):
            return super().call(inputs, training=training)[0]

    return Block(width, hidden, num_experts, k)


def transformers_mixtral(num_experts, width, hidden, k, implementation):
    """Hugging Face's block, PyTorch only; `implementation` is "grouped_mm" or "eager"."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
    )
    config._experts_implementation = implementation
    return _torch_layer(MixtralSparseMoeBlock(config))


def transformers_switch(num_experts, width, hidden):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=width, d_ff=hidden, num_experts=num_experts, expert_capacity=2**20
    )
    return _torch_layer(SwitchTransformersSparseMLP(config))


def _torch_layer(module):
    import torch

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    class Wrapped(TokenLayer, keras.layers.TorchModuleWrapper):
        def call(self, inputs, training=False):
            y = super().call(inputs, training=training)
            return y[0] if isinstance(y, tuple) else y

    return Wrapped(module)
