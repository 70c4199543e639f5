"""Routing statistics: a few bounded figures per layer, padding excluded.

The layer adds up `statistics` of every call in non-trainable weights (a Keras `Metric` that is
updated inside a layer's `call` does not survive JAX's trainer), and `figures` reads them.

G groups, S tokens per group, K experts per token, E experts, R rows of slots, C slots per row.
"""

import numpy as np
from keras import ops

from keras_moe.distribution.active import by_groups
from keras_moe.ops import add_rows
from keras_moe.routing import ExpertChoiceRouter
from keras_moe.slots import count, pool_groups

TOTALS = ("calls", "tokens", "wanted", "kept", "untaken", "entropy", "max_share")


def statistics_shapes(num_experts):
    """Names and shapes of the statistics that a layer keeps."""
    return {"routing_totals": (len(TOTALS),), "expert_tokens": (num_experts,)}


def statistics(routing, num_experts=None):
    """What one call adds to the statistics.

    Args:
        routing: a `Routing`.
        num_experts: integer; `None`: as many as the routing has probabilities.

    Returns:
        Tuple of `routing_totals` `[7]` (in the order of `TOTALS`) and `expert_tokens` `[experts]`,
        how many choices fell on each expert before any was dropped; both float32.
    """
    outcomes = routing.probabilities.shape[-1]
    num_experts = num_experts or outcomes
    groups, tokens = ops.shape(routing.probabilities)[:2]
    valid_GS = (
        ops.ones((groups, tokens)) if routing.mask is None else ops.cast(routing.mask, "float32")
    )

    experts_per_token_GS = ops.reshape(_experts_per_token(routing), (groups, tokens))
    expert_tokens_E = expert_tokens(routing, num_experts)
    wanted = ops.sum(expert_tokens_E)
    p_GSE = ops.stop_gradient(routing.probabilities)
    entropy_GS = -ops.sum(p_GSE * ops.log(ops.maximum(p_GSE, 1e-30)), axis=-1)
    totals = {
        "calls": ops.cast(wanted > 0, "float32"),
        "tokens": ops.sum(valid_GS),
        "wanted": wanted,
        "kept": ops.sum(experts_per_token_GS),
        "untaken": ops.sum(valid_GS * ops.cast(experts_per_token_GS == 0, "float32")),
        "entropy": ops.sum(valid_GS * entropy_GS) / max(np.log(outcomes), 1e-30),
        "max_share": ops.max(expert_tokens_E) * num_experts / ops.maximum(wanted, 1.0),
    }
    return ops.stack([totals[name] for name in TOTALS]), expert_tokens_E


def experts_per_token_histogram(routing):
    """How many tokens are served by 0, 1, ... experts; the paper finds one or two most often.

    Expert Choice (https://arxiv.org/abs/2202.09368). Padding is not counted. Unlike `statistics` it
    is not kept by the layer: `keras_moe.routings` gives the routings of a model to call it with.

    Args:
        routing: a `Routing`.

    Returns:
        `[experts + 1]` int32, which sums to the number of tokens.
    """
    num_experts = routing.probabilities.shape[-1]
    experts_T = ops.cast(_experts_per_token(routing), "int32")
    experts_1T = ops.reshape(experts_T, (1, -1))
    if routing.mask is not None:
        experts_1T = ops.where(ops.reshape(routing.mask, (1, -1)), experts_1T, num_experts + 1)
    return count(experts_1T, num_experts + 1)[0]


def _experts_per_token(routing):
    """How many experts serve each token, all groups pooled; float32."""
    groups, rows, slots = ops.shape(routing.token_index)
    if routing.slot_index is not None:
        return ops.sum(ops.cast(routing.slot_index < rows * slots, "float32"), axis=-1)
    tokens = ops.shape(routing.probabilities)[1]

    def count_slots(token_index_GRC):
        groups = ops.shape(token_index_GRC)[0]
        token_M = ops.reshape(pool_groups(token_index_GRC, tokens), (-1,))
        slots_M1 = add_rows(ops.ones((ops.shape(token_M)[0], 1)), token_M, groups * tokens)
        return ops.reshape(slots_M1, (groups, tokens))

    return by_groups(count_slots, routing.token_index)


