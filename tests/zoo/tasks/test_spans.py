import pytest

from zoo.tasks import spans

TEXT = 'Mark told Pete many lies. "Good for him," he said, and he used it.'
#       0    1    2    3    4      5     6   7     8  9     10  11 12   13


@pytest.mark.parametrize(
    ("span", "word", "found"),
    [
        ("Mark", 0, "Mark"),
        ("him", 7, "him"),  # the word is `him,"`
        ("he", 8, "he"),
        ("it", 12, "it"),  # the index is that of the word before
        ("LIES", 4, "lies"),
        ("Many\nlies", 3, "many lies"),
        ("it", 99, "it"),
    ],
)
def test_find(span, word, found):
    start, end = spans.find(TEXT, span, word)
    assert TEXT[start:end] == found


def test_the_nearest_place_is_found():
    first, second = TEXT.index("he said"), TEXT.index("he used")
    assert spans.find(TEXT, "he", 8) == (first, first + 2)
    assert spans.find(TEXT, "he", 11) == (second, second + 2)


@pytest.mark.parametrize("span", ["Mar", "ete", "Bob", "", "use"])
def test_only_whole_words_are_found(span):
    assert spans.find(TEXT, span, 0) is None


def test_signs_in_a_span_are_signs():
    assert spans.find("a (b) c", "(b)", 1) == (2, 5)


def test_nothing_is_found_in_no_text():
    assert spans.find("", "he", 0) is None


def test_mark():
    assert spans.mark("one two", [((4, 7), "*"), ((0, 3), "#")]) == "#one# *two*"
    assert spans.mark("one", []) == "one"


def test_one_place_within_another():
    assert spans.mark("his hat", [((0, 7), "*"), ((0, 3), "#")]).replace("*", "").count("#") == 2
