"""A T5-style encoder whose feed-forward layers are dense or sparse, and a classifier on top of it.

Dense, Switch, expert choice and hash encoders are one implementation: they differ in the router
that is handed over (none, `SwitchRouter`, `ExpertChoiceRouter`, `HashRouter`, or any other of
`keras_moe`).
"""

import functools
import reprlib

import keras
import keras_hub
import numpy as np

from keras_moe import LinearExperts
from zoo.layers import (
    Dropout,
    RelativePositionBias,
    ReversibleEmbedding,
    SelfAttention,
    SwitchAttention,
    TransformerBlock,
)
from zoo.models.blocks import (
    Configured,
    check_arguments,
    check_parts,
    feed_forward,
    mixture,
    sparse_numbers,
)
from zoo.models.pooling import ComparedTexts, MaskedMean, MixedLayers, TextNumbers
from zoo.tokenizer import ZooTokenizer


@keras.saving.register_keras_serializable(package="zoo")
class EncoderBackbone(Configured, keras_hub.models.Backbone):
    """A Transformer encoder with mixtures of experts in some blocks.

    Inputs are a dictionary of `token_ids` and `padding_mask`, both `[batch, length]`; the output is
    `[batch, length, hidden_dim]`. The mask is 0 for padding; tokens of different numbers, those of
    texts that share a row, do not attend to each other. By default the second, fourth, ... block is
    sparse, as in Switch Transformers (https://arxiv.org/abs/2101.03961).

    Args:
        vocabulary_size: rows of the embedding table.
        num_layers: blocks.
        num_heads: attention heads.
        hidden_dim: width of the model.
        key_dim: width of a head.
        intermediate_dim: hidden width of the dense feed-forward layers.
        router: a `keras_moe` router, copied into every sparse block; `None` for a dense encoder.
        num_experts: experts per sparse block; 0 leaves its feed-forward layer dense.
        expert_dim: hidden width of an expert; `None`: `intermediate_dim`.
        attention_experts: experts that make the queries of a sparse block, and as many its keys and
            values, see `zoo.layers.SwitchAttention`; they compute in float32 whatever the dtype; 0
            leaves its attention dense.
        sparse_blocks: numbers, from 1, of the sparse blocks; `None`: every second one.
        group: the tokens that are routed together, see `keras_moe.MixtureOfExperts`. The default is
            the whole batch: an encoder has no future to leak.
        activation: of the feed-forward layers.
        gated: whether their hidden units are gated, as in T5 1.1.
        num_buckets: of the relative positions, see `zoo.layers.RelativePositionBias`.
        max_distance: of the relative positions, in tokens.
        dropout: rate after the embedding and in and after every sub-layer.
        expert_dropout: rate on the experts' hidden units; Switch Transformers fine-tune with 0.4.
        expert_init_scale: `init_scale` of `keras_moe.FeedForwardExperts`.
        epsilon: of the RMS norms.
        dtype: dtype or dtype policy of the layers; routers compute in float32 whatever it is.
        name: of the model.
        trainable: whether training changes the weights.

    Raises:
        ValueError: if a sparse block's number is out of range.
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_heads,
        hidden_dim,
        key_dim,
        intermediate_dim,
        router=None,
        num_experts=8,
        expert_dim=None,
        attention_experts=0,
        sparse_blocks=None,
        group="batch",
        activation="relu",
        gated=False,
        num_buckets=32,
        max_distance=128,
        dropout=0.1,
        expert_dropout=0.1,
        expert_init_scale=1.0,
        epsilon=1e-6,
        dtype=None,
        name=None,
        trainable=True,  # no `**kwargs`: Keras would take any name without a word
    ):
        check_arguments(
            {"router": router},
            dtype,
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            key_dim=key_dim,
            intermediate_dim=intermediate_dim,
        )
        sparse_blocks = sparse_numbers("sparse_blocks", sparse_blocks, num_layers)

        # === Layers ===
        token_embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.1),
            dtype=dtype,
            name="token_embedding",
        )
        position_bias = RelativePositionBias(
            num_heads, num_buckets, max_distance, dtype=dtype, name="position_bias"
        )

        def attention(number):
            if router is None or attention_experts == 0 or number not in sparse_blocks:
                return SelfAttention(num_heads, key_dim, dropout, dtype=dtype, name="attention")
            scales = {"query": expert_init_scale / key_dim, "key_value": expert_init_scale}
            query, key_value = (
                mixture(
                    LinearExperts(
                        attention_experts, num_heads * key_dim, init_scale=scale, dtype="float32"
                    ),
                    router,
                    group,
                    "float32",
                    name,
                )
                for name, scale in scales.items()
            )
            return SwitchAttention(
                num_heads, key_dim, query, key_value, dropout, dtype=dtype, name="attention"
            )

        feed = functools.partial(
            feed_forward,
            num_experts=num_experts,
            expert_dim=expert_dim,
            intermediate_dim=intermediate_dim,
            activation=activation,
            dropout=dropout,
            expert_dropout=expert_dropout,
            expert_init_scale=expert_init_scale,
            dtype=dtype,
        )
        blocks = [
            TransformerBlock(
                attention(number),
                feed(
                    router if number in sparse_blocks else None,
                    group=group,
                    gated=gated,
                    name=f"moe_{number}",
                ),
                dropout,
                epsilon,
                dtype=dtype,
                name=f"block_{number}",
            )
            for number in range(1, num_layers + 1)
        ]
        embedding_dropout = Dropout(dropout, dtype=dtype, name="embedding_dropout")
        output_norm = keras.layers.RMSNormalization(
            epsilon=epsilon, dtype=dtype, name="output_norm"
        )
        output_dropout = Dropout(dropout, dtype=dtype, name="output_dropout")

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = embedding_dropout(token_embedding(token_ids))
        bias = position_bias(x)
        for block in blocks:
            x = block(x, bias, padding_mask, token_ids=token_ids)
        x = output_dropout(output_norm(x))
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x,
            dtype=dtype,
            name=name,
            trainable=trainable,
        )

        self.token_embedding = token_embedding

        # === Config ===
        self.keep(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            key_dim=key_dim,
            intermediate_dim=intermediate_dim,
            router=router,
            num_experts=num_experts,
            expert_dim=expert_dim,
            attention_experts=attention_experts,
            sparse_blocks=sparse_blocks,
            group=group,
            activation=activation,
            gated=gated,
            num_buckets=num_buckets,
            max_distance=max_distance,
            dropout=dropout,
            expert_dropout=expert_dropout,
            expert_init_scale=expert_init_scale,
            epsilon=epsilon,
        )

    def layer_outputs(self):
        """A model of the same inputs: the embedded tokens, and what every block makes of them.

        Returns:
            A `keras.Model`, whose outputs are a list of `num_layers + 1` tensors, `[batch, length,
            hidden_dim]`; the last of them, normed, is the output of this one.
        """
        names = ["embedding_dropout", *(f"block_{n + 1}" for n in range(self.num_layers))]
        outputs = [self.get_layer(name).output for name in names]
        return keras.Model(self.input, outputs, name="layer_outputs")

    @classmethod
    def from_config(cls, config):
        if "sparse_step" in config:  # of earlier versions
            step = config["sparse_step"]
            blocks = tuple(range(step, config["num_layers"] + 1, step))
            config = {**config, "sparse_blocks": blocks}
            del config["sparse_step"]
        return super().from_config(config)


@keras.saving.register_keras_serializable(package="zoo")
class EncoderTextClassifierPreprocessor(keras_hub.models.TextClassifierPreprocessor):
    """Sentences, or pairs of sentences, to `token_ids` and `padding_mask`.

    Args:
        tokenizer: a `zoo.ZooTokenizer`.
        sequence_length: tokens; longer texts are cut.
        truncate: how pairs are cut, see `keras_hub.layers.MultiSegmentPacker`.
    """

    backbone_cls = EncoderBackbone
    tokenizer_cls = ZooTokenizer

    def call(self, x, y=None, sample_weight=None):
        packed = super().call(x, y, sample_weight)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(packed)
        x = {name: x[name] for name in ("token_ids", "padding_mask")}
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)


@keras.saving.register_keras_serializable(package="zoo")
class EncoderTextClassifier(keras_hub.models.TextClassifier):
    """A linear classifier, or a regressor, on an encoder's outputs: their mean, or two texts' own.

    The two texts of a pair are read as one, or each on its own, by the same encoder: with a
    `separator` the classifier sees how their outputs compare, see
    `zoo.models.pooling.ComparedTexts`. That two texts are alike it then need not learn to see.

    `predict`, `evaluate` and `fit` take texts as a list of strings, and pairs of texts as a tuple
    of two such lists: all first texts, then all second ones.

    Example:

    ```python
    classifier = zoo.from_preset("runs/glue-sst2-switch-jax-seed0/preset")
    classifier.predict(["a great film", "a dull film"])  # [2, num_classes], one row per text

    classifier = zoo.from_preset("runs/glue-rte-switch-jax-seed0/preset")
    premises = ["A dog runs in the park.", "It rains."]
    hypotheses = ["An animal moves.", "The sun shines."]
    classifier.predict((premises, hypotheses))  # [2, num_classes], one row per pair
    ```

    Args:
        backbone: an `EncoderBackbone`.
        num_classes: integer; 1 makes a regressor, trained on the squared error.
        preprocessor: an `EncoderTextClassifierPreprocessor`; `None` if inputs are tokens already.
        dropout: rate on what the linear layer sees, on what is compared of a pair, and on the mean
            of the layers.
        separator: id of the token that ends a text, by which a pair is told apart; `None`: it is
            read as one text.
        mix_layers: whether it sees a learnt mean of the embedded tokens and of what every block
            puts out, see `zoo.models.pooling.MixedLayers`, instead of what the last block does. The
            backbone's last norm has no part in it then and is frozen; whoever gives that backbone
            another head thaws it, as `zoo.finetune` does.
        name: of the model.
        trainable: whether training changes the weights.

    Returns:
        When called: `[batch, num_classes]` logits or scores.

    Raises:
        ValueError: by `predict`, `evaluate` and `fit`, if there are no texts, something else is
            among them, or the two lists of a pair are not of one length.
    """

    backbone_cls = EncoderBackbone
    preprocessor_cls = EncoderTextClassifierPreprocessor

    def __init__(
        self,
        backbone,
        num_classes,
        preprocessor=None,
        dropout=0.1,
        separator=None,
        mix_layers=False,
        name=None,
        trainable=True,
    ):
        check_parts(EncoderTextClassifier, backbone, preprocessor)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        if separator is None:
            pooler = MaskedMean(dtype=backbone.dtype_policy, name="pooler")
        else:
            text_numbers = TextNumbers(separator, name="text_numbers")
            pooler = ComparedTexts(dropout, dtype=backbone.dtype_policy, name="pooler")
        output_dropout = Dropout(dropout, dtype=backbone.dtype_policy, name="classifier_dropout")
        logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")

        # === Functional model ===
        inputs = backbone.input
        mask = inputs["padding_mask"]
        if separator is not None:
            mask = text_numbers(inputs["token_ids"], mask)
        outputs = {**inputs, "padding_mask": mask}
        if mix_layers:
            mixed_layers = MixedLayers(dtype=backbone.dtype_policy, name="mixed_layers")
            mixed_dropout = Dropout(dropout, dtype=backbone.dtype_policy, name="mixed_dropout")
            outputs = mixed_dropout(mixed_layers(backbone.layer_outputs()(outputs)))
        else:
            outputs = backbone(outputs)
        x = logits(output_dropout(pooler(outputs, mask)))
        super().__init__(inputs=inputs, outputs=x, name=name, trainable=trainable)
        if mix_layers:
            backbone.get_layer("output_norm").trainable = False

        # === Config ===
        self.num_classes = num_classes
        self.dropout = dropout
        self.separator = separator
        self.mix_layers = mix_layers

    def compile(self, optimizer="auto", loss="auto", *, metrics="auto", **kwargs):
        """As KerasHub's `TextClassifier.compile`; one class means the mean squared error."""
        if self.output_shape[-1] == 1:
            loss = "mean_squared_error" if loss == "auto" else loss
            metrics = ["mean_absolute_error"] if metrics == "auto" else metrics
        elif loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def fit(self, x=None, *args, **kwargs):
        self._check_texts(x)
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        self._check_texts(x)
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        self._check_texts(x)
        return super().predict(x, *args, **kwargs)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """As Keras' own; by default the last layer, a few weights, stays as it is."""
        filters = filters or (lambda layer: layer.name != "logits")
        super().quantize(mode, config=config, filters=filters, **kwargs)

    def _check_texts(self, x):
        """Refuses what the preprocessor, deep in a compiled pipeline, would fail on at length."""
        if self.preprocessor is not None and not _may_be_texts(x):
            raise ValueError(
                "`x` must be a list of one or more texts, or for pairs of texts a tuple of two "
                f"such lists of one length. Received: x={reprlib.repr(x)}"
            )

    def get_config(self):
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "dropout": self.dropout,
            "separator": self.separator,
            "mix_layers": self.mix_layers,
        }


def _may_be_texts(x):
    """False for what certainly is none; tensors and datasets are Keras' to judge."""
    columns = x if isinstance(x, tuple) else (x,)
    columns = [c.tolist() if isinstance(c, np.ndarray) else c for c in columns]
    if not columns or any(c is None or isinstance(c, (str, bytes, int, float)) for c in columns):
        return False
    lists = [column for column in columns if isinstance(column, list)]
    return len({len(column) for column in lists}) <= 1 and all(
        column and all(isinstance(text, (str, bytes)) for text in column) for column in lists
    )
