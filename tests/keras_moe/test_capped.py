import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from scipy.optimize import linprog

from keras_moe.capped import capped_choice, linear_programme
from tests import oracle
from tests.backend import compiled, numpy

pytestmark = pytest.mark.every_backend

tensor = ops.convert_to_tensor
PROGRAMME = pytest.mark.parametrize("by_programme", [False, True], ids=["greedy", "programme"])


def scores(seed, tokens, experts, scale=2.0):
    """Of one group, `[tokens, experts]` float32."""
    logits = scale * np.random.default_rng(seed).normal(size=(tokens, experts))
    return oracle.softmax(logits).astype("float32")


@functools.cache  # JAX would compile the loops at every call
def chooser(capacity, cap, by_programme):
    return compiled(lambda wish_GES: capped_choice(wish_GES, capacity, cap, by_programme))


def choose(p_SE, capacity, cap, by_programme=False, valid=None):
    wish_ES = p_SE.T if valid is None else np.where(valid, p_SE.T, -1.0)
    return numpy(chooser(capacity, cap, by_programme)(tensor(wish_ES[None], "float32")))[0]


def taken_by(rows):
    """Each expert's tokens, in order."""
    return [np.flatnonzero(row).tolist() for row in rows]


@PROGRAMME
def test_who_is_refused_takes_its_next_best(by_programme):
    # All three experts want token 0 most, then their own token. With cap 1 and one slot each, token
    # 0 keeps its best offer (expert 0) and the other two get their second wish, not an empty slot.
    p = np.array([[0.9, 0.8, 0.7], [0.1, 0.5, 0.1], [0.1, 0.1, 0.5]])
    assert taken_by(choose(p, 1, 1, by_programme)) == [[0], [1], [2]]


def test_a_swap_fills_the_last_seats():
    # Two slots each, cap 2, so that all six seats of the three tokens must be taken. All want
    # tokens 0 and 1, which keep experts 0 and 1. Expert 2 gets token 2, and once more: it can not.
    # Expert 0 gives it token 0 and takes token 2 (.1 - .5 + .3 = -.1; token 1 for it: .1 - .5 + .2;
    # expert 1 would give up .6 each time).
    p = np.array([[0.5, 0.6, 0.3], [0.5, 0.6, 0.2], [0.1, 0.1, 0.1]])
    assert taken_by(choose(p, 2, 2)) == [[1, 2], [0, 1], [0, 2]]


def test_the_programme_looks_ahead():
    # One slot each and cap 1. Greedily expert 0 gets token 0 (.50), and expert 1 is left with token
    # 1 (.40), .90 in all; .48 + .47 is more. (A hundred iterations raise the price of token 0 by
    # 100 * .001 * log 2 = .07 at most, enough to outweigh the .02 that expert 0 loses.)
    p = np.array([[0.50, 0.47], [0.48, 0.40]])
    assert taken_by(choose(p, 1, 1)) == [[0], [1]]
    assert taken_by(choose(p, 1, 1, by_programme=True)) == [[1], [0]]


# tokens, experts, capacity, cap, valid tokens. Tight: experts * capacity = tokens * cap.
SHAPES = {
    "loose": (12, 4, 5, 3, 12),
    "tight": (12, 6, 4, 2, 12),
    "tight, one each": (8, 4, 2, 1, 8),
    "tight, few tokens": (3, 3, 2, 2, 3),
    "too many slots": (6, 4, 5, 2, 6),
    "padding, tight": (12, 4, 4, 2, 8),
    "padding, too many slots": (12, 4, 4, 2, 3),
    "padding alone": (12, 4, 4, 2, 0),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@PROGRAMME
@EVERY_SHAPE
def test_is_the_oracles(shape, by_programme):
    tokens, experts, capacity, cap, num_valid = shape
    valid = np.arange(tokens)[::-1] < num_valid
    for seed in range(3):
        p = scores(seed, tokens, experts)
        taken = choose(p, capacity, cap, by_programme, valid)
        expected = oracle.expert_choice(p[None], capacity, valid[None], cap, by_programme)[0]
        np.testing.assert_array_equal(taken, expected.T > 0)


@PROGRAMME
@EVERY_SHAPE
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 0.1, 2.0, 20.0]))
def test_fills_every_slot_that_the_cap_allows(shape, by_programme, seed, scale):
    """Ties (scale 0) and scores of 0 or 1 (scale 20) too."""
    tokens, experts, capacity, cap, num_valid = shape
    valid = np.random.default_rng(seed).permutation(tokens) < num_valid
    taken = choose(scores(seed, tokens, experts, scale), capacity, cap, by_programme, valid)
    assert not taken[:, ~valid].any()
    assert taken.sum(axis=0).max() <= cap
    capacity = min(capacity, num_valid)
    if experts * capacity <= num_valid * cap:
        assert (taken.sum(axis=1) == capacity).all()
    else:
        assert (taken.sum(axis=1) <= capacity).all()
        assert (taken.sum(axis=0)[valid] == cap).all()


