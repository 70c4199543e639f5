"""T5, T5 1.1, mT5 and Switch Transformers: their settings and weights there and here."""

import math
import warnings

import keras

import keras_moe
from zoo.conversion.config import MOST_LAYERS, choice, flag, integer, real
from zoo.conversion.tensors import ALIASES, Weight
from zoo.files import is_file
from zoo.layers import gelu_tanh
from zoo.models.encoder_decoder import (
    EncoderDecoderBackbone,
    Seq2SeqLM,
    Seq2SeqLMPreprocessor,
)
from zoo.tokenizer import t5_tokenizer, without_sentinels

EMBEDDING, OUTPUT = "shared.weight", "lm_head.weight"
FAMILIES = ("t5", "mt5", "switch_transformers")
TASK = Seq2SeqLM
VOCABULARY = "spiece.model"
LENGTH = 512  # tokens that T5 was trained on
ROUNDED_TO = 128  # the rows of T5's embedding tables
# The embedding table again, which some versions write, and a weight that T5's cross-attention never
# used.
IGNORED = {
    *ALIASES[EMBEDDING],
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
}
ACTIVATIONS = {
    "relu": "relu",
    "gated-relu": "relu",
    "gelu_new": gelu_tanh,
    "gated-gelu": gelu_tanh,  # transformers' name for the approximate one
    "gelu": "gelu",
    "silu": "silu",
    "gated-silu": "silu",
}


def make(config, tensors, dtype=None):
    """An `EncoderDecoderBackbone` for a `config.json` of transformers, without its weights.

    `tensors` says whether the logits have weights of their own: the config does not. T5 1.1 has
    them, but transformers 5 ties them unless the checkpoint has both, and earlier versions wrote
    both where they were tied. Without `tensors` the config is all there is to go by.

    Raises:
        ValueError: as `settings`; if the checkpoint has several embedding tables, and they differ.
    """
    if tensors is None:
        tied = flag(config, "tie_word_embeddings", True)
    else:
        for name in ALIASES[EMBEDDING]:
            if not tensors.are_equal_or_one(EMBEDDING, name):
                raise ValueError(
                    f"The checkpoint {str(tensors.folder)!r} does not fit: the encoder and the "
                    f"decoder must share one embedding table, and {EMBEDDING!r} and {name!r} differ"
                )
        tied = tensors.are_equal_or_one(EMBEDDING, OUTPUT)
    options = {**settings(config), "tie_embeddings": tied}
    backbone = EncoderDecoderBackbone(**options, dtype=dtype)
    if backbone.compute_dtype == "float16":
        warnings.warn(
            "The published models of this family overflow in float16, where `dtype='bfloat16'` is "
            f"as small and does not. Received: dtype={backbone.dtype_policy.name}",
            stacklevel=3,
        )
    return backbone


def settings(config):
    """Arguments of `EncoderDecoderBackbone`.

    Raises:
        ValueError: if an entry of the config is missing or out of range, or asks for something that
            the backbone has not.
    """
    sparse = _is_sparse(config)
    kind = choice(
        config,
        "dense_act_fn" if sparse else "feed_forward_proj",
        ACTIVATIONS,
        "gated-gelu" if config["model_type"] == "mt5" else "relu",
    )
    layers = integer(config, "num_layers", most=MOST_LAYERS)
    decoder_layers = integer(config, "num_decoder_layers", layers, most=MOST_LAYERS)
    buckets = integer(config, "relative_attention_num_buckets", 32, least=4)
    dropout = real(config, "dropout_rate", 0.1, below=1)
    result = {
        "vocabulary_size": integer(config, "vocab_size"),
        "num_layers": layers,
        "num_decoder_layers": decoder_layers,
        "num_heads": integer(config, "num_heads"),
        "hidden_dim": integer(config, "d_model"),
        "key_dim": integer(config, "d_kv"),
        "intermediate_dim": integer(config, "d_ff"),
        "activation": ACTIVATIONS[kind],
        "gated": kind.startswith("gated-"),
        "scale_outputs": _scales_outputs(config),
        "num_buckets": buckets,
        # Half of the decoder's buckets are for exact distances; the others must have some left.
        "max_distance": integer(
            config, "relative_attention_max_distance", 128, least=buckets // 2 + 1
        ),
        "dropout": dropout,
        "epsilon": real(config, "layer_norm_epsilon", 1e-6),
    }
    if not sparse:
        return result
    if flag(config, "router_bias", False):
        raise ValueError("The router must have no bias. Received: router_bias=True")
    sides = {"encoder": layers, "decoder": decoder_layers}
    blocks = {
        side: _sparse(depth, _num_sparse(config, side, depth)) for side, depth in sides.items()
    }
    for side, depth in sides.items():
        step = integer(config, f"{side}_sparse_step", _step(depth, len(blocks[side])))
        if tuple(_every(step, depth)) != tuple(blocks[side]):
            raise ValueError(
                f"`{side}_sparse_step` must agree with `num_sparse_{side}_layers`. "
                f"Received: {side}_sparse_step={step} for the sparse blocks {blocks[side]}"
            )
    return result | {
        "router": _switch_router(config, len(blocks["encoder"]), layers),
        "decoder_router": _switch_router(config, len(blocks["decoder"]), decoder_layers),
        "num_experts": integer(config, "num_experts"),
        "sparse_blocks": blocks["encoder"],
        "decoder_sparse_blocks": blocks["decoder"],
        "group": "sequence",
        "expert_dropout": dropout,
    }


