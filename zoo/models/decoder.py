"""A decoder whose feed-forward layers are dense or sparse, and the language model on top of it.

The decoder-only Transformers of Expert Choice, Mixtral and OLMoE are one implementation: they
differ in the router that is handed over, in how tokens know their positions, and in the gates of
the feed-forward layers.
"""

import keras
import keras_hub
from keras import ops

from zoo.decoder_layers import (
    CausalSelfAttention,
    DecoderBlock,
    RotarySelfAttention,
    causal_mask,
)
from zoo.layers import Dropout, RelativePositionBias, ReversibleEmbedding
from zoo.models.blocks import Configured, check_arguments, check_parts, feed_forward, sparse_numbers
from zoo.models.generation import Writer
from zoo.tokenizer import ZooTokenizer

POSITIONS = ("relative", "rotary")


@keras.saving.register_keras_serializable(package="zoo")
class DecoderBackbone(Configured, keras_hub.models.Backbone):
    """A Transformer without an encoder, with mixtures of experts in some blocks.

    Inputs are a dictionary of `token_ids` and `padding_mask`, both `[batch, length]`; the output is
    `[batch, length, hidden_dim]`. No token sees a later one while a text is generated. Sources:
    Expert Choice (https://arxiv.org/abs/2202.09368), section 4.1, Mixtral
    (https://arxiv.org/abs/2401.04088) and OLMoE (https://arxiv.org/abs/2409.02060).

    Args:
        vocabulary_size: rows of the embedding table.
        num_layers: blocks.
        num_heads: attention heads.
        hidden_dim: width of the model.
        key_dim: width of a head.
        intermediate_dim: hidden width of the dense feed-forward layers.
        router: a `keras_moe` router, copied into every sparse block; `None` for a dense model. One
            that chooses among the tokens of a group, as expert choice, must have
            `inference="threshold"`; while it is trained it does look ahead.
        num_experts: experts per sparse block.
        expert_dim: hidden width of an expert; `None`: `intermediate_dim`.
        sparse_blocks: numbers, from 1, of the sparse blocks; `None`: every second one.
        group: the tokens that are routed together, see `keras_moe.MixtureOfExperts`.
        activation: of the feed-forward layers.
        gated: whether the hidden units of the dense ones are gated.
        gated_experts: the same of the experts'; `None`: `gated`.
        positions: "relative": a bias on the attention logits, as in T5; "rotary": queries and keys
            are rotated, and the logits scaled, as in the Llama family.
        num_key_value_heads: with rotary positions, heads of the keys and values; `None`:
            `num_heads`.
        max_wavelength: of the rotary positions.
        normalize_queries: with rotary positions, whether queries and keys are normalized.
        num_buckets: of the relative positions, see `zoo.layers.RelativePositionBias`.
        max_distance: of the relative positions, in tokens.
        tie_embeddings: whether the logits are made by the embedding table.
        scale_outputs: whether the outputs are first divided by the root of `hidden_dim`; `None`:
            where the embeddings are tied.
        dropout: rate after the embedding and in and after every sub-layer.
        expert_dropout: rate on the experts' hidden units.
        expert_init_scale: `init_scale` of `keras_moe.FeedForwardExperts`.
        epsilon: of the RMS norms.
        facts: entries of transformers' `config.json` by name, which change nothing here and are
            written into it again, such as its `max_position_embeddings`.
        dtype: dtype or dtype policy of the layers; routers compute in float32 whatever it is.
        name: of the model.
        trainable: whether training changes the weights.

    Raises:
        ValueError: if the router looks ahead in inference or drops tokens of other sequences, a
            sparse block's number is out of range, or there are no such positions.
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
        sparse_blocks=None,
        group="sequence",
        activation="relu",
        gated=False,
        gated_experts=None,
        positions="relative",
        num_key_value_heads=None,
        max_wavelength=10000,
        normalize_queries=False,
        num_buckets=32,
        max_distance=128,
        tie_embeddings=True,
        scale_outputs=None,
        dropout=0.1,
        expert_dropout=0.1,
        expert_init_scale=1.0,
        epsilon=1e-6,
        facts=None,
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
        if positions not in POSITIONS:
            raise ValueError(
                f"`positions` must be one of {', '.join(map(repr, POSITIONS))}. "
                f"Received: positions={positions!r}"
            )
        if router is not None and num_experts and sparse_blocks and not router.is_causal:
            raise ValueError(
                "`router` must not look ahead in inference (expert choice does not with "
                f"`inference='threshold'`). Received: router={router!r}"
            )

        drops = router is not None and router.eval_capacity_factor is not None
        if group != "sequence" and drops and num_experts and sparse_blocks:
            raise ValueError(
                "`group` must be 'sequence' for a router that drops tokens in inference, or a text "
                f"would depend on others. Received: group={group!r}, router={router!r}"
            )

        # === Layers ===
        token_embedding = ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
            dtype=dtype,
            name="token_embedding",
        )
        embedding_dropout = Dropout(dropout, dtype=dtype, name="embedding_dropout")
        position_bias = None
        if positions == "relative":
            position_bias = RelativePositionBias(
                num_heads,
                num_buckets,
                max_distance,
                bidirectional=False,
                dtype=dtype,
                name="position_bias",
            )

        def attention():
            options = {"dropout": dropout, "dtype": dtype, "name": "attention"}
            if positions == "relative":
                return CausalSelfAttention(num_heads, key_dim, **options)
            return RotarySelfAttention(
                num_heads,
                key_dim,
                num_key_value_heads=num_key_value_heads,
                max_wavelength=max_wavelength,
                normalize=normalize_queries,
                epsilon=epsilon,
                **options,
            )

        def feed(number):
            is_sparse = router is not None and num_experts and number in sparse_blocks
            return feed_forward(
                router if is_sparse else None,
                num_experts=num_experts,
                expert_dim=expert_dim,
                intermediate_dim=intermediate_dim,
                group=group,
                activation=activation,
                gated=gated_experts if is_sparse and gated_experts is not None else gated,
                dropout=dropout,
                expert_dropout=expert_dropout,
                expert_init_scale=expert_init_scale,
                dtype=dtype,
                name=f"moe_{number}",
            )

        blocks = [
            DecoderBlock(
                attention(),
                feed(number),
                dropout=dropout,
                epsilon=epsilon,
                dtype=dtype,
                name=f"block_{number}",
            )
            for number in range(1, num_layers + 1)
        ]
        output_norm = keras.layers.RMSNormalization(
            epsilon=epsilon, dtype=dtype, name="output_norm"
        )
        output_dropout = Dropout(dropout, dtype=dtype, name="output_dropout")

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = embedding_dropout(token_embedding(token_ids))
        bias = None if position_bias is None else position_bias(x)
        for block in blocks:
            x = block(x, bias, padding_mask, token_ids=token_ids)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=output_dropout(output_norm(x)),
            dtype=dtype,
            name=name,
            trainable=trainable,
        )
        self.token_embedding = token_embedding
        self.position_bias = position_bias
        self.blocks = blocks
        self.output_norm = output_norm

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
            sparse_blocks=sparse_blocks,
            group=group,
            activation=activation,
            gated=gated,
            gated_experts=gated if gated_experts is None else gated_experts,
            positions=positions,
            num_key_value_heads=num_key_value_heads or num_heads,
            max_wavelength=max_wavelength,
            normalize_queries=normalize_queries,
            num_buckets=num_buckets,
            max_distance=max_distance,
            tie_embeddings=tie_embeddings,
            scale_outputs=tie_embeddings if scale_outputs is None else scale_outputs,
            dropout=dropout,
            expert_dropout=expert_dropout,
            expert_init_scale=expert_init_scale,
            epsilon=epsilon,
            facts=facts and dict(facts),
        )

    def empty_cache(self, batch, length):
        """The cache before the first token, for `length` tokens: a tuple of tensors."""
        heads = self.num_heads if self.positions == "relative" else self.num_key_value_heads
        shape = (batch, 2, heads, length, self.key_dim)
        return tuple(ops.zeros(shape, self.compute_dtype) for _ in self.blocks)

    def go_on(self, token_ids, cache, first, padding_mask=None):
        """The outputs for tokens at `first` and after, in inference.

        Args:
            token_ids: `[batch, length]` integers.
            cache: what `empty_cache` or an earlier call returned.
            first: position of the first of the tokens.
            padding_mask: `[batch, length]`, 0 for tokens whose outputs nobody reads.

        Returns:
            Tuple of the outputs `[batch, length, hidden_dim]` and the new cache.
        """
        x, bias = self.token_embedding(token_ids), None
        num_keys = ops.shape(cache[0])[3]
        if self.position_bias is not None:
            bias = self.position_bias(x, num_keys=num_keys, first=first)
        mask = causal_mask(ops.shape(token_ids)[1], num_keys, first)
        caches = []
        for block, old in zip(self.blocks, cache, strict=True):
            x, new = block.go_on(
                x, bias, mask, old, first, token_ids=token_ids, padding_mask=padding_mask
            )
            caches.append(new)
        return self.output_norm(x), tuple(caches)

    def logits(self, outputs):
        """Logits of the next token, `[..., vocabulary_size]`, from the outputs."""
        if self.scale_outputs:
            outputs = outputs * self.hidden_dim**-0.5
        return self.token_embedding(outputs, reverse=True)


@keras.saving.register_keras_serializable(package="zoo")
class CausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Texts to `token_ids` and `padding_mask`, and the next tokens as labels.

    Args:
        tokenizer: a `zoo.ZooTokenizer`, or any of KerasHub's that knows its start, end and padding.
        sequence_length: tokens; longer texts are cut.
        add_start_token: whether a text starts with the tokenizer's start token.
        add_end_token: whether it ends with its end token.
    """

    backbone_cls = DecoderBackbone
    tokenizer_cls = ZooTokenizer


