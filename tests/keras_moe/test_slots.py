import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import slots
from tests.backend import compiled, gradients, numpy

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor


class TestCapacity:
    @pytest.mark.parametrize(
        ("tokens", "experts", "factor", "k", "expected"),
        [
            (64, 8, 1.0, 1, 8),
            (64, 8, 1.25, 1, 10),
            (65, 8, 1.0, 1, 9),  # 8.125, rounded up
            (100, 10, 1.1, 1, 11),  # 11.000000000000002 in binary, 11 on paper
            (64, 8, 2.0, 2, 32),
            (96, 8, 4 / 3, 1, 16),
            (3, 8, 0.5, 1, 1),
        ],
    )
    def test_rounds_up(self, tokens, experts, factor, k, expected):
        assert slots.capacity(tokens, experts, factor, k) == expected

    def test_minimum(self):
        assert slots.capacity(8, 8, 1.0, minimum=4) == 4
        assert slots.capacity(80, 8, 1.0, minimum=4) == 10

    @pytest.mark.parametrize(
        ("tokens", "experts", "factor", "k"),
        [(100, 10, 1.1, 1), (8, 8, 1.0, 1), (96, 8, 4 / 3, 1), (131_072, 8, 1.3333, 2)],
    )
    def test_tensor_of_tokens(self, tokens, experts, factor, k):
        if keras.backend.backend() == "jax" and tokens * k * factor * 1e4 > 2**31:
            pytest.skip("JAX knows every shape")
        result = slots.capacity(tensor(tokens, "int32"), experts, factor, k, minimum=4)
        assert ops.dtype(result) == "int32"
        assert int(result) == slots.capacity(tokens, experts, factor, k, minimum=4)


def test_count():
    count = slots.count(tensor([[0, 0, 2], [1, 2, 1]], "int32"), 2)  # 2: nobody
    assert ops.dtype(count) == "int32" and numpy(count).tolist() == [[2, 0], [0, 2]]


def test_by_capacity_keeps_exactly_the_capacity_in_order():
    # Two groups of five assignments to 2 experts (2 marks padding), 2 slots each:
    #   0 0 1 0 1   expert 0: assignments 0, 1 (3 is dropped)    expert 1: 2, 4
    #   1 2 1 1 2   expert 0: none                               expert 1: 0, 2 (3 is dropped)
    table = slots.by_capacity(tensor([[0, 0, 1, 0, 1], [1, 2, 1, 1, 2]], "int32"), 2, 2)
    assignment_index, slot_index, row_expert = numpy(table)
    assert assignment_index.tolist() == [[[0, 1], [2, 4]], [[5, 5], [0, 2]]]
    # Slot r*C + c; 4 = R*C where dropped or padding.
    assert slot_index.tolist() == [[0, 1, 2, 4, 3], [2, 4, 3, 4, 4]]
    assert row_expert is None


def test_by_confidence():
    # Tokens in order of confidence: 2, then 0 before 3, which ties, then 1. Of token s the first
    # choice is assignment 2s, the second 2s + 1; all first choices come before any second.
    order = slots.by_confidence(tensor([[0.5, 0.2, 0.9, 0.5]]), 2)
    assert ops.dtype(order) == "int32"
    assert numpy(order).tolist() == [[4, 0, 6, 2, 5, 1, 7, 3]]


