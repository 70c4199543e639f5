"""A T5-style encoder and decoder whose feed-forward layers are dense or sparse.

T5, T5 1.1 and Switch Transformers are one implementation: they differ in the router that is handed
over (none, `SwitchRouter`, or any other of `keras_moe`), in the gate of the feed-forward layers,
and in whether the logits are made by the embedding table.
"""

import keras
import keras_hub
from keras import ops

from keras_moe import MixtureOfExperts
from zoo.decoder_layers import CausalSelfAttention, CrossAttention, DecoderBlock, causal_mask
from zoo.layers import (
    Dropout,
    RelativePositionBias,
    ReversibleEmbedding,
    SelfAttention,
    TransformerBlock,
)
from zoo.models.blocks import Configured, check_arguments, check_parts, feed_forward, sparse_numbers
from zoo.models.generation import Writer
from zoo.tokenizer import ZooTokenizer

ENCODER_MULTIPLE = 64  # tokens; XLA compiles for every length of the encoder anew


@keras.saving.register_keras_serializable(package="zoo")
class EncoderDecoderBackbone(Configured, keras_hub.models.Backbone):
    """A Transformer with an encoder and a decoder, both with mixtures of experts in some blocks.

    Inputs are a dictionary of `encoder_token_ids`, `encoder_padding_mask`, `decoder_token_ids` and
    `decoder_padding_mask`, `[batch, length]` each; outputs one of `encoder_sequence_output` and
    `decoder_sequence_output`, `[batch, length, hidden_dim]`. Source: T5
    (https://arxiv.org/abs/1910.10683) and Switch Transformers (https://arxiv.org/abs/2101.03961).

    Args:
        vocabulary_size: rows of the embedding table.
        num_layers: blocks of the encoder.
        num_heads: attention heads.
        hidden_dim: width of the model.
        key_dim: width of a head.
        intermediate_dim: hidden width of the dense feed-forward layers.
        num_decoder_layers: blocks of the decoder; `None`: as many as the encoder's.
        router: a `keras_moe` router, copied into every sparse block; `None` for a dense model.
        decoder_router: the decoder's, one that does not look ahead; `None`: `router`.
        num_experts: experts per sparse block.
        expert_dim: hidden width of an expert; `None`: `intermediate_dim`.
        sparse_blocks: numbers, from 1, of the encoder's sparse blocks; `None`: every second one.
        decoder_sparse_blocks: the same of the decoder.
        group: the encoder's tokens that are routed together, see `keras_moe.MixtureOfExperts`. By
            default no text depends on the others in its batch. The decoder's are always those of a
            sequence.
        activation: of the feed-forward layers.
        gated: whether their hidden units are gated, as in T5 1.1.
        tie_embeddings: whether the logits are made by the embedding table, as in T5 1.0.
        scale_outputs: whether the decoder's outputs are first divided by the root of `hidden_dim`;
            `None`: where the embeddings are tied.
        num_buckets: of the relative positions, see `zoo.layers.RelativePositionBias`.
        max_distance: of the relative positions, in tokens.
        dropout: rate after the embedding and in and after every sub-layer.
        expert_dropout: rate on the experts' hidden units.
        expert_init_scale: `init_scale` of `keras_moe.FeedForwardExperts`.
        epsilon: of the RMS norms.
        dtype: dtype or dtype policy of the layers; routers compute in float32 whatever it is.
        name: of the model.
        trainable: whether training changes the weights.

    Raises:
        ValueError: if the decoder's router looks ahead, or a sparse block's number is out of range.
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_heads,
        hidden_dim,
        key_dim,
        intermediate_dim,
        num_decoder_layers=None,
        router=None,
        decoder_router=None,
        num_experts=8,
        expert_dim=None,
        sparse_blocks=None,
        decoder_sparse_blocks=None,
        group="sequence",
        activation="relu",
        gated=False,
        tie_embeddings=True,
        scale_outputs=None,
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
            {"router": router, "decoder_router": decoder_router},
            dtype,
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            key_dim=key_dim,
            intermediate_dim=intermediate_dim,
        )
        if num_decoder_layers is None:
            num_decoder_layers = num_layers
        routers = {"encoder": router, "decoder": decoder_router or router}
        depths = {"encoder": num_layers, "decoder": num_decoder_layers}
        sparse = {
            "encoder": sparse_numbers("sparse_blocks", sparse_blocks, num_layers),
            "decoder": sparse_numbers(
                "decoder_sparse_blocks", decoder_sparse_blocks, num_decoder_layers
            ),
        }
        decoder_routes = routers["decoder"] is not None and num_experts and sparse["decoder"]
        if decoder_routes and not routers["decoder"].is_causal:
            raise ValueError(
                "`decoder_router` must not look ahead. "
                f"Received: decoder_router={routers['decoder']!r}"
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

        def attention(layer, name):
            return layer(num_heads, key_dim, dropout, dtype=dtype, name=name)

        def feed(side, number):
            return feed_forward(
                routers[side] if number in sparse[side] else None,
                num_experts=num_experts,
                expert_dim=expert_dim,
                intermediate_dim=intermediate_dim,
                group=group if side == "encoder" else "sequence",
                activation=activation,
                gated=gated,
                dropout=dropout,
                expert_dropout=expert_dropout,
                expert_init_scale=expert_init_scale,
                dtype=dtype,
                name=f"{side}_moe_{number}",
            )

        def blocks(side, make):
            return [make(number, f"{side}_block_{number}") for number in range(1, depths[side] + 1)]

        def last(side):
            norm = keras.layers.RMSNormalization(
                epsilon=epsilon, dtype=dtype, name=f"{side}_output_norm"
            )
            return norm, Dropout(dropout, dtype=dtype, name=f"{side}_output_dropout")

        encoder_position_bias, decoder_position_bias = (
            RelativePositionBias(
                num_heads,
                num_buckets,
                max_distance,
                bidirectional=side == "encoder",
                dtype=dtype,
                name=f"{side}_position_bias",
            )
            for side in ("encoder", "decoder")
        )
        embedding_dropout = Dropout(dropout, dtype=dtype, name="embedding_dropout")
        encoder_blocks = blocks(
            "encoder",
            lambda number, name: TransformerBlock(
                attention(SelfAttention, "attention"),
                feed("encoder", number),
                dropout,
                epsilon,
                dtype=dtype,
                name=name,
            ),
        )
        decoder_blocks = blocks(
            "decoder",
            lambda number, name: DecoderBlock(
                attention(CausalSelfAttention, "attention"),
                feed("decoder", number),
                attention(CrossAttention, "cross_attention"),
                dropout,
                epsilon,
                dtype=dtype,
                name=name,
            ),
        )
        encoder_last, decoder_last = last("encoder"), last("decoder")

        # === Functional model ===
        encoder_token_ids, encoder_padding_mask, decoder_token_ids, decoder_padding_mask = (
            keras.Input((None,), dtype="int32", name=f"{side}_{kind}")
            for side in ("encoder", "decoder")
            for kind in ("token_ids", "padding_mask")
        )
        x = embedding_dropout(token_embedding(encoder_token_ids))
        bias = encoder_position_bias(x)
        for block in encoder_blocks:
            x = block(x, bias, encoder_padding_mask, token_ids=encoder_token_ids)
        for layer in encoder_last:
            x = layer(x)
        memory = x

        x = embedding_dropout(token_embedding(decoder_token_ids))
        bias = decoder_position_bias(x)
        for block in decoder_blocks:
            x = block(
                x,
                bias,
                decoder_padding_mask,
                memory,
                encoder_padding_mask,
                token_ids=decoder_token_ids,
            )
        for layer in decoder_last:
            x = layer(x)
        super().__init__(
            inputs={
                "encoder_token_ids": encoder_token_ids,
                "encoder_padding_mask": encoder_padding_mask,
                "decoder_token_ids": decoder_token_ids,
                "decoder_padding_mask": decoder_padding_mask,
            },
            outputs={"encoder_sequence_output": memory, "decoder_sequence_output": x},
            dtype=dtype,
            name=name,
            trainable=trainable,
        )
        self.token_embedding = token_embedding
        self.encoder_position_bias = encoder_position_bias
        self.decoder_position_bias = decoder_position_bias
        self.encoder_blocks, self.decoder_blocks = encoder_blocks, decoder_blocks
        self.encoder_output_norm, self.decoder_output_norm = encoder_last[0], decoder_last[0]

        # === Config ===
        self.keep(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            key_dim=key_dim,
            intermediate_dim=intermediate_dim,
            num_decoder_layers=num_decoder_layers,
            router=router,
            decoder_router=decoder_router,
            num_experts=num_experts,
            expert_dim=expert_dim,
            sparse_blocks=sparse["encoder"],
            decoder_sparse_blocks=sparse["decoder"],
            group=group,
            activation=activation,
            gated=gated,
            tie_embeddings=tie_embeddings,
            scale_outputs=tie_embeddings if scale_outputs is None else scale_outputs,
            num_buckets=num_buckets,
            max_distance=max_distance,
            dropout=dropout,
            expert_dropout=expert_dropout,
            expert_init_scale=expert_init_scale,
            epsilon=epsilon,
        )

    def encode(self, token_ids, padding_mask):
        """The encoder's outputs in inference, `[batch, length, hidden_dim]`."""
        x = self.token_embedding(token_ids)
        bias = self.encoder_position_bias(x)
        for block in self.encoder_blocks:
            x = block(x, bias, padding_mask, token_ids=token_ids, counts=False)
        return self.encoder_output_norm(x)

    def remember(self, memory):
        """What the decoder's blocks look up of an encoder's outputs.

        Returns:
            Tuple, for each block a `[batch, 2, heads, length, key_dim]` tensor.
        """
        return tuple(block.cross_attention.remember(memory) for block in self.decoder_blocks)

    def empty_cache(self, batch, length):
        """The decoder's cache before its first token, for `length` tokens: a tuple of tensors."""
        shape = (batch, 2, self.num_heads, length, self.key_dim)
        return tuple(ops.zeros(shape, self.compute_dtype) for _ in self.decoder_blocks)

    def go_on(self, token_ids, cache, first, memory, memory_mask, padding_mask=None):
        """The decoder's outputs for tokens at `first` and after, in inference.

        Args:
            token_ids: `[batch, length]` integers.
            cache: what `empty_cache` or an earlier call returned.
            first: position of the first of the tokens.
            memory: what `remember` returned.
            memory_mask: `[batch, keys]`, 0 for padding of the encoder's inputs.
            padding_mask: `[batch, length]`, 0 for tokens whose outputs nobody reads.

        Returns:
            Tuple of the outputs `[batch, length, hidden_dim]` and the new cache.
        """
        x = self.token_embedding(token_ids)
        num_keys = ops.shape(cache[0])[3]
        bias = self.decoder_position_bias(x, num_keys=num_keys, first=first)
        mask = causal_mask(ops.shape(token_ids)[1], num_keys, first)
        caches = []
        for block, old, remembered in zip(self.decoder_blocks, cache, memory, strict=True):
            x, new = block.go_on(
                x, bias, mask, old, first, remembered, memory_mask, token_ids, padding_mask
            )
            caches.append(new)
        return self.decoder_output_norm(x), tuple(caches)

    def logits(self, outputs):
        """Logits of the next token, `[..., vocabulary_size]`, from the decoder's outputs."""
        if self.scale_outputs:
            outputs = outputs * self.hidden_dim**-0.5
        return self.token_embedding(outputs, reverse=True)


