"""Experts choose tokens, and no token is shared by more than so many of them.

G groups, S tokens per group, E experts. A token that is padding has wishes below zero.
"""

import math

from keras import ops

from keras_moe.ops import as_number, check_can_loop, take_entries, top_k


def capped_choice(wish_GES, capacity, cap, by_programme=False):
    """Which tokens each expert takes under a cap: all of its `capacity`, wherever that is possible.

    In rounds. Experts that are short ask for the best tokens that still have room; of the experts
    that ask, a token takes those with the highest scores, as many as it has room for, and keeps
    them. When an expert is short and holds every token with room itself, another expert gives it
    one of its own and takes such a token instead, at the least cost. Like that every expert gets
    its full capacity if only `experts * capacity <= tokens * cap`; if not, every token ends with
    `cap` experts. Equal scores go to the earlier token and to the lower expert.

    Args:
        wish_GES: `[groups, experts, tokens]` scores, without gradient.
        capacity: tokens per expert and group.
        cap: most experts per token, less than there are experts.
        by_programme: whether the first round asks in the order of `linear_programme`, not in that
            of the scores.

    Returns:
        `[groups, experts, tokens]` booleans.
    """
    check_can_loop(wish_GES, "`max_experts_per_token`")
    valid_G1S = wish_GES[:, :1] >= 0

    def short(taken_GES):  # [G, E, 1]
        return capacity - _count(taken_GES, axis=2)

    def room(taken_GES):  # [G, 1, S]
        return ops.where(valid_G1S, cap - _count(taken_GES, axis=1), 0)

    def open_to(taken_GES):
        return ~taken_GES & (room(taken_GES) > 0)

    def ask(taken_GES, order_GES):
        open_GES = open_to(taken_GES)
        order_GES = ops.where(open_GES, order_GES, -math.inf)
        asked_GES = open_GES & _best(order_GES, short(taken_GES), capacity)
        offer_GSE = ops.transpose(ops.where(asked_GES, wish_GES, -math.inf), (0, 2, 1))
        room_GS1 = ops.transpose(room(taken_GES), (0, 2, 1))
        kept_GES = ops.transpose(_best(offer_GSE, room_GS1, cap), (0, 2, 1))
        return taken_GES | (asked_GES & kept_GES)

    def can_ask(taken_GES):
        return ops.any(open_to(taken_GES) & (short(taken_GES) > 0))

    def is_stuck(taken_GES):
        short_G11 = ops.max(short(taken_GES), axis=1, keepdims=True)
        return (short_G11 > 0) & (ops.max(room(taken_GES), axis=2, keepdims=True) > 0)

    def swap(taken_GES):
        # Expert i is short and holds t, a token with room; expert m gives it s and takes t.
        i_GE1 = _first_largest(short(taken_GES))
        of_i_G1S = ops.max(ops.where(i_GE1, wish_GES, -math.inf), axis=1, keepdims=True)
        t_G1S = _first_largest(ops.where(room(taken_GES) > 0, of_i_G1S, -math.inf))
        of_t_GE1 = ops.max(ops.where(t_G1S, wish_GES, -math.inf), axis=2, keepdims=True)
        i_has_G1S = ops.any(taken_GES & i_GE1, axis=1, keepdims=True)
        has_t_GE1 = ops.any(taken_GES & t_G1S, axis=2, keepdims=True)
        gain_GES = ops.where(
            taken_GES & ~i_has_G1S & ~has_t_GE1, of_i_G1S + of_t_GE1 - wish_GES, -math.inf
        )
        ms_GES = _first_largest(gain_GES)
        m_GE1 = ops.any(ms_GES, axis=2, keepdims=True)
        s_G1S = ops.any(ms_GES, axis=1, keepdims=True)
        changes_GES = ms_GES | (m_GE1 & t_G1S) | (i_GE1 & s_G1S)
        return ops.logical_xor(taken_GES, changes_GES & is_stuck(taken_GES))

    order_GES = wish_GES
    if by_programme:
        order_GES = linear_programme(wish_GES, valid_G1S, capacity, cap)
    taken_GES = ask(ops.zeros_like(wish_GES, dtype="bool"), order_GES)
    taken_GES = ops.while_loop(can_ask, lambda taken_GES: ask(taken_GES, wish_GES), taken_GES)
    return ops.while_loop(lambda taken_GES: ops.any(is_stuck(taken_GES)), swap, taken_GES)