def test_another_order():
    # As above, but the group is seated from its last assignment to its first:
    #   0 0 1 0 1   expert 0: assignments 3, 1 (0 is dropped)    expert 1: 4, 2
    #   1 2 1 1 2   expert 0: none                               expert 1: 3, 2 (0 is dropped)
    index = tensor([[0, 0, 1, 0, 1], [1, 2, 1, 1, 2]], "int32")
    backwards = tensor([[4, 3, 2, 1, 0]] * 2, "int32")
    table = numpy(slots.by_capacity(index, 2, 2, backwards))
    assert table.assignment_index.tolist() == [[[3, 1], [4, 2]], [[5, 5], [3, 2]]]
    assert table.slot_index.tolist() == [[4, 1, 3, 0, 2], [4, 4, 3, 2, 4]]
    rows = numpy(slots.by_rows(index, 2, 2, backwards))
    kept = rows.slot_index[0] < np.prod(rows.assignment_index.shape)
    assert np.flatnonzero(kept).tolist() == [1, 2, 3, 4, 7, 8]
    for assignment in np.flatnonzero(kept):
        slot = rows.slot_index[0, assignment]
        assert rows.assignment_index.reshape(-1)[slot] == assignment


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_by_rows_seats_every_assignment_once_with_its_expert(data):
    num_experts = data.draw(st.sampled_from([1, 5]))
    length = data.draw(st.sampled_from([1, 48]))  # few shapes: JAX compiles for each
    index = data.draw(st.lists(st.integers(0, num_experts), min_size=length, max_size=length))
    table = numpy(slots.by_rows(tensor([index], "int32"), num_experts))
    (assignment_RC,), (slot_N,), row_expert_R = table
    rows, size = assignment_RC.shape
    for n, expert in enumerate(index):
        if expert == num_experts:
            assert slot_N[n] == rows * size
        else:
            assert assignment_RC.reshape(-1)[slot_N[n]] == n
            assert row_expert_R[slot_N[n] // size] == expert
    assert np.sum(assignment_RC < len(index)) == sum(e < num_experts for e in index)
    for expert in range(num_experts):  # token order is kept within an expert
        seated = assignment_RC[row_expert_R == expert].reshape(-1)
        seated = seated[seated < len(index)]
        assert seated.tolist() == sorted(seated.tolist())


@pytest.mark.parametrize("assignments", [1, 2, 16, 1000, 8192])
def test_by_rows_wastes_little(assignments):
    """Rows are the work to be done: few tokens touch few experts, many waste at most half."""
    table = slots.by_rows(ops.zeros((1, assignments), "int32"), 8)
    _, rows, size = ops.shape(table.assignment_index)
    assert rows * size <= assignments if assignments <= 8 else rows * size <= 1.5 * assignments


def test_reroute_seats_in_rounds():
    # One slot for each of three experts; the lists of the tokens, the last one padding:
    #   0 1 2    0 1 2    0 2 1    1 0 2    3 . .
    # Round 1: token 0 gets expert 0, token 3 expert 1. Round 2: token 1 finds 1 full, too, and
    # token 2 gets 2. Round 3: token 1 finds 2 full.
    wish = tensor([[[0, 1, 2], [0, 1, 2], [0, 2, 1], [1, 0, 2], [3, 0, 1]]], "int32")
    for rounds, expected in ((1, [0, 3, 3, 1, 3]), (2, [0, 3, 2, 1, 3]), (3, [0, 3, 2, 1, 3])):
        assert numpy(slots.reroute(wish[..., :rounds], 3, 1)).tolist() == [expected]
    assert numpy(slots.reroute(wish, 3, 2)).tolist() == [[0, 0, 2, 1, 3]]
    assert ops.dtype(slots.reroute(wish, 3, 2)) == "int32"


def test_reroute_leaves_no_slot_empty_that_a_token_asks_for():
    """With as many rounds as experts a token stands only where every expert is full."""
    rng = np.random.default_rng(0)
    wish = np.argsort(rng.normal(size=(5, 12, 4)) - [1, 0, 0, 0], axis=-1).astype("int32")
    expert = numpy(slots.reroute(tensor(wish), 4, tensor(2, "int32")))
    count = numpy(slots.count(tensor(expert), 4))
    assert (count == 2).all() and (np.sum(expert == 4, axis=1) == 12 - 8).all()


def test_by_score_takes_the_best_and_never_padding():
    # Expert 0 scores tokens .9 .8 .7 .1, expert 1 .1 .2 .3 .9; the last token is padding.
    score = tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]], "float32")
    mask = tensor([[True, True, True, False]])
    token, weight = numpy(slots.by_score(score, 2, mask))
    assert token.tolist() == [[[0, 1], [2, 1]]]
    np.testing.assert_allclose(weight, [[[0.9, 0.8], [0.3, 0.2]]], rtol=1e-6)
    token, weight = numpy(slots.by_score(score, 4, mask))
    assert token.tolist() == [[[0, 1, 2, 4], [2, 1, 0, 4]]]  # 4 = S: the slot is empty
    assert weight[0, :, 3].tolist() == [0.0, 0.0]