@keras.saving.register_keras_serializable(package="zoo")
class Seq2SeqLMPreprocessor(keras_hub.models.Seq2SeqLMPreprocessor):
    """Pairs of texts to the inputs of an `EncoderDecoderBackbone`, and the next tokens as labels.

    As in T5, the encoder's text has the end token at its end and nothing at its start, and the
    decoder starts with the token that pads.

    Args:
        tokenizer: a `zoo.ZooTokenizer`, or KerasHub's `T5Tokenizer`.
        encoder_sequence_length: tokens; longer texts are cut.
        decoder_sequence_length: the same of the decoder.
    """

    backbone_cls = EncoderDecoderBackbone
    tokenizer_cls = ZooTokenizer

    def build(self, input_shape):
        packer = {
            "end_value": self.tokenizer.end_token_id,
            "pad_value": self.tokenizer.pad_token_id,
            "return_padding_mask": True,
        }
        self.encoder_packer = keras_hub.layers.StartEndPacker(
            sequence_length=self.encoder_sequence_length, **packer
        )
        self.decoder_packer = keras_hub.layers.StartEndPacker(
            sequence_length=self.decoder_sequence_length,
            start_value=self.tokenizer.pad_token_id,
            **packer,
        )
        self.built = True

    def get_config(self):
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
        }