def linear_programme(score_GES, valid_G1S, capacity, cap, temperature=1e-3, iterations=100):
    """The order in which experts want tokens, by the paper's entropy-regularised programme.

    `max <S, A> + temperature * H(A)`, where every expert's row of `A` sums to the capacity, every
    token's column to `cap` at most, and `0 <= A <= 1`. Expert Choice
    (https://arxiv.org/abs/2202.09368), section 3.3, with its temperature and number of iterations:
    Dykstra's algorithm projects `exp(S / temperature)` on the three sets in turn, here in
    logarithms, since `S / temperature` reaches 1,000. Experts then take the largest entries of
    their rows. So many iterations need not be enough, and the entries need not be near 0 or 1: the
    cap is `capped_choice`'s to keep.

    Args:
        score_GES: `[groups, experts, tokens]` scores from 0 to 1.
        valid_G1S: `[groups, 1, tokens]` booleans, `False` for padding.
        capacity: tokens per expert and group.
        cap: most experts per token.
        temperature: lambda in the paper.
        iterations: number of rounds of three projections.

    Returns:
        `[groups, experts, tokens]` tensor `y` with `A = exp(min(y, 0))`. Where `A` is at its bound
        of 1, `y` tells how far the bound is exceeded without the last projection, so that entries
        at the bound are no ties.
    """
    log_capacity, log_cap = ops.log(ops.cast(as_number(capacity), "float32")), math.log(cap)

    def project(_, state):
        y_GES, column_G1S = state
        a_GES = ops.minimum(y_GES, 0.0)
        a_GES = a_GES + log_capacity - ops.logsumexp(a_GES, axis=2, keepdims=True)
        a_GES = a_GES + column_G1S  # Dykstra: what the last projection took is given back first
        column_G1S = ops.maximum(ops.logsumexp(a_GES, axis=1, keepdims=True) - log_cap, 0.0)
        return a_GES - column_G1S + ops.maximum(y_GES, 0.0), column_G1S

    score_GES = ops.where(valid_G1S, score_GES, 0.0)
    best_GE1 = ops.max(score_GES, axis=2, keepdims=True)  # the first projection is free of scale
    y_GES = ops.where(valid_G1S, (score_GES - best_GE1) / temperature, -1e9)
    state = (y_GES, ops.zeros_like(y_GES[:, :1]))
    return ops.fori_loop(0, iterations, project, state)[0]


def _count(x, axis):
    return ops.sum(ops.cast(x, "int32"), axis=axis, keepdims=True)


def _best(x, count, most):
    """Which entries of the last axis are among its `count` largest; equal ones in order of place.

    Args:
        x: `[..., n]` tensor.
        count: `[..., 1]` integers, `most` at most.
        most: integer, at most `n`.
    """
    values, index = top_k(x, most)
    last = ops.maximum(count - 1, 0)
    value, place = (take_entries(of, last, axis=-1) for of in (values, index))
    tied = (x == value) & (ops.arange(ops.shape(x)[-1], dtype="int32") <= place)
    return ((x > value) | tied) & (count > 0)


def _first_largest(x_GES):
    """The place of each group's largest entry, as booleans; the first one if there are several."""
    flat_GN = ops.reshape(x_GES, (ops.shape(x_GES)[0], -1))
    first_G1 = ops.cast(ops.argmax(flat_GN, axis=1, keepdims=True), "int32")
    is_it_GN = ops.arange(ops.shape(flat_GN)[1], dtype="int32") == first_G1
    return ops.reshape(is_it_GN, ops.shape(x_GES))
