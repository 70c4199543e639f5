"""From the texts that a model wrote back to labels, and their official metrics."""

import math
import re

import numpy as np

from zoo.tasks import answers, metrics
from zoo.tasks.task import get

# Words before a noun that say nothing of which one it is.
_DETERMINERS = re.compile(
    "a|an|the|this|that|these|those|my|your|his|her|our|their|whose|which"
    "|some|every|each|many|much|few"
)


def score_text(task, predictions, examples):
    """Scores generated texts as T5 does.

    A text that is none of the task's words is wrong whatever the label is: it counts as the other
    one of two classes, as none of three, as the score -1 of STS-B. One departure: "true" is "True",
    since vocabularies that fold case, as the zoo's own does, have no other.

    Args:
        task: A `Task` or the name of one.
        predictions: A list of `str`, one for each row.
        examples: The `TextExamples` of a labelled split.

    Returns:
        A dict from the name of each of the task's metrics to a float, a fraction of 1.

    Raises:
        ValueError: If there are not as many predictions as rows, or a label is missing.
    """
    task = get(task)
    values = read_text(task, predictions, examples)
    if examples.labels.min() < 0:
        raise ValueError(
            f"`examples` must have labels, which the test splits of {task.name!r} have not. "
            "Received: a label of -1"
        )
    if "token_f1" in task.metrics:
        first = np.unique(examples.groups, return_index=True)[1]  # A question may be there twice.
        return answers.compare(
            [values[row] for row in first], [examples.answers[row] for row in first]
        )
    return metrics.score(task, examples.labels, np.array(values), examples.groups)


def read_text(task, predictions, examples):
    """What generated texts say.

    Args:
        task: A `Task` or the name of one.
        predictions: A list of `str`, one for each row.
        examples: The `TextExamples`.

    Returns:
        A list with a class for each row, -1 where the text is none of the task's words, whatever
        their case; of STS-B
        a score, of ReCoRD the text itself.

    Raises:
        ValueError: If there are not as many predictions as rows.
    """
    task = get(task)
    predictions = [text.strip() for text in predictions]
    if not predictions or len(predictions) != len(examples.inputs):
        raise ValueError(
            f"`predictions` must be as many as the examples, {len(examples.inputs)}, and not none. "
            f"Received: {len(predictions)}"
        )
    if task.name == "super_glue/record":
        return predictions
    if task.name == "super_glue/wsc":
        pairs = zip(predictions, examples.answers, strict=True)
        return [_is_noun(text, noun) for text, (noun,) in pairs]
    if not task.words:
        return [_number(text) for text in predictions]
    classes = {word.casefold(): n for n, word in enumerate(task.words)}
    return [classes.get(text.casefold(), -1) for text in predictions]


def _number(text):
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _is_noun(text, noun):
    """Whether a text means the noun: 1 or 0, or -1 of no text at all.

    One of them may have more words than the other ("the big dog" and "dog"), but not the
    apostrophe of an owner ("Bob" is not "Bob's hat").
    """
    said, known = _words(text), _words(noun)
    if not said:
        return -1
    if any("'" in word for word in said) != any("'" in word for word in known):
        return 0
    return int(bool(known) and (said <= known or known <= said))


def _words(text):
    return {word for word in text.lower().split() if not _DETERMINERS.fullmatch(word)}