def test_by_score_breaks_ties_by_position():
    token, _ = numpy(slots.by_score(ops.full((1, 40, 3), 1 / 3), 5))
    assert token.tolist() == [[[0, 1, 2, 3, 4]] * 3]


@pytest.mark.parametrize("linear_programme", [False, True])
def test_by_score_under_a_cap(linear_programme):
    # All three experts want token 0 most, then their own token: token 0 keeps its best offer.
    score = tensor([[[0.9, 0.8, 0.7], [0.1, 0.5, 0.1], [0.1, 0.1, 0.5]]], "float32")
    token, weight = numpy(slots.by_score(score, 1, None, 1, linear_programme))
    assert token.tolist() == [[[0], [1], [2]]]
    np.testing.assert_allclose(weight, [[[0.9], [0.5], [0.5]]], rtol=1e-6)
    token, _ = numpy(slots.by_score(score, 1, None, 3, linear_programme))
    assert token.tolist() == [[[0], [0], [0]]]
    # Two slots each, five seats in all where the middle token is padding: one stays empty.
    mask = tensor([[True, False, True]])
    token, weight = numpy(slots.by_score(score, 2, mask, 2, linear_programme))
    assert np.bincount(token.reshape(-1), minlength=4).tolist() == [2, 0, 2, 2]
    assert (weight[token == 3] == 0).all()


def test_look_up_and_pool_groups():
    value = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")
    index = tensor([[[2, 0]], [[3, 1]]], "int32")  # 3 = N: empty
    assert numpy(slots.look_up(value, index)).tolist() == [[[3.0, 1.0]], [[0.0, 5.0]]]
    assert numpy(slots.pool_groups(index, 3)).tolist() == [[[2, 0]], [[6, 4]]]


def test_tables_compile():
    """XLA may choose longer rows, but the same assignments sit in the same order."""
    index = tensor(np.random.default_rng(0).integers(0, 5, (3, 20)).astype("int32"))
    for table, arguments in ((slots.by_capacity, (4, 6)), (slots.by_rows, (4,))):

        def seated(indices):
            assignment_index, slot_index = (t.reshape(len(t), -1) for t in numpy(indices))
            for held, slot in zip(assignment_index, slot_index, strict=True):
                kept = slot < len(held)
                np.testing.assert_array_equal(held[slot[kept]], np.flatnonzero(kept))
            return [held[held < slot_index.shape[1]].tolist() for held in assignment_index]

        def indices(index, table=table, arguments=arguments):
            return tuple(table(index, *arguments)[:2])

        assert seated(indices(index)) == seated(compiled(indices)(index))


def test_selection_has_no_gradient_but_scores_do():
    # Expert 0 takes tokens 0 and 1, expert 1 takes token 2 and token 0, by its lower number.
    score = np.array([[[0.9, 0.1], [0.8, 0.1], [0.3, 0.7]]])
    layer = keras.layers.Lambda(lambda x: slots.by_score(x, 2)[1])
    layer.build(score.shape)
    by_score, _ = gradients(layer, score, [[[1.0, 2.0], [4.0, 8.0]]])
    assert by_score.tolist() == [[[1.0, 8.0], [2.0, 0.0], [0.0, 4.0]]]
