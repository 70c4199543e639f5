import pytest

from zoo.tasks import forms, get
from zoo.tasks.forms import Row


def test_without_a_form_a_row_is_the_inputs():
    features = {"question": "is it", "passage": "it is", "label": 1, "idx": 7}
    assert get("super_glue/boolq").rows(features) == [Row(("is it", "it is"), 1, 7)]
    features = {"sentence": "it is", "label": 0, "idx": 3}
    assert get("glue/cola").rows(features) == [Row(("it is",), 0, 3)]


@pytest.mark.parametrize(
    ("question", "asked"),
    [("cause", "What was the cause of this?"), ("effect", "What happened as a result?")],
)
@pytest.mark.parametrize(("label", "labels"), [(0, [1, 0]), (1, [0, 1]), (-1, [-1, -1])])
def test_copa_is_a_row_per_choice(question, asked, label, labels):
    features = {"premise": "It fell.", "choice1": "A.", "choice2": "B.", "question": question}
    rows = get("super_glue/copa").rows(features | {"label": label, "idx": 5})
    first = f"It fell. {asked}"
    assert [row.texts for row in rows] == [(first, "A."), (first, "B.")]
    assert [row.label for row in rows] == labels
    assert [row.id for row in rows] == [5, 5]


def test_multirc_is_a_row_per_answer():
    features = {
        "paragraph": "<b>Sent 1: </b>One.<br>Two.",
        "question": "Which?",
        "answer": "<b>two</b>",
        "label": 1,
        "idx": (3, 4, 5),
    }
    rows = get("super_glue/multirc").rows(features)
    assert rows == [Row(("Which? two", "Sent 1: One. Two."), 1, (3, 4, 5))]


def test_record_is_a_row_per_entity():
    features = {
        "passage": "Ann ran.\n@highlight\nBob too",
        "query": "@placeholder won",
        "entities": ("Ann", "Bob"),
        "answers": ("Bob",),
        "idx": (1, 2),
    }
    rows = get("super_glue/record").rows(features)
    assert rows == [
        Row(("Ann won", "Ann ran. Bob too"), 0, (1, 2), "Ann"),
        Row(("Bob won", "Ann ran. Bob too"), 1, (1, 2), "Bob"),
    ]
    rows = get("super_glue/record").rows(features | {"answers": ()})
    assert [row.label for row in rows] == [-1, -1]


def test_wic_marks_the_word():
    features = {"word": "place", "sentence1": "my place", "sentence2": "No places."}
    features |= {"start1": 3, "end1": 8, "start2": 3, "end2": 9, "label": 0, "idx": 1}
    assert get("super_glue/wic").rows(features) == [Row(("my *place*", "No *places*."), 0, 1)]


def test_wsc_marks_noun_and_pronoun():
    features = {"text": "Ann saw the cat. It slept.", "span1_text": "the cat", "span1_index": 2}
    features |= {"span2_text": "It", "span2_index": 4, "label": 1, "idx": 1}
    rows = get("super_glue/wsc").rows(features)
    assert rows == [Row(("Ann saw *the cat*. #It# slept.", "the cat"), 1, 1)]


def test_a_noun_that_is_not_in_the_text_is_not_marked():
    features = {"text": "Ann and, later, Bob ran. They won.", "span1_text": "Ann and Bob"}
    features |= {"span1_index": 0, "span2_text": "They", "span2_index": 5, "label": 1, "idx": 1}
    [row] = get("super_glue/wsc").rows(features)
    assert row.texts == ("Ann and, later, Bob ran. #They# won.", "Ann and Bob")


def test_without_highlights():
    text = 'He said so.\n@highlight\nOne\n@highlight\nTwo"\n@highlight\nThree\nfour'
    assert forms.without_highlights(text) == 'He said so. One. Two" Three\nfour'
