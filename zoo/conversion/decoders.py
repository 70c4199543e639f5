"""Mixtral and OLMoE: their settings and weights there and here."""

import warnings

import keras

import keras_moe
from zoo.conversion.config import MOST_LAYERS, choice, flag, integer, real, shown
from zoo.conversion.tensors import Weight
from zoo.conversion.tokenizers import TransformersTokenizer, UnusableError, load_tokenizer
from zoo.models.decoder import CausalLM, CausalLMPreprocessor, DecoderBackbone

FAMILIES = ("mixtral", "olmoe")
TASK = CausalLM
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
IGNORED = frozenset()
ACTIVATIONS = ("silu", "gelu", "relu")
LENGTH = 1024  # tokens of a text, unless the model was trained on shorter ones
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
ONLY_ONE = (
    "A router that chooses one expert and normalizes its weight, to 1, is not among the zoo's: "
    "`num_experts_per_tok` must be at least 2 unless there is one expert. Received: 1"
)
# What transformers may ask for and the backbone has not, and what its `config.json` must then say.
FOREIGN = {
    "attention_bias": (None, False),
    "clip_qkv": (None,),
    "quantization_config": (None,),
}
# Entries that change nothing here, and are written again: these always, those where they are set.
FACTS, SET = ("max_position_embeddings", *SPECIAL), ("sliding_window", "attention_dropout")
# Where the families differ: the mixture's name, and the expert's gate, input and output kernels.
CONTEXT = {"mixtral": 131072, "olmoe": 4096}  # `max_position_embeddings` where it is not given
MIXTURES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def make(config, tensors, dtype=None):
    """A `DecoderBackbone` for a `config.json` of transformers, without its weights.

    Where the config says that the embedding table makes the logits, `tensors`, if they are given,
    may say otherwise.
    """
    tied = flag(config, "tie_word_embeddings", False)
    if tied and tensors is not None:
        tied = tensors.are_equal_or_one(EMBEDDING, OUTPUT)
    return DecoderBackbone(**settings(config), tie_embeddings=tied, dtype=dtype)


