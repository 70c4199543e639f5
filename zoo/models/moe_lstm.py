"""The language model of 2017: a mixture of experts between two LSTMs, and its baselines.

B batch, L length, D width, F hidden units of an LSTM, S numbers of state of all LSTMs.
"""

import difflib

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_moe import (
    FeedForwardExperts,
    HierarchicalRouter,
    NoisyTopKRouter,
)
from keras_moe.ops import put_rows
from zoo.layers import Dropout, Embedding
from zoo.models.blocks import Configured, check_parts, mixture
from zoo.models.generation import Writer
from zoo.tokenizer import ZooTokenizer

KINDS = ("lstm", "moe", "dense")


@keras.saving.register_keras_serializable(package="zoo")
class ProjectedLSTMCell(keras.layers.Layer):
    """An LSTM cell whose output, and what it remembers of it, is projected to fewer units.

    Sak et al. 2014 (https://arxiv.org/abs/1402.1128), without peepholes. The bias of the forget
    gate starts at 1, as Keras' own does.

    Args:
        units: integer, width of the cell.
        projection_dim: integer, width of the output.

    Call arguments:
        inputs: `[batch, dim]` tensor.
        states: list of the last output `[batch, projection_dim]` and cell `[batch, units]`.

    Returns:
        Tuple of the output and the list of the new states.
    """

    def __init__(self, units, projection_dim, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.projection_dim = projection_dim
        self.state_size = [projection_dim, units]
        self.output_size = projection_dim

    def build(self, input_shape):
        shapes = {
            "kernel": (input_shape[-1], 4 * self.units),
            "recurrent_kernel": (self.projection_dim, 4 * self.units),
            "projection_kernel": (self.units, self.projection_dim),
        }
        self.kernel, self.recurrent_kernel, self.projection_kernel = (
            self.add_weight(name=name, shape=shape, initializer="glorot_uniform")
            for name, shape in shapes.items()
        )
        self.bias = self.add_weight(name="bias", shape=(4 * self.units,), initializer="zeros")

    def call(self, inputs, states):
        output_BD, cell_BF = states
        gates = ops.matmul(inputs, self.kernel) + ops.matmul(output_BD, self.recurrent_kernel)
        in_BF, forget_BF, new_BF, out_BF = ops.split(gates + self.bias, 4, axis=-1)
        cell_BF = ops.sigmoid(forget_BF + 1.0) * cell_BF + ops.sigmoid(in_BF) * ops.tanh(new_BF)
        output_BD = ops.matmul(ops.sigmoid(out_BF) * ops.tanh(cell_BF), self.projection_kernel)
        return output_BD, [output_BD, cell_BF]

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "projection_dim": self.projection_dim,
        }


