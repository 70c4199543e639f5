import numpy as np
import pytest

from zoo.tasks import TextExamples, score_text
from zoo.tasks.text_scores import read_text

pytest.importorskip("sklearn")
pytest.importorskip("scipy")


def examples(labels, groups=None, answers=None):
    count = len(labels)
    groups = np.arange(count) if groups is None else np.array(groups)
    labels = np.array(labels, dtype="float32" if isinstance(labels[0], float) else "int32")
    answers = [()] * count if answers is None else answers
    return TextExamples(["input"] * count, ["target"] * count, labels, groups, [], answers)


def test_words_are_classes():
    said = ["entailment", " contradiction ", "neutral", "Neutral", "", "entailment neutral"]
    assert read_text("super_glue/cb", said, examples([0] * 6)) == [0, 1, 2, 2, -1, -1]
    assert read_text("super_glue/boolq", ["true", "False", "tru"], examples([0] * 3)) == [1, 0, -1]


def test_unknown_text_is_wrong_whatever_the_label():
    # labels 1 0 1 0; said 1 ? ? 0: right are the first and the last.
    # F1: the unknown ones count as the other class: TP 1, FP 1 (second), FN 1 (third): 2/4
    said = ["equivalent", "maybe", "", "not_equivalent"]
    scores = score_text("glue/mrpc", said, examples([1, 0, 1, 0]))
    assert scores == pytest.approx({"accuracy": 0.5, "f1": 0.5})


def test_macro_f1():
    # labels 0 0 1 2, said 0 ? 1 0: F1 of 0: TP 1 FP 1 FN 1: 2/4; of 1: 1; of 2: 0; mean 1/2
    said = ["entailment", "yes", "contradiction", "entailment"]
    scores = score_text("super_glue/cb", said, examples([0, 0, 1, 2]))
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 0.5})


def test_scores_are_numbers():
    said = ["1.0", "2.2", "three", "nan"]
    assert read_text("glue/stsb", said, examples([1.0, 2.0, 3.0, 4.0])) == [1.0, 2.2, -1.0, -1.0]
    scores = score_text("glue/stsb", ["0.2", "0.4", "3.0"], examples([1.0, 2.0, 3.0]))
    assert scores["spearman"] == pytest.approx(1.0)


def test_multirc():
    # question 0: right, right; question 1: unknown; question 2: right.
    # F1: labels 1 0 1 1, said 1 0 ? 1: TP 2, FN 1: 4/5. Exact: 2 of 3.
    said = ["True", "False", "perhaps", "True"]
    scores = score_text("super_glue/multirc", said, examples([1, 0, 1, 1], [0, 0, 1, 2]))
    assert scores == pytest.approx({"f1a": 0.8, "exact_match": 2 / 3})


def test_copa():
    said = ["choice1", "choice2", "choice3"]
    assert score_text("super_glue/copa", said, examples([0, 1, 1])) == {
        "accuracy": pytest.approx(2 / 3)
    }


def test_record_counts_a_question_once():
    # question 0 is there twice, its first text counts: exact. question 1: "new york" against
    # "york": 2 * 1 / (2 + 1)
    answers = [("Ann", "Bob")] * 2 + [("York",)]
    scores = score_text(
        "super_glue/record", ["the Bob", "Cy", "New York"], examples([1] * 3, [0, 0, 1], answers)
    )
    assert scores == pytest.approx({"token_f1": (1 + 2 / 3) / 2, "exact_match": 0.5})


@pytest.mark.parametrize(
    ("said", "noun", "value"),
    [
        ("the cat", "The cat", 1),
        ("cat", "the big cat", 1),
        ("his big cat", "the cat", 1),
        ("the dog", "The cat", 0),
        ("Bob", "Bob's hat", 0),  # another thing than Bob
        ("Bob's hat", "Bob's hat", 1),
        ("", "the cat", -1),
        ("the", "the cat", -1),
        ("cat", "the", 0),
    ],
)
def test_wsc_compares_nouns(said, noun, value):
    assert read_text("super_glue/wsc", [said], examples([1], answers=[(noun,)])) == [value]


def test_wsc_is_right_where_noun_and_label_agree():
    said = ["the cat", "a dog", "a dog", ""]
    answers = [("the cat",)] * 4
    scores = score_text("super_glue/wsc", said, examples([1, 1, 0, 0], answers=answers))
    assert scores == {"accuracy": 0.5}  # the first and the third; no text at all is never right


@pytest.mark.parametrize(
    ("said", "labels", "message"),
    [
        (["True"], [1, 0], "`predictions`.* 2.* 1"),
        ([], [1], "`predictions`.* 1.* 0"),
        (["True"], [-1], "`examples`.*'super_glue/boolq'.* -1"),
    ],
)
def test_errors(said, labels, message):
    with pytest.raises(ValueError, match=message):
        score_text("super_glue/boolq", said, examples(labels))
