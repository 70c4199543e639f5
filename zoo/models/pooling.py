"""From an encoder's outputs to what a classifier sees: of one text, and of two in one row.

Axes: B batch, L tokens, M those they attend to, D width.
"""

import keras
from keras import ops

from zoo.layers import Dropout

# Of the attention from one text to the other, whose scores are cosines. Raw products of the
# outputs of former presets instead were as good: Pearson 0.784 and 0.785 on STS-B.
_SHARPNESS = 10.0


@keras.saving.register_keras_serializable(package="zoo")
class MaskedMean(keras.layers.Layer):
    """Mean over the tokens of each sequence that are not padding, `[batch, dim]`."""

    def call(self, inputs, padding_mask):
        mask_BL = ops.cast(ops.cast(padding_mask, "bool"), inputs.dtype)
        return _mean(inputs, ops.expand_dims(mask_BL, 2))

    def compute_output_shape(self, input_shape, *args):
        return (input_shape[0], input_shape[-1])


@keras.saving.register_keras_serializable(package="zoo")
class MixedLayers(keras.layers.Layer):
    """Weighted mean of what several layers put out, each normed, `[batch, length, dim]`.

    The weights are learnt, a softmax over as many scalars, and equal at first (ELMo, Peters et al.
    2018, https://arxiv.org/abs/1802.05365, Eq. 1). Departures: no scale for all of it, which what
    follows can learn; RMS norms without weights, where ELMo has layer norms at times.

    Call arguments:
        inputs: list of `[batch, length, dim]` tensors.
    """

    def build(self, input_shapes):
        self.scores = self.add_weight(
            shape=(len(input_shapes),), initializer="zeros", name="scores"
        )

    def call(self, inputs):
        weights = ops.cast(ops.softmax(ops.cast(self.scores, "float32")), self.compute_dtype)
        return sum(
            weight * ops.rms_normalization(x_BLD, epsilon=1e-6)
            for weight, x_BLD in zip(ops.unstack(weights, len(inputs)), inputs, strict=True)
        )

    def compute_output_shape(self, input_shapes):
        return input_shapes[0]


@keras.saving.register_keras_serializable(package="zoo")
class TextNumbers(keras.layers.Layer):
    """1 for the tokens of the first text of a pair, 2 for those of the second, 0 for padding.

    The first text ends with its first separator, unless that is the row's first token.

    Args:
        separator: id of the token that ends a text.
    """

    def __init__(self, separator, **kwargs):
        super().__init__(**kwargs)
        self.separator = separator

    def call(self, token_ids, padding_mask):
        ends_BL = ops.cast(token_ids == self.separator, "int32")
        ends_BL = ops.pad(ends_BL[:, 1:], ((0, 0), (1, 0)))
        is_second_BL = ops.cumsum(ends_BL, axis=1) - ends_BL > 0
        numbers_BL = ops.where(is_second_BL, 2, 1)
        return ops.where(ops.cast(padding_mask, "bool"), numbers_BL, 0)

    def compute_output_spec(self, token_ids, padding_mask):
        return keras.KerasTensor(token_ids.shape, dtype="int32")

    def get_config(self):
        return {**super().get_config(), "separator": self.separator}


@keras.saving.register_keras_serializable(package="zoo")
class ComparedTexts(keras.layers.Layer):
    """Features of a pair of texts, `[batch, 6 * dim + 2]`: as a whole, and token by token.

    As a whole: the means `u` and `v` of the outputs of either text's tokens, `|u - v|` and `u * v`
    (InferSent, Conneau et al. 2017, https://arxiv.org/abs/1705.02364, Figure 1; so do GLUE's own
    baselines). Token by token: each one attends to the other text, and a layer compares what it is
    with what it found; the features are the means of that over either text (decomposable attention,
    Parikh et al. 2016, https://arxiv.org/abs/1606.01933, Eqs. 1-4, with the differences and
    products of Chen et al. 2017, https://arxiv.org/abs/1609.06038, Eqs. 14-15). The last two say
    how close the closest token of the other text is, on average over either text (BERTScore, Zhang
    et al. 2020, https://arxiv.org/abs/1904.09675, recall and precision). Departures: attention is
    by the cosine, since a pretrained encoder's outputs are alike already, and not by a learnt
    score; means instead of sums, since texts differ in length; differences without their sign, so
    that the order of the texts matters to the last layer alone. What a text has of another that is
    empty is 0.

    Args:
        dropout: rate on what is compared token by token.

    Call arguments:
        inputs: `[batch, length, dim]` tensor.
        text_numbers: `[batch, length]` integers: 1, 2, or 0 for padding.
        training: whether there is dropout.
    """

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.dropout = dropout
        self.compared_dropout = Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape, *args):
        dim = input_shape[-1]
        self.compare = keras.layers.Dense(
            dim, activation="gelu", dtype=self.dtype_policy, name="compare"
        )
        self.compare.build((*input_shape[:-1], 4 * dim))

    def call(self, inputs, text_numbers, training=None):
        unit_BLD = ops.normalize(ops.cast(inputs, "float32"), axis=-1)
        cosine_BLM = ops.matmul(unit_BLD, ops.swapaxes(unit_BLD, 1, 2))
        is_other_BLM = ops.expand_dims(text_numbers, 2) + ops.expand_dims(text_numbers, 1) == 3
        weight_BLM = ops.softmax(ops.where(is_other_BLM, _SHARPNESS * cosine_BLM, -1e9))
        weight_BLM = ops.cast(ops.where(is_other_BLM, weight_BLM, 0.0), inputs.dtype)
        pair_BLD = _side_by_side(inputs, ops.matmul(weight_BLM, inputs))
        compared_BLD = self.compare(self.compared_dropout(pair_BLD, training=training))
        closest_BL1 = ops.max(ops.where(is_other_BLM, cosine_BLM, -1.0), axis=2, keepdims=True)
        has_other_BL1 = ops.any(is_other_BLM, axis=2, keepdims=True)
        closest_BL1 = ops.cast(ops.where(has_other_BL1, closest_BL1, 0.0), inputs.dtype)

        masks_BL1 = [ops.expand_dims(ops.cast(text_numbers == n, inputs.dtype), 2) for n in (1, 2)]
        u, v = (_mean(inputs, mask_BL1) for mask_BL1 in masks_BL1)
        parts = [_side_by_side(u, v)]
        for tokens in (compared_BLD, closest_BL1):
            parts += [_mean(tokens, mask_BL1) for mask_BL1 in masks_BL1]
        return ops.concatenate(parts, axis=-1)

    def compute_output_shape(self, input_shape, *args):
        return (input_shape[0], 6 * input_shape[-1] + 2)

    def get_config(self):
        return {**super().get_config(), "dropout": self.dropout}


def _side_by_side(one, other):
    return ops.concatenate([one, other, ops.abs(one - other), one * other], axis=-1)


def _mean(x_BLD, mask_BL1):
    return ops.sum(x_BLD * mask_BL1, axis=1) / ops.maximum(ops.sum(mask_BL1, axis=1), 1.0)