@keras.saving.register_keras_serializable(package="zoo")
class Seq2SeqLM(Writer, keras_hub.models.Seq2SeqLM):
    """A text-to-text model: logits of the decoder's next token on an `EncoderDecoderBackbone`.

    `fit` and `generate` take texts if there is a preprocessor, tokens otherwise. While generating,
    the encoder runs once, and a token costs one step of the decoder, whose mixtures touch the
    experts of that token alone, and drop none.

    Args:
        backbone: an `EncoderDecoderBackbone`.
        preprocessor: a `Seq2SeqLMPreprocessor`; `None` if inputs are tokens already.
        name: of the model.
        trainable: whether training changes the weights.

    Returns:
        When called: `[batch, length, vocabulary_size]` logits.
    """

    backbone_cls = EncoderDecoderBackbone
    preprocessor_cls = Seq2SeqLMPreprocessor
    side = "decoder_"

    def __init__(self, backbone, preprocessor=None, name=None, trainable=True):
        check_parts(Seq2SeqLM, backbone, preprocessor)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        outputs = backbone.logits(backbone(inputs)["decoder_sequence_output"])
        super().__init__(inputs=inputs, outputs=outputs, name=name, trainable=trainable)

    def generate_step(self, inputs, stop_token_ids=None):
        """Fills up one batch of `decoder_token_ids` where `decoder_padding_mask` is 0."""
        backbone, memory_mask = self.backbone, inputs["encoder_padding_mask"]
        token_ids, mask = inputs["decoder_token_ids"], inputs["decoder_padding_mask"]
        memory = backbone.remember(backbone.encode(inputs["encoder_token_ids"], memory_mask))

        def read(cache):
            x_BLD, cache = backbone.go_on(token_ids, cache[0], 0, memory, memory_mask, mask)
            return x_BLD, (cache, memory, memory_mask)

        # With all that a beam search must repeat for each beam.
        cache = (backbone.empty_cache(*ops.shape(token_ids)), memory, memory_mask)
        token_ids, mask = self.write(token_ids, mask, cache, read, stop_token_ids)
        return {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}

    def _trim(self, inputs):
        mask = inputs["encoder_padding_mask"]
        used, given = int(mask.any(axis=0).nonzero()[0].max(initial=0)) + 1, mask.shape[1]
        kept = min(-(-used // ENCODER_MULTIPLE) * ENCODER_MULTIPLE, given)
        routers = [
            block.feed_forward.router
            for block in self.backbone.encoder_blocks
            if isinstance(block.feed_forward, MixtureOfExperts)
        ]
        # Padding has its share of a capacity: a text would be routed as its batch is padded.
        if all(router.capacity_of(kept) == router.capacity_of(given) for router in routers):
            for name in ("encoder_token_ids", "encoder_padding_mask"):
                inputs[name] = inputs[name][:, :kept]

    def step(self, token_ids, cache, position):
        cache, memory, memory_mask = cache
        x_B1D, cache = self.backbone.go_on(token_ids, cache, position, memory, memory_mask)
        logits = self.backbone.logits(x_B1D)[:, 0]
        return logits, x_B1D[:, 0], (cache, memory, memory_mask)
