"""How large a model is, and what a token costs."""

import math
from typing import NamedTuple

import keras

from keras_moe import MixtureOfExperts
from zoo.layers import RelativePositionBias


class Figures(NamedTuple):
    """What `figures` returns."""

    parameters: int
    active_parameters: int
    training_flops_per_token: int


def figures(model):
    """Parameters of a backbone, in all and per token, and the FLOPs that a token costs.

    Active parameters are all but those of the experts that a token does not see (with expert
    choice: does not see on average). A token's training costs 6 FLOPs for each weight that it is
    multiplied by, forward and backward; looking up embeddings, attention's products of tokens with
    tokens, norms and routing noise are left out. Of an encoder with a decoder, "a token" is one of
    each. What LoRA adds (`backbone.enable_lora`) are parameters, but no FLOPs; what is frozen or
    quantized counts as if it were not.

    Args:
        model: a `zoo.EncoderDecoderBackbone`, `zoo.EncoderBackbone` or `zoo.DecoderBackbone`, or a
            task with one, a `zoo.Seq2SeqLM`, say, whose own weights do not count; also one without
            memory for its weights, see `zoo.models.deferred.Deferred`.

    Returns:
        A `Figures`: `parameters`, `active_parameters` and `training_flops_per_token`.

    Raises:
        ValueError: if the model is another.
    """
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, keras.Model) or not hasattr(backbone, "token_embedding"):
        raise ValueError(
            "`model` must be a backbone of the zoo or a task with one. "
            f"Received: a {type(model).__name__}"
        )
    layers = backbone._flatten_layers()
    weights = [v for layer in layers for v in _weights(layer)]
    parameters = sum(map(_size, weights))
    idle = 0
    for layer in layers:
        if isinstance(layer, MixtureOfExperts):
            bank = layer.experts._flatten_layers()
            experts = sum(_size(v) for part in bank for v in part._trainable_variables)
            share = layer.router.experts_per_token / layer.router.num_experts
            idle += round(experts * (1 - share))
    active = parameters - idle
    not_multiplied = sum(_size(v) for v in weights if len(v.shape) == 1)
    for layer in layers:
        # Keras multiplies these with each other and adds them to the kernel, whatever the tokens.
        lora = [v for v in layer._trainable_variables if v.name.startswith("lora_")]
        not_multiplied += sum(map(_size, lora))
        if isinstance(layer, RelativePositionBias):  # a table, which is looked up
            not_multiplied += _size(layer.embedding)
    embedding = backbone.token_embedding
    makes_logits = hasattr(backbone, "logits") and embedding.tie_weights
    if not makes_logits:
        not_multiplied += _size(embedding.embeddings)
    return Figures(parameters, active, 6 * (active - not_multiplied))


def _weights(layer):
    """What training changes, also if it is frozen just now; not seeds, counters or thresholds."""
    weights = list(layer._trainable_variables)
    if getattr(layer, "quantization_mode", None):  # which has made the weight a constant
        weights.append(layer.embeddings if hasattr(layer, "embeddings") else layer.kernel)
    return weights


def _size(variable):
    return math.prod(variable.shape)