@keras.saving.register_keras_serializable(package="zoo")
class LstmBackbone(Configured, keras_hub.models.Backbone):
    """LSTMs, mixtures of experts and dense layers, one upon the other, all of one width.

    Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), appendix C.1: the embedding's output
    goes through dropout; that of every further layer too, and then the layer's input is added. The
    output of a mixture, and of the dense layer that stands in for one, goes through a sigmoid
    before.

    Inputs are a dictionary of `token_ids` and `padding_mask`, both `[batch, length]`; the output is
    `[batch, length, hidden_dim]`. An LSTM skips padding, and the mixture does not see it. No token
    sees a later one: an LSTM cannot, and tokens are routed each by itself where nothing is dropped,
    as in the paper; for a router that drops some, `group="sequence"` has earlier tokens go first.

    Args:
        vocabulary_size: rows of the embedding table.
        hidden_dim: width of the model.
        stack: the layers, each "lstm", "moe" or "dense".
        lstm_dim: hidden units of the LSTMs, whose outputs are then projected to `hidden_dim`;
            `None`: `hidden_dim`, not projected.
        router: a `keras_moe` router, copied into every mixture.
        num_experts: experts per mixture.
        expert_dim: hidden width of an expert.
        dense_dims: widths of the hidden layers of a dense layer, each followed by a ReLU.
        group: the tokens that are routed together, see `keras_moe.MixtureOfExperts`.
        dropout: rate on the output of every layer.
        dtype: dtype or dtype policy of the layers; routers compute in float32 whatever it is.
        name: of the model.
        trainable: whether training changes the weights.

    Raises:
        ValueError: if there is no such kind of layer, no router for a mixture, or one that looks
            ahead (expert choice without thresholds, say).
    """

    def __init__(
        self,
        vocabulary_size,
        hidden_dim=512,
        stack=("lstm", "moe", "lstm"),
        lstm_dim=None,
        router=None,
        num_experts=4,
        expert_dim=1024,
        dense_dims=(1024,),
        group="sequence",
        dropout=0.1,
        dtype=None,
        name=None,
        trainable=True,  # no `**kwargs`: Keras would take any name without a word
    ):
        if not stack or not set(stack) <= set(KINDS):
            raise ValueError(
                f"`stack` must be one or more of {', '.join(map(repr, KINDS))}. "
                f"Received: stack={stack!r}"
            )
        if "moe" in stack and router is None:
            raise ValueError(
                "`router` must be a `keras_moe` router for a stack with mixtures of experts. "
                "Received: router=None"
            )

        if router is not None and (router.needs_token_ids or not router.is_causal):
            raise ValueError(
                "`router` must route every token by itself or by earlier ones, in inference, and "
                f"without token ids. Received: router={router!r}"
            )

        # === Layers ===
        def lstm(name):
            options = {"return_sequences": True, "return_state": True, "dtype": dtype, "name": name}
            if lstm_dim is None:
                return keras.layers.LSTM(hidden_dim, **options)
            cell = ProjectedLSTMCell(lstm_dim, hidden_dim, dtype=dtype, name="cell")
            return keras.layers.RNN(cell, **options)

        def moe(name):
            experts = FeedForwardExperts(num_experts, expert_dim, dtype=dtype, name="experts")
            return mixture(experts, router, group, dtype, name)

        def dense(name):
            layers = [
                keras.layers.Dense(dim, "relu", use_bias=False, dtype=dtype, name=f"hidden_{place}")
                for place, dim in enumerate(dense_dims, start=1)
            ]
            output = keras.layers.Dense(hidden_dim, use_bias=False, dtype=dtype, name="output")
            return keras.Sequential([*layers, output], name=name)

        make = {"lstm": lstm, "moe": moe, "dense": dense}
        self.stack = tuple(stack)
        self.stack_layers = [
            make[kind](f"{kind}_{number}") for number, kind in enumerate(stack, start=1)
        ]
        self.stack_dropouts = [
            Dropout(dropout, dtype=dtype, name=f"dropout_{number}")
            for number in range(len(stack) + 1)
        ]
        self.token_embedding = Embedding(
            vocabulary_size,
            hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.1),
            dtype=dtype,
            name="token_embedding",
        )
        state_sizes = [hidden_dim, lstm_dim or hidden_dim] * self.stack.count("lstm")
        self.state_ends = np.cumsum(state_sizes).tolist()

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x, _ = self._run(token_ids, ops.cast(padding_mask, "bool"), None)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x,
            dtype=dtype,
            name=name,
            trainable=trainable,
        )

        # === Config ===
        self.keep(
            vocabulary_size=vocabulary_size,
            hidden_dim=hidden_dim,
            stack=tuple(stack),
            lstm_dim=lstm_dim,
            router=router,
            num_experts=num_experts,
            expert_dim=expert_dim,
            dense_dims=tuple(dense_dims),
            group=group,
            dropout=dropout,
        )

    def call_with_state(self, token_ids, state=None, mask=None):
        """Goes on from where the LSTMs stand.

        Args:
            token_ids: `[batch, length]` integers.
            state: `[batch, state_size]` tensor, what an earlier call returned; `None`: the start.
            mask: `[batch, length]` booleans; a token with `False` leaves the state as it was.

        Returns:
            Tuple of the outputs `[batch, length, hidden_dim]` and the new state.
        """
        if state is None:
            state = self.first_state(ops.shape(token_ids)[0])
        x_BLD, states = self._run(token_ids, mask, ops.split(state, self.state_ends[:-1], axis=-1))
        return x_BLD, ops.concatenate(states, axis=-1)

    def first_state(self, batch):
        """The state before the first token, `[batch, state_size]`."""
        return ops.zeros((batch, self.state_ends[-1]), self.compute_dtype)

    def _run(self, token_ids, mask, states):
        x_BLD = self.stack_dropouts[0](self.token_embedding(token_ids))
        new_states = []
        for kind, layer, dropout in zip(
            self.stack, self.stack_layers, self.stack_dropouts[1:], strict=True
        ):
            if kind == "lstm":
                start = len(new_states)
                initial = None if states is None else states[start : start + 2]
                y_BLD, *after = layer(x_BLD, initial_state=initial, mask=mask)
                new_states += after
            elif kind == "moe" and states is not None:  # a text is being written
                y_BLD = ops.sigmoid(layer.outputs_and_routing(x_BLD, mask, drops=False)[0])
            else:
                y_BLD = layer(x_BLD, mask=mask) if kind == "moe" else layer(x_BLD)
                y_BLD = ops.sigmoid(y_BLD)
            x_BLD = x_BLD + dropout(y_BLD)
        return x_BLD, new_states


