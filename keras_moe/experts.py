"""Banks of experts: networks from slots to slots. They know neither tokens nor routers.

R rows of slots, C slots per row, D width, E experts, F hidden. Either row `e` is expert `e`'s, or
`row_expert` says whose each row is. A bank with `compact = True` would rather have that: an expert
then gets as few rows as its tokens need, none if it has none.
"""

import keras
from keras import ops

from keras_moe.ops import (
    IMPLEMENTATIONS,
    call_by_row,
    drop,
    embedding_lookup,
    expert_product,
    uniform,
)
from keras_moe.routing.base import positive_integer, positive_number


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(keras.layers.Layer):
    """`num_experts` two-layer networks whose kernels lie in one tensor per layer.

    Plain, `act(x kernel_in) kernel_out`, or gated (GLU, https://arxiv.org/abs/2002.05202),
    `(act(x kernel_gate) * x kernel_in) kernel_out`.

    Example:

    ```python
    experts = keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=1024, activation="relu")
    outputs = experts(slots)  # [8, slots, dim] -> [8, slots, dim]
    ```

    Args:
        num_experts: integer.
        hidden_dim: integer, the width between the two layers.
        activation: name or function.
        gated: whether the hidden units are gated.
        use_bias: whether the two layers have biases.
        dropout: rate on the hidden units while training, the "expert dropout" of Switch
            Transformers (https://arxiv.org/abs/2101.03961), section 2.4: 0.4 while fine-tuning.
        init_scale: every kernel is drawn per expert from a truncated normal of variance
            `init_scale / fan_in`, the fan being that of one expert's `[in, out]` matrix. Switch
            Transformers use 0.1 (section 2.4, Table 3).
        implementation: how the products are made: "auto", "batched", "loop" or "grouped", which
            differ in speed alone, see `keras_moe.ops.expert_product`.
        seed: integer, seed of the initial weights and the dropout.

    Call arguments:
        inputs: `[rows, slots, dim]` tensor.
        row_expert: `[rows]` integers, ascending; `num_experts` marks rows that are nobody's;
            `None` when row `e` is expert `e`'s.
        training: boolean.

    Returns:
        `[rows, slots, dim]` tensor.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_experts,
        hidden_dim,
        activation="relu",
        gated=False,
        use_bias=False,
        dropout=0.0,
        init_scale=1.0,
        implementation="auto",
        seed=None,
        **kwargs,
    ):
        super().__init__(**{"name": "experts", **kwargs})
        positive_integer("num_experts", num_experts)
        positive_integer("hidden_dim", hidden_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={dropout}")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)}. "
                f"Received: implementation={implementation!r}"
            )
        positive_number("init_scale", init_scale)
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = dropout
        self.init_scale = init_scale
        self.implementation = implementation
        self.compact = implementation != "batched"
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        dim = input_shape[-1]
        self.kernel_in = self._add_kernel("kernel_in", dim, self.hidden_dim, 0)
        if self.gated:
            self.kernel_gate = self._add_kernel("kernel_gate", dim, self.hidden_dim, 1)
        self.kernel_out = self._add_kernel("kernel_out", self.hidden_dim, dim, 2)
        if self.use_bias:
            self.bias_in = self._add_bias("bias_in", self.hidden_dim)
            self.bias_out = self._add_bias("bias_out", dim)

    def _add_kernel(self, name, fan_in, fan_out, index):
        seed = None if self.seed is None else self.seed + index
        initializer = _kernel_initializer(self.num_experts, self.init_scale, seed)
        return self._add(name, (fan_in, fan_out), initializer)

    def _add_bias(self, name, dim):
        return self._add(name, (dim,), "zeros")

    def _add(self, name, shape, initializer):
        shape = (self.num_experts, *shape)
        weight = self.add_weight(name=name, shape=shape, initializer=initializer)
        weight.per_expert = True  # see `keras_moe.optimizers`
        return weight

    def call(self, inputs, row_expert=None, training=False):
        kept_RCF = self._kept(inputs, training)
        return self.compute(inputs, self.cast_weights(), row_expert, kept_RCF)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """The call in a `keras.RematScope`: computed again, but with the same random numbers."""
        rematerialized = super().rematerialized_call

        def call(inputs, row_expert=None, training=False):
            kept_RCF = self._kept(inputs, training)
            weights = self.cast_weights()  # here, since Keras casts them in the first pass alone

            def compute(inputs, weights):
                return self.compute(inputs, weights, row_expert, kept_RCF)

            return rematerialized(compute, inputs, weights)(inputs, weights)

        return call

    def _kept(self, inputs, training):
        """Which hidden units dropout keeps, `[rows, slots, hidden_dim]`; `None`: all."""
        if not training or self.dropout == 0:
            return None
        shape_RCF = (*ops.shape(inputs)[:2], self.hidden_dim)
        return uniform(shape_RCF, 0.0, 1.0, self.seed_generator) >= self.dropout

    def cast_weights(self):
        """The weights by name, in the dtype of the computation."""
        names = ("kernel_in", "kernel_gate", "kernel_out", "bias_in", "bias_out")
        return {
            name: ops.cast(getattr(self, name), self.compute_dtype)
            for name in names
            if hasattr(self, name)
        }

    def compute(self, inputs, weights, row_expert=None, kept_RCF=None):
        """What a call computes, with the weights of all experts or of some, whole or in part.

        Args:
            inputs: as in a call, in the dtype of the weights.
            weights: as `cast_weights` returns them; fewer experts, and fewer hidden units, will do.
            row_expert: as in a call, counted among the experts that there are weights of.
            kept_RCF: which hidden units dropout keeps, `[rows, slots, hidden_dim]`; `None`: all.
        """

        def product(x_RCD, name, before=None):
            y_RCF = expert_product(
                x_RCD, weights[f"kernel_{name}"], row_expert, self.implementation, before
            )
            bias_EF = weights.get(f"bias_{name}")
            return y_RCF if bias_EF is None else y_RCF + self._of_rows(bias_EF, row_expert)

        def activate(hidden, gate=None):
            return self.activation(hidden) if gate is None else self.activation(gate) * hidden

        hidden = (product(inputs, "in"),)
        if self.gated:
            hidden += (product(inputs, "gate"),)
        if kept_RCF is None:
            return product(hidden, "out", before=activate)
        return product(drop(activate(*hidden), kept_RCF, self.dropout), "out")

    def _of_rows(self, bias_ED, row_expert):
        if row_expert is not None:
            bias_ED = embedding_lookup(bias_ED, ops.minimum(row_expert, bias_ED.shape[0] - 1))
        return ops.expand_dims(bias_ED, axis=1)

    def compute_output_shape(self, input_shape, row_expert=None):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "init_scale": self.init_scale,
            "implementation": self.implementation,
            "seed": self.seed,
        }


def _kernel_initializer(num_experts, init_scale, seed):
    """Draws every expert's `[in, out]` kernel with variance `init_scale / in`."""
    # Keras counts the expert axis as part of the fan; the factor num_experts takes it out.
    return keras.initializers.VarianceScaling(
        init_scale * num_experts, "fan_in", "truncated_normal", seed
    )


