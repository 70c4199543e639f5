import numpy as np
import pytest

from zoo.tasks import answers


def test_chosen_is_the_largest_margin_of_each_question():
    outputs = np.array([[0.0, 1.0], [5.0, 7.0], [0.0, 3.0], [9.0, 9.0], [1.0, 0.0]])
    # margins            1           2           3           0           -1
    groups = np.array([0, 0, 1, 1, 2])
    assert answers.chosen(outputs, groups).tolist() == [1, 2, 4]


def test_the_first_of_two_equal_ones_is_chosen():
    assert answers.chosen(np.zeros((4, 2)), np.array([1, 0, 0, 1])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The U.S. Army", "us army"),
        ("a  theatre, an opera", "theatre opera"),
        ("it's", "its"),
        ("...", ""),
    ],
)
def test_normalise(text, plain):
    assert answers.normalise(text) == plain


def test_the_nearest_right_answer_counts():
    # "new york city" against "york": common 1, f1 = 2 * 1 / (3 + 1) = 1/2; against "new york":
    # 2 * 2 / (3 + 2) = 4/5. "bob" against "bob": 1, and exact.
    texts = ["New York City", "the Bob!"]
    scores = answers.compare(texts, [("York", "New York"), ("Ann", "bob")])
    assert scores == pytest.approx({"token_f1": (0.8 + 1) / 2, "exact_match": 0.5})


def test_a_word_counts_as_often_as_both_have_it():
    # "no no no" against "no no yes": common 2, f1 = 2 * 2 / (3 + 3)
    scores = answers.compare(["no no no"], [("no no yes",)])
    assert scores == pytest.approx({"token_f1": 2 / 3, "exact_match": 0.0})


def test_nothing_is_like_nothing_but_shares_no_word():
    assert answers.compare(["the"], [("Ann",)]) == {"token_f1": 0.0, "exact_match": 0.0}