@keras.saving.register_keras_serializable(package="zoo")
class LstmCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Texts to `token_ids` and `padding_mask`, and the next tokens as labels.

    Args:
        tokenizer: a `zoo.ZooTokenizer`.
        sequence_length: tokens; longer texts are cut.
        add_start_token: whether a text starts with the tokenizer's start token.
        add_end_token: whether it ends with its end token.
    """

    backbone_cls = LstmBackbone
    tokenizer_cls = ZooTokenizer


@keras.saving.register_keras_serializable(package="zoo")
class LstmCausalLM(Writer, keras_hub.models.CausalLM):
    """A language model: a softmax over the next token on top of an `LstmBackbone`.

    `fit`, `evaluate` and `generate` take texts if there is a preprocessor, tokens otherwise. While
    generating, the state of the LSTMs is carried from token to token, so that a token costs the
    same wherever it stands. See `moe_lstm` for an example.

    Args:
        backbone: an `LstmBackbone`.
        preprocessor: an `LstmCausalLMPreprocessor`; `None` if inputs are tokens already.
        name: of the model.
        trainable: whether training changes the weights.

    Returns:
        When called: `[batch, length, vocabulary_size]` logits.
    """

    backbone_cls = LstmBackbone
    preprocessor_cls = LstmCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, name=None, trainable=True):
        check_parts(LstmCausalLM, backbone, preprocessor)
        if "lstm" not in backbone.stack:
            raise ValueError(
                "`backbone` must have an LSTM, or no token would know of another. "
                f"Received: a backbone with stack={backbone.stack}"
            )

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.logits = keras.layers.Dense(backbone.vocabulary_size, dtype="float32", name="logits")

        # === Functional model ===
        inputs = backbone.input
        super().__init__(
            inputs=inputs, outputs=self.logits(backbone(inputs)), name=name, trainable=trainable
        )

    def generate_step(self, inputs, stop_token_ids=None):
        """Fills up one batch of `token_ids` where `padding_mask` is 0."""
        token_ids, mask = inputs["token_ids"], inputs["padding_mask"]
        batch, length = ops.shape(token_ids)

        def read(state):
            # The state after all but the last token of the shortest prompt, which the first step
            # reads; and the hidden states with that token's.
            last = ops.min(ops.sum(ops.cast(mask, "int32"), axis=-1)) - 1
            read_L = ops.arange(length, dtype="int32") < last
            read_BL = ops.broadcast_to(read_L, (batch, length))
            x_BLD, state = self.backbone.call_with_state(token_ids, state, read_BL)
            x_B1D, _ = self.backbone.call_with_state(
                ops.slice(token_ids, (0, last), (batch, 1)), state
            )
            return put_rows(x_BLD, x_B1D, last, axis=1), state

        state = self.backbone.first_state(batch)
        token_ids, mask = self.write(token_ids, mask, state, read, stop_token_ids)
        return {"token_ids": token_ids, "padding_mask": mask}

    def step(self, token_ids, state, position):
        x_B1D, state = self.backbone.call_with_state(token_ids, state)
        return self.logits(x_B1D)[:, 0], x_B1D[:, 0], state


# Of the paper's Table 7 the models of 8.4 to 9.4 million operations a token. Width 512;
# of the experts, which have 1,024 hidden units, a token sees four: 4 of all, or 2 of 2 groups each.
MODELS = {
    "LSTM-2048-512": {"stack": ("lstm",), "lstm_dim": 2048},
    "4xLSTM-512": {"stack": ("lstm", "lstm", "lstm", "lstm")},
    "MoE-1-Wide": {"stack": ("lstm", "dense", "lstm"), "dense_dims": (4096,)},
    "MoE-1-Deep": {"stack": ("lstm", "dense", "lstm"), "dense_dims": (1024, 1024, 1024, 1024)},
    "MoE-4": {"num_experts": 4},
    "MoE-32": {"num_experts": 32},
    "MoE-256": {"num_experts": 256},
    "MoE-256-h": {"num_experts": 256, "num_groups": 16},
    "MoE-1024-h": {"num_experts": 1024, "num_groups": 16, "dropout": 0.2},
    "MoE-4096-h": {"num_experts": 4096, "num_groups": 16, "dropout": 0.2},
}


def moe_lstm(model="MoE-4", vocabulary_size=8192, preprocessor=None, **options):
    """A language model of Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), appendix C.

    MoE-4 to MoE-4096-h are an LSTM, a mixture of experts and another LSTM; an h means that experts
    are chosen on two levels. The others are the paper's baselines of about as many operations per
    token. Widths, dropout rates and numbers of parameters are the paper's. The vocabulary is not:
    it was 793,471 words, with a softmax that was trained on samples. LSTM-2048-512 has the residual
    connection of the others, which the paper does not speak of.

    Example:

    ```python
    preprocessor = zoo.LstmCausalLMPreprocessor(zoo.default_tokenizer(), sequence_length=64)
    model = zoo.moe_lstm("MoE-4", preprocessor=preprocessor)
    model.compile(keras.optimizers.Adam(zoo.InverseSquareRoot(1e-3)), sampler="top_k")
    model.fit(["One sentence.", "Another one."], batch_size=2)
    model.generate("one", max_length=20)
    model.save_to_preset("language_model")
    model = zoo.from_preset("language_model")
    model.compile(sampler="top_k")  # a sampler is not saved
    ```

    Args:
        model: "LSTM-2048-512", "4xLSTM-512", "MoE-1-Wide", "MoE-1-Deep", "MoE-4", "MoE-32",
            "MoE-256", "MoE-256-h", "MoE-1024-h" or "MoE-4096-h".
        vocabulary_size: rows of the embedding table, and width of the softmax; the default fits the
            shipped tokenizer.
        preprocessor: a `zoo.LstmCausalLMPreprocessor`; `None` if inputs are tokens already.
        **options: any other argument of `zoo.LstmBackbone`.

    Returns:
        A `zoo.LstmCausalLM`.

    Raises:
        ValueError: if there is no such model.
    """
    if model not in MODELS:
        near = difflib.get_close_matches(str(model), MODELS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`model` must be one of {', '.join(MODELS)}. Received: model={model!r}.{hint}"
        )
    arguments = dict(MODELS[model])
    num_groups = arguments.pop("num_groups", None)
    if "num_experts" in arguments and "router" not in options:
        arguments["router"] = (
            HierarchicalRouter(num_groups, k=2, secondary_k=2)
            if num_groups
            else NoisyTopKRouter(k=4)
        )
    return LstmCausalLM(LstmBackbone(vocabulary_size, **(arguments | options)), preprocessor)
