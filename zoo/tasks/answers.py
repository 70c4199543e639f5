"""Answers in words: which one of a question is chosen, and how near it is to the right ones.

The comparison is that of SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250, section
6.1), which ReCoRD takes over (Zhang et al., 2018, https://arxiv.org/abs/1810.12885, section 5).
"""

import collections
import re
import string

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def chosen(outputs, groups):
    """The row of each question that is most probably right.

    Args:
        outputs: The logits of wrong and right, `[rows, 2]`.
        groups: The question of each row, `[rows]`.

    Returns:
        An array of one row index per question, in the order of their numbers; of two rows that
        are equally probable the first.
    """
    margin = outputs[:, 1] - outputs[:, 0]
    best = {}
    for row, question in enumerate(groups.tolist()):
        if question not in best or margin[row] > margin[best[question]]:
            best[question] = row
    return np.array([best[question] for question in sorted(best)])


def compare(texts, answers):
    """Scores texts against the right answers of their questions.

    Args:
        texts: A list of texts, one per question.
        answers: A list of tuples of right answers; the nearest one counts.

    Returns:
        A dict of `token_f1` and `exact_match`, means over the questions.
    """
    f1, exact = [], []
    for text, right in zip(texts, answers, strict=True):
        said = normalise(text)
        known = [normalise(answer) for answer in right]
        f1.append(max(_token_f1(said, answer) for answer in known))
        exact.append(said in known)
    return {"token_f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def normalise(text):
    """A text in lower case, without punctuation, articles and superfluous white space."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(said, answer):
    said, answer = said.split(), answer.split()
    common = sum((collections.Counter(said) & collections.Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0
