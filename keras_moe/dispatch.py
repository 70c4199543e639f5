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

from keras_moe.ops import add_rows, take_rows, with_gradient
from keras_moe.slots import pool_groups


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
    _, rows, slots = ops.shape(routing.token_index)
    to_slots, to_tokens = _moves(routing, groups * tokens)
    x_TD = ops.reshape(inputs, (groups * tokens, dim))
    x_MD = with_gradient(to_slots, lambda upstream, _: to_tokens(upstream))(x_TD)
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
    to_slots, to_tokens = _moves(routing, groups * tokens)
    weight_M1 = ops.reshape(ops.transpose(routing.weight, (1, 0, 2)), (-1, 1))
    y_MD = ops.reshape(outputs, (-1, dim)) * ops.cast(weight_M1, outputs.dtype)
    y_TD = with_gradient(to_tokens, lambda upstream, _: to_slots(upstream))(y_MD)
    return ops.reshape(y_TD, (groups, tokens, dim))


def _moves(routing, num_tokens):
    """The two linear maps between tokens `[T, D]` and slots `[M, D]`."""
    groups, rows, slots = ops.shape(routing.token_index)  # one group where the routing pooled them
    token_GRC = pool_groups(routing.token_index, num_tokens // groups)
    token_M = ops.reshape(ops.transpose(token_GRC, (1, 0, 2)), (-1,))

    def to_slots(x_TD):
        return take_rows(x_TD, token_M)

    if routing.slot_index is None:
        return to_slots, lambda x_MD: add_rows(x_MD, token_M, num_tokens)

    k = routing.slot_index.shape[-1]
    slot_GN = ops.reshape(routing.slot_index, (groups, -1))
    row_GN = slot_GN // slots
    group_G1 = ops.arange(groups, dtype="int32")[:, None]
    slot_in_M_GN = (row_GN * groups + group_G1) * slots + slot_GN % slots
    slot_in_M_GN = ops.where(row_GN == rows, rows * groups * slots, slot_in_M_GN)
    slot_TK = ops.reshape(slot_in_M_GN, (num_tokens, k))

    def to_tokens(x_MD):
        return sum(take_rows(x_MD, slot_TK[:, choice]) for choice in range(k))

    return to_slots, to_tokens
