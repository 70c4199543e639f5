"""Auxiliary losses: pure functions of what a router returns. All are float32 and skip padding."""

from keras import ops


def load_balancing(probabilities, expert_index, mask=None):
    """Switch Transformers' load-balancing loss, `E * sum_e f_e * P_e`.

    `f_e` is the share of all choices that fell on expert `e` (all `k` choices of a token count,
    before any is dropped) and `P_e` the mean probability of expert `e`. It is 1 at perfect balance
    for every `k` and `E` when one expert takes everything; a little under 1 is possible, where
    choices and probabilities are anti-correlated. Only `P` has a gradient.

    Source: https://arxiv.org/abs/2101.03961, Eqs. 4-6, without its weight alpha.

    Args:
        probabilities: `[..., experts]` softmax over experts.
        expert_index: `[..., k]` integers, the chosen experts; an index outside `[0, experts)` is
            not counted.
        mask: `[...]` booleans, `False` for padding.

    Returns:
        A scalar.
    """
    num_experts = probabilities.shape[-1]
    probabilities = ops.cast(probabilities, "float32")
    chosen = expert_index[..., None] == ops.arange(num_experts, dtype=expert_index.dtype)
    chosen = ops.sum(ops.cast(chosen, "float32"), axis=-2)
    share = _mean(chosen / expert_index.shape[-1], mask)
    return num_experts * ops.sum(ops.stop_gradient(share) * _mean(probabilities, mask))


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
