"""The zoo's Transformers by name and size: equal active FLOPs, one implementation.

Per token and sparse block, a dense feed-forward layer of hidden width F, one Switch or hash expert
of width F, and two expert-choice experts of width F/2 (the paper's capacity factor of 2) multiply
the same number of weights.
"""

import difflib

import keras_moe
from zoo.models.encoder import EncoderBackbone

# Widths of T5 (https://arxiv.org/abs/1910.10683) and, for base, of the public Switch models, whose
# hidden width is 3,072; "mini" is the project's own, made to be trained on two CPU cores.
SIZES = {
    "mini": {
        "num_layers": 4,
        "num_heads": 4,
        "hidden_dim": 128,
        "key_dim": 32,
        "intermediate_dim": 512,
    },
    "small": {
        "num_layers": 6,
        "num_heads": 8,
        "hidden_dim": 512,
        "key_dim": 64,
        "intermediate_dim": 2048,
    },
    "base": {
        "num_layers": 12,
        "num_heads": 12,
        "hidden_dim": 768,
        "key_dim": 64,
        "intermediate_dim": 3072,
    },
}


def dense_transformer(size="mini", vocabulary_size=8192, **options):
    """A dense T5-style encoder, the twin that the sparse ones are measured against.

    Args:
        size: "mini", "small" or "base".
        vocabulary_size: rows of the embedding table; the default fits the shipped tokenizer.
        **options: any other argument of `zoo.EncoderBackbone`.

    Returns:
        An `EncoderBackbone`.

    Raises:
        ValueError: if there is no such size.
    """
    return EncoderBackbone(vocabulary_size, **(_size(size) | options))


def switch_transformer(size="mini", num_experts=8, vocabulary_size=8192, router=None, **options):
    """A Switch Transformer encoder: every token of a sparse block goes to one expert.

    Switch Transformers (https://arxiv.org/abs/2101.03961): every other block is sparse, expert
    kernels start at scale 0.1, and the routers have `keras_moe.SwitchRouter`'s defaults.

    Args:
        size: "mini", "small" or "base".
        num_experts: experts per sparse block.
        vocabulary_size: rows of the embedding table; the default fits the shipped tokenizer.
        router: a `keras_moe.SwitchRouter` with other settings.
        **options: any other argument of `zoo.EncoderBackbone`.

    Returns:
        An `EncoderBackbone`.

    Raises:
        ValueError: if there is no such size.
    """
    defaults = {"expert_init_scale": 0.1}
    return EncoderBackbone(
        vocabulary_size,
        router=router or keras_moe.SwitchRouter(),
        num_experts=num_experts,
        **(_size(size) | defaults | options),
    )


def expert_choice_transformer(
    size="mini", num_experts=8, vocabulary_size=8192, router=None, **options
):
    """An expert choice encoder: every expert of a sparse block takes its best tokens.

    Expert Choice (https://arxiv.org/abs/2202.09368): every other block is sparse; a token sees
    `capacity_factor` experts on average (2 by default), each of which is narrower than the dense
    layer by that factor.

    Args:
        size: "mini", "small" or "base".
        num_experts: experts per sparse block.
        vocabulary_size: rows of the embedding table; the default fits the shipped tokenizer.
        router: a `keras_moe.ExpertChoiceRouter` with other settings.
        **options: any other argument of `zoo.EncoderBackbone`.

    Returns:
        An `EncoderBackbone`.

    Raises:
        ValueError: if there is no such size.
    """
    router = router or keras_moe.ExpertChoiceRouter()
    options = _size(size) | options
    defaults = {"expert_dim": round(options["intermediate_dim"] / router.capacity_factor)}
    return EncoderBackbone(
        vocabulary_size, router=router, num_experts=num_experts, **(defaults | options)
    )


def hash_transformer(size="mini", num_experts=8, vocabulary_size=8192, router=None, **options):
    """A hash layer encoder: every token of a sparse block goes to the expert that its id names.

    The baseline of Expert Choice (https://arxiv.org/abs/2202.09368), Table 4; every other block is
    sparse, and no token is dropped.

    Args:
        size: "mini", "small" or "base".
        num_experts: experts per sparse block.
        vocabulary_size: rows of the embedding table; the default fits the shipped tokenizer.
        router: a `keras_moe.HashRouter` with other settings.
        **options: any other argument of `zoo.EncoderBackbone`.

    Returns:
        An `EncoderBackbone`.

    Raises:
        ValueError: if there is no such size.
    """
    router = router or keras_moe.HashRouter()
    return EncoderBackbone(
        vocabulary_size, router=router, num_experts=num_experts, **(_size(size) | options)
    )


def _size(name):
    if name not in SIZES:
        near = difflib.get_close_matches(str(name), SIZES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`size` must be one of {', '.join(SIZES)}. Received: size={name!r}.{hint}"
        )
    return SIZES[name]
