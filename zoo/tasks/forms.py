"""From one example to the rows that a classifier reads: one or two texts, and a label.

Where an example is a choice, each possible answer is a row of its own that is right (1) or wrong
(0), as SuperGLUE's baselines have it (Wang et al., 2019, https://arxiv.org/abs/1905.00537,
section 5). Features carry the names of TensorFlow Datasets.
"""

import re
from typing import NamedTuple

from zoo.tasks import spans

PLACEHOLDER = "@placeholder"  # In a query of ReCoRD, where the entity was.

# What COPA asks, in the words of its authors (Roemmele et al., 2011).
_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


class Row(NamedTuple):
    """What a classifier reads.

    Attributes:
        texts: One or two texts.
        label: The class or the score, -1 for none.
        id: What the submission calls the example: a number or a tuple of them.
        candidate: The answer that the row is about, where the metric compares texts.
    """

    texts: tuple[str, ...]
    label: float
    id: int | tuple[int, ...]
    candidate: str | None = None


def copa(features):
    """Each choice after the premise and the question."""
    first = f"{features['premise']} {_COPA_QUESTIONS[features['question']]}"
    label = features["label"]
    return [
        Row(
            (first, features[f"choice{n + 1}"]),
            int(label == n) if label >= 0 else -1,
            _id(features),
        )
        for n in range(2)
    ]


def multirc(features):
    """An answer after its question, and the paragraph; TFDS gives each answer by itself."""
    first = f"{features['question']} {features['answer']}"
    texts = (without_markup(first), without_markup(features["paragraph"]))
    return [Row(texts, features["label"], _id(features))]


def record(features):
    """The query with each entity in the place of the placeholder, and the passage."""
    query, passage = features["query"], without_highlights(features["passage"])
    rows = []
    for entity in features["entities"]:
        label = int(entity in features["answers"]) if features["answers"] else -1
        texts = (query.replace(PLACEHOLDER, entity), passage)
        rows.append(Row(texts, label, _id(features), entity))
    return rows


def wic(features):
    """Both sentences with the *word* marked."""
    texts = tuple(
        spans.mark(features[f"sentence{n}"], [((features[f"start{n}"], features[f"end{n}"]), "*")])
        for n in (1, 2)
    )
    return [Row(texts, features["label"], _id(features))]


def wsc(features):
    """The text with the *noun* and the #pronoun# marked, and the noun."""
    places = []
    for n, sign in ((1, "*"), (2, "#")):
        place = spans.find(features["text"], features[f"span{n}_text"], features[f"span{n}_index"])
        if place is not None:  # A few nouns of the official files do not stand in the text so.
            places.append((place, sign))
    texts = (spans.mark(features["text"], places), features["span1_text"])
    return [Row(texts, features["label"], _id(features))]


def without_markup(text):
    """A text of MultiRC without its HTML, as T5 reads it."""
    return re.sub("</?b>", "", text.replace("<br>", " "))


def without_highlights(passage):
    """A passage of ReCoRD whose summary lines are sentences, as T5 reads it."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage)
    return passage.replace("\n@highlight\n", ". ")


def _id(features):
    return features["idx"]
