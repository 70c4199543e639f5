"""The zoo's Transformers by name and size: equal active FLOPs, one implementation.

Per token and sparse block, a dense feed-forward layer of hidden width F, one Switch or hash expert
of width F, and two expert-choice (or top-2) experts of width F/2 multiply the same number of
weights. The sizes of Expert Choice's own decoders are an exception: there, as in the paper, an
expert is as wide as the dense layer.
"""

import difflib

import keras_moe
from zoo.layers import gelu_tanh
from zoo.models.blocks import check_arguments
from zoo.models.decoder import DecoderBackbone
from zoo.models.encoder import EncoderBackbone
from zoo.models.encoder_decoder import EncoderDecoderBackbone

BACKBONES = {
    "encoder_decoder": EncoderDecoderBackbone,
    "encoder": EncoderBackbone,
    "decoder": DecoderBackbone,
}


def _widths(layers, heads, width, head_width, hidden, vocabulary=32128, **options):
    return {
        "vocabulary_size": vocabulary,
        "num_layers": layers,
        "num_heads": heads,
        "hidden_dim": width,
        "key_dim": head_width,
        "intermediate_dim": hidden,
        **options,
    }


_GATED = {"activation": gelu_tanh, "gated": True}
# "mini" is the project's own, to be pretrained on two CPU cores, with the shipped tokenizer; the
# shipped presets are of it. The others up to "xxl" are T5's (https://arxiv.org/abs/1910.10683),
# "xl" and "xxl" those of T5 1.1; the public Switch models have these widths, too. "c-2048" is the
# Switch-C of Switch Transformers (https://arxiv.org/abs/2101.03961, Table 9), every block of which
# is sparse; "100m" and "8b" are Expert Choice's (https://arxiv.org/abs/2202.09368, Table 1).
SIZES = {
    "mini": _widths(4, 3, 192, 64, 512, vocabulary=8192, **_GATED),
    "small": _widths(6, 8, 512, 64, 2048),
    "base": _widths(12, 12, 768, 64, 3072),
    "large": _widths(24, 16, 1024, 64, 4096),
    "xl": _widths(24, 32, 2048, 64, 5120, **_GATED),
    "xxl": _widths(24, 64, 4096, 64, 10240, **_GATED),
    "c-2048": _widths(15, 32, 2080, 64, 6144),
    "100m": _widths(12, 12, 768, 64, 3072, **_GATED),
    "8b": _widths(32, 32, 4096, 128, 16384, **_GATED),
}
DECODER_SIZES = ("100m", "8b")
# Experts of the published models, where there are not many to choose from.
NUM_EXPERTS = {"large": 128, "xl": 128, "xxl": 128, "c-2048": 2048, "100m": 64, "8b": 64}


def dense_transformer(size="mini", vocabulary_size=None, architecture="encoder_decoder", **options):
    """A dense Transformer, T5, the twin that the sparse ones are measured against.

    From "small" to "large" this is T5 1.0, "xl" and "xxl" are T5 1.1 (gated, and logits by weights
    of their own).

    Args:
        size: "mini", "small", "base", "large", "xl" or "xxl"; decoders also "100m" and "8b".
        vocabulary_size: rows of the embedding table; `None`: 8,192 for "mini", which fits the
            shipped tokenizer, and T5's 32,128.
        architecture: "encoder_decoder", "encoder" or "decoder".
        **options: any other argument of `zoo.EncoderDecoderBackbone`, `zoo.EncoderBackbone` or
            `zoo.DecoderBackbone`, but for experts and routers.

    Returns:
        A backbone of the architecture.

    Raises:
        ValueError: if there is no such size or architecture, or there are to be experts.
    """
    if "num_experts" in options and "router" not in options:
        raise ValueError(
            "`num_experts` must be left out of a dense model. "
            f"Received: num_experts={options['num_experts']}"
        )
    return _make(architecture, size, {}, {"vocabulary_size": vocabulary_size, **options})


def switch_transformer(
    size="mini",
    num_experts=None,
    vocabulary_size=None,
    router=None,
    architecture="encoder_decoder",
    **options,
):
    """A Switch Transformer: every token of a sparse block goes to one expert.

    Switch Transformers (https://arxiv.org/abs/2101.03961): every other block is sparse (of size
    "c-2048" every one), expert kernels start at scale 0.1, and the routers have
    `keras_moe.SwitchRouter`'s defaults. `zoo.switch_transformer("base", num_experts=8)` has the
    parameters of google/switch-base-8, and "c-2048" those of Switch-C, 1.6 trillion. To be written
    for transformers (`zoo.save_transformers`) a model must have experts without gates ("mini" needs
    `gated=False, activation="relu"`), and route as there, without a capacity or with so many tokens
    of a sequence:
    `router=keras_moe.SwitchRouter(capacity_factor=0, eval_capacity_factor=0, min_capacity=64)`.

    Args:
        size: "mini", "small", "base", "large", "xl", "xxl" or "c-2048".
        num_experts: experts per sparse block; `None`: those of the paper's model, or 8 up to
            "base".
        vocabulary_size: rows of the embedding table; `None`: 8,192 for "mini", which fits the
            shipped tokenizer, and T5's 32,128.
        router: a `keras_moe.SwitchRouter` with other settings.
        architecture: "encoder_decoder", "encoder" or "decoder".
        **options: any other argument of `zoo.EncoderDecoderBackbone`, `zoo.EncoderBackbone` or
            `zoo.DecoderBackbone`.

    Returns:
        A backbone of the architecture.

    Raises:
        ValueError: if there is no such size or architecture.
    """
    defaults = {"router": keras_moe.SwitchRouter(), "expert_init_scale": 0.1}
    given = {"num_experts": num_experts, "vocabulary_size": vocabulary_size, "router": router}
    return _make(architecture, size, defaults, {**given, **options})


