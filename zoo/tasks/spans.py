"""Where words stand in a text, and marks around them."""

import re


def find(text, span, word_index):
    """Finds a span that begins at, or near, a word.

    WSC says which word a span begins with, but its official files are off by one here and there,
    keep the punctuation with the word, or begin the span with the other case.

    Args:
        text: The text.
        span: The words to find there; case and the kind of white space do not matter.
        word_index: The place of the first of them among the words of the text.

    Returns:
        The first and one past the last character of the nearest place, or `None` without any.
    """
    words = [match.start() for match in re.finditer(r"\S+", text)]
    pattern = r"\s+".join(re.escape(word) for word in span.split())
    if not words or not pattern:
        return None
    near = words[min(word_index, len(words) - 1)]
    matches = re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
    return min((x.span() for x in matches), key=lambda x: abs(x[0] - near), default=None)


def mark(text, places):
    """Puts marks around places of a text.

    Args:
        text: The text.
        places: A list of `((start, end), sign)`; the sign goes before and after the place.

    Returns:
        The text with the marks.
    """
    signs = [(at, sign) for (start, end), sign in places for at in (start, end)]
    for at, sign in sorted(signs, reverse=True):
        text = text[:at] + sign + text[at:]
    return text
