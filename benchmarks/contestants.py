"""The layers that are timed against each other, all from `[batch, length, width]` to the same.

The dense layer of the same active FLOPs is as wide as all experts of one token together.
"""

import keras
from keras import ops

import keras_moe
from keras_moe.metrics import statistics


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


def mixture(bank, router):
    return keras_moe.MixtureOfExperts(bank, router, group="batch", name="moe")


def moe(router, num_experts, hidden, gated):
    return mixture(experts(num_experts, hidden, gated), router)


class Bare(TokenLayer):
    """The floor: the experts' products alone, on as many tokens as there are slots."""

    def __init__(self, num_experts, hidden, gated, dropless, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts(num_experts, hidden, gated)
        self.dropless = dropless

    def build(self, input_shape):
        self.experts.build((None, None, input_shape[-1]))

    def call(self, inputs):
        num_experts, width = self.experts.num_experts, inputs.shape[-1]
        if not self.dropless:
            y = self.experts(ops.reshape(inputs, (num_experts, -1, width)))
        else:
            slots = ops.shape(inputs)[0] * ops.shape(inputs)[1]
            size = keras_moe.ops.row_size(slots, num_experts)
            x = ops.reshape(inputs, (-1, size, width))
            rows = ops.shape(x)[0]
            row_expert = ops.arange(rows, dtype="int32") * num_experts // rows
            y = self.experts(x, row_expert=row_expert)
        return ops.reshape(y, ops.shape(inputs))


class Routing(TokenLayer):
    """The router and its losses, with or without the metrics; the tokens stay where they are."""

    def __init__(self, router, num_experts, with_metrics, **kwargs):
        super().__init__(**kwargs)
        router.set_num_experts(num_experts)
        self.router = router
        self.with_metrics = with_metrics

    def build(self, input_shape):
        self.router.build((None, None, input_shape[-1]))

    def call(self, inputs, training=False):
        x = ops.reshape(inputs, (1, -1, inputs.shape[-1]))
        routing = self.router(x, training=training, compact=True)
        for loss in self.router.auxiliary_losses(routing):
            self.add_loss(loss)
        made = [routing.weight, routing.token_index, routing.slot_index]
        if self.with_metrics:
            made += statistics(routing)
        for each in made:  # or a compiler would leave them out
            self.add_loss(1e-9 * ops.mean(ops.cast(each, "float32")))
        return inputs


class NoExperts(TokenLayer):
    """Experts that return their slots: what a layer costs but for the products."""

    compact = True

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def call(self, inputs, row_expert=None, training=False):
        if keras.backend.backend() == "jax":  # or XLA would join dispatch and combine
            import jax

            return jax.lax.optimization_barrier(inputs)
        return inputs


class WeightsAlone(TokenLayer):
    """The experts' weights with next to no use of them: what they and their optimizer take."""

    def __init__(self, num_experts, hidden, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts(num_experts, hidden, gated=False)

    def build(self, input_shape):
        self.experts.build((None, None, input_shape[-1]))

    def call(self, inputs):
        return inputs * sum(ops.sum(kernel[0, 0]) for kernel in self.experts.trainable_variables)


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