def prepare(config, tensors):
    """Gives the weights the names that `weights` expects: they have these names in every file.

    Raises:
        ValueError: if the config asks for more blocks or experts than there are weights.
    """
    counts = ["num_layers", "num_decoder_layers", *["num_experts"] * _is_sparse(config)]
    for name in counts:
        integer(config, name, 1, most=len(tensors.names))


def first_shapes(config):
    """Shapes of some weights by name, from which the sizes of the others follow."""
    dim = integer(config, "d_model")
    inner = integer(config, "num_heads") * integer(config, "d_kv")
    shapes = {name: (integer(config, "vocab_size"), dim) for name in (EMBEDDING, OUTPUT)}
    attention = "encoder.block.0.layer.0.SelfAttention"
    shapes |= {f"{attention}.{part}.weight": (inner, dim) for part in "qkv"}
    buckets = integer(config, "relative_attention_num_buckets", 32, least=4)
    bias = f"{attention}.relative_attention_bias.weight"
    hidden = integer(config, "d_ff")
    for name in ("DenseReluDense.wi", "DenseReluDense.wi_0", "mlp.wi"):
        shapes[f"encoder.block.0.layer.1.{name}.weight"] = (hidden, dim)
    return shapes | {bias: (buckets, integer(config, "num_heads"))}


def _is_sparse(config):
    return config["model_type"] == "switch_transformers"


def _num_sparse(config, side, depth):
    name = f"num_sparse_{side}_layers"
    count = integer(config, name, least=0)
    if count > depth:
        raise ValueError(
            f"`{name}` must be at most the number of layers, {depth}. Received: {name}={count}"
        )
    return count


def _switch_router(config, num_sparse, num_layers):
    """The router of the sparse blocks of one side."""
    # Here the losses of all blocks add up, there their tokens are pooled to make one.
    blocks = num_sparse if _has_losses(num_sparse, num_layers) else math.inf
    return keras_moe.SwitchRouter(
        capacity_factor=0,  # but so many tokens of a sequence, whatever its length
        eval_capacity_factor=0,
        min_capacity=integer(config, "expert_capacity", 64),
        jitter=real(config, "router_jitter_noise", 0.01, below=1),
        load_balancing_weight=real(config, "router_aux_loss_coef", 1e-3) / blocks,
        router_z_weight=real(config, "router_z_loss_coef", 1e-3) / blocks,
    )


def _has_losses(num_sparse, num_layers):
    """Whether transformers adds the routers' losses of one side: not where all are sparse."""
    return 0 < num_sparse < num_layers


def has_tokenizer(folder, config):
    """Whether `preprocessor` finds a tokenizer in a folder."""
    return is_file(folder / VOCABULARY)


def preprocessor(folder, config):
    """Texts to tokens and back, if the folder has a tokenizer; `None` otherwise.

    Raises:
        ValueError: if the tokenizer has more pieces than the model has rows, or too few: tables are
            a little larger than vocabularies at most, 32,128 rows for 32,100 pieces.
    """
    if not has_tokenizer(folder, config):
        return None
    try:
        tokenizer = t5_tokenizer(folder / VOCABULARY)
    except ValueError as error:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit or is damaged: {VOCABULARY!r} cannot be "
            f"used: {error}"
        ) from error
    pieces, rows = tokenizer.vocabulary_size(), config["vocab_size"]
    if not 0 <= rows - pieces < ROUNDED_TO:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit: its tokenizer has {pieces} pieces with "
            f"its sentinels, and the model has {rows}"
        )
    return Seq2SeqLMPreprocessor(tokenizer, LENGTH, LENGTH)


