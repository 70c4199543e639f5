"""Who sits where: tables of slots, filled from tokens' choices or from experts' choices.

G groups, S tokens per group, K experts per token, N = S*K assignments per group, E experts,
R rows of slots, C slots per row. Every row belongs to one expert. Either there is one row of the
capacity's length per expert (R = E) and an assignment that finds its expert's row full is dropped;
or an expert has as many rows as its assignments need.

Selection has no gradient: all of this file is integers, except the scores that experts choose by.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

from keras import ops

from keras_moe.capped import capped_choice
from keras_moe.ops import (
    argsort,
    as_number,
    count_entries,
    largest,
    row_size,
    smallest,
    take_entries,
    take_rows,
    top_k,
    write_entries,
)


class Slots(NamedTuple):
    """A table of slots, read in both directions."""

    assignment_index: Any  # [G, R, C] the assignment in each slot; N where the slot is empty
    slot_index: Any  # [G, N] the slot r*C + c of each assignment; R*C where it was dropped
    row_expert: Any  # [R] expert of each row, E: nobody's; None when row e is expert e's


def capacity(tokens, num_experts, factor, k=1, minimum=1):
    """Slots per expert and group: `max(minimum, ceil(tokens * k * factor / num_experts))`.

    Switch Transformers (https://arxiv.org/abs/2101.03961), Eq. 3, times `k`; the paper's has none,
    since its `k` is 1. It leaves the rounding open, here it is always up. The factor is taken as
    the decimal that was written, not as its binary neighbour: 100 tokens, 10 experts and 1.1 make
    11 slots, not 12; it counts to four decimals.

    Args:
        tokens: tokens per group, padding included; an integer, or a scalar tensor where the shape
            is not known before run time.
        num_experts: integer.
        factor: capacity factor, not negative; with 0 the minimum is the capacity.
        k: experts per token.
        minimum: fewest slots.

    Returns:
        An integer, or a scalar tensor where `tokens` is one.
    """
    factor = Fraction(str(factor)).limit_denominator(10**4)  # 4 / 3 has too many decimals
    if ops.is_tensor(tokens):
        tokens = ops.cast(tokens, "int64")
    slots = -(-tokens * k * factor.numerator // (num_experts * factor.denominator))
    slots = largest(minimum, slots)
    return ops.cast(slots, "int32") if ops.is_tensor(slots) else slots


def by_confidence(confidence_GS, k):
    """The order in which the most confident tokens sit first, for `by_capacity` and `by_rows`.

    All first choices come before any second choice, and within them the more confident token before
    the less; equal ones in token order. Batch Prioritized Routing of V-MoE
    (https://arxiv.org/abs/2106.05974), section 4.

    Args:
        confidence_GS: `[groups, tokens]` numbers.
        k: choices per token.

    Returns:
        `[groups, tokens * k]` int32: the assignments, token `s`'s choice `i` being `s * k + i`.
    """
    groups, tokens = ops.shape(confidence_GS)
    token_GS = argsort(-confidence_GS)
    choice_K1 = ops.arange(k, dtype="int32")[:, None]
    return ops.reshape(token_GS[:, None] * k + choice_K1, (groups, tokens * k))


def by_capacity(expert_index_GN, num_experts, capacity, order_GN=None):
    """Seats assignments in their order, `capacity` at most per expert and group.

    Args:
        expert_index_GN: `[groups, assignments]` integers; `num_experts` marks an assignment that
            takes no slot (padding).
        num_experts: integer.
        capacity: slots per expert and group.
        order_GN: `[groups, assignments]` integers, the assignments in the order in which they are
            seated; `None`: in their own.

    Returns:
        `Slots` with `R = num_experts` rows of `capacity` slots.
    """
    groups = ops.shape(expert_index_GN)[0]
    rank_GN, _ = _rank(expert_index_GN, num_experts, order_GN)
    kept_GN = (rank_GN < capacity) & (expert_index_GN < num_experts)
    slot_GN = ops.where(
        kept_GN, expert_index_GN * capacity + rank_GN, as_number(num_experts * capacity)
    )
    assignment_GM = _inverse(slot_GN, num_experts * capacity)
    return Slots(ops.reshape(assignment_GM, (groups, num_experts, capacity)), slot_GN, None)


def by_rows(expert_index_GN, num_experts, capacity=None, order_GN=None):
    """Seats assignments sorted by expert, each expert in as many rows as it needs.

    The shapes do not depend on the routing, so that it compiles: `m` experts with `N` assignments
    among them need at most `(N - m) // C + m` rows of `C` slots.

    Args:
        expert_index_GN: `[groups, assignments]` integers; `num_experts` marks padding.
        num_experts: integer.
        capacity: slots per expert and group; `None` drops nothing.
        order_GN: see `by_capacity`.

    Returns:
        `Slots` of one group (the groups share their rows), so `assignment_index` is `[1, R, C]`
        and `slot_index` `[1, G*N]`. Rows that are left over are of expert `num_experts`.
    """
    assignments = math.prod(ops.shape(expert_index_GN))
    size = row_size(assignments, num_experts)
    if capacity is None and isinstance(size, int) and size == 1:
        return _by_single_rows(expert_index_GN, num_experts, assignments)
    rank_GN, count_GE = _rank(expert_index_GN, num_experts, order_GN)
    if capacity is not None:
        expert_index_GN = ops.where(rank_GN < capacity, expert_index_GN, num_experts)
        count_GE = ops.minimum(count_GE, capacity)
    busy = smallest(num_experts, assignments)
    num_rows = (assignments - busy) // size + busy

    rows_E = (ops.sum(count_GE, axis=0) + size - 1) // size
    row_end_E = ops.cumsum(rows_E)
    # The expert of a row is the number of experts whose rows end before it.
    ends_R = count_entries(ops.minimum(row_end_E, as_number(num_rows)), num_rows + 1)[:-1]
    row_expert_R = ops.cumsum(ends_R)

    earlier_GE = ops.cumsum(count_GE, axis=0) - count_GE  # of the groups before
    start_GE = (row_end_E - rows_E) * size + earlier_GE
    slot_GN = _of_experts(start_GE, expert_index_GN) + rank_GN
    slot_GN = ops.where(expert_index_GN < num_experts, slot_GN, as_number(num_rows * size))
    slot_1N = ops.reshape(slot_GN, (1, assignments))
    assignment_1RC = ops.reshape(_inverse(slot_1N, num_rows * size), (1, num_rows, size))
    return Slots(assignment_1RC, slot_1N, ops.cast(row_expert_R, "int32"))


def _by_single_rows(expert_index_GN, num_experts, assignments):
    """`by_rows` where a row is one slot and nothing is dropped: the assignments, sorted."""
    expert_1N = ops.reshape(ops.cast(expert_index_GN, "int32"), (1, assignments))
    sorted_1N = argsort(expert_1N)
    row_expert_1R = take_entries(expert_1N, sorted_1N, axis=1)
    nowhere = as_number(assignments)
    slot_1N = ops.where(expert_1N < num_experts, _inverse(sorted_1N, assignments), nowhere)
    assignment_1R = ops.where(row_expert_1R < num_experts, sorted_1N, nowhere)
    return Slots(assignment_1R[..., None], slot_1N, row_expert_1R[0])


def reroute(wish_GSK, num_experts, capacity, order_GS=None):
    """Seats tokens in rounds: one that finds an expert full asks the next on its list.

    Round k seats those that the rounds before left standing; nobody loses a seat.

    Args:
        wish_GSK: `[groups, tokens, k]` integers, the experts that each token asks, in this order;
            `num_experts` as the first marks padding.
        num_experts: integer.
        capacity: slots per expert and group.
        order_GS: `[groups, tokens]` integers, the order in which tokens are seated; `None`: their
            own.

    Returns:
        `[groups, tokens]` int32, the expert that took each token; `num_experts`: none.
    """
    groups, tokens, k = ops.shape(wish_GSK)
    padding_GS = wish_GSK[..., 0] == num_experts
    expert_GS = ops.full((groups, tokens), num_experts, dtype="int32")
    taken_GE = ops.zeros((groups, num_experts), dtype="int32")
    for choice in range(k):
        stands_GS = (expert_GS == num_experts) & ~padding_GS
        asked_GS = ops.where(stands_GS, wish_GSK[..., choice], num_experts)
        rank_GS, count_GE = _rank(asked_GS, num_experts, order_GS)
        seated_GS = rank_GS + _of_experts(taken_GE, asked_GS) < capacity
        expert_GS = ops.where(stands_GS & seated_GS, asked_GS, expert_GS)
        taken_GE = taken_GE + count_GE  # of a full expert any number above its capacity
    return expert_GS


def by_score(score_GSE, capacity, mask_GS=None, max_experts_per_token=None, linear_programme=False):
    """Lets every expert take its `capacity` best tokens.

    Expert Choice (https://arxiv.org/abs/2202.09368), Eq. 2. Padding is never taken. Equal scores go
    to the earlier token.

    Args:
        score_GSE: `[groups, tokens, experts]` non-negative scores.
        capacity: tokens per expert and group.
        mask_GS: `[groups, tokens]` booleans, `False` for padding.
        max_experts_per_token: most experts that may share a token, see `capped_choice`; `None` for
            no cap.
        linear_programme: whether the paper's linear programme has its say in who shares a token
            when there is a cap.

    Returns:
        Tuple of `token_index` and `score`, both `[groups, experts, capacity]`; an empty slot has
        token index S and score 0.
    """
    score_GES = ops.transpose(score_GSE, (0, 2, 1))
    num_experts, tokens = score_GSE.shape[2], ops.shape(score_GSE)[1]
    wish_GES = ops.stop_gradient(score_GES)
    if mask_GS is not None:
        wish_GES = ops.where(mask_GS[:, None, :], wish_GES, -1.0)
    if max_experts_per_token is not None and max_experts_per_token < num_experts:
        taken_GES = capped_choice(wish_GES, capacity, max_experts_per_token, linear_programme)
        wish_GES = ops.where(taken_GES, wish_GES, -1.0)
    wish_GEC, token_index_GEC = top_k(wish_GES, capacity)
    score_GEC = take_entries(score_GES, token_index_GEC, axis=2)
    taken_GEC = wish_GEC >= 0
    return (
        ops.where(taken_GEC, token_index_GEC, as_number(tokens)),
        ops.where(taken_GEC, score_GEC, 0.0),
    )


def pool_groups(index, size):
    """Positions within each group as positions in all groups laid end to end.

    Args:
        index: `[groups, ...]` integers in `[0, size]`.
        size: entries per group; `size` itself marks no entry.

    Returns:
        Integers of the same shape in `[0, groups * size]`; the last again marks none.
    """
    groups = ops.shape(index)[0]
    group = ops.arange(groups, dtype="int32")
    group = ops.reshape(group, (-1,) + (1,) * (len(index.shape) - 1))
    return ops.where(index == size, as_number(groups * size), index + group * size)


def pool_tokens(token_index, groups, tokens):
    """The tokens in the slots of a `Routing`, as positions in all groups laid end to end.

    Args:
        token_index: `[groups, rows, slots]` integers in `[0, tokens]`; `[1, rows, slots]` in
            `[0, groups * tokens]` where the routing pooled the groups.
        groups: number of groups of tokens.
        tokens: tokens per group.

    Returns:
        Integers of the same shape in `[0, groups * tokens]`; the last marks an empty slot.
    """
    own_groups = ops.shape(token_index)[0]
    is_one = isinstance(own_groups, int) and own_groups == 1
    return pool_groups(token_index, groups * tokens if is_one else tokens)


def look_up(value_GN, assignment_index_GRC):
    """The assignments' values in their slots, `[groups, rows, slots]`; 0 where a slot is empty."""
    index_GRC = pool_groups(assignment_index_GRC, ops.shape(value_GN)[1])
    return take_rows(ops.reshape(value_GN, (-1, 1)), index_GRC)[..., 0]


def count(expert_index_GN, num_experts):
    """Assignments of each expert in each group, `[groups, experts]` int32.

    Args:
        expert_index_GN: `[groups, assignments]` integers in `[0, num_experts]`; the last is nobody.
        num_experts: integer.
    """
    groups = ops.shape(expert_index_GN)[0]
    expert_M = ops.reshape(pool_groups(expert_index_GN, num_experts), (-1,))
    count_M = count_entries(expert_M, groups * num_experts + 1)
    return ops.reshape(count_M[:-1], (groups, num_experts))


def _rank(expert_index_GN, num_experts, order_GN=None):
    """How many assignments that its group seats earlier went to the same expert.

    Returns:
        Tuple of the rank `[G, N]`, of no meaning for padding, and the assignments per expert
        `[G, E]`; int32 each.
    """
    if order_GN is None:
        sorted_GN = argsort(expert_index_GN)
    else:
        place_GN = argsort(take_entries(expert_index_GN, order_GN, axis=1))
        sorted_GN = take_entries(order_GN, place_GN, axis=1)
    sorted_at_GN = _inverse(sorted_GN, ops.shape(sorted_GN)[1])
    count_GE = count(expert_index_GN, num_experts)
    first_GE = ops.cumsum(count_GE, axis=1) - count_GE
    return sorted_at_GN - _of_experts(first_GE, expert_index_GN), count_GE


def _of_experts(value_GE, expert_index_GN):
    """Each assignment's expert's value; any for padding."""
    expert_GN = ops.minimum(expert_index_GN, value_GE.shape[1] - 1)
    return take_entries(value_GE, expert_GN, axis=1)


def _inverse(place_GN, size):
    """The entry in each place: `result[g, place_GN[g, n]] = n`, and N where there is none.

    Args:
        place_GN: `[groups, entries]` different integers in `[0, size)`, or `size`: nowhere.
        size: places per group.

    Returns:
        `[groups, size]` int32.
    """
    groups, entries = ops.shape(place_GN)
    place_M = ops.reshape(pool_groups(place_GN, size), (-1,))
    entry_GN = ops.broadcast_to(ops.arange(entries, dtype="int32"), (groups, entries))
    entry_M = ops.reshape(entry_GN, (-1,))
    written_M = write_entries(entry_M, place_M, groups * size + 1, empty=entries)
    return ops.reshape(written_M[:-1], (groups, size))
