import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.pretraining.objectives import OBJECTIVES, Causal, Masked, Prefix, Span

END, SENTINEL = 1, 99
ORDINARY = (3, 50)


def blocks(rows, length, seed=0):
    """Ids from 3 to 49, all of a row different as far as they go."""
    rng = np.random.default_rng(seed)
    ids = [np.concatenate([rng.permutation(47) + 3 for _ in range(0, length, 47)])] * rows
    return np.stack([rng.permutation(47)[row[:length] - 3] + 3 for row in ids]).astype("int32")


def spoken(row):
    """What a decoder's labels say of each sentinel: id -> tokens."""
    said = {}
    for token in row:
        if token > 49:
            said[token] = []
        elif token != END:
            said[list(said)[-1]].append(token)
    return said


class TestSpan:
    @given(st.integers(4, 40), st.floats(0.05, 0.7), st.floats(1.0, 5.0), st.integers(0, 9))
    @settings(deadline=None, max_examples=60)
    def test_the_two_texts_together_are_the_block(self, length, density, mean_span, seed):
        objective = Span(length, SENTINEL, END, density, mean_span)
        tokens = blocks(3, objective.block)
        x, labels, weight = objective(tokens, np.random.default_rng(seed))
        assert x["encoder_token_ids"].shape[1] <= max(3, length)
        for row, original in enumerate(tokens):
            said, together = spoken(labels[row]), []
            for token in x["encoder_token_ids"][row][:-1]:
                together += said.pop(token) if token > 49 else [token]
            assert together == original.tolist() and not said
        assert (labels[:, -1] == END).all() and (x["encoder_token_ids"][:, -1] == END).all()
        assert weight.all()

    @pytest.mark.parametrize(
        ("length", "density", "mean_span", "block", "said"),
        # The first is of T5's own gin files; 145 have 22 of noise in 7 spans, 123 + 7 + 1 > 128.
        [(512, 0.15, 3.0, 568, 114), (128, 0.15, 3.0, 141, 29), (20, 0.5, 2.0, 26, 20)],
    )
    def test_as_many_tokens_as_leave_the_encoder_its_length(
        self, length, density, mean_span, block, said
    ):
        objective = Span(length, SENTINEL, END, density, mean_span)
        assert objective.block == block
        x, labels, _ = objective(blocks(2, block), np.random.default_rng(0))
        assert x["encoder_token_ids"].shape == (2, length) and labels.shape == (2, said)

    def test_of_100_tokens_15_are_noise_in_5_spans(self):
        tokens = np.arange(100, 200)[None] + 100
        objective = Span(91, SENTINEL, END)
        assert objective.block == 100
        x, labels, _ = objective(tokens, np.random.default_rng(0))
        # 85 stay, 5 sentinels, the end; 5 sentinels, 15 tokens, the end.
        assert x["encoder_token_ids"].shape == (1, 91) and labels.shape == (1, 21)
        assert [t for t in x["encoder_token_ids"][0] if t < 100] == [99, 98, 97, 96, 95, END]
        assert [t for t in labels[0] if t < 100] == [99, 98, 97, 96, 95, END]
        assert labels[0, 0] == 99 and x["encoder_token_ids"][0, 0] == 200

    def test_ends_that_are_hidden_do_not_count(self):
        tokens = blocks(50, 100)
        tokens[:, 20:80:3] = END
        _, labels, weight = Span(91, SENTINEL, END)(tokens, np.random.default_rng(0))
        assert (weight[:, -1] == 1).all() and (labels[:, :-1] == END).any()
        np.testing.assert_array_equal(weight[:, :-1] == 0, labels[:, :-1] == END)

    def test_the_decoder_sees_the_labels_one_place_later(self):
        x, labels, _ = Span(20, SENTINEL, END)(blocks(4, 21), np.random.default_rng(0))
        assert (x["decoder_token_ids"][:, 0] == 0).all()
        np.testing.assert_array_equal(x["decoder_token_ids"][:, 1:], labels[:, :-1])

    def test_any_place_may_be_noise_but_the_first_and_the_last_is(self):
        """As T5 draws them: what stays and what does not take turns, and begin and end a block."""
        tokens = np.tile(np.arange(100, 164), (2000, 1))
        x, _, _ = Span(59, SENTINEL, END)(tokens, np.random.default_rng(0))
        lost = [(x["encoder_token_ids"] != token).all(axis=1).mean() for token in tokens[0]]
        assert (lost[0], lost[-1]) == (0.0, 1.0)
        # 10 of 64 tokens, the last one and 9 of the 62 others; 2000 rows differ by 0.008.
        assert np.mean(lost[1:-1]) == pytest.approx(9 / 62)
        assert min(lost[3:-6]) > 0.08 and max(lost[3:-6]) < 0.2