@keras.saving.register_keras_serializable(package="zoo")
class CausalLM(Writer, keras_hub.models.CausalLM):
    """A language model: logits of the next token on top of a `DecoderBackbone`.

    `fit`, `evaluate` and `generate` take texts if there is a preprocessor, tokens otherwise. While
    generating, a token costs one step, whose mixtures touch the experts of that token alone.

    Example:

    ```python
    backbone = zoo.expert_choice_transformer("mini", architecture="decoder")
    preprocessor = zoo.CausalLMPreprocessor(zoo.default_tokenizer(), sequence_length=64)
    model = zoo.CausalLM(backbone, preprocessor)
    model.fit(["One sentence.", "Another one."], batch_size=2)
    model.generate("one", max_length=20)
    ```

    Args:
        backbone: a `DecoderBackbone`.
        preprocessor: a `CausalLMPreprocessor`; `None` if inputs are tokens already.
        name: of the model.
        trainable: whether training changes the weights.

    Returns:
        When called: `[batch, length, vocabulary_size]` logits.
    """

    backbone_cls = DecoderBackbone
    preprocessor_cls = CausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, name=None, trainable=True):
        check_parts(CausalLM, backbone, preprocessor)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        outputs = backbone.logits(backbone(inputs))
        super().__init__(inputs=inputs, outputs=outputs, name=name, trainable=trainable)

    def generate_step(self, inputs, stop_token_ids=None):
        """Fills up one batch of `token_ids` where `padding_mask` is 0."""
        token_ids, mask = inputs["token_ids"], inputs["padding_mask"]

        def read(cache):
            return self.backbone.go_on(token_ids, cache, 0, mask)

        cache = self.backbone.empty_cache(*ops.shape(token_ids))
        token_ids, mask = self.write(token_ids, mask, cache, read, stop_token_ids)
        return {"token_ids": token_ids, "padding_mask": mask}

    def step(self, token_ids, cache, position):
        x_B1D, cache = self.backbone.go_on(token_ids, cache, position)
        return self.backbone.logits(x_B1D)[:, 0], x_B1D[:, 0], cache