def write_tokenizer(model, folder):
    """Writes the tokenizer's `spiece.model`, to which transformers adds 100 sentinels itself.

    Raises:
        ValueError: if the model has no rows for them.
    """
    proto = without_sentinels(model.preprocessor.tokenizer.proto)
    (folder / VOCABULARY).write_bytes(proto)
    pieces = t5_tokenizer(proto).vocabulary_size()
    if pieces > model.backbone.vocabulary_size:
        raise ValueError(
            "transformers adds 100 sentinels to a tokenizer, for which the model must have rows: "
            f"{pieces} in all. Received: vocabulary_size={model.backbone.vocabulary_size}"
        )


def _scales_outputs(config):
    tied = flag(config, "tie_word_embeddings", True)
    # A T5 that transformers 5 wrote is always tied, and says this apart.
    scales = {"t5": flag(config, "scale_decoder_outputs", tied), "mt5": False}
    return scales.get(config["model_type"], tied)


def _mixtures(backbone, sides=("encoder", "decoder")):
    blocks = [block for side in sides for block in getattr(backbone, f"{side}_blocks")]
    layers = (block.feed_forward for block in blocks)
    return [layer for layer in layers if isinstance(layer, keras_moe.MixtureOfExperts)]


def _router(mixtures):
    """The router of all mixtures, if transformers has such a one."""
    router = mixtures[0].router
    may_differ = dict.fromkeys(("seed", "load_balancing_weight", "router_z_weight"))
    configs = [{**m.router.get_config(), **may_differ} for m in mixtures]
    if type(router) is not keras_moe.SwitchRouter or any(c != configs[0] for c in configs):
        raise ValueError(
            "transformers has one kind of `SwitchRouter` in all blocks only. "
            f"Received: {', '.join(sorted({type(m.router).__name__ for m in mixtures}))}"
        )
    # There the capacity is a number of tokens of a sequence, in order, in training as in inference.
    factors = (router.capacity_factor, router.eval_capacity_factor)
    # Earlier versions wrote 1e-9 for 0.
    is_fixed = all(factor is not None and factor <= 1e-9 for factor in factors)
    if not (is_fixed or factors == (None, None)) or router.priority != "position":
        raise ValueError(
            "transformers has a capacity in tokens per sequence, taken in order: "
            "`capacity_factor` and `eval_capacity_factor` must both be None, or 0 beside a "
            f"`min_capacity`. Received: {factors}, priority={router.priority!r}"
        )
    if router.reroutes or any(m.group != "sequence" for m in mixtures):
        raise ValueError(
            "transformers reroutes nothing and routes every sequence by itself. Received: "
            f"reroutes={router.reroutes}, group={[m.group for m in mixtures]}"
        )
    return router


def _coefficient(backbone, weight):
    """The weight of a loss there: at balance both sides' losses add up to what they are here."""
    totals = []
    for side, depth in (("encoder", backbone.num_layers), ("decoder", backbone.num_decoder_layers)):
        routers = [mixture.router for mixture in _mixtures(backbone, (side,))]
        if _has_losses(len(routers), depth):
            totals.append(len(routers) * getattr(routers[0], weight))
    return sum(totals) / len(totals) if totals else 0.0


def _sparse(num_layers, num_sparse):
    """Numbers, from 1, of the sparse blocks."""
    return _every(_step(num_layers, num_sparse), num_layers)


def _step(num_layers, num_sparse):
    return num_layers // num_sparse if num_sparse else num_layers


def _every(step, num_layers):
    """Every `step`-th, beginning with the second."""
    return [i + 1 for i in range(num_layers) if step == 1 or i % step == 1]