@keras.saving.register_keras_serializable(package="keras_moe")
class LinearExperts(keras.layers.Layer):
    """`num_experts` linear maps without biases, `x kernel`, whose kernels lie in one tensor.

    The experts that make queries, keys and values in Switch Transformers
    (https://arxiv.org/abs/2101.03961), appendix A.

    Args:
        num_experts: integer.
        output_dim: integer.
        init_scale: see `FeedForwardExperts`.
        seed: integer, seed of the initial weights.

    Call arguments:
        inputs: `[rows, slots, dim]` tensor.
        row_expert: `[rows]` integers, ascending; `num_experts` marks rows that are nobody's;
            `None` when row `e` is expert `e`'s.

    Returns:
        `[rows, slots, output_dim]` tensor.

    Raises:
        ValueError: if an argument is out of range.
    """

    compact = True

    def __init__(self, num_experts, output_dim, init_scale=1.0, seed=None, **kwargs):
        super().__init__(**{"name": "experts", **kwargs})
        positive_integer("num_experts", num_experts)
        positive_integer("output_dim", output_dim)
        positive_number("init_scale", init_scale)
        self.num_experts = num_experts
        self.output_dim = output_dim
        self.init_scale = init_scale
        self.seed = seed

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_experts, input_shape[-1], self.output_dim),
            initializer=_kernel_initializer(self.num_experts, self.init_scale, self.seed),
        )
        self.kernel.per_expert = True  # see `keras_moe.optimizers`

    def call(self, inputs, row_expert=None):
        return self.compute(inputs, self.cast_weights(), row_expert)

    def cast_weights(self):
        """The weights by name, in the dtype of the computation."""
        return {"kernel": ops.cast(self.kernel, self.compute_dtype)}

    def compute(self, inputs, weights, row_expert=None):
        """What a call computes with such weights, of all experts or of some."""
        return expert_product(inputs, weights["kernel"], row_expert)

    def compute_output_shape(self, input_shape, row_expert=None):
        return (*input_shape[:-1], self.output_dim)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Plain: in a `keras.RematScope` there is nothing between inputs and outputs to save."""
        return layer_call

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "output_dim": self.output_dim,
            "init_scale": self.init_scale,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class LayerExperts(keras.layers.Layer):
    """Any Keras layers or models as experts, one call each on that expert's slots.

    They may differ in everything but the width of their outputs (Shazeer et al. 2017,
    https://arxiv.org/abs/1701.06538, section 2, asks no more of experts). Each sees `[slots, dim]`,
    like a batch; empty slots hold zeros, and a layer that keeps statistics of its batch counts
    them. Without capacity a layer is called once for all of its tokens (on a GPU with up to seven
    empty slots), or, where XLA compiles, once per row of its slots; losses that it adds itself
    (regularizers of its outputs) are then not supported.

    Example:

    ```python
    experts = keras_moe.LayerExperts(
        [keras.layers.Dense(64), keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(64)])]
    )
    ```

    Args:
        layers: list of `keras.Layer` or `keras.Model`.

    Call arguments:
        inputs: `[rows, slots, dim]` tensor.
        row_expert: `[rows]` integers, ascending; `num_experts` marks rows that are nobody's;
            `None` when row `e` is expert `e`'s.
        training: boolean.

    Returns:
        `[rows, slots, output_dim]` tensor.

    Raises:
        ValueError: if there is no layer, if one is not a Keras layer, or if their output widths
            differ.
    """

    def __init__(self, layers, **kwargs):
        # The layers cast their own weights: here they are carried, and must not be rounded.
        super().__init__(**{"name": "experts", "autocast": False, **kwargs})
        layers = list(layers)
        if not layers:
            raise ValueError("`layers` must hold at least one Keras layer. Received: layers=[]")
        for layer in layers:
            if not isinstance(layer, keras.Layer):
                raise ValueError(f"`layers` must be Keras layers. Received: {layer!r}")
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("`layers` must be different objects, or experts would share weights.")
        self.layers = layers

    @property
    def num_experts(self):
        return len(self.layers)

    def build(self, input_shape):
        self.output_dim = self._widths(input_shape[-1])[0]

    def call(self, inputs, row_expert=None, training=False):
        inputs = ops.cast(inputs, self.compute_dtype)
        return call_by_row(self.layers, inputs, self.output_dim, row_expert, training)

    def compute_output_shape(self, input_shape, row_expert=None):
        return (*input_shape[:-1], self._widths(input_shape[-1])[0])

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Plain: layers made in a `keras.RematScope` see to it themselves."""
        return layer_call

    def _widths(self, dim):
        """Output width of each layer; a symbolic call asks, and builds, layers of every kind."""
        slots = keras.KerasTensor((None, dim), dtype=self.compute_dtype)
        widths = [layer(slots).shape[-1] for layer in self.layers]
        if len(set(widths)) > 1:
            raise ValueError(f"`layers` must agree in their output width. Received: {widths}")
        return widths

    def get_config(self):
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.layers]
        return {**super().get_config(), "layers": layers}

    @classmethod
    def from_config(cls, config):
        # Not built on their own, or their weights' paths would lack this layer's name.
        layers = [
            keras.saving.deserialize_keras_object({**layer, "build_config": None})
            for layer in config["layers"]
        ]
        return cls(**{**config, "layers": layers})
