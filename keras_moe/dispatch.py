"""Moves tokens to their slots and back; knows nothing of how the routing came about.

    dispatch: x_TD, Routing -> [R, G*C, D]        slots[r, g*C + c] = x[token_index[g, r, c]]
    combine:  [R, G*C, D], Routing -> y_TD        y[t] = sum of weight * slots over t's slots

As linear maps the two are each other's transpose, and so each is the other's gradient. When tokens
chose, both are gathers (a token knows its K slots); when experts chose, a token may sit in any
number of slots, and the way back is a sum by token. Nothing of size tokens x experts x dim, nor of
tokens x experts x capacity, is ever made.

G groups, S tokens per group, T = G*S tokens, D width, K slots per token, R rows of slots (the
expert axis), C slots per row, M = R*G*C slots in all.
"""

from keras import ops

from keras_moe.ops import add_rows, as_number, sum_rows, take_rows, with_gradient
from keras_moe.slots import pool_tokens


def dispatch(inputs, routing):
    """Copies each token into its slots; an empty slot holds zeros.

    Args:
        inputs: `[groups, tokens, dim]` tensor.
        routing: a `Routing` of these tokens.

    Returns:
        `[rows, groups * slots, dim]` tensor, one row of slots per expert (per block of one expert's
        slots, where the routing drops nothing).
    """
    groups, tokens, dim = ops.shape(inputs)
    rows = ops.shape(routing.token_index)[1]
    x_TD = ops.reshape(inputs, (groups * tokens, dim))

    def gradients(upstream_MD, x_TD, *places):
        return [lambda: _to_tokens(upstream_MD, ops.shape(x_TD)[0], *places), *[None] * len(places)]

    places = _places(routing, groups, tokens)
    x_MD = with_gradient(_to_slots, gradients)(x_TD, *places)
    return ops.reshape(x_MD, (rows, -1, dim))


def combine(outputs, routing, groups, tokens):
    """Sums each token's slots, times their weights; a token without a slot gets exactly zero.

    Args:
        outputs: `[rows, groups * slots, dim]` tensor, what the experts made of the slots.
        routing: the `Routing` that filled the slots.
        groups: number of groups of tokens.
        tokens: tokens per group.

    Returns:
        `[groups, tokens, dim]` tensor.
    """
    dim = ops.shape(outputs)[-1]

    def weighted_sums(y_MD, weight_M, *places):
        return _to_tokens(y_MD, groups * tokens, *places, weight_M=weight_M)

    def gradients(upstream_TD, y_MD, weight_M, *places):
        upstream_MD = _to_slots(upstream_TD, *places)
        return [
            lambda: upstream_MD * ops.cast(ops.expand_dims(weight_M, 1), upstream_MD.dtype),
            lambda: ops.cast(ops.sum(upstream_MD * y_MD, axis=-1), weight_M.dtype),
            *[None] * len(places),
        ]

    weight_M = ops.reshape(ops.transpose(routing.weight, (1, 0, 2)), (-1,))
    y_MD = ops.reshape(outputs, (-1, dim))
    places = _places(routing, groups, tokens)
    y_TD = with_gradient(weighted_sums, gradients)(y_MD, weight_M, *places)
    return ops.reshape(y_TD, (groups, tokens, dim))


def _to_slots(x_TD, token_M, slot_TK=None):
    return take_rows(x_TD, token_M)


def _to_tokens(x_MD, num_tokens, token_M, slot_TK=None, weight_M=None):
    if slot_TK is not None:
        return sum_rows(x_MD, slot_TK, weight_M)
    if weight_M is not None:
        x_MD = x_MD * ops.cast(ops.expand_dims(weight_M, 1), x_MD.dtype)
    return add_rows(x_MD, token_M, num_tokens)


def _places(routing, groups, tokens):
    """Where tokens and slots lie when the groups are laid end to end.

    Returns:
        Tuple of `token_M`, the token in each slot, T where the slot is empty; and, where tokens
        chose, `slot_TK`, the slots of each token, M where an assignment was dropped.
    """
    token_GRC = pool_tokens(routing.token_index, groups, tokens)
    num_tokens = groups * tokens
    groups, rows, slots = ops.shape(token_GRC)
    token_M = ops.reshape(ops.transpose(token_GRC, (1, 0, 2)), (-1,))
    if routing.slot_index is None:
        return (token_M,)
    k = routing.slot_index.shape[-1]
    slot_GN = ops.reshape(routing.slot_index, (groups, -1))
    row_GN = slot_GN // slots
    group_G1 = ops.arange(groups, dtype="int32")[:, None]
    slot_in_M_GN = (row_GN * groups + group_G1) * slots + slot_GN % slots
    slot_in_M_GN = ops.where(row_GN == rows, as_number(rows * groups * slots), slot_in_M_GN)
    return token_M, ops.reshape(slot_in_M_GN, (num_tokens, k))