def config(model):
    """What transformers writes into `config.json` for a `Seq2SeqLM`.

    Raises:
        ValueError: if the backbone has something that transformers has not.
    """
    backbone = model.backbone
    activation = keras.activations.get(backbone.activation)
    kinds = [
        kind
        for kind, ours in ACTIVATIONS.items()
        if keras.activations.get(ours) is activation and kind.startswith("gated-") == backbone.gated
    ]
    if not kinds:
        raise ValueError(
            "transformers has no feed-forward layer with this activation. "
            f"Received: activation={activation!r}, gated={backbone.gated}"
        )
    result = {
        "vocab_size": backbone.vocabulary_size,
        "num_layers": backbone.num_layers,
        "num_decoder_layers": backbone.num_decoder_layers,
        "num_heads": backbone.num_heads,
        "d_model": backbone.hidden_dim,
        "d_kv": backbone.key_dim,
        "d_ff": backbone.intermediate_dim,
        "tie_word_embeddings": backbone.scale_outputs,
        "relative_attention_num_buckets": backbone.num_buckets,
        "relative_attention_max_distance": backbone.max_distance,
        "dropout_rate": backbone.dropout,
        "layer_norm_epsilon": backbone.epsilon,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "dtype": keras.backend.standardize_dtype(backbone.token_embedding.embeddings.dtype),
    }
    mixtures = _mixtures(backbone)
    if not mixtures:
        return result | {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "feed_forward_proj": kinds[0],
            "scale_decoder_outputs": backbone.scale_outputs,
        }
    if backbone.gated:
        raise ValueError("transformers has no gated experts in this family. Received: gated=True")
    router = _router(mixtures)
    sparse = {
        "num_sparse_encoder_layers": (backbone.sparse_blocks, backbone.num_layers),
        "num_sparse_decoder_layers": (
            backbone.decoder_sparse_blocks,
            backbone.num_decoder_layers,
        ),
    }
    for blocks, layers in sparse.values():
        if tuple(_sparse(layers, len(blocks))) != tuple(blocks):
            raise ValueError(
                "transformers has a sparse block at every so many, beginning with the second. "
                f"Received: the sparse blocks {blocks} of {layers}"
            )
    if backbone.expert_dim not in (None, backbone.intermediate_dim):
        raise ValueError(
            "transformers has experts of the dense layers' width only. "
            f"Received: expert_dim={backbone.expert_dim}"
        )
    return result | {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "dense_act_fn": kinds[0],
        "num_experts": backbone.num_experts,
        "expert_capacity": 2**30 if router.capacity_factor is None else router.min_capacity,
        "router_jitter_noise": router.jitter,
        "router_z_loss_coef": _coefficient(backbone, "router_z_weight"),
        "router_aux_loss_coef": _coefficient(backbone, "load_balancing_weight"),
        **{name: len(blocks) for name, (blocks, _) in sparse.items()},
    }


def weights(backbone):
    """Every weight of an `EncoderDecoderBackbone` as a `Weight`."""
    embedding = backbone.token_embedding
    yield Weight(embedding.embeddings, (EMBEDDING,))
    if not backbone.tie_embeddings:
        yield Weight(embedding.reverse_embeddings, (OUTPUT,), True)
    for side in ("encoder", "decoder"):
        bias = getattr(backbone, f"{side}_position_bias").embedding
        yield Weight(
            bias, (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
        )
        norm = getattr(backbone, f"{side}_output_norm").scale
        yield Weight(norm, (f"{side}.final_layer_norm.weight",))
        for number, block in enumerate(getattr(backbone, f"{side}_blocks")):
            dense = "mlp" if _mixtures(backbone) else "DenseReluDense"
            yield from _block(block, f"{side}.block.{number}.layer", dense)


def copies(backbone):
    """Names under which weights are written once more."""
    # Or versions before 5 would scale the outputs.
    if backbone.tie_embeddings and not backbone.scale_outputs:
        yield Weight(backbone.token_embedding.embeddings, (OUTPUT,))


def _block(block, name, dense):
    yield Weight(block.attention_norm.scale, (f"{name}.0.layer_norm.weight",))
    yield from _attention(block.attention, f"{name}.0.SelfAttention")
    last = 1
    if getattr(block, "cross_attention", None) is not None:
        yield Weight(block.cross_attention_norm.scale, (f"{name}.1.layer_norm.weight",))
        yield from _attention(block.cross_attention, f"{name}.1.EncDecAttention")
        last = 2
    yield Weight(block.feed_forward_norm.scale, (f"{name}.{last}.layer_norm.weight",))
    layer = block.feed_forward
    if isinstance(layer, keras_moe.MixtureOfExperts):
        name = f"{name}.{last}.mlp"
        yield Weight(layer.router.kernel, (f"{name}.router.classifier.weight",), True)
        experts = [f"{name}.experts.expert_{e}" for e in range(layer.experts.num_experts)]
        kernels = _kernels(
            layer.experts.kernel_in,
            layer.experts.kernel_gate if layer.experts.gated else None,
            layer.experts.kernel_out,
        )
    else:
        experts = [f"{name}.{last}.{dense}"]
        kernels = _kernels(
            layer.hidden.kernel,
            layer.gate.kernel if layer.gated else None,
            layer.output_projection.kernel,
        )
    stacked = isinstance(layer, keras_moe.MixtureOfExperts)
    for kernel, there in kernels:
        names = tuple(f"{expert}.{there}.weight" for expert in experts)
        yield Weight(kernel, names, True, stacked)


def _attention(attention, name):
    for part, there in (("query", "q"), ("key", "k"), ("value", "v"), ("output_projection", "o")):
        yield Weight(getattr(attention, part).kernel, (f"{name}.{there}.weight",), True)


def _kernels(hidden, gate, output):
    if gate is None:
        return (hidden, "wi"), (output, "wo")
    return (gate, "wi_0"), (hidden, "wi_1"), (output, "wo")
