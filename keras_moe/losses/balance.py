"""Auxiliary losses: pure functions of what a router returns. All are float32 and skip padding."""

import math

from keras import ops

from keras_moe import slots
from keras_moe.ops import add_rows, as_number, take_entries, top_k


def load_balancing(probabilities, expert_index, mask=None):
    """Switch Transformers' load-balancing loss, `E * sum_e f_e * P_e`.

    `f_e` is the share of all choices that fell on expert `e` (all `k` choices of a token count,
    before any is dropped) and `P_e` the mean probability of expert `e`. It is 1 at perfect balance
    for every `k` and `E / k` when the same `k` experts take everything; a little under 1 is
    possible, where choices and probabilities are anti-correlated. Only `P` has a gradient.

    Source: https://arxiv.org/abs/2101.03961, Eqs. 4-6, without its weight alpha.

    Args:
        probabilities: `[..., experts]` softmax over experts.
        expert_index: `[..., k]` integers, the chosen experts; an index outside `[0, experts)` is
            not counted.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    one = [ops.reshape(x, (1, -1, x.shape[-1])) for x in (probabilities, expert_index)]
    return sequence_balancing(*one, None if mask is None else ops.reshape(mask, (1, -1)))


def sequence_balancing(probabilities, expert_index, mask=None):
    """`load_balancing` of every sequence by itself, the mean over sequences.

    Source: DeepSeek-V3 (https://arxiv.org/abs/2412.19437), Eqs. 17-20, without its weight alpha.

    Args:
        probabilities: `[sequences, tokens, experts]`, each token's adding up to 1.
        expert_index: `[sequences, tokens, k]` integers, the chosen experts; an index outside
            `[0, experts)` is not counted.
        mask: `[sequences, tokens]` booleans, `False` for padding; a sequence of nothing else does
            not count.

    Returns:
        A scalar.
    """
    groups, tokens, num_experts = ops.shape(probabilities)
    k = expert_index.shape[-1]
    counted_GSK = (expert_index >= 0) & (expert_index < num_experts)
    tokens_G1 = ops.broadcast_to(ops.cast(as_number(tokens), "float32"), (groups, 1))
    if mask is not None:
        counted_GSK = counted_GSK & mask[..., None]
        tokens_G1 = ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)
    expert_GSK = ops.where(counted_GSK, ops.cast(expert_index, "int32"), num_experts)
    count_GE = slots.count(ops.reshape(expert_GSK, (groups, tokens * k)), num_experts)
    total_GE = ops.sum(_without_padding(ops.cast(probabilities, "float32"), mask), axis=1)
    # Shares of the choices times mean probabilities.
    product_GE = ops.cast(count_GE, "float32") * total_GE / ops.maximum(k * tokens_G1**2, 1.0)
    sequences = ops.sum(ops.cast(tokens_G1 > 0, "float32"))
    return num_experts * ops.sum(product_GE) / ops.maximum(sequences, 1.0)


def router_z(logits, mask=None):
    """Router z-loss: the mean over tokens of `logsumexp(logits) ** 2`; keeps logits small.

    Source: ST-MoE (https://arxiv.org/abs/2202.08906), Eq. 5, without its weight.

    Args:
        logits: `[..., experts]` router logits.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    logits = _without_padding(ops.cast(logits, "float32"), mask)
    return _mean(ops.square(ops.logsumexp(logits, axis=-1, keepdims=True)), mask)[0]


def importance(weights, mask=None):
    """How unequal the experts' importance is: the squared coefficient of variation over experts.

    The importance of an expert is the sum of its weights over all tokens. 0 when all are equal,
    `E - 1` when one expert has everything; the number of tokens does not matter.

    Source: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eqs. 6-7, without its weight.

    Args:
        weights: `[..., experts]`, each token's weight of each expert, 0 where it was not chosen.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    return _squared_variation(_mean(ops.cast(weights, "float32"), mask))


def load(logits, noisy_logits, noise_scale, k, mask=None):
    """How unequal the experts' load is, with a gradient: the squared coefficient of variation.

    The load of an expert is the sum over tokens of the probability that the expert is among the
    token's `k` largest logits if its own noise, and no other, were drawn anew:
    `Phi((logit - threshold) / noise_scale)`, the threshold being the `k`-th largest noisy logit of
    the other experts. With `k` experts in all every probability is 1, and the loss is 0.

    Source: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eqs. 8-11, without its weight.

    Args:
        logits: `[..., experts]` logits without noise.
        noisy_logits: `[..., experts]` logits with noise, by which experts are chosen.
        noise_scale: `[..., experts]` standard deviation of the noise, positive.
        k: experts per token.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    return _squared_variation(_mean(_chances(logits, noisy_logits, noise_scale, k), mask))


def hierarchical_importance(weights, expert_index, num_experts, mask=None):
    """`importance` where experts are chosen in two levels, from the choices alone.

    The importance of an expert is the sum over all tokens of the product of its group's weight and
    of its own within the group.

    Source: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eq. 13, without its weight.

    Args:
        weights: `[..., k]`, the product of both levels' weights for each of a token's experts.
        expert_index: `[..., k]` integers, those experts; an index outside `[0, num_experts)` is not
            counted.
        num_experts: integer, of all groups together.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    weights = ops.cast(weights, "float32")[..., None]
    return _squared_variation(_sums(weights, expert_index, num_experts, mask))


def hierarchical_load(primary, secondary, group_index, secondary_k, mask=None):
    """`load` where experts are chosen in two levels: the primary gate learns from it too.

    The load of expert `j` of group `i` is the primary load of the group times the mean, over the
    tokens that chose the group, of the probability that the secondary gate of the group chooses `j`
    when its noise is drawn anew. A group that no token chose has experts without load.

    Source: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eq. 14, without its weight.

    Args:
        primary: tuple of logits without noise, logits with noise and the noise's standard
            deviation, `[..., groups]` each.
        secondary: the same of the gates of the chosen groups, `[..., k, group_size]` each.
        group_index: `[..., k]` integers, the chosen groups; an index outside `[0, groups)` is not
            counted.
        secondary_k: experts per token and chosen group.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    num_groups = primary[0].shape[-1]
    load_A = _mean(_chances(*primary, group_index.shape[-1]), mask)
    chances = _chances(*secondary, secondary_k)
    total_AB = _sums(chances, group_index, num_groups, mask)
    count_A1 = _sums(ops.ones_like(chances[..., :1]), group_index, num_groups, mask)
    mean_AB = total_AB / ops.maximum(count_A1, 1.0)
    return _squared_variation(load_A[:, None] * mean_AB)


def _sums(values, index, size, mask):
    """Sum of the rows `[..., n]` of each index in `[0, size)`, `[size, n]`; others do not count."""
    index = ops.cast(index, "int32")
    index = ops.where((index >= 0) & (index < size), index, size)
    if mask is not None:
        index = ops.where(mask[..., None], index, size)
    index_M = ops.reshape(index, (-1,))
    return add_rows(ops.reshape(values, (-1, values.shape[-1])), index_M, size)


def _chances(logits, noisy_logits, noise_scale, k):
    """Probability of being among the `k` largest when one's own noise is drawn anew, `[..., n]`."""
    logits, noisy_logits, noise_scale = (
        ops.cast(x, "float32") for x in (logits, noisy_logits, noise_scale)
    )
    if k >= logits.shape[-1]:
        return ops.ones_like(logits)
    largest, _ = top_k(noisy_logits, k + 1)
    kth, next_one = largest[..., k - 1 : k], largest[..., k:]
    threshold = ops.where(noisy_logits > next_one, next_one, kth)
    deviations = (logits - threshold) / ops.maximum(noise_scale, 1e-6)
    return 0.5 * (1.0 + ops.erf(deviations / math.sqrt(2)))


def batchwise_threshold(probabilities, token_index, threshold, mask=None):
    """How far thresholds are from choosing the tokens that the experts chose.

    `sum_te (over_te - taken_te) * (p_te - threshold_e)`, where `over` is 1 for a score above the
    threshold and `taken` is 1 for a token that the expert took, divided by the number of tokens
    (the paper adds up). It is 0 where the two agree and positive elsewhere, and pushes a threshold
    up that lets more tokens through than its expert takes, and down if fewer.

    Source: Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Eq. 20.

    Args:
        probabilities: `[groups, tokens, experts]` softmax over experts.
        token_index: `[groups, experts, slots]` integers, the tokens that each expert took; an empty
            slot has the number of tokens.
        threshold: `[experts]` tensor.
        mask: `[groups, tokens]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    probabilities, threshold = (ops.cast(x, "float32") for x in (probabilities, threshold))
    beyond_GSE = _without_padding(probabilities - threshold, mask)
    groups, tokens, _ = ops.shape(beyond_GSE)
    over = ops.sum(ops.relu(beyond_GSE))
    beyond_GES = ops.transpose(beyond_GSE, (0, 2, 1))
    beyond_GEC = take_entries(beyond_GES, ops.minimum(token_index, tokens - 1), axis=2)
    taken = ops.sum(ops.where(token_index < tokens, beyond_GEC, 0.0))
    count = groups * tokens if mask is None else ops.sum(ops.cast(mask, "int32"))
    return (over - taken) / ops.cast(ops.maximum(count, 1), "float32")


def _squared_variation(x):
    """Variance over squared mean; 0 where all of `x` is 0."""
    return ops.var(x) / ops.maximum(ops.square(ops.mean(x)), 1e-30)


def _mean(x, mask):
    """Mean over all axes but the last, `[n]`; 0 where there is nothing but padding."""
    axes = tuple(range(len(x.shape) - 1))
    if mask is None:
        return ops.mean(x, axis=axes)
    total = ops.sum(_without_padding(x, mask), axis=axes)
    return total / ops.maximum(ops.sum(ops.cast(mask, x.dtype)), 1.0)


def _without_padding(x, mask):
    """Zeros at padding, whatever stood there: NaN times zero would still be NaN."""
    return x if mask is None else ops.where(mask[..., None], x, 0.0)