def expert_choice_transformer(
    size="mini",
    num_experts=None,
    vocabulary_size=None,
    router=None,
    architecture="encoder_decoder",
    **options,
):
    """An expert choice Transformer: every expert of a sparse block takes its best tokens.

    Expert Choice (https://arxiv.org/abs/2202.09368): every other block is sparse; a token sees
    `capacity_factor` experts on average (2 by default), each of which is narrower than the dense
    layer by that factor.

    Choosing among tokens looks ahead. A decoder beside an encoder therefore routes by top-k, with
    the same experts and as many to a token (top-2 by default). One on its own is the paper's: it
    looks ahead in training, and generates by the thresholds that its experts learn
    (`inference="threshold"`). Of its sizes "100m" and "8b" an expert is as wide as the dense layer,
    and alone not gated.

    Args:
        size: "mini", "small", "base", "large", "xl" or "xxl"; decoders also "100m" and "8b".
        num_experts: experts per sparse block; `None`: 8 up to "base", 128 up to "xxl", 64 for
            "100m" and "8b".
        vocabulary_size: rows of the embedding table; `None`: 8,192 for "mini", which fits the
            shipped tokenizer, and T5's 32,128.
        router: a `keras_moe.ExpertChoiceRouter` with other settings.
        architecture: "encoder_decoder", "encoder" or "decoder".
        **options: any other argument of `zoo.EncoderDecoderBackbone`, `zoo.EncoderBackbone` or
            `zoo.DecoderBackbone`.

    Returns:
        A backbone of the architecture.

    Raises:
        ValueError: if there is no such size or architecture.
    """
    inference = {"inference": "threshold"} if architecture == "decoder" else {}
    if router is None:
        router = keras_moe.ExpertChoiceRouter(**inference)
    check_arguments({"router": router}, None)
    hidden_dim = options.get("intermediate_dim") or _size(size)["intermediate_dim"]
    if size in DECODER_SIZES:
        defaults = {"gated_experts": False}
    else:
        defaults = {"expert_dim": round(hidden_dim / router.capacity_factor)}
    if architecture == "encoder_decoder":
        defaults["decoder_router"] = keras_moe.TopKRouter(max(1, round(router.capacity_factor)))
    given = {"num_experts": num_experts, "vocabulary_size": vocabulary_size, "router": router}
    return _make(architecture, size, defaults, {**given, **options})


def hash_transformer(
    size="mini",
    num_experts=None,
    vocabulary_size=None,
    router=None,
    architecture="encoder_decoder",
    **options,
):
    """A hash layer Transformer: every token of a sparse block goes to the expert its id names.

    The baseline of Expert Choice (https://arxiv.org/abs/2202.09368), Table 4; every other block is
    sparse, and no token is dropped.

    Args:
        size: "mini", "small", "base", "large", "xl" or "xxl"; decoders also "100m" and "8b".
        num_experts: experts per sparse block; `None`: 8 up to "base", 128 up to "xxl", 64 for
            "100m" and "8b".
        vocabulary_size: rows of the embedding table; `None`: 8,192 for "mini", which fits the
            shipped tokenizer, and T5's 32,128.
        router: a `keras_moe.HashRouter` with other settings.
        architecture: "encoder_decoder", "encoder" or "decoder".
        **options: any other argument of `zoo.EncoderDecoderBackbone`, `zoo.EncoderBackbone` or
            `zoo.DecoderBackbone`.

    Returns:
        A backbone of the architecture.

    Raises:
        ValueError: if there is no such size or architecture.
    """
    defaults = {"router": keras_moe.HashRouter()}
    given = {"num_experts": num_experts, "vocabulary_size": vocabulary_size, "router": router}
    return _make(architecture, size, defaults, {**given, **options})


# What `zoo.finetune` and `zoo.pretrain` build by name.
MODELS = {
    "switch": switch_transformer,
    "expert_choice": expert_choice_transformer,
    "dense": dense_transformer,
}


def _make(architecture, size, defaults, options):
    """The backbone with what is given, else the builder's defaults, else the size's."""
    if architecture not in BACKBONES:
        raise ValueError(
            f"`architecture` must be one of {', '.join(map(repr, BACKBONES))}. "
            f"Received: architecture={architecture!r}"
        )
    of_size = dict(_size(size))
    if size in DECODER_SIZES and architecture != "decoder":
        raise ValueError(
            f"`architecture` must be 'decoder' for size={size!r}. "
            f"Received: architecture={architecture!r}"
        )
    if architecture != "encoder":  # which makes no logits
        of_size["tie_embeddings"] = size not in ("xl", "xxl")
    if "router" in defaults | options:
        of_size["num_experts"] = NUM_EXPERTS.get(size, 8)
    if size == "c-2048":
        every = tuple(range(1, of_size["num_layers"] + 1))
        of_size["sparse_blocks"] = every
        if architecture == "encoder_decoder":
            of_size["decoder_sparse_blocks"] = every
    given = {name: value for name, value in options.items() if value is not None}
    return BACKBONES[architecture](**(of_size | defaults | given))


def _size(name):
    if name not in SIZES:
        near = difflib.get_close_matches(str(name), SIZES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`size` must be one of {', '.join(SIZES)}. Received: size={name!r}.{hint}"
        )
    return SIZES[name]