@PROGRAMME
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_tokens_does_not_matter(by_programme, seed):
    p, order = scores(seed, 12, 6), np.random.default_rng(seed).permutation(12)
    taken = choose(p, 4, 2, by_programme)
    np.testing.assert_array_equal(choose(p[order], 4, 2, by_programme), taken[:, order])


def best_total(p_SE, capacity, cap):
    """The most that a choice under the cap can add up to, by scipy's solver."""
    tokens, experts = p_SE.shape
    rows = np.kron(np.eye(experts), np.ones(tokens))
    columns = np.kron(np.ones(experts), np.eye(tokens))
    limits = np.full(tokens, cap), np.full(experts, capacity)
    return -linprog(-p_SE.T.ravel(), columns, limits[0], rows, limits[1], bounds=(0, 1)).fun


@PROGRAMME
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_total_score_is_near_the_best(by_programme, scale):
    for seed in range(4):
        p = scores(seed, 64, 8, scale)
        total = p.T[choose(p, 16, 2, by_programme)].sum()
        best = best_total(p, 16, 2)
        assert 0.985 * best <= total <= best * (1 + 1e-6)


class TestLinearProgramme:
    def programme(self, p_SE, capacity, cap, valid=None, **options):
        valid = np.ones(len(p_SE), bool) if valid is None else valid
        y = linear_programme(
            tensor(p_SE.T[None]), tensor(valid[None, None]), capacity, cap, **options
        )
        return numpy(y)[0].astype("float64")

    @pytest.mark.parametrize("iterations", [1, 2, 7, 100])
    @pytest.mark.parametrize(("temperature", "tolerance"), [(0.1, 1e-5), (1e-3, 2e-3)])
    def test_is_dykstras_algorithm(self, temperature, tolerance, iterations):
        # Of numbers up to 1,000 float32 keeps 6e-5, each time that one is added.
        p, options = scores(0, 12, 4), {"temperature": temperature, "iterations": iterations}
        y = self.programme(p, 5, 2, **options)
        a, before = oracle.linear_programme(p.T, 5, 2, **options)
        np.testing.assert_allclose(y, np.log(before).astype("float64"), tolerance, tolerance)
        np.testing.assert_allclose(np.exp(np.minimum(y, 0)), a.astype("float64"), atol=tolerance)

    def test_reaches_the_constraints_and_the_optimum(self):
        # Given time, and a temperature that is small beside the scores' differences.
        p = scores(0, 12, 4)
        a = np.exp(np.minimum(self.programme(p, 5, 2, temperature=0.02, iterations=3000), 0))
        np.testing.assert_allclose(a.sum(axis=1), 5, rtol=1e-3)
        assert a.sum(axis=0).max() < 2.002
        assert (a * p.T).sum() == pytest.approx(best_total(p, 5, 2), rel=0.02)

    def test_padding_takes_no_part(self):
        valid = np.arange(12) % 3 > 0
        p = scores(0, 12, 4)
        y, alone = self.programme(p, 3, 2, valid), self.programme(p[valid], 3, 2)
        np.testing.assert_allclose(y[:, valid], alone, rtol=1e-4, atol=1e-3)
        assert (y[:, ~valid] < -1e8).all()

    def test_scores_of_0_and_1_stay_finite(self):
        for p in (np.eye(4)[[0] * 12], np.eye(4)[[0, 1, 2, 3] * 3]):
            assert np.isfinite(self.programme(p.astype("float32"), 5, 2)).all()


@PROGRAMME
def test_groups_are_apart(by_programme):
    """Also, that it runs uncompiled."""
    p_GES = np.stack([scores(seed, 12, 6).T for seed in range(3)])
    taken = numpy(capped_choice(tensor(p_GES), 4, 2, by_programme))
    for p_ES, rows in zip(p_GES, taken, strict=True):
        np.testing.assert_array_equal(choose(p_ES.T, 4, 2, by_programme), rows)
