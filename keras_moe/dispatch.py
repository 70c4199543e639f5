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

from typing import Any, NamedTuple

from keras import ops

from keras_moe.ops import add_rows, sum_rows, take_rows, with_gradient
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
    seats = _seats(routing, groups * tokens)
    x_TD = ops.reshape(inputs, (groups * tokens, dim))

    def gradients(upstream_MD, _):
        return [lambda: seats.to_tokens(upstream_MD)]

    x_MD = with_gradient(seats.to_slots, gradients)(x_TD)
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
    seats = _seats(routing, groups * tokens)

    def gradients(upstream_TD, y_MD, weight_M):
        upstream_MD = seats.to_slots(upstream_TD)
        return (
            lambda: upstream_MD * ops.cast(weight_M[:, None], upstream_MD.dtype),
            lambda: ops.cast(ops.sum(upstream_MD * y_MD, axis=-1), weight_M.dtype),
        )

    weight_M = ops.reshape(ops.transpose(routing.weight, (1, 0, 2)), (-1,))
    y_MD = ops.reshape(outputs, (-1, dim))
    y_TD = with_gradient(seats.to_tokens, gradients)(y_MD, weight_M)
    return ops.reshape(y_TD, (groups, tokens, dim))


class _Seats(NamedTuple):
    """Who sits where, all groups laid end to end: the two linear maps of the file's heading."""

    token_M: Any  # the token in each slot; T where it is empty
    slot_TK: Any  # the slot of each choice; M where it was dropped; None: experts chose
    num_tokens: Any

    def to_slots(self, x_TD):
        return take_rows(x_TD, self.token_M)

    def to_tokens(self, x_MD, weight_M=None):
        if self.slot_TK is not None:
            return sum_rows(x_MD, self.slot_TK, weight_M)
        if weight_M is not None:
            x_MD = x_MD * ops.cast(weight_M[:, None], x_MD.dtype)
        return add_rows(x_MD, self.token_M, self.num_tokens)


def _seats(routing, num_tokens):
    groups, rows, slots = ops.shape(routing.token_index)  # one group where the routing pooled them
    token_GRC = pool_groups(routing.token_index, num_tokens // groups)
    token_M = ops.reshape(ops.transpose(token_GRC, (1, 0, 2)), (-1,))
    if routing.slot_index is None:
        return _Seats(token_M, None, num_tokens)
    k = routing.slot_index.shape[-1]
    slot_GN = ops.reshape(routing.slot_index, (groups, -1))
    row_GN = slot_GN // slots
    group_G1 = ops.arange(groups, dtype="int32")[:, None]
    slot_in_M_GN = (row_GN * groups + group_G1) * slots + slot_GN % slots
    slot_in_M_GN = ops.where(row_GN == rows, rows * groups * slots, slot_in_M_GN)
    return _Seats(token_M, ops.reshape(slot_in_M_GN, (num_tokens, k)), num_tokens)