def expert_tokens(routing, num_experts=None):
    """How many tokens chose each expert, before any was dropped (or each expert chose).

    Args:
        routing: a `Routing`.
        num_experts: integer; `None`: as many as the routing has probabilities.

    Returns:
        `[experts]` float32.
    """
    num_experts = num_experts or routing.probabilities.shape[-1]
    if routing.expert_index is None:
        taken_GEC = routing.token_index < ops.shape(routing.probabilities)[1]
        return ops.sum(ops.cast(taken_GEC, "float32"), axis=(0, 2))
    choices_1N = ops.reshape(routing.expert_index, (1, -1))
    return ops.cast(count(choices_1N, num_experts)[0], "float32")


def expert_weights(routing, num_experts=None):
    """What the output of each expert is multiplied by for each token.

    For a look at some tokens: this is the table that layers never make.

    Args:
        routing: a `Routing`.
        num_experts: integer; `None`: as many as the routing has probabilities.

    Returns:
        `[groups, tokens, experts]` float32 NumPy array, 0 where an expert does not serve a token.
    """
    groups, tokens, outcomes = routing.probabilities.shape
    num_experts = num_experts or outcomes
    token_GRC, weight_GRC = map(ops.convert_to_numpy, (routing.token_index, routing.weight))
    pools, rows, _ = token_GRC.shape  # one where the routing pooled the groups
    expert_R = np.arange(rows)
    if routing.row_expert is not None:
        expert_R = ops.convert_to_numpy(routing.row_expert)
    size = groups * tokens // pools
    pool, row, slot = np.nonzero(token_GRC < size)
    weight_TE = np.zeros((groups * tokens, num_experts), "float32")
    token = pool * size + token_GRC[pool, row, slot]
    weight_TE[token, expert_R[row]] = weight_GRC[pool, row, slot]
    return weight_TE.reshape(groups, tokens, num_experts)


def figures(totals, expert_tokens, expert_choice=False):
    """The figures that a layer's statistics amount to.

    Args:
        totals: `[7]` array, the sums of `statistics`.
        expert_tokens: `[experts]` array.
        expert_choice: whether experts chose; adds two figures.

    Returns:
        Dictionary of floats. `dropped`: share of the choices that found no free slot, 0 to 1.
        `max_share`: the most chosen expert's choices relative to a fair share, mean over the calls
        that chose any, 1 to the number of experts. `dead`: share of experts that no token chose in
        all that time. `entropy`: of the router's probabilities, mean over tokens, relative to its
        maximum. With expert choice also `untaken`, the share of tokens that no expert took, and
        `experts_per_token`, the mean over tokens. All are 0 when nothing was seen.
    """
    total = dict(zip(TOTALS, np.asarray(totals, "float64").tolist(), strict=True))
    calls, tokens, wanted = (max(total[name], 1.0) for name in ("calls", "tokens", "wanted"))
    result = {
        "dropped": (total["wanted"] - total["kept"]) / wanted,
        "max_share": total["max_share"] / calls,
        "dead": float(np.mean(np.asarray(expert_tokens) == 0)) if total["tokens"] else 0.0,
        "entropy": total["entropy"] / tokens,
    }
    if expert_choice:
        result["untaken"] = total["untaken"] / tokens
        result["experts_per_token"] = total["kept"] / tokens
    return result


def read(layer):
    """The `figures` of what a built `MixtureOfExperts` has seen since they were last reset."""
    totals, expert_tokens = (ops.convert_to_numpy(variable) for variable in layer.statistics)
    return figures(totals, expert_tokens, isinstance(layer.router, ExpertChoiceRouter))