def settings(config):
    """Arguments of `DecoderBackbone`, but for `tie_embeddings`.

    Raises:
        ValueError: if an entry of the config is missing or out of range, or asks for something that
            the backbone has not.
    """
    for name, allowed in FOREIGN.items():
        if config.get(name) not in allowed:
            raise ValueError(
                f"`{name}` must be {allowed[-1]}. Received: {name}={shown(config[name])}"
            )
    is_olmoe, rope = config["model_type"] == "olmoe", _rope(config)
    real(config, "attention_dropout", 0.0, below=1)  # of training only, and there is none here
    # A window that is as long as the longest text hides nothing.
    context = integer(config, "max_position_embeddings", CONTEXT[config["model_type"]])
    if not is_olmoe:  # which has none
        integer(config, "sliding_window", context, least=context)
    experts = integer(config, _num_experts(config))
    # One expert has all the weight, normalized or not.
    normalizes = experts > 1 and (not is_olmoe or flag(config, "norm_topk_prob", False))
    k = integer(config, "num_experts_per_tok", most=experts)
    if normalizes and k == 1:
        raise ValueError(ONLY_ONE)
    layers = integer(config, "num_hidden_layers", most=MOST_LAYERS)
    heads, width = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    key_dim = integer(config, "head_dim", max(width // heads, 1))
    if key_dim % 2:
        raise ValueError(
            "`head_dim` must be even, as rotary positions turn pairs of numbers. "
            f"Received: head_dim={key_dim}"
        )
    router = keras_moe.TopKRouter(
        k,
        normalize=normalizes,
        # Here it is divided by k, and those of all blocks add up; there the blocks' tokens are
        # pooled to make one.
        load_balancing_weight=k / layers * _loss_weight(config, is_olmoe),
        jitter=0.0 if is_olmoe else real(config, "router_jitter_noise", 0.0, below=1),
    )
    return {
        "vocabulary_size": integer(config, "vocab_size"),
        "num_layers": layers,
        "num_heads": heads,
        "hidden_dim": width,
        "key_dim": key_dim,
        "intermediate_dim": integer(config, "intermediate_size"),
        "router": router,
        "num_experts": experts,
        "sparse_blocks": tuple(range(1, layers + 1)),
        "activation": choice(config, "hidden_act", ACTIVATIONS),
        "gated": True,
        "positions": "rotary",
        "num_key_value_heads": integer(config, "num_key_value_heads", heads),
        "max_wavelength": real(rope, "rope_theta", 1e4 if is_olmoe else 1e6, positive=True),
        "normalize_queries": is_olmoe,
        "scale_outputs": False,
        "dropout": 0.0,
        "expert_dropout": 0.0,
        "epsilon": real(config, "rms_norm_eps", 1e-5),
        "facts": {
            name: config[name]
            for name in (*FACTS, *SET)
            if config.get(name) or (name in FACTS and name in config)
        },
    }


def _num_experts(config):
    """What the config calls the number of experts."""
    return "num_experts" if config["model_type"] == "olmoe" else "num_local_experts"


def _rope(config):
    """The settings of the rotary positions, wherever the config has them."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"`{name}` must be an object. Received: {name}={shown(rope)}")
        kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
        if kind != "default":
            raise ValueError(
                f"`{name}` must be of the `rope_type` 'default'. Received: {name}={shown(rope)}"
            )
    return config.get("rope_parameters") or config


def prepare(config, tensors):
    """Gives the weights the names that `weights` expects.

    transformers 5 may store one tensor with the kernels of all experts of a block, under names
    that Mixtral and OLMoE share.

    Raises:
        ValueError: if the config asks for more blocks or experts than there are weights, or such a
            tensor has another shape.
    """
    layers = integer(config, "num_hidden_layers", most=len(tensors.names))
    experts, hidden = integer(config, _num_experts(config)), integer(config, "intermediate_size")
    width = integer(config, "hidden_size")
    mixture, (gate, up, down) = MIXTURES[config["model_type"]]
    missing, is_fused = [], False
    for name in (f"model.layers.{number}" for number in range(layers)):
        for fused, kernels, shape in (
            ("gate_up_proj", (gate, up), (hidden, width)),
            ("down_proj", (down,), (width, hidden)),
        ):
            fused = f"{name}.mlp.experts.{fused}"
            if fused not in tensors.names:
                missing.append(fused)
                continue
            whole = (experts, len(kernels) * shape[0], shape[1])
            if tensors.shape(fused) != whole:
                raise ValueError(
                    f"The checkpoint {str(tensors.folder)!r} does not fit: weight {fused!r} has "
                    f"shape {tensors.shape(fused)}, and the model wants {whole}"
                )
            parts = [
                f"{name}.{mixture}.experts.{expert}.{kernel}.weight"
                for expert in range(experts)
                for kernel in kernels
            ]
            tensors.split(fused, dict.fromkeys(parts, shape))
            is_fused = True
        router = f"{name}.mlp.gate.weight"
        if mixture != "mlp" and router in tensors.names:
            tensors.rename(router, f"{name}.{mixture}.gate.weight")
    if is_fused and missing:
        raise ValueError(
            f"The checkpoint {str(tensors.folder)!r} does not fit or is damaged: it lacks the "
            f"weight {missing[0]!r}"
        )
    if not is_fused:
        integer(config, _num_experts(config), most=len(tensors.names))


def first_shapes(config):
    """Shapes of some weights by name, from which the sizes of the others follow."""
    heads, width = integer(config, "num_attention_heads"), integer(config, "hidden_size")
    key_dim = integer(config, "head_dim", max(width // heads, 1))
    groups = integer(config, "num_key_value_heads", heads)
    table = (integer(config, "vocab_size"), width)
    return {
        EMBEDDING: table,
        OUTPUT: table,
        "model.layers.0.self_attn.q_proj.weight": (heads * key_dim, width),
        "model.layers.0.self_attn.k_proj.weight": (groups * key_dim, width),
    }


def _loss_weight(config, is_olmoe):
    return real(config, "router_aux_loss_coef", 0.01 if is_olmoe else 0.001)


def has_tokenizer(folder, config):
    """Whether `preprocessor` finds a tokenizer in a folder.

    Raises:
        ValueError: if there is one that cannot be used.
    """
    return load_tokenizer(folder, config) is not None


def preprocessor(folder, config):
    """Texts to tokens and back, if the folder has a tokenizer that can be used; else `None`.

    Warns if there is one that cannot be.

    Raises:
        ValueError: if it has more ids than the model has rows.
    """
    try:
        tokenizer = load_tokenizer(folder, config)
    except UnusableError as error:
        warnings.warn(f"{error}; the model is loaded without it", stacklevel=3)
        return None
    if tokenizer is None:
        return None
    return CausalLMPreprocessor(
        tokenizer,
        min(LENGTH, integer(config, "max_position_embeddings", LENGTH)),
        add_start_token=tokenizer.start_token is not None,
    )


def write_tokenizer(model, folder):
    """Writes the files that the tokenizer was loaded from; another kind is left out."""
    tokenizer = model.preprocessor.tokenizer
    if isinstance(tokenizer, TransformersTokenizer):
        tokenizer.save_assets(folder)


def _special_ids(facts, preprocessor):
    """Ids that the tokenizer has, as in `config.json`; lists of several where one is among them."""
    tokenizer = preprocessor and preprocessor.tokenizer
    names = ("start_token_id", "end_token_id", "pad_token_id")
    ids = (getattr(tokenizer, name, None) for name in names)
    of_tokenizer = {name: id for name, id in zip(SPECIAL, ids, strict=True) if id is not None}
    for name, id in of_tokenizer.items():
        if isinstance(facts.get(name), list) and id in facts[name]:
            of_tokenizer[name] = facts[name]
    return of_tokenizer


def config(model):
    """What transformers writes into `config.json` for a `CausalLM`.

    Raises:
        ValueError: if the backbone has something that transformers has not.
    """
    backbone, facts = model.backbone, model.backbone.facts or {}
    routers = [
        block.feed_forward.router
        for block in backbone.blocks
        if isinstance(block.feed_forward, keras_moe.MixtureOfExperts)
    ]
    activation = keras.activations.get(backbone.activation)
    kinds = [kind for kind in ACTIVATIONS if keras.activations.get(kind) is activation]
    inner = backbone.num_heads * backbone.key_dim
    olmoe = backbone.normalize_queries
    wanted = {
        "rotary positions": backbone.positions == "rotary",
        "a mixture in every block": len(routers) == backbone.num_layers,
        "`TopKRouter`s that drop nothing": all(
            type(router) is keras_moe.TopKRouter
            and router.capacity_factor is router.eval_capacity_factor is None
            for router in routers
        ),
        "gated experts": backbone.gated_experts,
        f"an activation of {', '.join(ACTIVATIONS)}": bool(kinds),
        "outputs that are not scaled": not backbone.scale_outputs,
        "normalized weights of two or more chosen experts (Mixtral)": olmoe
        or backbone.num_experts == 1
        or all(router.normalize and router.k > 1 for router in routers),
        "heads that share out the width (OLMoE)": not olmoe or inner == backbone.hidden_dim,
    }
    if missing := [name for name, is_there in wanted.items() if not is_there]:
        raise ValueError(
            f"transformers has Mixtral and OLMoE only, with {missing[0]}. "
            f"Received: {backbone.get_config()}"
        )
    result = {
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.expert_dim or backbone.intermediate_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "num_experts_per_tok": routers[0].k,
        "router_aux_loss_coef": backbone.num_layers
        * routers[0].load_balancing_weight
        / routers[0].k,
        "hidden_act": kinds[0],
        "rms_norm_eps": backbone.epsilon,
        "rope_parameters": {"rope_theta": backbone.max_wavelength, "rope_type": "default"},
        "tie_word_embeddings": backbone.tie_embeddings,
        **dict.fromkeys(SPECIAL),  # or transformers would have its own
        **facts,
        **_special_ids(facts, model.preprocessor),
        "dtype": keras.backend.standardize_dtype(backbone.token_embedding.embeddings.dtype),
    }
    if olmoe:
        return result | {
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "num_experts": backbone.num_experts,
            "norm_topk_prob": routers[0].normalize and routers[0].k > 1,
        }
    return result | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": backbone.num_experts,
        "head_dim": backbone.key_dim,
        "router_jitter_noise": routers[0].jitter,
    }


def weights(backbone):
    """Every weight of a `DecoderBackbone` as a `Weight`."""
    embedding = backbone.token_embedding
    yield Weight(embedding.embeddings, (EMBEDDING,))
    if not backbone.tie_embeddings:
        yield Weight(embedding.reverse_embeddings, (OUTPUT,), True)
    yield Weight(backbone.output_norm.scale, ("model.norm.weight",))
    mixture, kernels = MIXTURES["olmoe" if backbone.normalize_queries else "mixtral"]
    for number, block in enumerate(backbone.blocks):
        yield from _block(block, f"model.layers.{number}", mixture, kernels)


def copies(backbone):
    """Names under which weights are written once more."""
    return ()


def _block(block, name, mixture, kernels):
    attention, layer = block.attention, block.feed_forward
    yield Weight(block.attention_norm.scale, (f"{name}.input_layernorm.weight",))
    yield Weight(block.feed_forward_norm.scale, (f"{name}.post_attention_layernorm.weight",))
    for part, there in (("query", "q"), ("key", "k"), ("value", "v"), ("output_projection", "o")):
        kernel = getattr(attention, part).kernel
        yield Weight(kernel, (f"{name}.self_attn.{there}_proj.weight",), True)
    if attention.normalize:
        yield Weight(attention.query_norm.scale, (f"{name}.self_attn.q_norm.weight",))
        yield Weight(attention.key_norm.scale, (f"{name}.self_attn.k_norm.weight",))
    name = f"{name}.{mixture}"
    yield Weight(layer.router.kernel, (f"{name}.gate.weight",), True)
    bank = layer.experts
    for kernel, there in zip(
        (bank.kernel_gate, bank.kernel_in, bank.kernel_out), kernels, strict=True
    ):
        names = tuple(f"{name}.experts.{e}.{there}.weight" for e in range(bank.num_experts))
        yield Weight(kernel, names, True, stacked=True)