def test_prefix():
    tokens = blocks(50, 10)
    x, labels, weight = Prefix(10)(tokens, np.random.default_rng(0))
    lengths = x["encoder_padding_mask"].sum(axis=1)
    assert set(lengths) == set(range(1, 10))
    for row, length in enumerate(lengths):
        assert x["encoder_token_ids"][row].tolist() == [*tokens[row, :length], *[0] * (10 - length)]
        assert labels[row].tolist() == [*tokens[row, length:], *[0] * length]
        assert weight[row].tolist() == [1.0] * (10 - length) + [0.0] * length
        assert x["decoder_padding_mask"][row].tolist() == weight[row].tolist()
    np.testing.assert_array_equal(x["decoder_token_ids"][:, 1:], labels[:, :-1])
    assert (x["decoder_token_ids"][:, 0] == 0).all()


def test_causal():
    objective = Causal(5)
    assert objective.block == 6
    x, labels, weight = objective(blocks(2, 6), None)
    np.testing.assert_array_equal(x["token_ids"], blocks(2, 6)[:, :5])
    np.testing.assert_array_equal(labels, blocks(2, 6)[:, 1:])
    assert weight.all() and x["padding_mask"].all()


class TestMasked:
    def test_what_is_to_guess_was_there(self):
        objective = Masked(20, SENTINEL, ORDINARY, density=0.2)
        tokens = blocks(6, 20)
        before = tokens.copy()
        x, labels, weight = objective(tokens, np.random.default_rng(0))
        np.testing.assert_array_equal(tokens, before)
        assert labels.shape == (6, 4) and weight.all()
        np.testing.assert_array_equal(
            np.take_along_axis(tokens, x["mask_positions"], axis=1), labels
        )
        assert all(len(set(row)) == 4 and sorted(row) == list(row) for row in x["mask_positions"])
        changed = x["token_ids"] != tokens
        for row, places in enumerate(x["mask_positions"]):
            assert set(changed[row].nonzero()[0]) <= set(places)

    def test_eight_of_ten_are_hidden_and_one_is_any_ordinary_token(self):
        tokens = np.full((2000, 10), 5, "int32")
        objective = Masked(10, 1000, (3, 900), density=0.5)
        x, _, _ = objective(tokens, np.random.default_rng(0))
        there = np.take_along_axis(x["token_ids"], x["mask_positions"], axis=1)
        # Of 10,000 each share differs by at most 0.004.
        assert (there == 1000).mean() == pytest.approx(0.8, abs=0.02)
        assert (there == 5).mean() == pytest.approx(0.1, abs=0.02)
        others = there[(there != 1000) & (there != 5)]
        assert len(set(others)) > 500
        assert 3 <= others.min() < 20 and 880 < others.max() < 900

    def test_special_tokens_are_not_guessed(self):
        """Of the 20 places 2 are ordinary, of 4 guesses as many count."""
        tokens = np.full((5, 20), END, "int32")
        tokens[:, [3, 17]] = 7
        objective = Masked(20, SENTINEL, ORDINARY, density=0.2)
        x, labels, weight = objective(tokens, np.random.default_rng(0))
        np.testing.assert_array_equal(weight, labels == 7)
        assert (weight.sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masked(8, 99, ORDINARY, 1.0), "`density`.*density=1.0"),
        (lambda: Span(8, 99, END, 0.0), "`density`.*density=0.0"),
        (lambda: Span(8, 99, END, 0.5, 0.5), "`mean_span`.*mean_span=0.5"),
        (lambda: Span(0, 99, END), "`length`.*length=0"),
        (lambda: Span(512, 99, END, 0.5, 1.0), "`density` and `mean_span`.*100.*0.5.*1.0.*255"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_depend_on_the_generator_alone(name):
    given = {"length": 40, "sentinel": SENTINEL, "end": END, "ordinary": ORDINARY}
    kind = OBJECTIVES[name]
    objective = kind(**{k: v for k, v in given.items() if k in kind.__dataclass_fields__})
    tokens = blocks(8, objective.block)
    first, second, other = (objective(tokens, np.random.default_rng(s)) for s in (0, 0, 1))
    assert all((first[0][k] == second[0][k]).all() for k in first[0])
    assert all(x.dtype == "int32" for x in [*first[0].values(), first[1]])
    assert first[2].dtype == "float32" and first[2].shape == first[1].shape
    if name != "causal":
        assert any((first[0][k] != other[0][k]).any() for k in first[0])
